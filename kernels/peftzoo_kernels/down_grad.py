from __future__ import annotations

from torch import Tensor

from peftzoo_kernels._gemm import mm_float32
from peftzoo_kernels.dropout import dropped


def down_grad(dh: Tensor, x: Tensor, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    return mm_float32(dh.t(), x if seed is None else dropped(x, p, seed))
