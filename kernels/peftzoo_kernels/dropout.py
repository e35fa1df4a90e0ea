"""Seeded dropout: what is dropped is a pure function of a seed, drawn wherever it is needed and stored nowhere.

    drop(x) = x * keep / (1 - t / 2^16),    keep[i, j] = lane >= t,    t = round(p 2^16)

where the lane of entry (i, j) of a matrix with n columns is 16 bits of Philox4x32-7: with w = ceil(n / 8), lane j // w
of the counter (j mod w, i, 0, 0); lane 2 v + h is half h (0: low) of word v. So one counter serves eight entries in
eight slices of the columns, and a kernel that walks through one slice has the bits of the others at hand. The factor
is that of t, not of p: the mean of drop(x) is x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftzoo_kernels._triton import jit, tl, tl_philox
from peftzoo_kernels.basis import basis_lanes

LANES = 8
_CHUNK = 1 << 15  # counters drawn at a time, so that they stay in cache


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
    keep = torch.empty(rows, columns, dtype=torch.bool, device=seed.device)
    for first in range(0, rows, many := max(1, _CHUNK // max(counters, 1))):
        block = keep[first : first + many]
        lanes = basis_lanes(seed, block.shape[0], LANES * counters, first, device=seed.device)
        lanes = lanes.transpose(2, 3).flatten(1)[:, :columns]  # [rows, word, counter, half] -> [rows, column]
        torch.ge(lanes.to(torch.int32).bitwise_and_(0xFFFF), least, out=block)
    return keep


def dropped(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Return drop(x) for x [..., n], whose rows are counted over all leading dimensions; differentiable."""
    keep = keep_mask(seed, x[..., 0].numel(), x.shape[-1], p)
    return x * keep.view(x.shape) * dropout_factor(p)


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
