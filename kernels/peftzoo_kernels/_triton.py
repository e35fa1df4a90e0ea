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
except ImportError:  # no Triton for this platform: the functions below become plain ones that nobody calls
    triton = tl = tl_philox = None

Kernel = Any

jit: Callable[[Callable[..., Any]], Kernel] = triton.jit if triton is not None else lambda function: function


def can_run(x: Tensor) -> bool:
    """Whether a kernel can work on `x`: on a GPU, or on a CPU where TRITON_INTERPRET=1 was set before the import."""
    if triton is None:
        return False
    return x.device.type in ("cuda", "xpu") or os.environ.get("TRITON_INTERPRET") == "1"


def launch(kernel: Kernel, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run `kernel` on `grid`; the one place that does, so that ahead-of-time compiles see what a launch would be."""
    kernel[grid](*args, **meta)


def block(size: int, least: int = 16, most: int = 1 << 30) -> int:
    """Return the power of two that holds `size`, between `least` (what `tl.dot` wants) and `most`."""
    return min(most, max(least, 1 << max(size - 1, 0).bit_length()))


def precision(dtype: torch.dtype) -> str:
    """Return how `tl.dot` multiplies `dtype`: float32 as torch's own products do."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
