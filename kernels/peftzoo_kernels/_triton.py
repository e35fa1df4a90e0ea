"""Triton where there is one: kernels are defined everywhere, and run on a GPU or in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    from triton import language as tl
    from triton.language.random import philox as tl_philox
except ImportError:  # no Triton for this platform: the functions below stay plain ones that nobody calls
    triton = tl = tl_philox = None

__all__ = ["block", "can_run", "jit", "launch", "launches", "precision", "tl", "tl_philox", "triton"]

Kernel = Any

jit: Callable[[Callable[..., Any]], Kernel] = triton.jit if triton is not None else lambda function: function

# where a list, launches are noted in it instead of made: (kernel, grid, arguments, meta)
launches: list[tuple[Kernel, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] | None = None


def can_run(x: Tensor) -> bool:
    """Whether a kernel can work on `x`: on a GPU, or on a CPU where TRITON_INTERPRET=1 was set before the import."""
    if triton is None:
        return False
    return x.device.type in ("cuda", "xpu") or (x.is_cpu and os.environ.get("TRITON_INTERPRET") == "1")


def launch(kernel: Kernel, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run `kernel` on `grid`; an empty grid has nothing to do."""
    if launches is not None:
        launches.append((kernel, grid, args, meta))
    elif all(grid):
        kernel[grid](*args, **meta)


def block(size: int, least: int = 16) -> int:
    """Return the power of two that holds `size`, at least what `tl.dot` wants."""
    return max(least, 1 << max(size - 1, 0).bit_length())


def precision(dtype: torch.dtype) -> str:
    """Return how `tl.dot` multiplies `dtype`: float32 as torch's own products do."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
