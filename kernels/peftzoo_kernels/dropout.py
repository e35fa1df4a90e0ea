"""Seeded dropout: what is dropped is a pure function of a seed, drawn wherever it is needed and stored nowhere.

    drop(x) = x * keep / (1 - t / 2^16),    keep[i, j] = lane >= t,    t = round(p 2^16)

where the lane of entry (i, j) of a matrix with n columns is 16 bits of Philox4x32-7: with w = ceil(n / 8), lane j // w
of the counter (j mod w, i, 0, 0); lane 2 v + h is half h (0: low) of word v. So one counter serves eight entries in
eight slices of the columns, and a kernel that walks through one slice has the bits of the others at hand. The factor
is that of t, not of p: the mean of drop(x) is x.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from peftzoo_kernels._triton import jit, tl, tl_philox
from peftzoo_kernels.basis import basis_lanes
from peftzoo_kernels.philox import philox_rows

LANES = 8
_CHUNK = 1 << 14  # counters drawn at a time, so that they stay in cache
_ROUNDS = 7


def threshold(p: float) -> int:
    """Return t: lanes below it are dropped.

    Raises:
        ValueError: p is not at least 0 and below 1, or so close to 1 that nothing would be kept.
    """
    t = round(p * 65536) if 0 <= p < 1 else 65536
    if t == 65536:
        raise ValueError(f"dropout={p} must be at least 0 and below 1")
    return t


def dropout_factor(p: float) -> float:
    """Return what kept entries are multiplied by."""
    return 65536 / (65536 - threshold(p))


def draw_seed(device: torch.device | str) -> Tensor:
    """Return a seed from torch's generator of `device`: an int64 scalar that stays there, unread."""
    return torch.randint(2**62, (), device=device)


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Return what is kept, [rows, columns] bool, on the device of `seed`, an int64 scalar."""
    counters, least = -(-columns // LANES), threshold(p)
    keep = torch.empty(rows, LANES, counters, dtype=torch.bool, device=seed.device)
    for first in range(0, rows, many := max(1, _CHUNK // max(counters, 1))):
        block = keep[first : first + many]
        if seed.is_cpu:
            words = philox_rows(int(seed), block.shape[0], counters, first, _ROUNDS)
            halves = words.view(np.dtype("<u2")).reshape(-1, 4, counters, 2)
            for half in (0, 1):
                np.greater_equal(halves[..., half], np.uint16(least), out=block.numpy()[:, half::2])
        else:
            lanes = basis_lanes(seed, block.shape[0], LANES * counters, first, device=seed.device)
            lanes = lanes.to(torch.int32).bitwise_and_(0xFFFF)  # [rows, word, counter, half]
            for half in (0, 1):
                torch.ge(lanes[..., half], least, out=block[:, half::2])
    return keep.flatten(1)[:, :columns]


def dropped(x: Tensor, p: float, seed: Tensor, keep: Tensor | None = None) -> Tensor:
    """Return drop(x) for x [..., n], whose rows are counted over all leading dimensions; differentiable.

    Args:
        x: [..., n].
        p: share of the entries that is dropped.
        seed: an int64 scalar on the device of `x`.
        keep: `keep_mask` of these, if it is at hand.
    """
    if keep is None:
        keep = keep_mask(seed, x[..., 0].numel(), x.shape[-1], p)
    return torch.where(keep.view(x.shape), x, 0.0).mul_(dropout_factor(p))


@jit
def kept_lanes(seed, row, counter, threshold):  # type: ignore[no-untyped-def]
    """Return the eight masks of `counter` at `row`, lanes 0 to 7; the arguments broadcast."""
    row, counter = row.to(tl.int32), counter.to(tl.int32)  # of 64 bits each they would be another Philox
    zero = (row + counter) * 0
    word0, word1, word2, word3 = tl_philox(seed, zero + counter, zero + row, zero, zero, 7)
    return (
        (word0 & 0xFFFF) >= threshold,
        (word0 >> 16) >= threshold,
        (word1 & 0xFFFF) >= threshold,
        (word1 >> 16) >= threshold,
        (word2 & 0xFFFF) >= threshold,
        (word2 >> 16) >= threshold,
        (word3 & 0xFFFF) >= threshold,
        (word3 >> 16) >= threshold,
    )
