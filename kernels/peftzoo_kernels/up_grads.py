"""What the gradient of the output gives: g = c * dy, t = g b, db = g^T u, dc = colsum(dy * v).

The kernel reads dy (and v) once for all of them. Each sum over programs is one of parts in a fixed order: no atomics,
the same bits every time.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peftzoo_kernels._gemm import mm_float32
from peftzoo_kernels._scratch import scratch_like
from peftzoo_kernels._triton import block, jit, launch, precision, tl
from peftzoo_kernels.dispatch import Choice, Tiles, choose

_BLOCK = 512  # rows at a time on a CPU: they stay in its cache, and fewer would not pay for starting its threads


class UpGrads(NamedTuple):
    """Gradients behind the output.

    Attributes:
        g: c * dy, [m, n], in the dtype of dy; dy itself without a c.
        t: g b, [m, r], in the dtype of dy.
        db: g^T u, [n, r], in at least float32; None without u.
        dc: colsum(dy * v), [n], in at least float32; None without v.
    """

    g: Tensor
    t: Tensor
    db: Tensor | None
    dc: Tensor | None


def up_grads(
    dy: Tensor,
    b: Tensor,
    u: Tensor | None = None,
    c: Tensor | None = None,
    v: Tensor | None = None,
    *,
    g_passes: bool = False,
    tiles: Choice = "auto",
) -> UpGrads:
    """Return g, t, and what of db and dc is wanted.

    Args:
        dy: [m, n].
        b: [n, r], in any floating dtype; rounded to that of `dy`.
        u: [m, r], in the dtype of `dy`; None if db is not wanted.
        c: [n], in any floating dtype; None means all ones.
        v: [m, n], in the dtype of `dy`; None if dc is not wanted.
        g_passes: g is not wanted any more at the next call; on a CPU it is then written where the last one was.
        tiles: of the kernel: m rows and n columns at a time, split programs for a column.
    """
    (m, n), r = dy.shape, b.shape[1]
    # for t alone the library's product reads dy once as well
    alone = u is None and c is None
    cut = None if alone else choose(tiles, dy, "up_grads", m, 0, n, r)
    if cut is not None:
        return _launch(dy, b, u, c, v, cut)
    g = dy
    if c is not None:  # in float32, rounded once
        plain = g_passes and dy.is_cpu and type(dy) is Tensor
        g = torch.mul(dy, c, out=scratch_like(dy) if plain else torch.empty_like(dy))
    db = None if u is None else mm_float32(g.t(), u)
    return UpGrads(g, g @ b.to(g.dtype), db, None if v is None else _column_sums(dy, v))


def _column_sums(dy: Tensor, v: Tensor) -> Tensor:
    """Return colsum(dy * v), [n]; on a CPU without a product of their size."""
    wide = torch.promote_types(torch.float32, dy.dtype)
    if not dy.is_cpu:
        return (dy.to(wide) * v).sum(0)
    sums = dy.new_zeros(min(_BLOCK, dy.shape[0]), dy.shape[1], dtype=wide)
    for start in range(0, dy.shape[0], _BLOCK):
        rows = slice(start, start + _BLOCK)
        sums[: dy[rows].shape[0]].addcmul_(dy[rows].to(wide), v[rows].to(wide))
    return sums.sum(0)


def _launch(dy: Tensor, b: Tensor, u: Tensor | None, c: Tensor | None, v: Tensor | None, cut: Tiles) -> UpGrads:
    (m, n), r = dy.shape, b.shape[1]
    chunks = -(-n // cut.n)
    g = dy if c is None else torch.empty_like(dy)
    t = dy.new_empty(chunks, m, r, dtype=torch.float32)
    db = None if u is None else dy.new_empty(cut.split, n, r, dtype=torch.float32)
    dc = None if v is None else dy.new_empty(cut.split, n, dtype=torch.float32)
    given = [t if one is None else one for one in (u, c, v, db, dc)]  # a kernel wants something for each
    strides = (*dy.stride(), *b.stride(), *(u.stride() if u is not None else (0, 0)))
    launch(
        _up_grads, (chunks, cut.split), dy, b, *given[:3], g, t, *given[3:], m, n, r, *strides,
        HAS_U=u is not None, HAS_C=c is not None, HAS_V=v is not None,
        BLOCK_M=cut.m, BLOCK_N=cut.n, BLOCK_R=block(r), SPLIT=cut.split, PRECISION=precision(dy.dtype),
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    parts = [None if part is None else part[0] if cut.split == 1 else part.sum(0) for part in (db, dc)]
    return UpGrads(g, t.sum(0).to(dy.dtype), parts[0], parts[1])


@jit
def _up_grads(
    dy_ptr, b_ptr, u_ptr, c_ptr, v_ptr, g_ptr, t_ptr, db_ptr, dc_ptr,
    m, n, r, dy_row, dy_column, b_row, b_column, u_row, u_column,
    HAS_U: tl.constexpr, HAS_C: tl.constexpr, HAS_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N columns of dy over one of SPLIT shares of the rows; db and dc stay in registers meanwhile.

    v and g are contiguous.
    """
    chunk = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    columns = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    b_at = b_ptr + columns[:, None] * b_row + ranks[None, :] * b_column
    b = tl.load(b_at, mask=(columns[:, None] < n) & (ranks[None, :] < r), other=0.0).to(dy_ptr.dtype.element_ty)
    db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    dc = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_C:
        c = tl.load(c_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)
    for start in range(part * BLOCK_M, m, SPLIT * BLOCK_M):
        rows = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = (rows[:, None] < m) & (columns[None, :] < n)
        g = tl.load(dy_ptr + rows[:, None] * dy_row + columns[None, :] * dy_column, mask=inside, other=0.0)
        if HAS_V:
            v = tl.load(v_ptr + rows[:, None] * n + columns[None, :], mask=inside, other=0.0)
            dc += tl.sum(g.to(tl.float32) * v.to(tl.float32), 0)
        if HAS_C:
            g = (g.to(tl.float32) * c[None, :]).to(dy_ptr.dtype.element_ty)
            tl.store(g_ptr + rows[:, None] * n + columns[None, :], g, mask=inside)
        t = tl.dot(g, b, input_precision=PRECISION)
        t_at = t_ptr + (chunk * m + rows[:, None]) * r + ranks[None, :]
        tl.store(t_at, t, mask=(rows[:, None] < m) & (ranks[None, :] < r))
        if HAS_U:
            u_at = u_ptr + rows[:, None] * u_row + ranks[None, :] * u_column
            u = tl.load(u_at, mask=(rows[:, None] < m) & (ranks[None, :] < r), other=0.0)
            db = tl.dot(tl.trans(g), u, db, input_precision=PRECISION)
    if HAS_U:
        db_at = db_ptr + (part * n + columns[:, None]) * r + ranks[None, :]
        tl.store(db_at, db, mask=(columns[:, None] < n) & (ranks[None, :] < r))
    if HAS_V:
        tl.store(dc_ptr + part * n + columns, dc, mask=columns < n)
