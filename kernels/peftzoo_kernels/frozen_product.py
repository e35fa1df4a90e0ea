"""The frozen product with the low-rank one in it: v = x W^T + u b^T, y = c * v + bias.

The library's way is C-first: u b^T is written where the frozen product is then added, which rounds once less. On a CPU
in float32 the frozen product is the first, and u b^T is added: there the time of a thin product into a new buffer is
mostly that of the buffer's first touch, which a wide product hides. The kernel adds u b^T to the
sum it still holds in registers, and c and the bias with it, so that y is written once and never read.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from peftzoo_kernels._triton import block, jit, launch, precision, tl
from peftzoo_kernels.dispatch import Choice, Tiles, choose
from peftzoo_kernels.expand import expand


def frozen_product(
    x: Tensor,
    weight: Tensor | None,
    u: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    out_scale: Tensor | None = None,
    keep: bool = False,
    *,
    tiles: Choice = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Return y = out_scale * (x W^T + u b^T) + bias, [m, n], and with `keep` what out_scale multiplies, else None.

    Args:
        x: [m, k].
        weight: W, [n, k], in the dtype of `x`, any strides; None leaves u b^T alone.
        u: [m, r], in the dtype of `x`.
        b: [n, r], in any floating dtype, any strides; rounded to that of `x`.
        bias: [n], in any floating dtype.
        out_scale: [n], in any floating dtype; None means all ones.
        keep: whether the product before `out_scale` is wanted as well.
        tiles: of the kernel: m rows, n columns, k summands at a time.
    """
    (m, k), (n, r) = x.shape if weight is not None else (0, 0), b.shape
    cut = None if weight is None else choose(tiles, x, "frozen_product", m, k, n, r)
    if cut is not None and weight is not None:
        return _launch(x, weight, u, b, bias, out_scale, keep and out_scale is not None, cut)
    inner = bias if out_scale is None else None
    if weight is None:
        v = expand(u, b, inner)
    elif x.is_cpu and x.dtype.itemsize >= 4:
        v = x @ weight.t() if inner is None else torch.addmm(inner.to(x.dtype), x, weight.t())
        v.addmm_(u, b.to(x.dtype).t())
    else:
        v = expand(u, b, inner).addmm_(x, weight.t())
    if out_scale is None:
        return v, None
    y = torch.empty_like(v) if keep else v
    if bias is None:
        torch.mul(v, out_scale, out=y)  # in float32, rounded once
    else:
        torch.addcmul(bias, v, out_scale, out=y)
    return y, v if keep else None


def _launch(
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    b: Tensor,
    bias: Tensor | None,
    out_scale: Tensor | None,
    keep: bool,
    cut: Tiles,
) -> tuple[Tensor, Tensor | None]:
    (m, k), (n, r) = x.shape, b.shape
    y = x.new_empty(m, n)
    v = torch.empty_like(y) if keep else None
    launch(
        _frozen_product, (-(-m // cut.m) * -(-n // cut.n),), x, weight, u, b, b if bias is None else bias,
        b if out_scale is None else out_scale, y, y if v is None else v,
        m, n, k, r, *x.stride(), *weight.stride(), *u.stride(), *b.stride(),
        HAS_BIAS=bias is not None, HAS_SCALE=out_scale is not None, KEEP=keep,
        BLOCK_M=cut.m, BLOCK_N=cut.n, BLOCK_K=cut.k, BLOCK_R=block(r), GROUP=8, PRECISION=precision(x.dtype),
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return y, v


@jit
def _frozen_product(
    x_ptr, w_ptr, u_ptr, b_ptr, bias_ptr, c_ptr, y_ptr, v_ptr,
    m, n, k, r, x_row, x_column, w_row, w_column, u_row, u_column, b_row, b_column,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of y. Programs are numbered through GROUP rows of tiles at a time, which share W in L2."""
    number = tl.program_id(0)
    down, across = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    first = number // (GROUP * across) * GROUP
    height = min(down - first, GROUP)
    tile_m = first + number % (GROUP * across) % height
    tile_n = number % (GROUP * across) // height
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    steps = tl.arange(0, BLOCK_K)
    x_at = x_ptr + rows[:, None] * x_row + steps[None, :].to(tl.int64) * x_column
    w_at = w_ptr + columns[None, :] * w_row + steps[:, None].to(tl.int64) * w_column
    v = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        x = tl.load(x_at, mask=(rows[:, None] < m) & (start + steps[None, :] < k), other=0.0)
        w = tl.load(w_at, mask=(columns[None, :] < n) & (start + steps[:, None] < k), other=0.0)
        v = tl.dot(x, w, v, input_precision=PRECISION)
        x_at += BLOCK_K * x_column
        w_at += BLOCK_K * w_column
    u_at = u_ptr + rows[:, None] * u_row + ranks[None, :] * u_column
    u = tl.load(u_at, mask=(rows[:, None] < m) & (ranks[None, :] < r), other=0.0)
    b_at = b_ptr + columns[None, :] * b_row + ranks[:, None].to(tl.int64) * b_column
    b = tl.load(b_at, mask=(columns[None, :] < n) & (ranks[:, None] < r), other=0.0).to(u.dtype)
    v = tl.dot(u, b, v, input_precision=PRECISION)
    at = rows[:, None] * n + columns[None, :]
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    if KEEP:
        tl.store(v_ptr + at, v.to(v_ptr.dtype.element_ty), mask=inside)
    if HAS_SCALE:
        v *= tl.load(c_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        v += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at, v.to(y_ptr.dtype.element_ty), mask=inside)
