"""Forward and backward of frozen layers that share their input, with their low-rank updates.

Order of work ("C-first"): the rank-r product is written into the output buffer, then the frozen product is accumulated
on top of it, so the update costs no pass over y of its own (on a CPU in float32 the other way round, see
`frozen_product`). With h = drop(x) a^T, u = scale * s * h, g = c * dy and t = g b, and with v for what c multiplies:

    dc = colsum(dy * v)    ds = scale * colsum(h * t)    db = g^T u    dh = scale * s * t
    da = dh^T drop(x)      dx = sum_i drop'(dh_i a_i) + g_i W_i

Layers in one call read x once for all h, once for all da, and add up dx in one place. Only a trained `a` needs x, only
a trained `b` or `s` needs h [m, r], only a trained `c` needs v [m, out]; nothing else of size m is kept: dropout is
drawn anew from its seed. In place of v the backward can do with y = c * v, which is there anyhow, where x is kept too:
if y was written to meanwhile, or c is about 0, v is computed anew.

A list holds one entry for each layer, an empty vector for what one of them does not have; or none, if all do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor

from peftzoo_kernels._registration import differentiable
from peftzoo_kernels._weight import PackedWeight, Weight, dense, restored, stored
from peftzoo_kernels.dispatch import Choice, library_only
from peftzoo_kernels.down_grad import down_grad
from peftzoo_kernels.dropout import keep_mask
from peftzoo_kernels.expand import expand
from peftzoo_kernels.frozen_product import frozen_product
from peftzoo_kernels.shrink import shrink
from peftzoo_kernels.up_grads import up_grads

_LEAST_SCALE = 1e-6  # below it c * v may have rounded v away
Chance = tuple[Tensor | None, Tensor | None]  # seed of a dropout, and its mask if it is at hand


def _given(tensors: list[Tensor], i: int) -> Tensor | None:
    """Return what layer `i` has, or None where an empty vector stands for it."""
    return tensors[i] if tensors and tensors[i].numel() else None


def _dense(weights: Sequence[Weight], i: int, x: Tensor) -> Tensor | None:
    """Return W [out, in] of layer `i` in the dtype of `x`, or None."""
    return dense(weights[i], x.dtype) if weights else None


def _scaled(h: Tensor, s: Tensor | None, scale: float) -> Tensor:
    """Return scale * s * h, [m, r]; the factor is rounded once, to the dtype of `h`."""
    if s is not None:
        return h * (s * scale).to(h.dtype)
    return h if scale == 1.0 else h * scale


def _slices(b: list[Tensor]) -> list[slice]:
    """Return where each layer's ranks are among those of all."""
    ends = [0]
    for one in b:
        ends.append(ends[-1] + one.shape[1])
    return [slice(start, end) for start, end in pairwise(ends)]


def _down(a: list[Tensor], x: Tensor) -> Tensor:
    """Return the down factors of all layers, [sum of r, in]; those of several in the dtype of `x`."""
    return a[0] if len(a) == 1 else torch.cat([one.to(x.dtype) for one in a])


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _forward(
    x: Tensor,
    weights: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    s: list[Tensor],
    bias: list[Tensor],
    out_scale: list[Tensor],
    scale: list[float],
    dropout: float,
    seeds: list[Tensor],
    keep: bool,
) -> list[Tensor]:
    """Return every y [m, out], h of all layers [m, sum of r], and with `keep` every v [m, out], or [0] without c."""
    tiles: Choice = None if library_only(x) else "auto"
    if len(seeds) > 1:
        h = _joined([shrink(x, one, dropout, seed, tiles=tiles) for one, seed in zip(a, seeds, strict=True)], 1)
    else:
        h = shrink(x, _down(a, x), dropout, *seeds, tiles=tiles)
    ys, vs = [], []
    for i, ranks in enumerate(_slices(b)):
        u = _scaled(h[:, ranks], _given(s, i), scale[i])
        weight, c = _dense(weights, i, x), _given(out_scale, i)
        y, v = frozen_product(x, weight, u, b[i], _given(bias, i), c, keep, tiles=tiles)
        ys.append(y)
        if keep:
            vs.append(x.new_empty(0) if v is None else v)
    return [*ys, h, *vs]


