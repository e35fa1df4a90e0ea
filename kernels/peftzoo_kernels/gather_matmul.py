"""A frozen linear layer and an update of some of its columns in one op (PaCA).

    y = x W^T + bias + scale * x[:, C] p^T

It is `low_rank_linear` with rows of the identity for `a`, so the down product is a gather and the backward keeps
x[:, C] [m, r] instead of x [m, in]:

    dp = scale * dy^T x[:, C]    dx = dy W,  dx[:, C] += scale * dy p
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftzoo_kernels._backend import backend
from peftzoo_kernels._gemm import compute_dtype, mm_float32, to_dtype_of
from peftzoo_kernels._registration import differentiable
from peftzoo_kernels._weight import PackedWeight, Weight, dense, restored, stored


def gather_matmul_ref(
    x: Tensor,
    weight: Weight | None,
    columns: Tensor,
    p: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Say in plain torch what `gather_matmul` computes, in the dtype of `x`."""
    update = scale * F.linear(x[..., columns], p.to(x.dtype))
    return update if weight is None else F.linear(x, dense(weight, x.dtype), to_dtype_of(x, bias)) + update


def gather_matmul(
    x: Tensor,
    weight: Weight | None,
    columns: Tensor,
    p: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Return x W^T + bias + scale * x[..., columns] p^T.

    Args:
        x: input, [..., in].
        weight: frozen weight, [out, in], any strides, or packed; None returns the update alone.
        columns: distinct indices into `in`, [r], integer; sorted ones read memory in order.
        p: update of those columns, [out, r], in any floating dtype; gradient in its own.
        bias: frozen bias, [out]; needs `weight`.
        scale: scalar factor of the update.

    Returns:
        [..., out], in the dtype of `x`, or in autocast's where it is on.

    Raises:
        ValueError: the shapes do not chain, or a bias without a weight.
        TypeError: the columns are not integers.
    """
    _check(x, weight, columns, p, bias)
    x = x.to(compute_dtype(x))
    trains_base = weight is not None and (weight.requires_grad or (bias is not None and bias.requires_grad))
    if trains_base or backend() == "eager":
        return gather_matmul_ref(x, weight, columns, p, bias, scale)
    (y,) = _gather_matmul(x.reshape(-1, x.shape[-1]), weight, columns, p, bias, scale)
    return y.view(*x.shape[:-1], p.shape[0])


def _check(x: Tensor, weight: Weight | None, columns: Tensor, p: Tensor, bias: Tensor | None) -> None:
    shapes = f"x {list(x.shape)}, columns {list(columns.shape)}, p {list(p.shape)}"
    if columns.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"gather_matmul: columns are {columns.dtype}; want int32 or int64")
    if columns.dim() != 1 or p.dim() != 2 or columns.shape[0] != p.shape[1] or p.shape[1] > x.shape[-1]:
        raise ValueError(f"gather_matmul: {shapes} do not chain; want x [..., in], columns [r], p [out, r], r <= in")
    if weight is not None and weight.shape != (p.shape[0], x.shape[-1]):
        raise ValueError(f"gather_matmul: weight {list(weight.shape)} is not [out, in] of {shapes}")
    if bias is not None and (weight is None or bias.shape != (p.shape[0],)):
        raise ValueError(f"gather_matmul: bias {list(bias.shape)} needs a weight and the shape [out] of {shapes}")


def _forward(
    x: Tensor, weight: Tensor | None, columns: Tensor, p: Tensor, bias: Tensor | None, scale: float
) -> list[Tensor]:
    """Return y [m, out] and x[:, columns] [m, r]."""
    gathered = x.index_select(1, columns)
    p_t = (p * scale).to(x.dtype).t()
    y = gathered @ p_t if bias is None else torch.addmm(bias.to(x.dtype), gathered, p_t)
    if weight is not None:
        y.addmm_(x, dense(weight, x.dtype).t())
    return [y, gathered]


def _forward_fake(
    x: Tensor, weight: Tensor | None, columns: Tensor, p: Tensor, bias: Tensor | None, scale: float
) -> list[Tensor]:
    return [x.new_empty(x.shape[0], p.shape[0]), x.new_empty(x.shape[0], columns.shape[0])]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor], needed: Sequence[Any]) -> None:
    x, weight, columns, p, _, ctx.scale = inputs
    ctx.need_x, ctx.need_p = need_x, need_p = needed[0], needed[3]
    ctx.in_features, ctx.packed = x.shape[1], weight if isinstance(weight, PackedWeight) else None
    ctx.save_for_backward(
        stored(weight) if need_x and weight is not None else None,
        columns if need_x else None,
        p if need_x else None,
        output[1] if need_p else None,
    )


def _backward(
    dy: Tensor,
    weight: Tensor | None,
    columns: Tensor | None,
    p: Tensor | None,
    gathered: Tensor | None,
    in_features: int,
    scale: float,
) -> list[Tensor]:
    """Return the needed ones of dx [m, in], dp [out, r]."""
    needed = []
    if columns is not None and p is not None:
        dx = dy.new_zeros(dy.shape[0], in_features) if weight is None else dy @ dense(weight, dy.dtype)
        needed.append(dx.index_add_(1, columns, dy @ (p * scale).to(dy.dtype)))
    if gathered is not None:
        needed.append(scale * mm_float32(dy.t(), gathered))
    return needed


def _backward_fake(
    dy: Tensor,
    weight: Tensor | None,
    columns: Tensor | None,
    p: Tensor | None,
    gathered: Tensor | None,
    in_features: int,
    scale: float,
) -> list[Tensor]:
    needed = []
    if columns is not None:
        needed.append(dy.new_empty(dy.shape[0], in_features))
    if gathered is not None:
        wide = torch.promote_types(torch.float32, dy.dtype)
        needed.append(dy.new_empty(dy.shape[1], gathered.shape[1], dtype=wide))
    return needed


def _gradients(ctx: Any, dys: list[Tensor | None], backward: Any) -> tuple[Tensor | None, ...]:
    kept, columns, p, gathered = ctx.saved_tensors
    weight = None if kept is None else restored(kept, ctx.packed)
    found = iter(backward(dys[0], weight, columns, p, gathered, ctx.in_features, ctx.scale))
    return next(found) if ctx.need_x else None, None, None, next(found) if ctx.need_p else None, None, None


_gather_matmul = differentiable(
    "gather_matmul", _forward, _forward_fake, _setup_context, _backward, _backward_fake, _gradients
)
