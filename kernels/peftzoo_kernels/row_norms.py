"""Norms of the rows of a frozen weight and its update together: |W + scale B A|, which DoRA divides by.

Neither W + scale B A nor an identity to make it from is ever built. The library's way is three thin products,

    |W + D|^2 = |W|^2 + 2 scale rows(W A^T * B) + scale^2 rows(B (A A^T) * B),

the kernel sums (w + d)^2 tile by tile: one read of W, and nothing that cancels.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from peftzoo_kernels._triton import block, jit, launch, tl
from peftzoo_kernels.dispatch import Choice, Tiles, choose


def row_norms_ref(weight: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Say in plain torch what `row_norms` computes: by way of the whole sum."""
    return torch.linalg.vector_norm(weight + scale * b @ a, dim=1)


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, *, tiles: Choice = "auto") -> Tensor:
    """Return |W + scale B A| of each row, [n], at least a tiny number, in at least float32; without a gradient.

    Args:
        weight: W, [n, k], in any floating dtype, any strides.
        a: A, [r, k], in any floating dtype.
        b: B, [n, r], likewise.
        scale: scalar factor of the update.
        tiles: of the kernel: m rows of W, k columns at a time.

    Raises:
        ValueError: the shapes do not chain.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or weight.shape != (b.shape[0], a.shape[1]):
        raise ValueError(
            f"row_norms: weight {list(weight.shape)}, a {list(a.shape)}, b {list(b.shape)} do not chain; want weight "
            "[out, in], a [r, in], b [out, r]"
        )
    wide = torch.promote_types(torch.float32, torch.promote_types(weight.dtype, a.dtype))
    (n, r), k = b.shape, a.shape[1]
    cut = choose(tiles, weight, "row_norms", n, k, 0, r) if wide == torch.float32 else None
    with torch.no_grad():
        if cut is None:
            squares = _squares(weight.to(wide), a.to(wide), scale * b.to(wide))
        else:
            squares = _launch(weight, a, b, scale, cut)
        return squares.clamp_min(torch.finfo(wide).tiny).sqrt()


def _squares(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast(weight.device.type, enabled=False):  # it would round the products
        cross = (weight @ a.T * b).sum(1)
        update = (b @ (a @ a.T) * b).sum(1)
    return torch.linalg.vector_norm(weight, dim=1) ** 2 + 2 * cross + update


def _launch(weight: Tensor, a: Tensor, b: Tensor, scale: float, cut: Tiles) -> Tensor:
    (n, k), r = weight.shape, a.shape[0]
    squares = weight.new_empty(n, dtype=torch.float32)
    launch(
        _row_squares, (-(-n // cut.m),), weight, a, b, squares, float(scale), n, k, r,
        *weight.stride(), *a.stride(), *b.stride(), BLOCK_M=cut.m, BLOCK_K=cut.k, BLOCK_R=block(r),
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return squares


@jit
def _row_squares(
    w_ptr, a_ptr, b_ptr, squares_ptr, scale, n, k, r, w_row, w_column, a_row, a_column, b_row, b_column,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    b_at = b_ptr + rows[:, None] * b_row + ranks[None, :] * b_column
    b = tl.load(b_at, mask=(rows[:, None] < n) & (ranks[None, :] < r), other=0.0).to(tl.float32) * scale
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, k, BLOCK_K):
        columns = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        w_at = w_ptr + rows[:, None] * w_row + columns[None, :] * w_column
        w = tl.load(w_at, mask=(rows[:, None] < n) & (columns[None, :] < k), other=0.0).to(tl.float32)
        a_at = a_ptr + ranks[:, None].to(tl.int64) * a_row + columns[None, :] * a_column
        a = tl.load(a_at, mask=(ranks[:, None] < r) & (columns[None, :] < k), other=0.0).to(tl.float32)
        total = tl.dot(b, a, w, input_precision="ieee")
        squares += tl.sum(total * total, 1)
    tl.store(squares_ptr + rows, squares, mask=rows < n)
