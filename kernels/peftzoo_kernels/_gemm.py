"""What every op does around its matrix products: rows, dtypes, float32 gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype a product with `x` runs in: autocast's, which leaves float64 alone, or its own."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def to_dtype_of(x: Tensor, vector: Tensor | None) -> Tensor | None:
    """Return `vector`, if there is one, in the dtype of `x`."""
    return None if vector is None else vector.to(x.dtype)


def mm_float32(p: Tensor, q: Tensor) -> Tensor:
    """Return `p @ q` accumulated and returned in at least float32: the gradient of a float32 parameter.

    Args:
        p: [m, k], floating.
        q: [k, n], in the dtype of `p`.
    """
    if p.dtype in (torch.float32, torch.float64):
        return p @ q
    if p.is_cuda:
        return torch.mm(p, q, out_dtype=torch.float32)
    return p.float() @ q.float()
