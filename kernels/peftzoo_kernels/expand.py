"""The product up from the rank: c = drop(u b^T) + bias.

The kernel writes c once; a mask is never stored.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from peftzoo_kernels._triton import block, jit, launch, precision, tl
from peftzoo_kernels.dispatch import Choice, Tiles, choose
from peftzoo_kernels.dropout import dropout_factor, dropped, kept_lanes, threshold


def expand(
    u: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
    keep: Tensor | None = None,
    *,
    tiles: Choice = "auto",
) -> Tensor:
    """Return drop(u b^T) + bias, [m, n], in the dtype of `u`.

    Args:
        u: [m, r].
        b: [n, r], in any floating dtype, any strides; rounded to that of `u`.
        bias: [n], likewise; not together with a seed.
        p: share of the entries of u b^T that is dropped.
        seed: of the dropout, an int64 scalar; None drops nothing.
        keep: the mask of that, if it is at hand; no kernel wants it.
        tiles: of the kernel: m rows, n columns (with dropout: counters) at a time.
    """
    (m, r), n = u.shape, b.shape[0]
    cut = choose(tiles, u, "expand", m, 0, n, r, seed is not None)
    if cut is None:
        b_t = b.to(u.dtype).t()
        c = u @ b_t if bias is None else torch.addmm(bias.to(u.dtype), u, b_t)
        return c if seed is None else dropped(c, p, seed, keep)
    return _launch(u, b, bias, p, seed, cut)


def _launch(u: Tensor, b: Tensor, bias: Tensor | None, p: float, seed: Tensor | None, cut: Tiles) -> Tensor:
    (m, r), n = u.shape, b.shape[0]
    c = u.new_empty(m, n)
    sizes = (m, n, r, *u.stride(), *b.stride())
    tiles = {"BLOCK_M": cut.m, "BLOCK_N": cut.n, "BLOCK_R": block(r), "PRECISION": precision(u.dtype)}
    how = {"num_warps": cut.warps, "num_stages": cut.stages}
    if seed is None:
        grid = -(-m // cut.m), -(-n // cut.n)
        launch(_expand, grid, u, b, b if bias is None else bias, c, *sizes, HAS_BIAS=bias is not None, **tiles, **how)
    else:
        grid = -(-m // cut.m), -(-n // (8 * cut.n))
        launch(_expand_dropped, grid, u, b, c, seed, threshold(p), dropout_factor(p), *sizes, **tiles, **how)
    return c


@jit
def _expand(
    u_ptr, b_ptr, bias_ptr, c_ptr, m, n, r, u_row, u_column, b_row, b_column,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of c."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    u_at = u_ptr + rows[:, None] * u_row + ranks[None, :] * u_column
    u = tl.load(u_at, mask=(rows[:, None] < m) & (ranks[None, :] < r), other=0.0)
    b_at = b_ptr + columns[None, :] * b_row + ranks[:, None].to(tl.int64) * b_column
    b = tl.load(b_at, mask=(columns[None, :] < n) & (ranks[:, None] < r), other=0.0).to(u.dtype)
    c = tl.dot(u, b, input_precision=PRECISION)
    if HAS_BIAS:
        c += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    c_at = c_ptr + rows[:, None] * n + columns[None, :]
    tl.store(c_at, c.to(c_ptr.dtype.element_ty), mask=(rows[:, None] < m) & (columns[None, :] < n))


@jit
def _expand_dropped(
    u_ptr, b_ptr, c_ptr, seed_ptr, threshold, factor, m, n, r, u_row, u_column, b_row, b_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: eight tiles of c, one in each slice of its columns, which share their counters."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    counters = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    width = tl.cdiv(n, 8)
    u_at = u_ptr + rows[:, None] * u_row + ranks[None, :] * u_column
    u = tl.load(u_at, mask=(rows[:, None] < m) & (ranks[None, :] < r), other=0.0)
    kept = kept_lanes(tl.load(seed_ptr), rows[:, None], counters[None, :], threshold)
    for lane in tl.static_range(8):
        columns = (lane * width + counters).to(tl.int64)
        inside = (counters < width) & (columns < n)
        b_at = b_ptr + columns[None, :] * b_row + ranks[:, None].to(tl.int64) * b_column
        b = tl.load(b_at, mask=inside[None, :] & (ranks[:, None] < r), other=0.0).to(u.dtype)
        c = tl.where(kept[lane], tl.dot(u, b, input_precision=PRECISION) * factor, 0.0)
        c_at = c_ptr + rows[:, None] * n + columns[None, :]
        tl.store(c_at, c.to(c_ptr.dtype.element_ty), mask=(rows[:, None] < m) & inside[None, :])
