"""Philox4x32: a counter-based random generator with the same numbers on every device.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Word i of a stream is a pure function of the key
and i, so any part of a tensor can be drawn anywhere, in any order, without a generator state. The counter layout
(word i is lane i mod 4 of counter i // 4) is part of saved adapters' meaning: a change needs a new name.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox(key: int, counter: Tensor, rounds: int = 10) -> Tensor:
    """Return the four 32-bit words of each counter.

    Args:
        key: 64-bit key, 0 <= key < 2**64.
        counter: low 64 bits of the 128-bit counter, [n], int64 and not negative; the high bits are zero.
        rounds: 10, the published default, or 7, the least that passes BigCrush.

    Returns:
        [n, 4] int64, each in [0, 2**32), on the device of `counter`.
    """
    key0, key1 = key & _MASK, key >> 32
    c0, c1 = counter & _MASK, counter >> 32
    c2 = c3 = torch.zeros_like(counter)
    for _ in range(rounds):
        high0, low0 = _multiply(c0, _MULTIPLIER[0])
        high1, low1 = _multiply(c2, _MULTIPLIER[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def philox_words(key: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the first `count` words of the stream `key`, [count] int64 in [0, 2**32)."""
    counters = torch.arange((count + 3) // 4, dtype=torch.int64, device=device)
    return philox(key, counters).flatten()[:count]


def philox_rows(key: int, rows: int, counters: int, first: int, rounds: int) -> NDArray[np.uint32]:
    """Return the words of the counters (j, i, 0, 0) for rows i from `first` on, [rows, 4, counters].

    A CPU does small integer arrays faster in numpy than in torch, and large ones no slower.
    """
    mask, half = np.uint64(_MASK), np.uint64(32)
    factor0, factor1 = map(np.uint64, _MULTIPLIER)
    c0 = np.arange(counters, dtype=np.uint64)[None]
    c1 = np.arange(first, first + rows, dtype=np.uint64)[:, None]
    c2 = c3 = np.zeros((1, 1), np.uint64)
    key0, key1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(rounds):
        product0, product1 = c0 * factor0, c2 * factor1
        c0, c1 = (product1 >> half) ^ c1 ^ np.uint64(key0), product1 & mask
        c2, c3 = (product0 >> half) ^ c3 ^ np.uint64(key1), product0 & mask
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    words = np.empty((rows, 4, counters), np.uint32)
    for place, word in enumerate((c0, c1, c2, c3)):
        words[:, place] = word
    return words


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of word * factor; by halves, since the product exceeds int64."""
    low = (word & 0xFFFF) * factor
    high = (word >> 16) * factor + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
