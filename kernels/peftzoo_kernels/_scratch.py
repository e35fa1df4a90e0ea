"""A buffer that is used again: on a CPU the first touch of a new one takes longer than a pass over it (page faults).

One is kept in each thread, as large as the largest that was asked for.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class _Kept(threading.local):
    buffer: Tensor | None = None


_kept = _Kept()


def scratch_like(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor of the shape and dtype of `tensor`, whose values last until the next call."""
    buffer = _kept.buffer
    if buffer is None or buffer.dtype != tensor.dtype or buffer.numel() < tensor.numel():
        _kept.buffer = None  # gone before the next is there
        buffer = _kept.buffer = torch.empty(tensor.numel(), dtype=tensor.dtype)
    return buffer[: tensor.numel()].view(tensor.shape)
