"""The update of RandLoRA, of full rank from frozen random matrices and trained diagonals.

    T = diag(lam) A diag(gamma), once for each of n columns of lam [r, n] and rows of gamma [n, s]:
        T[k, i, j] = lam[k, i] A[k, j] gamma[i, j]          A [r, s], s = min(in, out)
    dW = scale * B^T T, or its transpose where in > out     B [n r, l], l = max(in, out)

As rows of B^T T, T[k, i] is number k n + i ("coded", as all published code pairs them) or i r + k (the paper's sum).

Two orders of work. Factored: x T^T, then B, each token through n r >= s columns, T made again in the backward; it
keeps x, or where in > out its n r products with B. Merged: x dW^T with a dW that was made once; it keeps x. The
backward of both ends in dT [n r, s], and with P = scale * dT in T's order

    dlam[k, i] = sum_j P[k, i, j] A[k, j] gamma[i, j]       dgamma[i, j] = sum_k P[k, i, j] A[k, j] lam[k, i]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftzoo_kernels._backend import backend
from peftzoo_kernels._gemm import compute_dtype, mm_float32


def randlora_delta(
    lam: Tensor, gamma: Tensor, a: Tensor, b: Tensor, scale: float, coded: bool, transposed: bool
) -> Tensor:
    """Return dW, [l, s], or [s, l] if `transposed`, in the dtype of `b`; the arguments as in `randlora_linear`."""
    t = _scaled_rows(lam, gamma, a, scale, coded).to(b.dtype)
    return t.t() @ b if transposed else b.t() @ t


def randlora_linear_ref(
    x: Tensor, lam: Tensor, gamma: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, coded: bool = True
) -> Tensor:
    """Say in plain torch what `randlora_linear` computes, in the dtype of `x`."""
    t, b = _scaled_rows(lam, gamma, a, scale, coded).to(x.dtype), b.to(x.dtype)
    return (x @ t.t()) @ b if x.shape[-1] == t.shape[1] else (x @ b.t()) @ t


def randlora_linear(
    x: Tensor,
    lam: Tensor,
    gamma: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    coded: bool = True,
    delta: Tensor | None = None,
) -> Tensor:
    """Return x dW^T, factored, or merged if `delta` is given.

    Args:
        x: input, [..., in].
        lam: left diagonals, [r, n], trained; gradient in its dtype.
        gamma: right diagonals, [n, s], trained; gradient in its dtype.
        a: frozen, [r, s], in the dtype of `lam`.
        b: frozen, [n r, l], in the dtype of the product.
        scale: factor of the update.
        coded: pair the rows as published code does, not as the paper's sum does.
        delta: dW [out, in] as `randlora_delta` makes it, in the dtype of the product, without a gradient of its own.

    Returns:
        [..., out], in the dtype of `x`, or in autocast's where it is on.

    Raises:
        ValueError: the shapes do not chain.
    """
    r, n = lam.shape
    chained = gamma.shape == (n, a.shape[1]) and a.shape[0] == r and b.shape[0] == n * r
    if not chained or x.shape[-1] not in (a.shape[1], b.shape[1]):
        given = {"x": x, "lam": lam, "gamma": gamma, "a": a, "b": b}
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in given.items())
        raise ValueError(
            f"randlora_linear: {shapes} do not chain; "
            "want x [..., s or l], lam [r, n], gamma [n, s], a [r, s], b [n r, l]"
        )
    x = x.to(compute_dtype(x))
    if backend() == "eager" or torch.compiler.is_compiling():
        return randlora_linear_ref(x, lam, gamma, a, b, scale, coded)
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _RandloraLinear.apply(rows, lam, gamma, a, b, delta, scale, coded)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.shape[-1])


def merging_is_less_work(x: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether a forward and backward of `x` take fewer products merged than factored, dW and all."""
    tokens, small, (rows, large) = x.numel() // max(x.shape[-1], 1), a.shape[1], b.shape
    # for each token y, dx and dW; once dW = B^T T and dT = B dW
    merged = 3 * tokens * small * large + 2 * rows * small * large
    return merged < tokens * rows * (2 * large + 3 * small)


class _RandloraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lam: Tensor,
        gamma: Tensor,
        a: Tensor,
        b: Tensor,
        delta: Tensor | None,
        scale: float,
        coded: bool,
    ) -> Tensor:
        ctx.scale, ctx.coded, ctx.narrow = scale, coded, x.shape[1] == a.shape[1]
        if delta is not None:
            y, kept = x @ delta.t(), x
        else:
            t = _scaled_rows(lam, gamma, a, scale, coded).to(x.dtype)
            h = x @ (t if ctx.narrow else b).t()
            y, kept = h @ (b if ctx.narrow else t), x if ctx.narrow else h
        trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(kept if trains else None, lam, gamma, a, b, delta)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, lam, gamma, a, b, delta = ctx.saved_tensors
        need_x, need_lam, need_gamma = ctx.needs_input_grad[:3]
        with torch.autocast(dy.device.type, enabled=False):  # it would round the float32 gradients
            dx = dt = dlam = dgamma = None
            if delta is not None:
                dx = dy @ delta if need_x else None
                if kept is not None:
                    dw = mm_float32(dy.t(), kept)
                    dt = b.to(dw.dtype) @ (dw if ctx.narrow else dw.t())
            else:
                t = _scaled_rows(lam, gamma, a, ctx.scale, ctx.coded).to(dy.dtype)
                dh = dy @ (b if ctx.narrow else t).t()
                dx = dh @ (t if ctx.narrow else b) if need_x else None
                if kept is not None:
                    dt = mm_float32(dh.t(), kept) if ctx.narrow else mm_float32(kept.t(), dy)
            if dt is not None:
                p = _unpaired(dt, lam.shape[0], lam.shape[1], ctx.coded).mul(ctx.scale).mul(a[:, None])
                dlam = torch.einsum("kij,ij->ki", p, gamma.to(p.dtype)).to(lam.dtype) if need_lam else None
                dgamma = torch.einsum("kij,ki->ij", p, lam.to(p.dtype)).to(gamma.dtype) if need_gamma else None
        return dx, dlam, dgamma, None, None, None, None, None


def _scaled_rows(lam: Tensor, gamma: Tensor, a: Tensor, scale: float, coded: bool) -> Tensor:
    """Return scale * T, [n r, s], its rows in the order that meets those of B."""
    t = (scale * lam)[:, :, None] * a[:, None] * gamma
    return (t if coded else t.transpose(0, 1)).flatten(0, 1)


def _unpaired(t: Tensor, r: int, n: int, coded: bool) -> Tensor:
    """Return rows in the order of B as [r, n, s]."""
    return t.view(r, n, -1) if coded else t.view(n, r, -1).transpose(0, 1)
