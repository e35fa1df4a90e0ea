"""Layers that are called with one input, such as q, k and v of an attention block, computed in one op.

The first of them that is called computes the outputs of all, and keeps the others' until they are asked for with that
same input. Nothing else of the model changes, so whether an output still holds is asked each time:

- the input is the same object in the same version, and gradients, autocast, stream and saved-tensor hooks are as they
  were: the last tell a checkpointed region from what is outside of it and from its own recomputation;
- the layer is one of the group (a replica of it is not), and all that its output follows from is as it was.

Otherwise the layer computes its own. One group at a time keeps outputs, in each thread: what is never asked for goes
when the next group is called, and copies of a model hold none.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from peftzoo.core.adapter import Factors
from peftzoo.core.base_layer import PLAIN
from peftzoo.core.cache import state_of
from peftzoo_kernels import LowRankLayer, Weight, grouped_low_rank_linear


class Product(NamedTuple):
    """A frozen product and its low-rank update, for the op to take.

    Attributes:
        weight: frozen weight, [out, in].
        bias: frozen bias, [out].
        dropout: share of the input that the update does not see.
        factors: makes the update; None where it is not low-rank.
        sources: gives every tensor that the output follows from, beside the input.
        settings: every number.
    """

    weight: Weight
    bias: Tensor | None
    dropout: float
    factors: Callable[[], Factors | None]
    sources: Callable[[], Iterable[Tensor]]
    settings: tuple[Any, ...] = ()

    def state(self, sources: Sequence[Tensor]) -> tuple[Any, ...]:
        """Return what is another whenever the output would be, or its graph, from what `sources` gives."""
        return self.dropout, self.settings, *(one.requires_grad for one in sources), *state_of(sources)


class FusedLayer(Protocol):
    """A layer whose forward calls `fused_output`."""

    shared_input: SharedInput | None

    def product(self, x: Tensor) -> Product | None:
        """Return what is to be computed of `x`; None where it is not a frozen product and one update."""
        ...


def fused_output(layer: FusedLayer, x: Tensor, product: Product) -> Tensor | None:
    """Return `product` of `x` for `layer`, [..., out], by the fused op; None where the update is not low-rank."""
    if layer.shared_input is not None and not torch.compiler.is_compiling():
        y = layer.shared_input.output(layer, x, product)
        if y is not None:
            return y
    factors = product.factors()
    return None if factors is None else factors.linear(x, product.weight, product.bias, product.dropout)


class SharedInput:
    """The layers of a model that are called with one input.

    Args:
        members: two or more, in the order in which they are called.
    """

    def __init__(self, members: Sequence[FusedLayer]) -> None:
        self.members = tuple(members)

    def output(self, layer: FusedLayer, x: Tensor, product: Product) -> Tensor | None:
        """Return the output of `layer`, with that of the others or kept from theirs; None if it is to make its own."""
        place = next((i for i, member in enumerate(self.members) if member is layer), None)
        if place is None or not _can_be_told_apart(x) or any(_gets_its_own_input(member) for member in self.members):
            return None
        now = _Circumstances.of(x)
        kept = _kept_here.outputs
        if kept is not None and kept.group is self and kept.x() is x and now.same_as(kept.circumstances):
            return kept.take(place, product)
        products = [product if member is layer else member.product(x) for member in self.members]
        joined = _joined(x, products)
        if joined is None:
            return None
        layers, waiting = joined
        forget_outputs()  # before there are others, not after
        ys: list[Tensor] = grouped_low_rank_linear(x, layers, product.dropout)
        _kept_here.outputs = _Kept(
            self, weakref.ref(x), now, {i: (*one, ys[i]) for i, one in enumerate(waiting) if i != place}
        )
        return ys[place]


def forget_outputs() -> None:
    """Let go of what is kept in this thread."""
    _kept_here.outputs = None


class _Circumstances(NamedTuple):
    """What, beside x and the layers, decides what is computed and what is recorded of it."""

    values: tuple[Any, ...]
    hooks: Any

    @classmethod
    def of(cls, x: Tensor) -> _Circumstances:
        device = x.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
        values = x._version, x.requires_grad, torch.is_grad_enabled(), autocast, stream
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        return cls(values, hooks and hooks[0])

    def same_as(self, other: _Circumstances) -> bool:
        return self.hooks is other.hooks and self.values == other.values


class _Kept(NamedTuple):
    """Outputs that wait to be asked for, each with its state and the tensors that this names."""

    group: SharedInput
    x: Callable[[], Tensor | None]
    circumstances: _Circumstances
    outputs: dict[int, tuple[tuple[Any, ...], list[Tensor], Tensor]]

    def take(self, place: int, product: Product) -> Tensor | None:
        """Return the output of the layer at `place` if it is that of `product`, and keep it no longer."""
        found = self.outputs.pop(place, None)
        if not self.outputs:
            forget_outputs()
        if found is None:
            return None
        state, _, y = found
        return y if state == product.state(list(product.sources())) else None


class _KeptHere(threading.local):
    outputs: _Kept | None = None


_kept_here = _KeptHere()


def _can_be_told_apart(x: Tensor) -> bool:
    """Whether a change of `x` would show: an inference tensor has no version, and a wrapper may not have its own."""
    return type(x) in PLAIN and not x.is_inference() and not torch._C._are_functorch_transforms_active()


def _gets_its_own_input(layer: Any) -> bool:
    """Whether hooks hand the layer another tensor than its caller did."""
    return bool(layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def _joined(
    x: Tensor, products: Sequence[Product | None]
) -> tuple[list[LowRankLayer], list[tuple[tuple[Any, ...], list[Tensor]]]] | None:
    """Return what the op takes, and each layer's state with its tensors; None if it cannot do all of them at once."""
    layers, states, dropouts = [], [], set()
    for product in products:
        if product is None:
            return None
        dropouts.add(product.dropout)
        sources = list(product.sources())
        if any(one.device != x.device or one.is_inference() for one in sources):
            return None
        factors = product.factors()
        if factors is None or not factors.a.is_floating_point() or (factors.drops_all and product.dropout):
            return None
        a, b, s, scale, out_scale, _ = factors
        layers.append(LowRankLayer(product.weight, a, b, s, product.bias, out_scale, scale))
        states.append((product.state(sources), sources))
    return (layers, states) if len(dropouts) == 1 else None
