"""A frozen linear layer and its low-rank update in one op, and several that share their input.

    y_i = c_i * (x W_i^T + scale_i * ((drop(x) a_i^T) * s_i) b_i^T) + bias_i

The order of work and the gradients are in `_low_rank_op`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from peftzoo_kernels._backend import backend
from peftzoo_kernels._gemm import compute_dtype
from peftzoo_kernels._low_rank_op import low_rank_op
from peftzoo_kernels._weight import Weight, dense
from peftzoo_kernels.dropout import draw_seed, dropped, threshold


class LowRankLayer(NamedTuple):
    """One layer of a group, without its input.

    Attributes:
        weight: frozen weight, [out, in], any strides, or packed; None for the update alone.
        a: down factor, [r, in], in any floating dtype; cast to the dtype of the product, gradient in its own.
        b: up factor, [out, r], likewise.
        s: middle diagonal, [r], likewise; None means all ones.
        bias: frozen bias, [out]; needs `weight`.
        out_scale: factor of each output, [out], in any floating dtype; None means all ones.
        scale: scalar factor of the update.
    """

    weight: Weight | None
    a: Tensor
    b: Tensor
    s: Tensor | None = None
    bias: Tensor | None = None
    out_scale: Tensor | None = None
    scale: float = 1.0


def low_rank_linear_ref(
    x: Tensor,
    weight: Weight | None,
    a: Tensor,
    b: Tensor,
    s: Tensor | None = None,
    bias: Tensor | None = None,
    out_scale: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Say in plain torch what `low_rank_linear` computes, in the dtype of `x`."""
    h = F.linear(x if seed is None else dropped(x, dropout, seed), a.to(x.dtype))
    if s is not None:
        h = h * s.to(x.dtype)
    y = scale * F.linear(h, b.to(x.dtype))
    if weight is not None:
        y = F.linear(x, dense(weight, x.dtype)) + y
    if out_scale is not None:
        y = (y * out_scale).to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


