"""A frozen linear layer and its low-rank update in one op.

    y = x W^T + bias + scale * ((x a^T) * s) b^T

Order of work ("C-first"): the rank-r product is written into the output buffer, then the frozen product is accumulated
on top of it, so the update costs no pass over y of its own. With h = x a^T, u = scale * s * h and t = dy b:

    ds = scale * colsum(h * t)    db = dy^T u    da = (scale * s * t)^T x    dx = (scale * s * t) a + dy W

Only a trained `a` needs x, only a trained `b` or `s` needs h [m, r]; nothing else of size m is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftzoo_kernels._backend import backend
from peftzoo_kernels._gemm import compute_dtype, mm_float32, to_dtype_of
from peftzoo_kernels._registration import differentiable


def low_rank_linear_ref(
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    s: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Say in plain torch what `low_rank_linear` computes, in the dtype of `x`."""
    h = F.linear(x, a.to(x.dtype))
    if s is not None:
        h = h * s.to(x.dtype)
    update = scale * F.linear(h, b.to(x.dtype))
    return update if weight is None else F.linear(x, weight.to(x.dtype), to_dtype_of(x, bias)) + update


def low_rank_linear(
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    s: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Return x W^T + bias + scale * ((x a^T) * s) b^T.

    Args:
        x: input, [..., in].
        weight: frozen weight, [out, in], any strides; None returns the update alone.
        a: down factor, [r, in], in any floating dtype; cast to the dtype of the product, gradient in its own.
        b: up factor, [out, r], likewise.
        s: middle diagonal, [r], likewise; None means all ones.
        bias: frozen bias, [out]; needs `weight`.
        scale: scalar factor of the update.

    Returns:
        [..., out], in the dtype of `x`, or in autocast's where it is on.

    Raises:
        ValueError: the shapes do not chain, or a bias without a weight.
    """
    _check(x, weight, a, b, s, bias)
    x = x.to(compute_dtype(x))
    trains_base = weight is not None and (weight.requires_grad or (bias is not None and bias.requires_grad))
    if trains_base or backend() == "eager":
        return low_rank_linear_ref(x, weight, a, b, s, bias, scale)
    y = _low_rank_linear(x.reshape(-1, x.shape[-1]), weight, a, b, s, bias, scale)
    return y.view(*x.shape[:-1], b.shape[0])


def _check(x: Tensor, weight: Tensor | None, a: Tensor, b: Tensor, s: Tensor | None, bias: Tensor | None) -> None:
    shapes = f"x {list(x.shape)}, a {list(a.shape)}, b {list(b.shape)}"
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or a.shape[1] != x.shape[-1]:
        raise ValueError(f"low_rank_linear: {shapes} do not chain; want x [..., in], a [r, in], b [out, r]")
    if weight is not None and weight.shape != (b.shape[0], a.shape[1]):
        raise ValueError(f"low_rank_linear: weight {list(weight.shape)} is not [out, in] of {shapes}")
    if s is not None and s.shape != (a.shape[0],):
        raise ValueError(f"low_rank_linear: s {list(s.shape)} is not [r] of {shapes}")
    if bias is not None and (weight is None or bias.shape != (b.shape[0],)):
        raise ValueError(f"low_rank_linear: bias {list(bias.shape)} needs a weight and the shape [out] of {shapes}")


def _scaled(h: Tensor, s: Tensor | None, scale: float) -> Tensor:
    """Return scale * s * h, [m, r]; the factor is rounded once, to the dtype of `h`."""
    if s is not None:
        return h * (s * scale).to(h.dtype)
    return h if scale == 1.0 else h * scale


def _forward(
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    s: Tensor | None,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return y [m, out] and h = x a^T [m, r]."""
    h = x @ a.to(x.dtype).t()
    u, b_t = _scaled(h, s, scale), b.to(x.dtype).t()
    y = u @ b_t if bias is None else torch.addmm(bias.to(x.dtype), u, b_t)
    if weight is not None:
        y.addmm_(x, weight.to(x.dtype).t())
    return y, h


def _forward_fake(
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    s: Tensor | None,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], b.shape[0]), x.new_empty(x.shape[0], a.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, a, b, s, _, ctx.scale = inputs
    need_x, _, need_a, need_b, need_s = ctx.needs_input_grad[:5]
    ctx.save_for_backward(
        x if need_a else None,
        weight if need_x else None,
        a if need_x else None,
        b,
        s,
        output[1] if need_b or need_s else None,
    )


def _backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    a: Tensor | None,
    b: Tensor,
    s: Tensor | None,
    h: Tensor | None,
    scale: float,
    need_b: bool,
    need_s: bool,
) -> list[Tensor]:
    """Return the needed ones of dx [m, in], da [r, in], db [out, r], ds [r]."""
    needed = []
    t = dy @ b.to(dy.dtype)  # gradient of u, [m, r]
    dh = _scaled(t, s, scale)
    if a is not None:
        dx = dh @ a.to(dy.dtype)
        needed.append(dx if weight is None else dx.addmm_(dy, weight.to(dy.dtype)))
    if x is not None:
        needed.append(mm_float32(dh.t(), x))
    if need_b and h is not None:
        needed.append(mm_float32(dy.t(), _scaled(h, s, scale)))
    if need_s and h is not None:
        wide = torch.promote_types(torch.float32, h.dtype)
        needed.append(scale * (h.to(wide) * t.to(wide)).sum(0))
    return needed


def _backward_fake(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    a: Tensor | None,
    b: Tensor,
    s: Tensor | None,
    h: Tensor | None,
    scale: float,
    need_b: bool,
    need_s: bool,
) -> list[Tensor]:
    wide = torch.promote_types(torch.float32, dy.dtype)
    needed = []
    if a is not None:
        needed.append(dy.new_empty(dy.shape[0], a.shape[1]))
    if x is not None:
        needed.append(dy.new_empty(b.shape[1], x.shape[1], dtype=wide))
    if need_b:
        needed.append(dy.new_empty(b.shape, dtype=wide))
    if need_s:
        needed.append(dy.new_empty(b.shape[1], dtype=wide))
    return needed


def _gradients(ctx: Any, dy: Tensor, backward: Any) -> tuple[Tensor | None, ...]:
    x, weight, a, b, s, h = ctx.saved_tensors
    need_x, _, need_a, need_b, need_s = ctx.needs_input_grad[:5]
    found = iter(backward(dy, x, weight, a, b, s, h, ctx.scale, need_b, need_s))
    dx = next(found) if need_x else None
    da = next(found) if need_a else None
    db = next(found) if need_b else None
    ds = next(found) if need_s else None
    return dx, None, da, db, ds, None, None


_low_rank_linear = differentiable(
    "low_rank_linear", _forward, _forward_fake, _setup_context, _backward, _backward_fake, _gradients
)
