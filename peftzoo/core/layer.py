"""ZooLinear: a frozen linear layer, or convolution, with any number of adapters on it, of any methods, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from peftzoo.core.adapter import LinearAdapter, fill_unloaded, unloaded_tensors
from peftzoo.core.base_layer import layer_kind, plain_weight
from peftzoo.core.config import ZooConfig
from peftzoo.core.in_place import InPlace
from peftzoo.core.names import check_adapter_name
from peftzoo.core.registry import get_method
from peftzoo.core.shared_input import Product, SharedInput, fused_output
from peftzoo.errors import ModelError
from peftzoo_kernels import Weight


class ZooLinear(InPlace):
    """Wraps one frozen layer; adds what its active adapters say.

    Args:
        base_layer: the frozen layer, of one of `base_layer.KINDS`.
        layer_name: its dotted name in the model, which keys the random draws of its adapters.

    Raises:
        ModelError: no adapter can sit on a layer of this type.
    """

    adapter_layer_names = ("peftzoo_adapter",)
    shared_input: SharedInput | None = None
    # of BaseTunerLayer, whose types nn.Module's would hide
    active_adapters: list[str]
    set_base_weight: Callable[[Tensor], None]
    _get_base_layer_device_and_dtype: Callable[[nn.Module], tuple[torch.device, torch.dtype]]
    _weight_before_merge: Tensor | None

    def __init__(self, base_layer: nn.Module, layer_name: str = "") -> None:
        super().__init__()
        kind = layer_kind(base_layer)
        if kind is None:
            raise ModelError(f"no adapter can sit on {layer_name or 'a layer'} of type {type(base_layer).__name__}")
        self.base_layer = base_layer
        self.kind = kind
        self.layer_name = layer_name
        self.quantization_backend = resolve_quantization_backend(base_layer)
        self.in_features, self.out_features = kind.sizes(base_layer)
        self.peftzoo_adapter = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._active_adapter: list[str] = []
        self._unloaded: set[str] = set()
        self._uncalibrated: set[str] = set()
        # a buffer, so that it follows the base to another device or dtype while an adapter is merged
        self.register_buffer("_weight_before_merge", None, persistent=False)

    def frozen_weight(self) -> Tensor:
        """Return the frozen weight, [out, in], dequantised where it is packed; without any merged adapter."""
        weight = self._weight_before_merge if self._weight_before_merge is not None else self.get_base_weight()
        return self.kind.matrix(weight)

    def add_adapter(self, name: str, config: ZooConfig) -> None:
        """Add an adapter: filled by its method's `init`, or left to be filled from a file.

        Adapters are float32, whatever the base is stored in (float64 on a float64 base).

        Raises:
            ModelError: the method adapts no layer of this kind, or not this one.
        """
        check_adapter_name(name)
        method = get_method(config.method_name)
        if self.kind.name not in method.layers:
            raise ModelError(
                f"{method.name} adapts no {self.kind.name} layer such as {self.layer_name or 'this'}; it adapts "
                f"{', '.join(method.layers)}"
            )
        if why := config.refusal(self.kind.name):
            raise ModelError(f"{self.layer_name or self.kind.name}: {method.name}: {why}")
        own = config.for_layer(self.layer_name)
        if own is None:
            raise ModelError(f"adapter {name!r}: rank_pattern gives {self.layer_name or 'this layer'} the rank 0")
        adapter_type = cast(type[LinearAdapter], method.adapter)
        adapter = adapter_type(own, self.in_features, self.out_features)
        adapter.stand_on(self.layer_name, self.frozen_weight)
        if adapter.in_place:
            self.allow_in_place()
        base = cast(Tensor, self.base_layer.weight)
        dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
        adapter.to(dtype)
        empty = base.is_meta or any(parameter.is_meta for parameter in adapter.parameters())
        if not empty:
            adapter.to(base.device)
        if empty or config.from_file:
            fill_unloaded(adapter)
            self._unloaded.add(name)
        else:
            with torch.no_grad():
                adapter.init(self.frozen_weight().to(dtype))
            if config.needs_data:
                self._uncalibrated.add(name)
        self.peftzoo_adapter[name] = adapter

    def loaded(self, name: str) -> None:
        """Take note that a file with every tensor of an adapter was found fit, so that none needs to be looked for."""
        self._unloaded.discard(name)

    def calibrated(self, name: str) -> None:
        """Take note that an adapter got the start that its method takes from data."""
        self._uncalibrated.discard(name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output plus the updates of the active adapters, [..., in] -> [..., out]."""
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        adapters = self._at_work()
        weight = None if args or kwargs else self._plain_weight(adapters, x)
        if weight is not None and (held := self.in_place_factors(adapters[0])) is not None:
            return self.in_place_linear(x, held)
        self.release()
        if weight is not None and (fused := fused_output(self, x, self._product(adapters[0], weight))) is not None:
            return fused
        y: Tensor = self.base_layer(x, *args, **kwargs)
        for adapter in adapters:
            y = y + self.kind.update(self.base_layer, adapter, x, self._dropout(adapter)).to(y.dtype)
        return y

    def product(self, x: Tensor) -> Product | None:
        """Return what the fused op is to compute of `x`; None where `forward` computes it in another way."""
        adapters = self._at_work()
        weight = self._plain_weight(adapters, x)
        if weight is None or self.in_place_factors(adapters[0]) is not None:
            return None
        self.release()
        return self._product(adapters[0], weight)

    def _at_work(self) -> list[LinearAdapter]:
        return [] if self._disable_adapters or self.merged_adapters else self.active()

    def _plain_weight(self, adapters: list[LinearAdapter], x: Tensor) -> Weight | None:
        return plain_weight(self.base_layer, self.kind, x.dtype) if len(adapters) == 1 else None

    def _product(self, adapter: LinearAdapter, weight: Weight) -> Product:
        def sources() -> list[Tensor]:
            return [*self.base_layer.parameters(), *adapter.parameters(), *adapter.buffers()]

        bias = cast("Tensor | None", self.base_layer.bias)
        return Product(weight, bias, self._dropout(adapter), adapter.factors, sources)

    def active(self) -> list[LinearAdapter]:
        """Return the active adapters of this layer, merged or not, disabled or not.

        Raises:
            ModelError: one of them was made to be loaded, or to be calibrated, and never was.
        """
        names = [name for name in self.active_adapters if name in self.peftzoo_adapter]
        self._require_ready(names)
        return [self.adapter(name) for name in names]

    def adapter(self, name: str) -> LinearAdapter:
        """Return the adapter of this name.

        Raises:
            KeyError: this layer has none.
        """
        return cast(LinearAdapter, self.peftzoo_adapter[name])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of the named adapters (default: the active ones) to the base weight.

        The weight as it was is kept until `unmerge`, so that it returns bit for bit.

        Args:
            safe_merge: accepted for peft; every merge is refused before it changes anything if it is not finite.
            adapter_names: which ones.

        Raises:
            ModelError: a merged weight would not be finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.peftzoo_adapter]
        if names:
            merged, current = self.merged_weight(names)
            if self._weight_before_merge is None:
                self._weight_before_merge = current
            self.set_base_weight(merged)
            self.merged_adapters.extend(names)

    def merged_weight(self, adapter_names: list[str]) -> tuple[Tensor, Tensor]:
        """Return the base weight with and without the updates of the named adapters, as the base layer stores it.

        Raises:
            ModelError: the sum is not finite.
        """
        names = [name for name in adapter_names if name in self.peftzoo_adapter and name not in self.merged_adapters]
        self._require_ready(names)
        current = self.get_base_weight()
        frozen = current if self._weight_before_merge is None else self._weight_before_merge
        total = current.to(torch.promote_types(torch.float32, current.dtype), copy=True)
        for name in names:
            with torch.no_grad():
                delta = self.adapter(name).delta_weight(self.kind.matrix(frozen))
            total += self.kind.stored(delta, total.shape)
        merged = total.to(current.dtype)
        if not torch.isfinite(merged).all():
            raise ModelError(f"merging {', '.join(names)} into {self.layer_name} gives values that are not finite")
        return merged, current

    def unmerge(self) -> None:
        """Put back the base weight as it was before the first merge, and before any adapter wrote into it."""
        self.release()
        if self._weight_before_merge is not None:
            self.set_base_weight(self._weight_before_merge)
            self._weight_before_merge = None
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the update of the weight in the shape in which the base layer stores it."""
        delta = self.adapter(adapter).delta_weight(self.frozen_weight())
        return self.kind.stored(delta, self.get_base_weight().shape)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether peft can convert the adapter to a plain LoRA."""
        return get_method(self.adapter(adapter_name).config.method_name).to_lora is not None

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and every trace of it."""
        super().delete_adapter(adapter_name)
        self._unloaded.discard(adapter_name)
        self._uncalibrated.discard(adapter_name)

    def _dropout(self, adapter: LinearAdapter) -> float:
        return adapter.config.dropout if self.training else 0.0

    def _require_ready(self, names: list[str]) -> None:
        for name in self._uncalibrated.intersection(names):
            raise ModelError(
                f"adapter {name!r} takes its start from data: call peftzoo.calibrate(model, batches) before using it"
            )
        for name in self._unloaded.intersection(names):
            missing = unloaded_tensors(self.adapter(name))
            if missing:
                raise ModelError(
                    f"adapter {name!r}: {', '.join(missing)} of {self.layer_name} never came from a file: its config "
                    "was read from one, or the base had no weights yet. To start anew on a loaded base use "
                    "dataclasses.replace(config, base_fingerprint=None)"
                )
            self._unloaded.discard(name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the base layer's device; its dtype stays, where peft's own would cast to the base's."""
        if adapter_name in self.peftzoo_adapter:
            adapter = self.peftzoo_adapter[adapter_name]
            target = torch.device(device) if device is not None else cast(Tensor, self.base_layer.weight).device
            if target.type != "meta" and not any(parameter.is_meta for parameter in adapter.parameters()):
                adapter.to(target)


def zoo_layers(model: nn.Module, adapter_name: str | None = None) -> Iterator[tuple[str, ZooLinear]]:
    """Yield the zoo layers of `model` with their names in it; with `adapter_name`, those that have the adapter."""
    for name, module in model.named_modules():
        if isinstance(module, ZooLinear) and (adapter_name is None or adapter_name in module.peftzoo_adapter):
            yield name, module
