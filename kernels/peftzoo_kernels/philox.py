"""Philox4x32: a counter-based random generator with the same numbers on every device.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Word i of a stream is a pure function of the key
and i, so any part of a tensor can be drawn anywhere, in any order, without a generator state. The counter layout
(word i is lane i mod 4 of counter i // 4) is part of saved adapters' meaning: a change needs a new name.
"""

from __future__ import annotations

import torch
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


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of word * factor; by halves, since the product exceeds int64."""
    low = (word & 0xFFFF) * factor
    high = (word >> 16) * factor + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
