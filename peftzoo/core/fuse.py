"""fuse and unfuse: our forward in the LoRA layers of stock peft, and one op for layers that share their input."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peftzoo.core.adapter import LinearAdapter
from peftzoo.core.base_layer import is_watched
from peftzoo.core.layer import ZooLinear
from peftzoo.core.shared_input import SharedInput, forget_outputs
from peftzoo.core.stock_layers import WATCHED, FusedStock, obstacle, turn, turn_back
from peftzoo.core.suggest import some
from peftzoo.errors import ModelError

# names that layers called with one input have in their block, in the order of the calls
_ATTENTION = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
)
_MLP = (("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"))
# what the forward of a block takes if keys and values are of something other than queries, or each of its own
_OTHER_SOURCE = re.compile(r"key_value_states|.*encoder_hidden_states|cross_attention_states|.*context.*|memory|kv.*")
_OWN_SOURCES = re.compile(r"quer(y|ies).*|keys?|values?")


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did; its string is a summary.

    Attributes:
        fused: layer -> what it computes with one op.
        groups: names of layers that share their input, computed in one call.
        left: layer -> why it keeps the forward that it has.
    """

    fused: Mapping[str, str]
    groups: Sequence[tuple[str, ...]]
    left: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"fused {_layers(len(self.fused))}"]
        lines += [f"  {what}: {_layers(len(names))}: {some(names)}" for what, names in _by_value(self.fused).items()]
        if self.groups:
            lines.append(f"one read of the input in {len(self.groups)} groups")
            kinds: dict[str, list[str]] = defaultdict(list)
            for group in self.groups:
                block = group[0].rpartition(".")[0]
                kinds[", ".join(name.rpartition(".")[2] for name in group)].append(block)
            lines += [f"  {names}: in {some(blocks)}" for names, blocks in kinds.items()]
        if self.left:
            lines.append(f"left {_layers(len(self.left))}")
            lines += [f"  {why}: {_layers(len(names))}: {some(names)}" for why, names in _by_value(self.left).items()]
        return "\n".join(lines)


def fuse(model: nn.Module, share_inputs: bool = True) -> FuseReport:
    """Let the LoRA and DoRA layers of stock peft compute with the fused op, in place; `unfuse` undoes it.

    Parameters, names, files, merging, switching and adding adapters stay peft's. A layer asks at each call whether the
    op does what it is to do, and runs peft's own forward where not. Call it again after an adapter was added to layers
    that had none.

    Args:
        model: any model with LoRA layers of peft, or with zoo layers, which run on the op by themselves.
        share_inputs: compute layers that are called with one input in one op: q, k, v, or gate and up. Turn it off for
            a model whose blocks call layers of these names with different inputs: the results would be the same, but
            for more work.

    Returns:
        What was fused, what was left, and why.

    Raises:
        ModelError: the model has no such layers.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if not any(isinstance(layer, (LoraLayer, ZooLinear)) for layer in layers.values()):
        there = sorted({type(layer).__module__.removeprefix("peft.tuners.") for layer in layers.values()})
        found = f"only layers of {some(there)}" if there else "no adapters"
        raise ModelError(f"fuse: the model has {found}; it needs LoRA layers of peft, or zoo layers")
    unfuse(model)
    fused, left = {}, {}
    for name, layer in layers.items():
        if why := _obstacle(layer):
            left[name] = why
            continue
        if not isinstance(layer, ZooLinear):
            turn(layer)
        fused[name] = _what(layer)
    groups = []
    if share_inputs:
        for names in _siblings(model, fused):
            members = [cast("FusedStock | ZooLinear", model.get_submodule(name)) for name in names]
            shared = SharedInput(members)
            for member in members:
                member.shared_input = shared
            groups.append(names)
    return FuseReport(fused, groups, left)


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`: the classes of the layers are those of before, and nothing stays beside them."""
    for layer in model.modules():
        if isinstance(layer, FusedStock):
            turn_back(layer)
        elif isinstance(layer, ZooLinear):
            layer.__dict__.pop("shared_input", None)
    forget_outputs()


def _obstacle(layer: BaseTunerLayer) -> str | None:
    """Return why a layer is left as it is."""
    if isinstance(layer, ZooLinear):
        return _obstacle_of_zoo(layer)
    if isinstance(layer, LoraLayer):
        return obstacle(layer)
    return f"{type(layer).__module__.removeprefix('peft.tuners.')} is not LoRA"


def _obstacle_of_zoo(layer: ZooLinear) -> str | None:
    base = layer.base_layer
    if layer.kind.forward is None and layer.kind.name != "bnb-4bit":
        return f"base layer of type {type(base).__name__}"
    if is_watched(base):
        return WATCHED
    adapters = [layer.adapter(name) for name in layer.peftzoo_adapter]
    others = [one.config.method_name for one in adapters if type(one).factors is LinearAdapter.factors]
    return f"{some(others)} is not low-rank" if len(others) == len(adapters) else None


def _what(layer: BaseTunerLayer) -> str:
    """Return what a layer computes with one op."""
    if isinstance(layer, ZooLinear):
        methods = {layer.adapter(name).config.method_name for name in layer.peftzoo_adapter}
        return f"{', '.join(sorted(methods))} of peftzoo on {layer.kind.name} (on the op by itself)"
    names = {"DoRA" if name in layer.lora_variant else "LoRA" for name in layer.lora_A}
    return f"{', '.join(sorted(names))} on {layer._kind.name}"


def _siblings(model: nn.Module, fused: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    """Yield the names of layers that are called with one input, going by their own and their block's forward."""
    for name, block in model.named_modules():
        children = {child: f"{name}.{child}".removeprefix(".") for child, _ in block.named_children()}
        children = {child: full for child, full in children.items() if full in fused}
        if len(children) < 2:
            continue
        for names in (*_called_alike(block), *_MLP):
            there = [child for child in names if child in children and _can_join(getattr(block, child))]
            if len(there) > 1 and len({getattr(block, child).in_features for child in there}) == 1:
                yield tuple(children[child] for child in there)


def _called_alike(block: nn.Module) -> Iterator[tuple[str, ...]]:
    """Yield the names of attention layers that `block` calls with one input."""
    arguments = inspect.signature(block.forward).parameters
    if any(_OWN_SOURCES.fullmatch(argument) for argument in arguments):
        return
    from_elsewhere = any(_OTHER_SOURCE.fullmatch(argument) for argument in arguments)
    for names in _ATTENTION:
        yield names[1:] if from_elsewhere else names


def _can_join(layer: nn.Module) -> bool:
    """Whether a fused layer has an adapter that an op for several layers takes."""
    if not isinstance(layer, ZooLinear):
        return True
    ready = [layer.adapter(one) for one in layer.peftzoo_adapter if one not in layer._unloaded]
    return not ready or any(_multiplies(adapter) for adapter in ready)


@torch.no_grad()
def _multiplies(adapter: LinearAdapter) -> bool:
    """Whether an adapter's down factor is a matrix: a gather is an op of its own."""
    factors = adapter.factors()
    return factors is not None and factors.a.is_floating_point()


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"


def _by_value(names: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name, value in names.items():
        found[value].append(name)
    return found
