"""Trained columns that stand in the frozen weight itself: the forward is the frozen product and nothing else.

An adapter asks for it with `in_place` and with factors whose `a` is a gather, dW[:, C] = scale * P. Its layer then
writes W'[:, C] = W[:, C] + scale * P into the weight and keeps W[:, C], so

    y = x W'^T + bias    dx = dy W'    dP = scale * dy^T x[:, C]

and the backward keeps x[:, C] alone. Nothing has to be told that P has changed or that the base is wanted back:

- every forward asks first whether the weight holds the columns of P as it is now, and writes them if not;
- every backward asks whether it still holds those of its own forward: another adapter, a reference pass without
  adapters or a step may have come between;
- whatever reads the base by way of the layer or a state dict, or moves it, first gets W[:, C] back, bit for bit.

Asking costs no arithmetic. What cannot be seen is a write to P through `.data` outside of any torch optimizer: call
`peftzoo.after_step(model)` after it. What reads `base_layer.weight` itself finds W' there; `release` gives W back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from peftzoo.core.base_layer import layer_kind
from peftzoo.core.cache import StepCache
from peftzoo.errors import ModelError
from peftzoo_kernels import compute_dtype, mm_float32

if TYPE_CHECKING:
    from peftzoo.core.adapter import Factors, LinearAdapter
    from peftzoo.core.base_layer import LayerKind


class Columns(NamedTuple):
    """What a weight is to hold in some of its columns.

    Attributes:
        weight: the parameter of the base layer.
        indices: the columns, [r].
        values: what is to stand there, [out, r], in the weight's dtype.
    """

    weight: Tensor
    indices: Tensor
    values: Tensor


class InPlace(nn.Module, BaseTunerLayer):
    """A layer over a frozen `base_layer` whose weight can hold the columns of one adapter at a time."""

    base_layer: nn.Module
    kind: LayerKind
    layer_name: str

    def __init__(self) -> None:
        super().__init__()
        self._held: Columns | None = None
        self._frozen_columns: Tensor | None = None
        self._wanted: StepCache[Columns] = StepCache()
        self._own_weight: tuple[Tensor, ...] = ()  # in a tuple, so that it does not become a parameter of this module

    def allow_in_place(self) -> None:
        """Make ready to hold the columns of an adapter.

        Raises:
            ModelError: the weight cannot hold any: it is packed, convolved with, or sharded.
        """
        _refuse_kind(self.kind, self.layer_name or "this layer")
        self._own_weight = (cast(Tensor, self.base_layer.weight),)
        self._refuse_sharded()

    def in_place_factors(self, adapter: LinearAdapter) -> Factors | None:
        """Return the factors of `adapter` if they are to stand in the weight and can; None if they are to be added."""
        bias = cast("Tensor | None", self.base_layer.bias)
        if not adapter.in_place or self.base_layer.weight.requires_grad or (bias is not None and bias.requires_grad):
            return None
        factors = adapter.factors()
        if factors is None or factors.a.is_floating_point() or not (factors.s is factors.out_scale is None):
            return None
        return factors

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph must not keep what it found written
    def in_place_linear(self, x: Tensor, factors: Factors) -> Tensor:
        """Return the output with the gathered update of `factors` standing in the weight, [..., in] -> [..., out].

        Raises:
            ModelError: the weight was sharded since.
        """
        if self._held is not None and self._held.weight is not self.base_layer.weight:
            self.release()
        columns = self._wanted.get(lambda: self._make_columns(factors), factors.a, factors.b)
        self.hold(columns)
        x = x.to(compute_dtype(x))
        y: Tensor = _InPlaceLinear.apply(x, factors.b, self, columns, factors.scale)  # type: ignore[no-untyped-call]
        return y

    def hold(self, columns: Columns) -> None:
        """Write `columns` into the weight, whose own values are kept for `release`; nothing if they stand there."""
        if self._held is columns:
            return
        self.release()
        matrix = self.kind.matrix(columns.weight)
        with torch.inference_mode(False), torch.no_grad():
            self._frozen_columns = matrix.index_select(1, columns.indices)
            matrix.index_copy_(1, columns.indices, columns.values)
        self._held = columns

    @contextmanager
    def holding(self, columns: Columns) -> Iterator[None]:
        """Hold `columns` for a while; a weight that held none before holds none after."""
        was_released = self._held is None
        self.hold(columns)
        try:
            yield
        finally:
            if was_released:
                self.release()

    def release(self) -> None:
        """Put back the weight's own columns, bit for bit; nothing if no others stand there."""
        if self._held is None:
            return
        with torch.no_grad():
            matrix = self.kind.matrix(self._held.weight)
            matrix.index_copy_(1, self._held.indices, cast(Tensor, self._frozen_columns))
        self._held = self._frozen_columns = None
        self._wanted.drop()  # the weight may change before it holds columns again

    def _make_columns(self, factors: Factors) -> Columns:
        self.release()
        self._refuse_sharded()
        weight = cast(Tensor, self.base_layer.weight)
        with torch.inference_mode(False), torch.no_grad():
            indices = factors.a.clone()
            frozen = self.kind.matrix(weight).index_select(1, indices)
            values = frozen.to(factors.b.dtype) + factors.scale * factors.b
            return Columns(weight, indices, values.to(weight.dtype))

    def _refuse_sharded(self) -> None:
        weight = cast(Tensor, self.base_layer.weight)
        # within a forward a gathered weight looks like any other, but it is not the one that the adapter was put on
        replaced = torch.distributed.is_initialized() and weight is not self._own_weight[0]
        if replaced or isinstance(weight, DTensor) or hasattr(weight, "ds_id"):
            raise ModelError(
                "in_place: each process holds a part of the base weight (FSDP, ZeRO-3), and what is written into a "
                "gathered copy is lost; set in_place to false, which trains the same"
            )

    # what hands out or changes the whole weight

    def get_base_weight(self) -> Tensor:
        """Return the weight as the base layer stores it, dequantised where it is packed."""
        self.release()
        return cast(Tensor, super().get_base_weight())

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, to train or not."""
        self.release()
        super().set_adapter(adapter_names, inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off."""
        self.release()
        super().enable_adapters(enabled)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.release()
        done = super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._own_weight = self._own_weight and (cast(Tensor, self.base_layer.weight),)
        return done

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.release()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.release()
        super()._load_from_state_dict(*args, **kwargs)


