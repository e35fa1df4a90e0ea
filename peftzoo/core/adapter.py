"""The contract of a method: one adapter on one linear layer is one module that says what it adds.

A method file fills in `LinearAdapter`. Frozen tensors are buffers, trained ones are Parameters, and nothing is keyed
by an adapter's name; names, merging, casting, devices and files are the business of the rest of core.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from peftzoo.errors import ModelError
from peftzoo_kernels import Weight, compute_dtype, dense, draw_seed, dropped, gather_matmul, low_rank_linear

if TYPE_CHECKING:
    from peftzoo.core.config import ZooConfig


class Factors(NamedTuple):
    """A low-rank update: y = out_scale * (x W^T + scale * ((drop(x) a^T) * s) b^T) + bias.

    Attributes:
        a: down factor, [r, in]; or, as integers [r], the input columns that a gather takes instead.
        b: up factor, [out, r].
        s: middle diagonal, [r]; None means all ones.
        scale: scalar factor.
        out_scale: factor of every output, the frozen product included, [out]; None means all ones.
        drops_all: out_scale multiplies drop(x) W^T, and x W^T - drop(x) W^T is left as it is: peft's DoRA.
    """

    a: Tensor
    b: Tensor
    s: Tensor | None = None
    scale: float = 1.0
    out_scale: Tensor | None = None
    drops_all: bool = False

    def linear(
        self,
        x: Tensor,
        weight: Weight | None = None,
        bias: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """Return y, [..., out], from x [..., in]; without a weight, out_scale times the low-rank product alone."""
        if dropout and (self.drops_all or not self.a.is_floating_point()):
            kept = dropped(x, dropout, draw_seed(x.device))
            if weight is None:
                return self.linear(kept)
            w = dense(weight, compute_dtype(x))
            if self.drops_all:
                return self.linear(kept, weight) + F.linear(x - kept, w, bias)
            return self.linear(kept) + F.linear(x, w, bias)
        if self.a.is_floating_point():
            return low_rank_linear(
                x, weight, self.a, self.b, self.s, bias, self.out_scale, scale=self.scale, dropout=dropout
            )
        return gather_matmul(x, weight, self.a, self._up(), bias, self.scale)

    def dense(self, in_features: int) -> tuple[Tensor, Tensor]:
        """Return a [r, in] and b * s [out, r]: the two matrices of a plain LoRA, the scales left out."""
        if self.a.is_floating_point():
            return self.a, self._up()
        rows = self.b.new_zeros(self.a.shape[0], in_features)
        return rows.scatter(1, self.a[:, None], 1.0), self._up()

    def _up(self) -> Tensor:
        return self.b if self.s is None else self.b * self.s


class LinearAdapter(nn.Module, ABC):
    """What one method adds to one frozen layer y = x W^T + bias, W [out, in].

    The law that is tested for every method: `forward(x) == x @ delta_weight(W).T`, and both are 0 after `init` unless
    the method's docstring says otherwise. A low-rank method gives `__init__`, `init` and `factors`, nothing else; any
    other gives `forward` and `delta_weight` in place of `factors`.

    Attributes:
        config: the method's settings for this layer.
        in_features: columns of W.
        out_features: rows of W.
        layer_name: dotted name of the adapted layer in its model; "" for an adapter that stands on its own.
        in_place: the update is to stand in the frozen weight itself; for factors (a, b, scale) with a gather for `a`.
    """

    in_place: bool = False

    def __init__(self, config: ZooConfig, in_features: int, out_features: int) -> None:
        """Allocate the tensors and check the sizes; values come from `init` or from a file."""
        super().__init__()
        self.config = config
        self.in_features = in_features
        self.out_features = out_features
        self.layer_name = ""
        self._read_weight: Callable[[], Tensor] | None = None

    @abstractmethod
    def init(self, weight: Tensor) -> None:
        """Fill the tensors for training from the frozen weight, [out, in] float32; never called on loading."""

    def factors(self) -> Factors | None:
        """Return the update as low-rank factors, or None when the method is not low-rank."""
        return None

    def delta_weight(self, weight: Tensor) -> Tensor:
        """Return the update of the weight, [out, in]; `weight` is the frozen one, for methods that depend on it."""
        factors = self._low_rank()
        a, b = factors.dense(self.in_features)
        delta = factors.scale * (b @ a)
        if factors.out_scale is None:
            return delta
        weight = weight.to(delta.dtype)
        return factors.out_scale[:, None] * (weight + delta) - weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the update of the output, [..., in] -> [..., out], in the dtype of `x`."""
        return self._update(x, 0.0)

    def with_dropout(self, x: Tensor, dropout: float) -> Tensor:
        """Return the update of the output when a share `dropout` of the entries of x is kept from it."""
        if not dropout:
            return cast(Tensor, self(x))
        factors = self.factors()
        if factors is None or factors.drops_all:
            return cast(Tensor, self(dropped(x, dropout, draw_seed(x.device))))
        return self._update(x, dropout)

    def _update(self, x: Tensor, dropout: float) -> Tensor:
        factors = self._low_rank()
        update = factors.linear(x, dropout=dropout)
        if factors.out_scale is None:
            return update
        return update + F.linear(x, self.frozen_weight().to(x.dtype)) * (factors.out_scale - 1).to(x.dtype)

    def stand_on(self, layer_name: str, frozen_weight: Callable[[], Tensor]) -> None:
        """Take note of the layer this adapter sits on: its name, and how to read its frozen weight [out, in]."""
        self.layer_name, self._read_weight = layer_name, frozen_weight

    @classmethod
    def share(cls, adapters: Sequence[Self]) -> None:
        """Let the adapters of one name on one model know each other, for what they share.

        Called once, when all of them are in place, in the order of the layers. A reference to another adapter must
        not become a child module: keep it in a tuple. An adapter that stands alone is never called.
        """
        return None

    def frozen_weight(self) -> Tensor:
        """Return the frozen weight of the layer, [out, in], dequantised, in the adapter's dtype, without any adapter.

        Raises:
            ModelError: the adapter stands on no layer.
        """
        if self._read_weight is None:
            raise ModelError(f"{type(self).__name__} needs the frozen weight and stands on no layer")
        return self._read_weight().detach().to(next(self.parameters()).dtype)

    def penalty(self, accumulation: int = 1) -> Tensor | None:
        """Return this layer's penalty, a scalar, or None.

        Trainers average it over the layers. It is decoupled from the learning rate: its gradient, divided by the peak
        learning rate, is added after clipping.

        Args:
            accumulation: micro-batches of the step.
        """
        return None

    def regularizer(self) -> Tensor | None:
        """Return this layer's extra term of the loss, a scalar, or None.

        Trainers sum it over the layers, and clip its gradient together with the task's.
        """
        return None

    def after_step(self) -> None:
        """Called once after each optimizer step."""
        return None

    def _low_rank(self) -> Factors:
        factors = self.factors()
        if factors is None:
            raise TypeError(f"{type(self).__name__} gives neither factors() nor forward() and delta_weight()")
        return factors


def fill_unloaded(adapter: LinearAdapter) -> None:
    """Mark every tensor of `adapter` as still to come: NaN, or -1 for integers."""
    with torch.no_grad():
        for tensor in adapter.state_dict().values():  # filling a tensor on the meta device does nothing
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)


def unloaded_tensors(adapter: LinearAdapter) -> list[str]:
    """Return the names of the tensors that still hold what `fill_unloaded` wrote."""
    return [
        name
        for name, tensor in adapter.state_dict().items()
        if tensor.is_meta
        or (tensor.numel() and bool((tensor.isnan() if tensor.is_floating_point() else tensor == -1).all()))
    ]
