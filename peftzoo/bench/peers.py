"""How other tools compute a LoRA layer, written anew from a description of each, as plain autograd Functions.

    y = x W^T + scale * (drop(x) A^T) B^T,    W [out, in] frozen, A [r, in], B [out, r]

They are there to be timed and do what the tool does, extra passes included. Their input is a matrix, [m, in].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class UnslothLike(torch.autograd.Function):
    """Frozen product first, update added in place; the backward makes h again, and dy B twice. No dropout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Return y [m, out]; the factors are cast to the dtype of `x` on every call."""
        down, up = a.to(x.dtype), b.to(x.dtype)
        y = x @ weight.t()
        y.addmm_(x @ down.t(), up.t(), alpha=scale)
        ctx.save_for_backward(x, weight, down, up)
        ctx.scale, ctx.dtypes = scale, (a.dtype, b.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:
        """Return dx, dA and dB."""
        (dy,) = dys
        x, weight, down, up = ctx.saved_tensors
        da = ((dy @ up).t() @ x) * ctx.scale
        db = ((down @ x.t()) @ dy).t() * ctx.scale
        dx = dy @ weight
        dx.addmm_(dy @ up, down, alpha=ctx.scale)
        return dx, None, da.to(ctx.dtypes[0]), db.to(ctx.dtypes[1]), None


class AxolotlLike(torch.autograd.Function):
    """The same with dy B made once. Where there is dropout, drop(x) comes in beside x, and autograd keeps its mask."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, weight: Tensor, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        """Return y [m, out]; the factors come in the dtype of `x`."""
        y = x @ weight.t()
        y.addmm_((x if dropped is None else dropped) @ a.t(), b.t(), alpha=scale)
        ctx.save_for_backward(x if dropped is None else dropped, weight, a, b)
        ctx.scale, ctx.drops = scale, dropped is not None
        return y

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:
        """Return dx, the gradient of drop(x), dA and dB."""
        (dy,) = dys
        seen, weight, a, b = ctx.saved_tensors
        t = dy @ b
        da = (t.t() @ seen) * ctx.scale
        db = (dy.t() @ (seen @ a.t())) * ctx.scale
        dx = dy @ weight
        if ctx.drops:
            return dx, (t @ a) * ctx.scale, None, da, db, None
        dx.addmm_(t, a, alpha=ctx.scale)
        return dx, None, None, da, db, None


def unsloth_like(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return y [m, out] as unsloth's `LoRA_W` computes it."""
    y: Tensor = UnslothLike.apply(x, weight, a, b, scale)  # type: ignore[no-untyped-call]
    return y


def axolotl_like(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """Return y [m, out] as axolotl's LoRA kernels compute it; the factors are cast once, outside."""
    dropped = F.dropout(x, dropout) if dropout else None
    y: Tensor = AxolotlLike.apply(  # type: ignore[no-untyped-call]
        x, dropped, weight, a.to(x.dtype), b.to(x.dtype), scale
    )
    return y