class _InPlaceLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor, layer: InPlace, columns: Columns, scale: float) -> Tensor:
        ctx.layer, ctx.columns, ctx.scale = layer, columns, scale
        ctx.save_for_backward(x.index_select(-1, columns.indices) if ctx.needs_input_grad[1] else None)
        bias = cast("Tensor | None", layer.base_layer.bias)
        weight = layer.kind.matrix(columns.weight)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (gathered,) = ctx.saved_tensors
        dx = dp = None
        # a backward inside an autocast block would round the float32 gradient
        with torch.autocast(dy.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                with ctx.layer.holding(ctx.columns):
                    dx = dy @ ctx.layer.kind.matrix(ctx.columns.weight).to(dy.dtype)
            if gathered is not None:
                rows = dy.reshape(-1, dy.shape[-1]), gathered.reshape(-1, gathered.shape[-1])
                dp = ctx.scale * mm_float32(rows[0].t(), rows[1])
        return dx, dp, None, None, None


def check_in_place(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    """Refuse to write into weights that are packed, or that other parts of the model use too.

    Args:
        model: the whole model.
        targets: the layers that would be written into, by name.

    Raises:
        ModelError: with the names of those layers.
    """
    for name, layer in targets.items():
        _refuse_kind(layer_kind(layer), name)
    modules = [module for _, module in model.named_modules(remove_duplicate=False)]
    uses = Counter(id(parameter) for module in modules for parameter in module.parameters(recurse=False))
    shared = [name for name, layer in targets.items() if uses[id(layer.weight)] > 1]
    if shared:
        raise ModelError(
            f"in_place would change the weight of {', '.join(shared[:3])} for all parts of the model that share it; "
            "set in_place to false, which trains the same, or leave the layer out of target_modules"
        )


def _refuse_kind(kind: LayerKind | None, name: str) -> None:
    if kind is None or kind.forward is None:
        raise ModelError(
            f"in_place cannot write columns into the weight of {name} ({kind.name if kind else 'unknown'}); set "
            "in_place to false, which trains the same"
        )
