"""What the processes of a run tell each other; one process alone is a run too."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, distributed

T = TypeVar("T")


def several() -> bool:
    """Whether more than one process takes part in this run."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def of_first(value: T) -> T:
    """Return what the first process has for `value`, on all; pickled, so tensors belong on the CPU."""
    if not several():
        return value
    own = [value]
    distributed.broadcast_object_list(own)
    return own[0]


def of_all(value: T) -> list[T]:
    """Return what each process has for `value`, in their order, on all; pickled, so tensors belong on the CPU."""
    if not several():
        return [value]
    everywhere: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everywhere, value)
    return everywhere


def summed(tensor: Tensor) -> Tensor:
    """Return the sum of `tensor` over all processes, in place."""
    if several():
        distributed.all_reduce(tensor)
    return tensor
