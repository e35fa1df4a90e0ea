"""LoRAFusion's formulation: the graph is cut at the rank, and the update starts the accumulator of the frozen product.

    forward    h = drop(x) A^T by library;    y = acc(h (scale B)^T) + x W^T in one Triton kernel
    backward   one pass over dy makes dh = scale * dy B and dB, both by float32 atomics;
               dA = dh^T drop(x) by library;    dx = acc(drop'(dh A)) + dy W in one Triton kernel

drop(x) and its mask are stored, as there. Written anew from the description, with block sizes it names as its start.
It runs on a GPU, or in Triton's interpreter, which shows that the numbers are right and nothing of its speed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftzoo_kernels._triton import block, jit, launch, precision, tl


def lorafusion_like(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """Return y [m, out] from x [m, in], weight [out, in], a [r, in] and b [out, r]."""
    y: Tensor = LoraFusionLike.apply(  # type: ignore[no-untyped-call]
        x, weight, a.to(x.dtype), b.to(x.dtype), scale, dropout
    )
    return y


class LoraFusionLike(torch.autograd.Function):
    """See the module; saves drop(x), its mask and h."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float) -> Tensor:
        """Return y [m, out]."""
        mask = F.dropout(torch.ones_like(x), dropout) != 0 if dropout else None
        seen = x if mask is None else x * mask / (1 - dropout)
        h = seen @ a.t()
        ctx.save_for_backward(seen, weight, a, b, h, *([] if mask is None else [mask]))
        ctx.scale, ctx.dropout = scale, dropout
        return accumulate(x, weight.t(), h, scale * b.t())

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:
        """Return dx, dA and dB."""
        (dy,) = dys
        seen, weight, a, b, h, *mask = ctx.saved_tensors
        dh, db = rank_gradients(dy, ctx.scale * b, h)
        dh = dh.to(dy.dtype)
        dx = accumulate(dy, weight, dh, a, mask[0] if mask else None, 1 / (1 - ctx.dropout))
        return dx, None, dh.t() @ seen, (db * ctx.scale).to(b.dtype), None, None


def accumulate(
    x: Tensor, weight: Tensor, u: Tensor, v: Tensor, mask: Tensor | None = None, keep_scale: float = 1.0
) -> Tensor:
    """Return mask * keep_scale * (u v) + x weight, [m, n], accumulated in float32, in the dtype of `x`.

    Args:
        x: [m, k].
        weight: [k, n], any strides.
        u: [m, r].
        v: [r, n], any strides.
        mask: [m, n] bool, contiguous; None masks nothing.
        keep_scale: factor of what the mask keeps.
    """
    (m, k), n, r = x.shape, weight.shape[1], u.shape[1]
    out = x.new_empty(m, n)
    block_m, block_n, block_k = (128, 256, 64) if x.is_cuda else (32, 32, 32)
    if x.dtype == torch.float32 and x.is_cuda:
        block_m, block_n, block_k = 64, 64, 32  # twice the bytes per entry
    launch(
        _accumulate, (-(-m // block_m) * -(-n // block_n),), x, weight, u, v, out if mask is None else mask, out,
        keep_scale, m, n, k, r, *x.stride(), *weight.stride(), *u.stride(), *v.stride(),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_R=block(r), MASKED=mask is not None,
        PRECISION=precision(x.dtype), num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


def rank_gradients(dy: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Return dy b [m, r] and dy^T h [n, r], float32, from one pass over dy [m, n]; sums in no fixed order."""
    (m, n), r = dy.shape, b.shape[1]
    t = torch.zeros(m, r, device=dy.device, dtype=torch.float32)
    db = torch.zeros(n, r, device=dy.device, dtype=torch.float32)
    size = 128 if dy.is_cuda and dy.dtype != torch.float32 else 32
    launch(
        _rank_gradients, (-(-m // size), -(-n // size)), dy, b, h, t, db,
        m, n, r, *dy.stride(), *b.stride(), *h.stride(),
        BLOCK=size, BLOCK_R=block(r), PRECISION=precision(dy.dtype), num_warps=8,
    )  # fmt: skip
    return t, db


@jit
def _accumulate(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, u_ptr, v_ptr, mask_ptr, out_ptr, keep_scale, m, n, k, r,
    x_row, x_column, w_row, w_column, u_row, u_column, v_row, v_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one tile of the output, in groups of 8 rows of tiles that share columns of the weight in cache."""
    tile = tl.program_id(0)
    per_group = 8 * tl.cdiv(n, BLOCK_N)
    first = tile // per_group * 8
    high = min(tl.cdiv(m, BLOCK_M) - first, 8)
    rows = ((first + tile % per_group % high) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = (tile % per_group // high * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    ranks = tl.arange(0, BLOCK_R)
    in_rows, in_columns, in_ranks = rows < m, columns < n, ranks < r
    out_at = rows[:, None] * n + columns[None, :]
    inside = in_rows[:, None] & in_columns[None, :]
    u = tl.load(u_ptr + rows[:, None] * u_row + ranks[None, :] * u_column, mask=in_rows[:, None] & in_ranks, other=0.0)
    v_at = v_ptr + ranks[:, None] * v_row + columns[None, :] * v_column
    v = tl.load(v_at, mask=in_ranks[:, None] & in_columns[None, :], other=0.0)
    total = tl.dot(u, v, input_precision=PRECISION)
    if MASKED:
        kept = tl.load(mask_ptr + out_at, mask=inside, other=0)
        total = tl.where(kept != 0, total * keep_scale, 0.0)
    for start in range(0, k, BLOCK_K):
        steps = start + tl.arange(0, BLOCK_K).to(tl.int64)
        x_at = x_ptr + rows[:, None] * x_row + steps[None, :] * x_column
        x = tl.load(x_at, mask=in_rows[:, None] & (steps < k)[None, :], other=0.0)
        w_at = w_ptr + steps[:, None] * w_row + columns[None, :] * w_column
        w = tl.load(w_at, mask=(steps < k)[:, None] & in_columns[None, :], other=0.0)
        total = tl.dot(x, w, total, input_precision=PRECISION)
    tl.store(out_ptr + out_at, total.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _rank_gradients(  # type: ignore[no-untyped-def]
    dy_ptr, b_ptr, h_ptr, t_ptr, db_ptr, m, n, r, dy_row, dy_column, b_row, b_column, h_row, h_column,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one tile of dy and its share of both sums."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ranks = tl.arange(0, BLOCK_R)
    row_ranks = (rows < m)[:, None] & (ranks < r)[None, :]
    column_ranks = (columns < n)[:, None] & (ranks < r)[None, :]
    dy_at = dy_ptr + rows[:, None] * dy_row + columns[None, :] * dy_column
    dy = tl.load(dy_at, mask=(rows < m)[:, None] & (columns < n)[None, :], other=0.0)
    b = tl.load(b_ptr + columns[:, None] * b_row + ranks[None, :] * b_column, mask=column_ranks, other=0.0)
    h = tl.load(h_ptr + rows[:, None] * h_row + ranks[None, :] * h_column, mask=row_ranks, other=0.0)
    t = tl.dot(dy, b, input_precision=PRECISION)
    tl.atomic_add(t_ptr + rows[:, None] * r + ranks[None, :], t, mask=row_ranks)
    db = tl.dot(tl.trans(dy), h, input_precision=PRECISION)
    tl.atomic_add(db_ptr + columns[:, None] * r + ranks[None, :], db, mask=column_ranks)
