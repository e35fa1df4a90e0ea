"""Which layers a config names, checked before anything is changed.

A pattern that matches nothing, a layer no adapter can sit on, experts that a list of linear layers would pass over:
each is refused by name, because a model that is adapted in part trains, and looks right, and is not what was asked.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn

from peftzoo.core.base_layer import layer_kind
from peftzoo.core.config import ZooConfig
from peftzoo.core.in_place import check_in_place
from peftzoo.core.registry import get_method
from peftzoo.core.suggest import nearest, some
from peftzoo.errors import ModelError

ALL_LINEAR = "all-linear"


def check_targets(config: ZooConfig, model: nn.Module) -> None:
    """Resolve "all-linear" in `config` and refuse targets of `model` that cannot be adapted.

    Raises:
        ModelError: with the names it is about and those there are.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    patterns = config.target_modules
    everything = isinstance(patterns, str) and patterns.lower() == ALL_LINEAR
    _refuse_experts(model, set() if everything else _listed(patterns), everything)
    if everything:
        _maybe_include_all_linear_layers(config, model)
    else:
        _refuse_unmatched(patterns, modules)
    # inside an adapted layer stand its base layer and its adapters: those are no targets
    adapted = tuple(f"{name}." for name, module in modules.items() if isinstance(module, BaseTunerLayer))
    targets = {
        name: module
        for name, module in modules.items()
        if not name.startswith(adapted) and check_target_module_exists(config, name)
    }
    _refuse_kinds(config, targets, modules)
    writes = get_method(config.method_name).edits_base
    if writes is not None and getattr(config, writes):
        check_in_place(model, {name: _base(module) for name, module in targets.items()})


def _listed(patterns: Iterable[str] | str) -> set[str]:
    return {patterns} if isinstance(patterns, str) else set(patterns)


def _matches(pattern: str, name: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}")


def _refuse_unmatched(patterns: Iterable[str] | str, modules: dict[str, nn.Module]) -> None:
    if isinstance(patterns, str):
        if any(re.fullmatch(patterns, name) for name in modules):
            return
        missed = [patterns]
    else:
        missed = sorted(p for p in patterns if not any(_matches(p, name) for name in modules))
    if not missed:
        return
    if isinstance(patterns, str) and any(_matches(patterns, name) for name in modules):
        raise ModelError(
            f"target_modules: {patterns!r} is a regular expression for whole names and matches none; to adapt the "
            f"layers whose names end so, write [{patterns!r}]"
        )
    suffixes = Counter(name.rsplit(".", 1)[-1] for name, module in modules.items() if layer_kind(_base(module)))
    guesses = [f"{p} (did you mean {guess}?)" if (guess := nearest(p, suffixes)) else p for p in missed]
    there = ", ".join(f"{suffix} x{count}" for suffix, count in sorted(suffixes.items())) or "none"
    raise ModelError(
        f"target_modules: {some(guesses)} matches no layer of the model; those that can be adapted: {there}"
    )


def _refuse_kinds(config: ZooConfig, targets: dict[str, nn.Module], modules: dict[str, nn.Module]) -> None:
    if not targets:
        raise ModelError("target_modules: every layer they match is excluded; check exclude_modules and layer indices")
    method = get_method(config.method_name)
    refused = []
    for name, module in targets.items():
        base = _base(module)
        kind = layer_kind(base)
        parent = modules.get(name.rpartition(".")[0])
        if kind is None or kind.name not in method.layers:
            refused.append(f"{name} ({type(base).__name__})")
        elif why := config.refusal(kind.name):
            raise ModelError(f"{name}: {method.name}: {why}")
        elif isinstance(parent, nn.TransformerEncoderLayer):
            # its fast path reads the weights of its layers without ever calling them
            refused.append(f"{name} (within {type(parent).__name__})")
        elif method.adapter is not None:
            try:
                with torch.device("meta"):
                    method.adapter(config, *kind.sizes(base))
            except ValueError as error:
                raise ModelError(f"{name}: {error}") from None
    if refused:
        raise ModelError(
            f"{method.name} cannot adapt {some(refused)}; it adapts {', '.join(method.layers)}: "
            "take them out of target_modules or name them in exclude_modules"
        )


def _refuse_experts(model: nn.Module, listed: set[str], everything: bool) -> None:
    experts = [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and "expert" in name.lower() and ".peftzoo_" not in name
    ]
    hit = [name for name in experts if everything or any(_matches(p, name) for p in listed)]
    if hit:
        raise ModelError(
            f"experts stored as 3-D parameters cannot be adapted yet: {some(hit, 3)}; list the linear layers to "
            "adapt in target_modules to leave the experts frozen"
        )


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
