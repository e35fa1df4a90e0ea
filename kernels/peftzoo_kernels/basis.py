"""Seeded random bases, drawn where they are needed and stored nowhere.

Basis b of a stream is a row of 16-bit integers, and entry j of it is a pure function of (key, b, j):

    lane j mod 8 of the Philox4x32-7 counter (j // 8, b, 0, 0); lane 2 w + h is half h (0: low) of word w, signed

so neither the number of bases nor their length moves any entry: fewer or shorter ones are the beginning of more or
longer ones. A lane s stands for u = (s + 1/2) / 2^15, uniform in (-1, 1) and exact in float32. Counter, lanes and u
are definition 1, part of the meaning of saved adapters: a change needs a new number.

    basis_expand      t = sum_b c_b u_b
    basis_coef_grad   dc_b = <dt, u_b>

On a CPU the words are drawn in int64, some 32,000 counters at a time so that they stay in cache. The counter's layout
lets broadcasting share most of the first three rounds between the bases and between the entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from peftzoo_kernels.philox import philox

_MASK = 0xFFFFFFFF
_ROUNDS = 7
_CHUNK = 1 << 15  # counters: 389 million entries a second on one 2.6 GHz core; half or twice as many, 290 and 180


def basis_ref(key: int, count: int, length: int) -> Tensor:
    """Say in plain Philox what the bases 0 to count - 1 of a stream are: u, [count, length] float64."""
    counters = torch.arange((length + 7) // 8) + (torch.arange(count) << 32)[:, None]
    words = philox(key, counters.flatten(), _ROUNDS)
    lanes = torch.stack((words & 0xFFFF, words >> 16), dim=-1)
    signed = lanes - ((lanes >> 15) << 16)
    return ((signed.double() + 0.5) / 2**15).reshape(count, 8 * counters.shape[1])[:, :length]


def basis_lanes(
    key: int | Tensor, count: int, length: int, first: int = 0, start: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Return lanes of the bases from `first` on, [count, 4, ceil(length / 8), 2] int16: word, counter, half.

    Args:
        key: 64-bit key, either sign; an int64 scalar tensor is never read back from its device.
        count: number of bases.
        length: entries of each.
        first: number of the first basis.
        start: first entry, a multiple of 8.
        device: where they are drawn; the numbers are the same on each.
    """
    m = (length + 7) // 8
    c0 = torch.arange(start // 8, start // 8 + m, device=device)[None]
    c1 = torch.arange(first, first + count, device=device)[:, None]
    c2 = c3 = c1.new_zeros(1, 1)
    key0, key1 = key & _MASK, (key >> 32) & _MASK
    for number in range(_ROUNDS):
        # the low half of a product is used with the high half dirty and masked before it is multiplied again;
        # from the fourth round on the old words may be overwritten, as no new one is larger than its old one
        late = number > 2
        product0 = (c0.bitwise_and_(_MASK) if late else c0 & _MASK).mul_(0xD2511F53)
        product1 = (c2.bitwise_and_(_MASK) if late else c2 & _MASK).mul_(0xCD9E8D57)
        c1, c3 = (c1.bitwise_xor_(key0), c3.bitwise_xor_(key1)) if late else (c1 ^ key0, c3 ^ key1)
        high0, high1 = product0 >> 32, product1 >> 32
        c0, c2 = (high1.bitwise_xor_(c1), high0.bitwise_xor_(c3)) if late else (high1 ^ c1, high0 ^ c3)
        c1, c3 = product1, product0
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    words = torch.empty(count, 4, m, dtype=torch.int32, device=device)
    for index, word in enumerate((c0, c1, c2, c3)):
        words[:, index] = word
    return words.view(torch.int16).view(count, 4, m, 2)


def basis_matrix(
    key: int, count: int, length: int, sparsity: float | None, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the bases 0 to count - 1 as rows of unit variance, [count, length].

    Args:
        key: 64-bit key.
        count: number of rows.
        length: entries of each.
        sparsity: None for the uniform law, sqrt(3) u; q > 1 for the ternary one, which is 0 but for one entry in q.
        device: where to.
        dtype: what in.
    """
    matrix = torch.empty(count, length, device=device, dtype=dtype)
    edge = None if sparsity is None else round(2**15 / sparsity)
    for entries in _blocks(length):
        for rows, lanes in _drawn(key, count, entries, device):
            # both halves of a word at once
            words = lanes.view(torch.int32).squeeze(-1).transpose(1, 2).contiguous()
            signed = words.view(torch.int16).flatten(1)[:, : entries.stop - entries.start]
            if edge is None:
                values = signed.to(torch.promote_types(dtype, torch.float32)).add_(0.5).mul_(3**0.5 / 2**15)
            else:  # s of -2^15 to 2^15 - 1: the `edge` lowest and the `edge` highest of them
                ternary = (signed >= 2**15 - edge).to(torch.int8) - (signed < edge - 2**15).to(torch.int8)
                values = ternary.to(dtype).mul_((2**15 / edge) ** 0.5)
            matrix[rows, entries] = values
    return matrix


def basis_expand(coef: Tensor, key: int, length: int, lanes: Tensor | None = None) -> Tensor:
    """Return sum_b coef_b u_b, [length], in the dtype of `coef`, differentiable in it once.

    Args:
        coef: [count], floating.
        key: 64-bit key of the stream.
        length: entries of a basis.
        lanes: `basis_lanes(key, count, length)`, if they were kept, to be read in place of a new draw.
    """
    return _expand(coef, _signed(key), length, lanes)


def basis_coef_grad(grad: Tensor, key: int, count: int, lanes: Tensor | None = None) -> Tensor:
    """Return <grad, u_b> for the bases 0 to count - 1, [count], from grad [length] and in its dtype."""
    return _coef_grad(grad, _signed(key), count, lanes)


@torch.library.custom_op("peftzoo::basis_expand", mutates_args=())
def _expand(coef: Tensor, key: int, length: int, lanes: Tensor | None) -> Tensor:
    wide = coef.to(torch.promote_types(coef.dtype, torch.float32))
    total = wide.new_empty(length)
    for entries in _blocks(length):
        m = (entries.stop - entries.start + 7) // 8
        part = wide.new_zeros(8 * m)
        for rows, drawn in _drawn(key, coef.shape[0], entries, coef.device, lanes):
            part.addmv_(drawn.to(wide.dtype).flatten(1).t(), wide[rows])
        total[entries] = part.view(4, m, 2).transpose(0, 1).flatten()[: entries.stop - entries.start]
    return total.add_(wide.sum() / 2).mul_(2.0**-15).to(coef.dtype)


@torch.library.custom_op("peftzoo::basis_coef_grad", mutates_args=())
def _coef_grad(grad: Tensor, key: int, count: int, lanes: Tensor | None) -> Tensor:
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    dots = wide.new_zeros(count)
    for entries in _blocks(grad.shape[0]):
        part = torch.nn.functional.pad(wide[entries], (0, -(entries.stop - entries.start) % 8))
        part = part.view(-1, 4, 2).transpose(0, 1).flatten()
        for rows, drawn in _drawn(key, count, entries, grad.device, lanes):
            dots[rows].addmv_(drawn.to(wide.dtype).flatten(1), part)
    return dots.add_(wide.sum() / 2).mul_(2.0**-15).to(grad.dtype)


@_expand.register_fake
def _(coef: Tensor, key: int, length: int, lanes: Tensor | None) -> Tensor:
    return coef.new_empty(length)


@_coef_grad.register_fake
def _(grad: Tensor, key: int, count: int, lanes: Tensor | None) -> Tensor:
    return grad.new_empty(count)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    coef, ctx.key, _, lanes = inputs
    ctx.count = coef.shape[0]
    ctx.save_for_backward(lanes)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _coef_grad(grad, ctx.key, ctx.count, *ctx.saved_tensors), None, None, None


_expand.register_autograd(_backward, setup_context=_setup_context)


def _blocks(length: int) -> Iterator[slice]:
    """Yield the entries of a basis, as many at a time as stay in cache."""
    for start in range(0, length, 8 * _CHUNK):
        yield slice(start, min(length, start + 8 * _CHUNK))


def _drawn(
    key: int, count: int, entries: slice, device: torch.device, lanes: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (bases, their lanes at `entries`), as many at a time as stay in cache."""
    length = entries.stop - entries.start
    many = max(1, 8 * _CHUNK // length)
    for first in range(0, count, many):
        rows = slice(first, min(count, first + many))
        if lanes is None:
            yield rows, basis_lanes(key, rows.stop - first, length, first, entries.start, device)
        else:
            yield rows, lanes[rows, :, entries.start // 8 : (entries.stop + 7) // 8]


def _signed(key: int) -> int:
    """Return a 64-bit key as the signed integer that an op can take."""
    return key - 2**64 if key >= 2**63 else key
