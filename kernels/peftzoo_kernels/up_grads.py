from __future__ import annotations

from torch import Tensor

from peftzoo_kernels._gemm import mm_float32


def up_grads(g: Tensor, b: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return g @ b.to(g.dtype), None if u is None else mm_float32(g.t(), u)