def _forward_fake(
    x: Tensor,
    weights: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    s: list[Tensor],
    bias: list[Tensor],
    out_scale: list[Tensor],
    scale: list[float],
    dropout: float,
    seeds: list[Tensor],
    keep: bool,
) -> list[Tensor]:
    ys = [x.new_empty(x.shape[0], one.shape[0]) for one in b]
    vs = [x.new_empty(0) if _given(out_scale, i) is None else torch.empty_like(y) for i, y in enumerate(ys)]
    return [*ys, x.new_empty(x.shape[0], sum(one.shape[0] for one in a)), *(vs if keep else [])]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor], needed: Sequence[Any]) -> None:
    x, weights, a, b, s, _, out_scale, ctx.scale, ctx.dropout, seeds, keep = inputs
    n = len(b)
    ctx.need_x, ctx.need_a, ctx.need_b, ctx.need_s, ctx.need_c = needed[0], *needed[2:5], needed[6]
    need_h = any(ctx.need_b) or any(ctx.need_s)
    v, ctx.versions = output[n + 1 :], None
    if any(ctx.need_c) and not keep:
        v, ctx.versions = [y.data for y in output[:n]], [_Version(y) for y in output[:n]]
    need_w = ctx.need_x or ctx.versions is not None
    ctx.packed = [one if isinstance(one, PackedWeight) else None for one in weights if need_w]
    kept = (
        [x if any(ctx.need_a) else None, output[n] if need_h else None],
        [stored(one) for one in weights if need_w],
        a if need_w else [],
        b,
        s,
        out_scale,
        v,
        seeds,
    )
    ctx.ends = list(accumulate(map(len, kept), initial=0))
    ctx.save_for_backward(*chain.from_iterable(kept))


class _Version:
    """Tells whether a tensor was written to since, without keeping what it holds."""

    def __init__(self, tensor: Tensor) -> None:
        self._counter = tensor.detach()  # shares the count of writes, and from the next line on nothing else
        self._counter.data = tensor.new_empty(0)
        self._then = self._counter._version

    @property
    def is_current(self) -> bool:
        return self._counter._version == self._then


