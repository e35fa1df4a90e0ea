"""What the gradient of the output gives the up factor and the rank: t = g b and db = g^T u.

The kernel reads g once for both. Each is a sum over programs, whose parts are added in a fixed order: no atomics, the
same bits every time.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from peftzoo_kernels._gemm import mm_float32
from peftzoo_kernels._triton import block, jit, launch, precision, tl
from peftzoo_kernels.dispatch import Choice, Sizes, Tiles, choose


def up_grads(g: Tensor, b: Tensor, u: Tensor | None, *, tiles: Choice = "auto") -> tuple[Tensor, Tensor | None]:
    """Return t = g b, [m, r] in the dtype of `g`, and db = g^T u, [n, r] in at least float32, or None without u.

    Args:
        g: [m, n].
        b: [n, r], in any floating dtype; rounded to that of `g`.
        u: [m, r], in the dtype of `g`, or None.
        tiles: of the kernel: m rows and n columns at a time, split programs for a column.
    """
    (m, n), r = g.shape, b.shape[1]
    # for t alone the library's product is one read of g as well
    cut = None if u is None else choose(tiles, g, Sizes("up_grads", m, 0, n, r, g.dtype))
    if cut is None or u is None:
        return g @ b.to(g.dtype), None if u is None else mm_float32(g.t(), u)
    return _launch(g, b, u, cut)


def _launch(g: Tensor, b: Tensor, u: Tensor, cut: Tiles) -> tuple[Tensor, Tensor]:
    (m, n), r = g.shape, b.shape[1]
    chunks = -(-n // cut.n)
    t, db = g.new_empty(chunks, m, r, dtype=torch.float32), g.new_empty(cut.split, n, r, dtype=torch.float32)
    launch(
        _up_grads, (chunks, cut.split), g, b, u, t, db, m, n, r, *g.stride(), *b.stride(), *u.stride(),
        BLOCK_M=cut.m, BLOCK_N=cut.n, BLOCK_R=block(r), SPLIT=cut.split, PRECISION=precision(g.dtype),
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return t.sum(0).to(g.dtype), db[0] if cut.split == 1 else db.sum(0)


@jit
def _up_grads(
    g_ptr, b_ptr, u_ptr, t_ptr, db_ptr, m, n, r, g_row, g_column, b_row, b_column, u_row, u_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N columns of g over one of SPLIT shares of the rows; db stays in registers meanwhile."""
    chunk = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    columns = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    b_at = b_ptr + columns[:, None] * b_row + ranks[None, :] * b_column
    b = tl.load(b_at, mask=(columns[:, None] < n) & (ranks[None, :] < r), other=0.0).to(g_ptr.dtype.element_ty)
    db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for start in range(part * BLOCK_M, m, SPLIT * BLOCK_M):
        rows = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        g_at = g_ptr + rows[:, None] * g_row + columns[None, :] * g_column
        g = tl.load(g_at, mask=(rows[:, None] < m) & (columns[None, :] < n), other=0.0)
        u_at = u_ptr + rows[:, None] * u_row + ranks[None, :] * u_column
        u = tl.load(u_at, mask=(rows[:, None] < m) & (ranks[None, :] < r), other=0.0)
        t = tl.dot(g, b, input_precision=PRECISION)
        t_at = t_ptr + (chunk * m + rows[:, None]) * r + ranks[None, :]
        tl.store(t_at, t, mask=(rows[:, None] < m) & (ranks[None, :] < r))
        db = tl.dot(tl.trans(g), u, db, input_precision=PRECISION)
    db_at = db_ptr + (part * n + columns[:, None]) * r + ranks[None, :]
    tl.store(db_at, db, mask=(columns[:, None] < n) & (ranks[None, :] < r))
