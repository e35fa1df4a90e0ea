"""ZooModel: the tuner through which peft and transformers apply, save and load every zoo adapter."""

from __future__ import annotations

import re
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
from peftzoo.core.layer import ZooLinear
from peftzoo.core.peft_type import ZOO_PREFIX, ZOO_TYPE
from peftzoo.core.targets import check_targets
from peftzoo.errors import ModelError

# names become folder names and parts of keys
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_WRAPPED = "base_model.model."


class ZooModel(BaseTuner):
    """Finds the layers a `ZooConfig` names and puts `ZooLinear` in their place."""

    prefix = ZOO_PREFIX
    tuner_layer_cls = ZooLinear
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_model(self, peft_config: ZooConfig, model: nn.Module) -> None:
        """Check everything that can be checked before the first layer is replaced."""
        name = next(name for name, config in self.peft_config.items() if config is peft_config)
        if not _ADAPTER_NAME.fullmatch(name):
            raise ModelError(f"adapter name {name!r}: use up to 64 letters, digits, - and _, the first no - or _")
        if not peft_config.from_file:
            peft_config.base_fingerprint = fingerprint(model)
        elif why := difference(model, cast(dict[str, list[float]], peft_config.base_fingerprint)):
            raise ModelError(
                f"adapter {name!r} was made on another base than this model: {why}. To use it all the same, set "
                '"base_fingerprint" to null in its adapter_config.json'
            )
        check_targets(peft_config, model)

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
        layer = target if isinstance(target, ZooLinear) else ZooLinear(target, current_key)
        layer.add_adapter(adapter_name, peft_config)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Leave adapters in float32, or, if the caller asks for no cast, put them into their base layer's dtype."""
        if autocast_adapter_dtype:
            return
        for layer in self.model.modules():
            if isinstance(layer, ZooLinear) and adapter_name in layer.peftzoo_adapter:
                dtype = layer.frozen_weight().dtype
                layer.peftzoo_adapter[adapter_name].to(dtype)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: ZooConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Map a file's keys to the model's, refusing a file that does not fit to the last key and number."""
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        found = {key.removeprefix(_WRAPPED): value for key, value in mapped.items()}
        want = {
            f"{name}.peftzoo_adapter.{adapter_name}.{key}".removeprefix(_WRAPPED): value
            for name, layer in model.named_modules()
            if isinstance(layer, ZooLinear) and adapter_name in layer.peftzoo_adapter
            for key, value in layer.peftzoo_adapter[adapter_name].state_dict().items()
        }
        _refuse_misfit(adapter_name, found, want, _kept_whole(model))
        return mapped


def _kept_whole(model: nn.Module) -> tuple[str, ...]:
    """Return the name prefixes of what an adapter file may hold beside the adapter: modules to save, embeddings."""
    embeddings = {getattr(model, get, lambda: None)() for get in ("get_input_embeddings", "get_output_embeddings")}
    return tuple(
        f"{name.removeprefix(_WRAPPED)}."
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper) or (module in embeddings and module is not None)
    )


def _refuse_misfit(
    adapter: str, found: dict[str, Tensor], want: dict[str, Tensor], kept_whole: tuple[str, ...]
) -> None:
    """Raise ModelError unless `found` holds exactly the tensors `want`, in their shapes, all finite."""
    missing = want.keys() - found.keys()
    unexpected = {key for key in found.keys() - want.keys() if not key.startswith(kept_whole)}
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