def _gradients(ctx: Any, dys: list[Tensor | None], backward: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    (x, h), frozen, a, b, s, out_scale, v, seeds = (list(saved[start:end]) for start, end in pairwise(ctx.ends))
    weights: list[Any] = [restored(tensor, packed) for tensor, packed in zip(frozen, ctx.packed, strict=True)]
    n, from_y = len(b), False
    if ctx.versions is not None:
        from_y = all(_tells(version, _given(out_scale, i)) for i, version in enumerate(ctx.versions))
        if not from_y:
            v = _forward(x, weights, a, b, s, [], out_scale, ctx.scale, ctx.dropout, seeds, True)[n + 1 :]
        if not ctx.need_x:
            weights, a = [], []
    # a layer whose output was not used has no gradient, as on its own
    needs = ctx.need_a, ctx.need_b, ctx.need_s, ctx.need_c
    flags = [
        [wanted and dy is not None for wanted, dy in zip(need, dys, strict=True)] if need else [False] * n
        for need in needs
    ]
    found = iter(backward(dys, x, weights, a, b, s, out_scale, h, v, ctx.scale, ctx.dropout, seeds, *flags))
    dx = next(found) if ctx.need_x else None
    da, db, ds, dc = (
        [next(found) if one else None for one in flag] if need else None
        for flag, need in zip(flags, needs, strict=True)
    )
    if from_y and dc is not None:  # colsum(dy * y) so far
        dc = [None if one is None else one / c for one, c in zip(dc, out_scale, strict=True)]
    return dx, None, da, db, ds, None, dc, None, None, None, None


def _tells(version: _Version, out_scale: Tensor | None) -> bool:
    """Whether y = c * v, as it is by now, tells v."""
    return version.is_current and (out_scale is None or bool(out_scale.abs().min() > _LEAST_SCALE))


def _backward(
    dys: list[Tensor | None],
    x: Tensor | None,
    weights: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    s: list[Tensor],
    out_scale: list[Tensor],
    h: Tensor | None,
    v: list[Tensor],
    scale: list[float],
    dropout: float,
    seeds: list[Tensor],
    need_a: list[bool],
    need_b: list[bool],
    need_s: list[bool],
    need_c: list[bool],
) -> list[Tensor]:
    """Return the needed ones of dx [m, in], every da [r, in], every db [out, r], every ds [r], every dc [out]."""
    given = next(dy for dy in dys if dy is not None)
    tiles: Choice = None if library_only(given) else "auto"
    gs, dhs, dbs, dss, dcs = [], [], [], [], []
    for i, ranks in enumerate(_slices(b)):
        dy = dys[i]
        if dy is None:  # this output was not used
            dy = given.new_zeros(given.shape[0], b[i].shape[0])
        factor, own = _given(s, i), None if h is None else h[:, ranks]
        u = _scaled(own, factor, scale[i]) if need_b[i] and own is not None else None
        one_v, last = v[i] if need_c[i] else None, i == len(b) - 1
        g, t, db, dc = up_grads(dy, b[i], u, _given(out_scale, i), one_v, g_passes=last, tiles=tiles)
        if db is not None:
            dbs.append(db)
        if dc is not None:
            dcs.append(dc)
        if need_s[i] and own is not None:
            wide = torch.promote_types(torch.float32, t.dtype)
            dss.append(scale[i] * (own.to(wide) * t.to(wide)).sum(0))
        gs.append(g)
        dhs.append(_scaled(t, factor, scale[i]))
    needed = []
    # kernels draw as they go; torch's way takes one mask for both products
    twice = a and x is not None and given.is_cpu
    keeps = [keep_mask(one, given.shape[0], a[0].shape[1], dropout) if twice else None for one in seeds]
    chances = list(zip(seeds, keeps, strict=True))
    if a:
        needed.append(_input_gradient(gs, dhs, weights, a, dropout, chances, tiles))
    if x is not None:
        needed += [da for da, need in zip(_down_grads(dhs, x, dropout, chances, tiles), need_a, strict=True) if need]
    return [*needed, *dbs, *dss, *dcs]


def _input_gradient(
    gs: list[Tensor],
    dhs: list[Tensor],
    weights: list[Tensor],
    a: list[Tensor],
    dropout: float,
    chances: Sequence[Chance],
    tiles: Choice,
) -> Tensor:
    """Return dx [m, in]: the low-rank terms as one, with a frozen product, then every other one on top."""
    given = gs[0]
    if not chances:
        weight = _dense(weights, 0, given)
        wide, thin = None if weight is None else weight.t(), _down(a, given).t()
        dx, _ = frozen_product(given, wide, _joined(dhs, 1), thin, tiles=tiles)
    elif len(chances) == 1:
        dx = expand(_joined(dhs, 1), _down(a, given).t(), None, dropout, *chances[0], tiles=tiles)
    else:
        dx = expand(dhs[0], a[0].t(), None, dropout, *chances[0], tiles=tiles)
        for dh, one, chance in zip(dhs[1:], a[1:], chances[1:], strict=True):
            dx += expand(dh, one.t(), None, dropout, *chance, tiles=tiles)
    for i in range(0 if chances else 1, len(weights)):
        dx.addmm_(gs[i], dense(weights[i], given.dtype))
    return dx


def _down_grads(
    dhs: list[Tensor], x: Tensor, dropout: float, chances: Sequence[Chance], tiles: Choice
) -> Sequence[Tensor]:
    """Return da of every layer, [r, in]."""
    if len(chances) > 1:
        return [down_grad(dh, x, dropout, *chance, tiles=tiles) for dh, chance in zip(dhs, chances, strict=True)]
    da = down_grad(_joined(dhs, 1), x, dropout, *(chances[0] if chances else ()), tiles=tiles)
    return [da] if len(dhs) == 1 else [part.clone() for part in da.split([dh.shape[1] for dh in dhs])]


def _backward_fake(
    dys: list[Tensor | None],
    x: Tensor | None,
    weights: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    s: list[Tensor],
    out_scale: list[Tensor],
    h: Tensor | None,
    v: list[Tensor],
    scale: list[float],
    dropout: float,
    seeds: list[Tensor],
    need_a: list[bool],
    need_b: list[bool],
    need_s: list[bool],
    need_c: list[bool],
) -> list[Tensor]:
    dy = next(dy for dy in dys if dy is not None)
    wide = torch.promote_types(torch.float32, dy.dtype)
    needed = []
    if a:
        needed.append(dy.new_empty(dy.shape[0], a[0].shape[1]))
    if x is not None:
        shapes = [(one.shape[1], x.shape[1]) for one, need in zip(b, need_a, strict=True) if need]
        needed += [dy.new_empty(shape, dtype=wide) for shape in shapes]
    needed += [dy.new_empty(one.shape, dtype=wide) for one, need in zip(b, need_b, strict=True) if need]
    needed += [dy.new_empty(one.shape[1], dtype=wide) for one, need in zip(b, need_s, strict=True) if need]
    needed += [dy.new_empty(one.shape[0], dtype=wide) for one, need in zip(b, need_c, strict=True) if need]
    return needed


low_rank_op = differentiable(
    "low_rank_linear",
    _forward,
    _forward_fake,
    _setup_context,
    _backward,
    _backward_fake,
    _gradients,
    outputs=lambda x, weights, a, *_: len(a),
)
