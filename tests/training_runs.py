"""The run that one process takes alone and two processes take together."""

from __future__ import annotations

import torch
from helpers import adapted, make_batches, shake

RATE = 1e-2
MICRO_BATCHES = 2
STEPS = make_batches(4)


def started(method, model, seed=0):
    """Return a copy of `model` with an adapter away from its start; `seed` is torch's, and must make no difference."""
    torch.manual_seed(0 if method.adopted else seed)
    return shake(adapted(method, model)).train()
