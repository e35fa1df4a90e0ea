"""The product up from the rank: c = drop(u b^T) + bias."""

from __future__ import annotations

import torch
from torch import Tensor

from peftzoo_kernels.dropout import dropped


def expand(u: Tensor, b: Tensor, bias: Tensor | None = None, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    b = b.to(u.dtype).t()
    c = u @ b if bias is None else torch.addmm(bias.to(u.dtype), u, b)
    return c if seed is None else dropped(c, p, seed)
