"""The product down to the rank: h = drop(x) a^T.

The kernel reads x once. With dropout it draws as it goes: one counter serves one column in each of eight slices of x.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from peftzoo_kernels._triton import block, jit, launch, precision, tl
from peftzoo_kernels.dispatch import Choice, Tiles, choose
from peftzoo_kernels.dropout import dropout_factor, dropped, kept_lanes, threshold


def shrink(x: Tensor, a: Tensor, p: float = 0.0, seed: Tensor | None = None, *, tiles: Choice = "auto") -> Tensor:
    """Return drop(x) a^T, [m, r], accumulated in float32, in the dtype of `x`.

    Args:
        x: [m, k].
        a: [r, k], in any floating dtype; rounded to that of `x`.
        p: share of the entries of `x` that is dropped.
        seed: of the dropout, an int64 scalar; None drops nothing.
        tiles: of the kernel: m rows, k columns (with dropout: counters) at a time, split programs for a row.
    """
    m, k = x.shape
    cut = choose(tiles, x, "shrink", m, k, 0, a.shape[0], seed is not None)
    if cut is None:
        return (x if seed is None else dropped(x, p, seed)) @ a.to(x.dtype).t()
    return _launch(x, a, p, seed, cut)


def _launch(x: Tensor, a: Tensor, p: float, seed: Tensor | None, cut: Tiles) -> Tensor:
    (m, k), r = x.shape, a.shape[0]
    parts = x.new_empty(cut.split, m, r, dtype=x.dtype if cut.split == 1 else torch.float32)
    kernel, chance = (_shrink, ()) if seed is None else (_shrink_dropped, (seed, threshold(p), dropout_factor(p)))
    launch(
        kernel, (-(-m // cut.m), cut.split), x, a, parts, *chance, m, k, r, *x.stride(), *a.stride(),
        BLOCK_M=cut.m, BLOCK_K=cut.k, BLOCK_R=block(r), SPLIT=cut.split, PRECISION=precision(x.dtype),
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return parts[0] if cut.split == 1 else parts.sum(0).to(x.dtype)


@jit
def _shrink(
    x_ptr, a_ptr, h_ptr, m, k, r, x_row, x_column, a_row, a_column,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of h, over one of SPLIT shares of the columns of x."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(1)
    ranks = tl.arange(0, BLOCK_R)
    h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(part * BLOCK_K, k, SPLIT * BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        x_at = x_ptr + rows[:, None] * x_row + columns[None, :].to(tl.int64) * x_column
        x = tl.load(x_at, mask=(rows[:, None] < m) & (columns[None, :] < k), other=0.0)
        a_at = a_ptr + ranks[None, :].to(tl.int64) * a_row + columns[:, None].to(tl.int64) * a_column
        a = tl.load(a_at, mask=(ranks[None, :] < r) & (columns[:, None] < k), other=0.0).to(x.dtype)
        h = tl.dot(x, a, h, input_precision=PRECISION)
    h_at = h_ptr + (part.to(tl.int64) * m + rows[:, None]) * r + ranks[None, :]
    tl.store(h_at, h.to(h_ptr.dtype.element_ty), mask=(rows[:, None] < m) & (ranks[None, :] < r))


@jit
def _shrink_dropped(
    x_ptr, a_ptr, h_ptr, seed_ptr, threshold, factor, m, k, r, x_row, x_column, a_row, a_column,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The same with dropout: BLOCK_K counters at a time."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(1)
    ranks = tl.arange(0, BLOCK_R)
    seed = tl.load(seed_ptr)
    width = tl.cdiv(k, 8)
    h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(part * BLOCK_K, width, SPLIT * BLOCK_K):
        counters = start + tl.arange(0, BLOCK_K)
        kept = kept_lanes(seed, rows[:, None], counters[None, :], threshold)
        for lane in tl.static_range(8):
            columns = lane * width + counters
            inside = (counters < width) & (columns < k)
            x_at = x_ptr + rows[:, None] * x_row + columns[None, :].to(tl.int64) * x_column
            x = tl.load(x_at, mask=(rows[:, None] < m) & inside[None, :] & kept[lane], other=0.0)
            a_at = a_ptr + ranks[None, :].to(tl.int64) * a_row + columns[:, None].to(tl.int64) * a_column
            a = tl.load(a_at, mask=(ranks[None, :] < r) & inside[:, None], other=0.0).to(x.dtype)
            h = tl.dot(x, a, h, input_precision=PRECISION)
    h_at = h_ptr + (part.to(tl.int64) * m + rows[:, None]) * r + ranks[None, :]
    tl.store(h_at, (h * factor).to(h_ptr.dtype.element_ty), mask=(rows[:, None] < m) & (ranks[None, :] < r))
