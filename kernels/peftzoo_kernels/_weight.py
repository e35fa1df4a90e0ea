"""A frozen weight, plain or packed: what an op needs to know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedWeight:
    """A quantised weight that an op unpacks for each product, and keeps packed in between.

    Eager calls take it; a registered op, and so `torch.compile`, takes tensors alone.

    Attributes:
        packed: what is stored; the only tensor of the weight that a backward keeps.
        unpack: (packed, dtype) -> W [out, in] in that dtype.
        shape: of W.
    """

    packed: Tensor
    unpack: Callable[[Tensor, torch.dtype], Tensor]
    shape: torch.Size

    requires_grad = False


Weight = Tensor | PackedWeight


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return W [out, in] in `dtype`."""
    return weight.unpack(weight.packed, dtype) if isinstance(weight, PackedWeight) else weight.to(dtype)


def stored(weight: Weight) -> Tensor:
    """Return the tensor that a backward keeps of a weight."""
    return weight.packed if isinstance(weight, PackedWeight) else weight


def restored(tensor: Tensor, weight: PackedWeight | None) -> Weight:
    """Return the weight of which `tensor` was kept; `weight` is that of before, if it was packed."""
    return tensor if weight is None else PackedWeight(tensor, weight.unpack, weight.shape)
