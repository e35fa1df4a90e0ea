"""calibrate: give adapters the start that their method takes from data.

A method that needs data registers `calibrate=function(model, adapters, batches)`, which returns a `Start` for every
layer. It runs on the base model: adapters off, evaluation mode, global random state put back afterwards. Each process
of a run calls `calibrate` with its own share of the batches, and all end with the adapters of the first.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from peftzoo.core.config import ZooConfig
from peftzoo.core.layer import ZooLinear, zoo_layers
from peftzoo.core.processes import of_first
from peftzoo.core.registry import get_method
from peftzoo.errors import DataError, ModelError

SECONDS_BETWEEN_LINES = 5.0


class Start(NamedTuple):
    """What data say about the adapter of one layer.

    Attributes:
        rank: its rank; 0 takes the adapter off the layer.
        alpha: its alpha, None as in the config.
        tensors: values by name for those of its tensors that `init` alone does not set right.
    """

    rank: int
    alpha: float | None
    tensors: Mapping[str, Tensor]


class Batches:
    """The batches as a method sees them: on the model's device, and one at least.

    Raises:
        DataError: on the first look, if there is none.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], tell: Callable[[str], None] | None = None) -> None:
        self._batches = batches
        self._device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self._tell, self._last = tell, time.monotonic()

    def say(self, line: str) -> None:
        """Tell how far the work is; of many lines in a few seconds only the first is passed on."""
        now = time.monotonic()
        if self._tell is not None and now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            self._tell(line)

    def warn(self, line: str) -> None:
        """Tell what the person should know of the result."""
        if self._tell is not None:
            self._tell(line)
        else:
            warnings.warn(line, stacklevel=2)

    def __iter__(self) -> Iterator[Any]:
        empty = True
        for batch in self._batches:
            empty = False
            yield _moved(batch, self._device)
        if empty:
            raise DataError("calibration was given no batch; it takes an iterable of at least one")


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    adapter_name: str = "default",
    progress: Callable[[str], None] | None = None,
) -> dict[str, int]:
    """Give the adapters of `model` the start that their method takes from data; until then they cannot be used.

    Args:
        model: any model with zoo adapters, from `get_peft_model`, transformers' `add_adapter` or `attach`; changed in
            place. Ranks may change, so an optimizer, DDP, FSDP and `torch.compile` have to come afterwards.
        batches: what the model is called with: mappings of its arguments by name, or tuples, or single tensors. As
            many are taken as it needs; where there are fewer, they are gone through again. Several processes give
            different ones.
        adapter_name: which adapter.
        progress: called with a line of text every few seconds and with what there is to know in the end, which
            without it becomes a warning.

    Returns:
        The rank of each layer by its name; 0 where the adapter was taken off.

    Raises:
        ModelError: the adapter takes no start from data, already has one, is merged, or lies on the meta device.
        DataError: there are no batches, or none that a start can be taken from.
    """
    layers = _layers(model, adapter_name)
    config = _config(model, layers, adapter_name)
    method = get_method(config.method_name)
    if method.calibrate is None:
        raise ModelError(f"adapter {adapter_name!r}: {method.name} has no start that data could give")
    before = {name: layer.adapter(adapter_name) for name, layer in layers.items()}
    with _as_base(model):
        found = method.calibrate(model, before, Batches(model, batches, progress))
    starts = _of_first({name: found.get(name, Start(0, None, {})) for name in layers})
    _note_patterns(config, starts, layers)
    with torch.no_grad():
        for name, layer in layers.items():
            _apply(model, layer, adapter_name, config, starts[name])
    adapters = [layer.adapter(adapter_name) for layer in layers.values() if adapter_name in layer.peftzoo_adapter]
    if any(adapter is not before[adapter.layer_name] for adapter in adapters):
        type(adapters[0]).share(adapters)
    return {name: start.rank for name, start in starts.items()}


def uncalibrated(model: nn.Module, adapter_name: str = "default") -> bool:
    """Whether an adapter of `model` still waits for `calibrate`."""
    return any(adapter_name in layer._uncalibrated for _, layer in zoo_layers(model))


def call(model: nn.Module, batch: Any) -> Any:
    """Return what `model` makes of a batch: a mapping of arguments by name, a tuple of them, or a single one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _layers(model: nn.Module, adapter_name: str) -> dict[str, ZooLinear]:
    """Return the layers with the adapter by name, in the model's order, after checking that all wait for a start."""
    found = [layer for _, layer in zoo_layers(model, adapter_name)]
    layers = {layer.layer_name: layer for layer in found}
    if not layers:
        raise ModelError(f"the model has no zoo adapter {adapter_name!r}")
    if len(layers) < len(found):
        raise ModelError("two layers have the same name: attach one adapter to the whole model, not one to each layer")
    for name, layer in layers.items():
        if layer.merged_adapters:
            raise ModelError(
                f"{', '.join(layer.merged_adapters)} is merged into {name}; unmerge it before calibrating"
            )
        if adapter_name not in layer._uncalibrated:
            raise ModelError(_why_not(layer, adapter_name))
    return layers


