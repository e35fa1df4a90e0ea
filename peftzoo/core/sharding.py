"""Tensors of which each process holds a part."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def whole(tensor: Tensor) -> Tensor:
    """Return `tensor`, gathered from all processes where each holds a shard of it; differentiable.

    Outside of a forward FSDP2 leaves shards in the place of parameters. All processes have to come here together.
    The gradient of what every process computes alike from the whole reaches each shard once.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
