"""Every tuner of peft's as a method of the zoo, by the lower-case name of its peft type, with peft's code and format.

What is said of a type here is read from its config class; which types our trainer cannot run is the one list to keep.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection
from functools import cache
from typing import Any

from peft import PeftConfig
from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn

from peftzoo.core.base_layer import layer_kind
from peftzoo.core.peft_type import ZOO_TYPE
from peftzoo.errors import ModelError

# why a tuner of peft's that does adapt modules cannot be trained by handing it a batch and stepping an optimizer
_REFUSED = {
    "adalora": "must be called between backward and step; eva spreads a budget of ranks before training",
    "ln_tuning": "trains whole norm layers; name them in modules_to_save of any other method",
    "poly": "needs the number of a task with every row",
    "shadow": "runs a second model of its own beside the base",
    "trainable_tokens": "trains rows of the embedding and adapts no layer",
    "xlora": "mixes adapters that were trained before",
}
_OURS = "peftzoo trains adapters of layers"
_SEEDS = ("random_seed", "projection_prng_key", "projection_seed", "proj_seed", "random_loc_seed")


def peft_names() -> list[str]:
    """Return the names of all types of peft's that can be asked for, sorted."""
    return sorted(name for name in _types() if refusal(name) is None)


def is_peft_name(name: str) -> bool:
    """Whether peft has a type of this name, be it one that is refused."""
    return name in _types()


def refusal(name: str) -> str | None:
    """Return why peft's type of this name cannot be trained here; None if it can."""
    key = _types()[name]
    config, tuner = PEFT_TYPE_TO_CONFIG_MAPPING[key], PEFT_TYPE_TO_TUNER_MAPPING.get(key)
    if issubclass(config, PromptLearningConfig):
        return f"peft's {name} trains tokens before the input; {_OURS}"
    if name in _REFUSED:
        return f"peft's {name} {_REFUSED[name]}"
    if not (isinstance(tuner, type) and issubclass(tuner, BaseTuner)) or "target_modules" not in _fields(config):
        return f"peft's {name} does not adapt layers that target_modules names; {_OURS}"
    return None


def type_of(config: type[PeftConfig]) -> Any:
    """Return the peft type whose config class this is; None if it is nobody's."""
    return next((key for key, known in PEFT_TYPE_TO_CONFIG_MAPPING.items() if known is config), None)


def describe(name: str) -> dict[str, Any]:
    """Return what `registry.Method` has to know about peft's type of this name."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[_types()[name]]
    return {
        "config": config,
        "paper": "as peft documents",
        "summary": f"peft's own {config.__name__.removesuffix('Config')}, by the name of its type.",
        "trains": (f"{PEFT_TYPE_TO_PREFIX_MAPPING[_types()[name]]}*",),
        "layers": (),
        "injectable": False,
        "fsdp": False,
        "compile": False,
        "aliases": _aliases(name, config),
    }


def prepare(config: PeftConfig, model: nn.Module, layers: Collection[str]) -> None:
    """Make one of peft's configs fit for `model`: resolve "all-linear", refuse kinds of layers it only seems to adapt.

    "all-linear" becomes the ends of names that match exactly these layers, where there are such: peft writes out
    every full name, with which some of its own configs cannot be read back (IA3's).

    Args:
        config: changed in place.
        model: the base.
        layers: the kinds of `base_layer.KINDS` that may be adapted; none named: what peft can.

    Raises:
        ModelError: a target is of another kind.
    """
    modules = dict(model.named_modules())
    if str(getattr(config, "target_modules", None)).lower() == "all-linear":
        full = set(_maybe_include_all_linear_layers(copy.copy(config), model).target_modules)
        ends = {name.rpartition(".")[2] for name in full}
        config.target_modules = ends if {n for n in modules if n.rpartition(".")[2] in ends} == full else full
    if layers and getattr(config, "target_modules", None):
        kinds = {
            name: layer_kind(module) for name, module in modules.items() if check_target_module_exists(config, name)
        }
        wrong = [f"{name} ({kind.name})" for name, kind in kinds.items() if kind and kind.name not in layers]
        if wrong:
            raise ModelError(f"cannot adapt {', '.join(wrong[:5])}; peft's own code for it adapts {', '.join(layers)}")


@cache
def _types() -> dict[str, Any]:
    return {str(getattr(key, "value", key)).lower(): key for key in PEFT_TYPE_TO_CONFIG_MAPPING if key != ZOO_TYPE}


def _fields(config: type[PeftConfig]) -> list[str]:
    return [f.name for f in dataclasses.fields(config)]


def _aliases(name: str, config: type[PeftConfig]) -> dict[str, str]:
    """Return the zoo's spellings of settings that peft spells otherwise in this config."""
    fields = _fields(config)
    spellings = {
        "alpha": (f"{name}_alpha", "lora_alpha"),
        "dropout": (f"{name}_dropout", "lora_dropout"),
        "seed": _SEEDS,
    }
    return {
        ours: next(own for own in own_names if own in fields)
        for ours, own_names in spellings.items()
        if ours not in fields and any(own in fields for own in own_names)
    }