def low_rank_linear(
    x: Tensor,
    weight: Weight | None,
    a: Tensor,
    b: Tensor,
    s: Tensor | None = None,
    bias: Tensor | None = None,
    out_scale: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return out_scale * (x W^T + scale * ((drop(x) a^T) * s) b^T) + bias.

    Args:
        x: input, [..., in].
        weight: frozen weight, [out, in], any strides, or packed; None returns the update alone.
        a: down factor, [r, in], in any floating dtype; cast to the dtype of the product, gradient in its own.
        b: up factor, [out, r], likewise.
        s: middle diagonal, [r], likewise; None means all ones.
        bias: frozen bias, [out]; needs `weight`.
        out_scale: factor of each output, [out], in any floating dtype; None means all ones.
        scale: scalar factor of the update.
        dropout: share of the entries of `x` that the update does not see.
        seed: of the dropout, an int64 scalar on the device of `x`; None draws one from torch's generator.

    Returns:
        [..., out], in the dtype of `x`, or in autocast's where it is on.

    Raises:
        ValueError: the shapes do not chain, a bias without a weight, or a dropout outside [0, 1).
    """
    layer = LowRankLayer(weight, a, b, s, bias, out_scale, scale)
    return grouped_low_rank_linear(x, (layer,), dropout, None if seed is None else (seed,))[0]


def grouped_low_rank_linear_ref(
    x: Tensor, layers: Sequence[LowRankLayer], dropout: float = 0.0, seeds: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Say in plain torch what `grouped_low_rank_linear` computes: each layer on its own."""
    return [
        low_rank_linear_ref(x, *layer, dropout=dropout, seed=seed)
        for layer, seed in zip(layers, _spread(seeds, len(layers)), strict=True)
    ]


def grouped_low_rank_linear(
    x: Tensor, layers: Sequence[LowRankLayer], dropout: float = 0.0, seeds: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Return what `low_rank_linear` returns for each layer, reading `x` and writing its gradient once.

    Args:
        x: input of all layers, [..., in].
        layers: at least one; ranks and outputs may differ; all with a weight, or all without.
        dropout: share of the entries of `x` that the updates do not see.
        seeds: one int64 scalar for each layer, or a single one if all are to drop the same entries, which saves
            drawing and reading; None draws one for each from torch's generator, as layers on their own do.

    Returns:
        [..., out] of each layer.

    Raises:
        ValueError: as for `low_rank_linear`.
    """
    trains_base = False
    for layer in layers:
        _check(x, *layer)
        weight, bias = layer.weight, layer.bias
        trains_base |= (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
        if (weight is None) != (layers[0].weight is None):
            raise ValueError("low_rank_linear: of the layers of a group all have a weight, or none")
    x = x.to(compute_dtype(x))
    if not threshold(dropout):
        seeds = None
    elif seeds is None:
        seeds = [draw_seed(x.device) for _ in layers]
    if trains_base or backend() == "eager":
        return grouped_low_rank_linear_ref(x, layers, dropout, seeds)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    columns = [_column(parts, x) for parts in zip(*layers, strict=True)]
    # what the op returns for its backward alone is decided here, where a graph can see it
    keep = torch.is_grad_enabled() and any(one.requires_grad for one in columns[5])
    keep = keep and not _told_by_output(rows, layers)
    ys = low_rank_op(rows, *columns, dropout, list(seeds or ()), keep)
    return ys if x.dim() == 2 else [y.view(*x.shape[:-1], y.shape[1]) for y in ys]


def _column(parts: Sequence[Any], x: Tensor) -> list[Any]:
    """Return one part of all layers as an op's list holds it, of tensors alone: none where no layer has the part."""
    missing = [part is None for part in parts]
    if not any(missing):
        return list(parts)
    if all(missing):
        return []
    nothing = x.new_empty(0)
    return [nothing if part is None else part for part in parts]


def _spread(seeds: Sequence[Tensor] | None, count: int) -> Sequence[Tensor | None]:
    """Return one seed for each layer."""
    if not seeds:
        return [None] * count
    return list(seeds) * count if len(seeds) == 1 else seeds


def _told_by_output(x: Tensor, layers: Sequence[LowRankLayer]) -> bool:
    """Whether a backward can do with y where it wants what a trained out_scale multiplies (see `_low_rank_op`)."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or not x.is_cpu or x.dtype.itemsize < 4:
        return False
    without_bias = all(one.bias is None for one in layers if one.out_scale is not None)
    return without_bias and any(one.a.requires_grad for one in layers)


def _check(
    x: Tensor,
    weight: Weight | None,
    a: Tensor,
    b: Tensor,
    s: Tensor | None,
    bias: Tensor | None,
    out_scale: Tensor | None,
    scale: float,
) -> None:
    k, r, n = x.shape[-1], a.shape[0], b.shape[0]
    if a.dim() != 2 or b.dim() != 2 or b.shape[1] != r or a.shape[1] != k:
        raise ValueError(f"low_rank_linear: {_said(x, a, b)} do not chain; want x [..., in], a [r, in], b [out, r]")
    if weight is not None and weight.shape != (n, k):
        raise ValueError(f"low_rank_linear: weight {list(weight.shape)} is not [out, in] of {_said(x, a, b)}")
    if s is not None and s.shape != (r,):
        raise ValueError(f"low_rank_linear: s {list(s.shape)} is not [r] of {_said(x, a, b)}")
    if bias is not None and (weight is None or bias.shape != (n,)):
        raise ValueError(
            f"low_rank_linear: bias {list(bias.shape)} needs a weight and the shape [out] of {_said(x, a, b)}"
        )
    if out_scale is not None and out_scale.shape != (n,):
        raise ValueError(f"low_rank_linear: out_scale {list(out_scale.shape)} is not [out] of {_said(x, a, b)}")


def _said(x: Tensor, a: Tensor, b: Tensor) -> str:
    return f"x {list(x.shape)}, a {list(a.shape)}, b {list(b.shape)}"