def _why_not(layer: ZooLinear, adapter_name: str) -> str:
    adapter = layer.adapter(adapter_name)
    if adapter_name in layer._unloaded:
        return f"adapter {adapter_name!r} is to be loaded from a file, or its base has no weights yet"
    if not adapter.config.needs_data:
        return (
            f"adapter {adapter_name!r}: {adapter.config.method_name} with these settings starts without data; there "
            "is nothing to calibrate"
        )
    return (
        f"adapter {adapter_name!r} already has its start, from calibration or a file, and another would undo what it "
        "has learned; make a new adapter instead"
    )


def _config(model: nn.Module, layers: dict[str, ZooLinear], adapter_name: str) -> ZooConfig:
    """Return the config that is saved with the adapter; that of the layer where no model holds one."""
    configs = (getattr(module, "peft_config", None) for module in model.modules())
    held = (config[adapter_name] for config in configs if isinstance(config, Mapping) and adapter_name in config)
    first = next(iter(layers.values())).adapter(adapter_name).config
    return cast(ZooConfig, next(held, first))


@contextmanager
def _as_base(model: nn.Module) -> Iterator[None]:
    """Let the model be the base in evaluation mode, and leave it and the random generators as they were."""
    modes: dict[Any, bool] = {module: module.training for module in model.modules()}
    layers: list[Any] = [layer for _, layer in zoo_layers(model)]
    disabled = [layer.disable_adapters for layer in layers]
    devices = {parameter.device for parameter in model.parameters()}
    gpus = [device for device in devices if device.type not in ("cpu", "mps")]  # Apple's has one generator for all
    kind = gpus[0].type if gpus else "cuda"
    with torch.random.fork_rng([device.index for device in gpus], device_type=kind):  # and the CPU's generator
        try:
            model.eval()
            for layer in layers:
                layer._disable_adapters = True
            yield
        finally:
            for layer, was in zip(layers, disabled, strict=True):
                layer._disable_adapters = was
            for module, training in modes.items():
                module.training = training  # train() would set what is below it too


def _of_first(starts: dict[str, Start]) -> dict[str, Start]:
    """Return what the first process found, on all."""
    return of_first(
        {
            name: start._replace(tensors={key: tensor.cpu() for key, tensor in start.tensors.items()})
            for name, start in starts.items()
        }
    )


def _note_patterns(config: ZooConfig, starts: dict[str, Start], layers: dict[str, ZooLinear]) -> None:
    """Write ranks and alphas that differ from the config's into it, so that a saved adapter is rebuilt with them."""
    # all layers or none: one left out would fall to another whose name it ends in
    if any(start.rank != config.r for start in starts.values()) or config.rank_pattern:
        config.rank_pattern = {name: start.rank for name, start in starts.items()}
    alphas = {name: start.alpha for name, start in starts.items() if start.rank and start.alpha is not None}
    if any(alpha != config.alpha for alpha in alphas.values()) or config.alpha_pattern:
        config.alpha_pattern = alphas


def _apply(model: nn.Module, layer: ZooLinear, adapter_name: str, config: ZooConfig, start: Start) -> None:
    old = layer.adapter(adapter_name)
    if start.rank == 0:
        _take_off(model, layer, adapter_name)
        return
    own = config.for_layer(layer.layer_name)
    assert own is not None
    if (own.r, own.alpha) != (old.config.r, old.config.alpha):
        layer.add_adapter(adapter_name, config)  # in the place of the old one
        reference = next(old.parameters())
        layer.adapter(adapter_name).to(reference.device, reference.dtype)
        for parameter in layer.adapter(adapter_name).parameters():
            parameter.requires_grad_(reference.requires_grad)
    state = layer.adapter(adapter_name).state_dict()
    for name, value in start.tensors.items():
        state[name].copy_(value)
    layer.calibrated(adapter_name)


def _take_off(model: nn.Module, layer: ZooLinear, adapter_name: str) -> None:
    """Remove the adapter from a layer, and the layer itself where it has no other; the base layer takes its place."""
    del layer.peftzoo_adapter[adapter_name]
    layer.calibrated(adapter_name)
    if len(layer.peftzoo_adapter):
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is layer:
                setattr(parent, name, layer.base_layer)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    return type(batch)(_moved(part, device) for part in batch) if isinstance(batch, (tuple, list)) else batch
