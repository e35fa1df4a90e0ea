"""Random numbers that depend on nothing but a seed and a name.

Every draw of the zoo is keyed by (seed, layer name, tensor name), so layers differ, reloading repeats them, every
device and every rank of a run draws the same, and torch's global generator is never touched.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from peftzoo_kernels import philox_words


def stream_key(seed: int, layer: str, tensor: str) -> int:
    """Return the 64-bit key of the random stream of one tensor of one layer."""
    name = f"peftzoo/1\0{seed}\0{layer}\0{tensor}".encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "little")


def uniform(key: int, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    """Return float32 draws from [low, high), 24 random bits each, in `shape`, on the CPU."""
    bits = philox_words(key, torch.Size(shape).numel()) >> 8
    return (low + (high - low) * (bits.double() / 2**24)).float().reshape(shape)


def normal(key: int, shape: tuple[int, ...]) -> Tensor:
    """Return float32 draws from the standard normal distribution, in `shape`, on the CPU, by Box and Muller."""
    radius, angle = uniform(key, (2, *shape), 0.0, 1.0).double()
    return ((-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * torch.pi * angle)).float()


def permutation(key: int, n: int) -> Tensor:
    """Return a random order of range(n), [n] int64, on the CPU."""
    return torch.argsort(philox_words(key, n), stable=True)
