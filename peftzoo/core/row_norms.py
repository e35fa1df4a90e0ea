"""DoRA's norm: the lengths of the rows of W + D, without making D."""

from __future__ import annotations

import torch
from torch import Tensor

from peftzoo.core.adapter import Factors


def row_norms(weight: Tensor, update: Factors) -> Tensor:
    """Return |W + D| of each row, [out], at least a tiny number, from W [out, in] and the factors of D."""
    with torch.autocast(weight.device.type, enabled=False):
        wide = torch.promote_types(torch.float32, weight.dtype)
        weight, a, b = weight.to(wide), update.a.to(wide), update.scale * update.b.to(wide)
        cross = (weight @ a.T * b).sum(1)
        square = (b @ (a @ a.T) * b).sum(1)
        total = torch.linalg.vector_norm(weight, dim=1) ** 2 + 2 * cross + square
        return total.clamp_min(torch.finfo(wide).tiny).sqrt().to(update.b.dtype)
