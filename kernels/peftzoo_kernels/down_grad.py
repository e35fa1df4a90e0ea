"""The gradient of the down factor: da = dh^T drop(x).

The kernel reads x once and sums over shares of the rows in a fixed order: no atomics, the same bits every time.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from peftzoo_kernels._gemm import mm_float32
from peftzoo_kernels._triton import block, jit, launch, precision, tl
from peftzoo_kernels.dispatch import Choice, Tiles, choose
from peftzoo_kernels.dropout import dropout_factor, dropped, kept_lanes, threshold


def down_grad(
    dh: Tensor,
    x: Tensor,
    p: float = 0.0,
    seed: Tensor | None = None,
    keep: Tensor | None = None,
    *,
    tiles: Choice = "auto",
) -> Tensor:
    """Return dh^T drop(x), [r, k], accumulated and returned in at least float32.

    Args:
        dh: [m, r].
        x: [m, k], in the dtype of `dh`.
        p: share of the entries of `x` that is dropped.
        seed: of the dropout, an int64 scalar; None drops nothing.
        keep: the mask of that, if it is at hand; no kernel wants it.
        tiles: of the kernel: n columns (with dropout: counters), m rows at a time, split programs for a column.
    """
    m, k = x.shape
    cut = choose(tiles, x, "down_grad", m, k, 0, dh.shape[1], seed is not None)
    if cut is None:
        return mm_float32(dh.t(), x if seed is None else dropped(x, p, seed, keep))
    return _launch(dh, x, p, seed, cut)


def _launch(dh: Tensor, x: Tensor, p: float, seed: Tensor | None, cut: Tiles) -> Tensor:
    (m, k), r = x.shape, dh.shape[1]
    parts = x.new_empty(cut.split, r, k, dtype=torch.float32)
    sizes = (m, k, r, *dh.stride(), *x.stride())
    tiles = {
        "BLOCK_M": cut.m, "BLOCK_N": cut.n, "BLOCK_R": block(r), "SPLIT": cut.split, "PRECISION": precision(x.dtype)
    }  # fmt: skip
    how = {"num_warps": cut.warps, "num_stages": cut.stages}
    if seed is None:
        launch(_down_grad, (-(-k // cut.n), cut.split), dh, x, parts, *sizes, **tiles, **how)
    else:
        grid = -(-k // (8 * cut.n)), cut.split
        chance = seed, threshold(p), dropout_factor(p)
        launch(_down_grad_dropped, grid, dh, x, parts, *chance, *sizes, **tiles, **how)
    return parts[0] if cut.split == 1 else parts.sum(0)


@jit
def _down_grad(
    dh_ptr, x_ptr, da_ptr, m, k, r, dh_row, dh_column, x_row, x_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N columns of da, over one of SPLIT shares of the rows."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    ranks = tl.arange(0, BLOCK_R)
    da = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start in range(part * BLOCK_M, m, SPLIT * BLOCK_M):
        rows = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        dh_at = dh_ptr + rows[None, :] * dh_row + ranks[:, None] * dh_column
        dh = tl.load(dh_at, mask=(rows[None, :] < m) & (ranks[:, None] < r), other=0.0)
        x_at = x_ptr + rows[:, None] * x_row + columns[None, :] * x_column
        x = tl.load(x_at, mask=(rows[:, None] < m) & (columns[None, :] < k), other=0.0)
        da = tl.dot(dh, x, da, input_precision=PRECISION)
    da_at = da_ptr + (part * r + ranks[:, None]).to(tl.int64) * k + columns[None, :]
    tl.store(da_at, da, mask=(ranks[:, None] < r) & (columns[None, :] < k))


@jit
def _down_grad_dropped(
    dh_ptr, x_ptr, da_ptr, seed_ptr, threshold, factor, m, k, r, dh_row, dh_column, x_row, x_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The same with dropout: BLOCK_N counters, each of which serves one column in each of eight slices."""
    counters = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    ranks = tl.arange(0, BLOCK_R)
    width = tl.cdiv(k, 8)
    seed = tl.load(seed_ptr)
    da0 = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    da1, da2, da3, da4, da5, da6, da7 = da0, da0, da0, da0, da0, da0, da0
    for start in range(part * BLOCK_M, m, SPLIT * BLOCK_M):
        rows = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        dh_at = dh_ptr + rows[None, :] * dh_row + ranks[:, None] * dh_column
        dh = tl.load(dh_at, mask=(rows[None, :] < m) & (ranks[:, None] < r), other=0.0)
        kept = kept_lanes(seed, rows[:, None], counters[None, :], threshold)
        x_at = x_ptr + rows[:, None] * x_row
        da0 = _add_lane(da0, 0, dh, x_at, kept[0], rows, counters, width, m, k, x_column, PRECISION)
        da1 = _add_lane(da1, 1, dh, x_at, kept[1], rows, counters, width, m, k, x_column, PRECISION)
        da2 = _add_lane(da2, 2, dh, x_at, kept[2], rows, counters, width, m, k, x_column, PRECISION)
        da3 = _add_lane(da3, 3, dh, x_at, kept[3], rows, counters, width, m, k, x_column, PRECISION)
        da4 = _add_lane(da4, 4, dh, x_at, kept[4], rows, counters, width, m, k, x_column, PRECISION)
        da5 = _add_lane(da5, 5, dh, x_at, kept[5], rows, counters, width, m, k, x_column, PRECISION)
        da6 = _add_lane(da6, 6, dh, x_at, kept[6], rows, counters, width, m, k, x_column, PRECISION)
        da7 = _add_lane(da7, 7, dh, x_at, kept[7], rows, counters, width, m, k, x_column, PRECISION)
    da_at = da_ptr + (part * r + ranks[:, None]).to(tl.int64) * k
    found = (da0, da1, da2, da3, da4, da5, da6, da7)
    for lane in tl.static_range(8):
        columns = lane * width + counters
        inside = (counters < width) & (columns < k)
        tl.store(da_at + columns[None, :], found[lane] * factor, mask=(ranks[:, None] < r) & inside[None, :])


@jit
def _add_lane(da, lane, dh, x_at, kept, rows, counters, width, m, k, x_column, PRECISION: tl.constexpr):
    """Return da with the product of one slice added."""
    columns = lane * width + counters
    inside = (counters < width) & (columns < k)
    at = x_at + columns[None, :].to(tl.int64) * x_column
    x = tl.load(at, mask=(rows[:, None] < m) & inside[None, :] & kept, other=0.0)
    return tl.dot(dh, x, da, input_precision=PRECISION)
