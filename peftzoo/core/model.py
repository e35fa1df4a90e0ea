"""ZooModel: the tuner through which peft and transformers apply, save and load every zoo adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, cast

import torch
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peftzoo.core.config import ZooConfig
from peftzoo.core.fingerprint import difference, fingerprint
from peftzoo.core.layer import ZooLinear, zoo_layers
from peftzoo.core.names import check_adapter_name
from peftzoo.core.peft_type import ZOO_PREFIX, ZOO_TYPE
from peftzoo.core.targets import check_targets
from peftzoo.errors import ModelError

_WRAPPED = "base_model.model."


class ZooModel(BaseTuner):
    """Finds the layers a `ZooConfig` names and puts `ZooLinear` in their place."""

    prefix = ZOO_PREFIX
    tuner_layer_cls = ZooLinear
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: ZooConfig, model_config: dict[str, Any]) -> ZooConfig:
        """Go on with a copy: what is filled in for this model must not reach the next that the config is used for."""
        name = self._name_of(peft_config)
        self.peft_config[name] = copy.copy(peft_config)
        return self.peft_config[name]

    def _prepare_model(self, peft_config: ZooConfig, model: nn.Module) -> None:
        """Check everything that can be checked before the first layer is replaced."""
        name = self._name_of(peft_config)
        check_adapter_name(name)
        if not peft_config.from_file:
            peft_config.base_fingerprint = fingerprint(model)
        elif why := difference(model, cast(dict[str, list[float]], peft_config.base_fingerprint)):
            raise ModelError(
                f"adapter {name!r} was made on another base than this model: {why}. To use it all the same, set "
                '"base_fingerprint" to null in its adapter_config.json'
            )
        check_targets(peft_config, model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put the adapter on every layer its config names, then let the adapters of the layers meet."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        adapters = [layer.adapter(adapter_name) for _, layer in zoo_layers(model, adapter_name)]
        if adapters:
            type(adapters[0]).share(adapters)

    def _name_of(self, peft_config: ZooConfig) -> str:
        return next(name for name, config in self.peft_config.items() if config is peft_config)

    def _create_and_replace(
        self,
        peft_config: ZooConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if peft_config.for_layer(current_key) is None:
            return
        layer = target if isinstance(target, ZooLinear) else ZooLinear(target, current_key)
        layer.add_adapter(adapter_name, peft_config)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Leave adapters in float32, or, if the caller asks for no cast, put them into their base layer's dtype."""
        if autocast_adapter_dtype:
            return
        for _, layer in zoo_layers(self.model, adapter_name):
            _, dtype = layer._get_base_layer_device_and_dtype(layer.base_layer)
            layer.adapter(adapter_name).to(dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse a batch whose rows name different adapters, which peft would otherwise ignore without a word."""
        if kwargs.get("adapter_names") is not None:
            raise ModelError("adapter_names: one batch cannot mix zoo adapters yet; run it once per adapter")
        yield

    def unload(self) -> Any:
        """Return the base model as it was, without any adapter, merged or not."""
        self.unmerge_adapter()
        return super().unload()

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge the named adapters (default: the active ones) in every layer, or in none if one would break."""
        self._refuse_broken_merge(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._refuse_broken_merge(kwargs.get("adapter_names"))
        return super()._unload_and_optionally_merge(merge, *args, **kwargs)

    def _refuse_broken_merge(self, adapter_names: list[str] | None) -> None:
        # every delta is made twice for it, which costs less than keeping them all, or than half a merge
        for _, layer in zoo_layers(self.model):
            layer.merged_weight(layer.active_adapters if adapter_names is None else adapter_names)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: ZooConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Map a file's keys to the model's, refusing a file that does not fit to the last key and number."""
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        found = {key.removeprefix(_WRAPPED): value for key, value in mapped.items()}
        layers = {name.removeprefix(_WRAPPED): layer for name, layer in zoo_layers(model, adapter_name)}
        want = {
            f"{name}.peftzoo_adapter.{adapter_name}.{key}": value
            for name, layer in layers.items()
            for key, value in layer.adapter(adapter_name).state_dict().items()
        }
        beside = _kept_beside(model, adapter_name)
        _refuse_misfit(
            adapter_name, found, want | {k: v for k, v in beside.items() if ".modules_to_save." in k}, beside
        )
        for layer in layers.values():
            layer.loaded(adapter_name)
        return mapped


def _kept_beside(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Return what the file of an adapter may hold beside it: its modules to save, and resized embeddings."""
    embeddings = set()
    for get in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(AttributeError, NotImplementedError):  # a model without embeddings lacks or refuses the getter
            embeddings.add(getattr(model, get)())
    places = [
        f"{name}.modules_to_save.{adapter_name}" if isinstance(module, AuxiliaryTrainingWrapper) else name
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper) or module in embeddings
    ]
    return {
        key.removeprefix(_WRAPPED): value
        for key, value in model.state_dict().items()
        if ".peftzoo_adapter." not in key and any(key.startswith(f"{place}.") for place in places)
    }


def _refuse_misfit(
    adapter: str, found: dict[str, Tensor], want: dict[str, Tensor], allowed: dict[str, Tensor]
) -> None:
    """Raise ModelError unless `found` holds the tensors `want`, in their shapes, all finite, and no strangers."""
    missing = want.keys() - found.keys()
    unexpected = found.keys() - want.keys() - allowed.keys()
    misshapen = [
        f"{key} {list(found[key].shape)} instead of {list(value.shape)}"
        for key, value in want.items()
        if key in found and found[key].shape != value.shape
    ]
    broken = [
        key for key, value in found.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    problems = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen, "not finite": broken}
    lines = [
        f"{len(keys)} {what}: {', '.join(sorted(keys)[:3])}{' ...' if len(keys) > 3 else ''}"
        for what, keys in problems.items()
        if keys
    ]
    if lines:
        raise ModelError(f"adapter {adapter!r} does not fit this model; {'; '.join(lines)}")


PEFT_TYPE_TO_CONFIG_MAPPING[ZOO_TYPE] = ZooConfig
PEFT_TYPE_TO_TUNER_MAPPING[ZOO_TYPE] = ZooModel
PEFT_TYPE_TO_PREFIX_MAPPING[ZOO_TYPE] = ZOO_PREFIX
