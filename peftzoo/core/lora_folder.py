"""The stock peft LoRA folder: written from any zoo adapter, and read back as the method of the zoo that it is.

The folder needs neither peftzoo nor a change of the base: peft, vLLM and whatever else reads LoRA opens it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, cast

import peft
import torch
from peft import get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftzoo.core.adapter import LinearAdapter
from peftzoo.core.config import ZooConfig
from peftzoo.core.layer import ZooLinear, zoo_layers
from peftzoo.core.registry import Method, get_method, list_methods
from peftzoo.core.stock_lora import StockLora
from peftzoo.errors import ModelError

WEIGHTS = "adapter_model.safetensors"
_WRAPPED = "base_model.model."
_PLAIN = StockLora()
# settings that mean the same in a stock LoraConfig and in a ZooConfig
_SHARED = (
    *("task_type", "base_model_name_or_path", "revision", "target_modules", "exclude_modules", "modules_to_save"),
    *("layers_to_transform", "layers_pattern"),
)
# what else a stock LoRA may say without computing anything but what a method of the zoo does, on the untouched base
_READ = (
    *_SHARED,
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "lora_dropout", "use_rslora", "use_dora", "fan_in_fan_out"),
    *("init_lora_weights", "eva_config", "inference_mode", "peft_type", "peft_version", "auto_mapping"),
    *("megatron_core", "qalora_group_size"),
)
_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # the others edit the base


class _Written(NamedTuple):
    """A layer as a plain LoRA has it, with the squared error of that and the squared size of the update."""

    a: Tensor
    b: Tensor
    scale: float
    error: float = 0.0
    size: float = 0.0


def write_lora_folder(model: Any, folder: Path, adapter_name: str = "default", rank: int | None = None) -> float:
    """Write an adapter of a peft `model` as a stock peft LoRA folder.

    Args:
        model: a peft model.
        folder: folder to write into.
        adapter_name: which adapter.
        rank: None writes the adapter as it is; a number writes the plain LoRA of this rank that is nearest to it in
            every layer.

    Returns:
        |written update - update| / |update|, Frobenius norms over all layers: 0 without a rank.

    Raises:
        ModelError: without a rank: the method is no LoRA of low rank; with one: it has no plain LoRA near it.
    """
    config: ZooConfig = model.peft_config[adapter_name]
    method = get_method(config.method_name)
    if method.to_lora is None:
        raise ModelError(f"a {method.name} adapter cannot be written as a plain LoRA")
    stock = method.stock_lora if method.stock_lora is not None and rank is None else _PLAIN
    state: dict[str, Tensor] = {}
    written: dict[str, _Written] = {}
    for name, layer in _layers(model, adapter_name).items():
        adapter = layer.adapter(adapter_name)
        one = _exact(method, adapter) if rank is None else _nearest(adapter, rank)
        shapes = _shapes(layer)
        tensors = {end: getattr(adapter, own).detach() for end, own in stock.extra.items()}
        for end, value in ({"lora_A.weight": one.a, "lora_B.weight": one.b} | tensors).items():
            state[f"{_WRAPPED}{name}.{end}"] = value.reshape(shapes.get(end, value.shape))
        written[name] = one
    for key, value in get_peft_model_state_dict(model, adapter_name=adapter_name).items():
        if ".peftzoo_adapter." not in key:  # modules_to_save
            state[key] = value
    _stock_config(model, config, stock, written, adapter_name).save_pretrained(str(folder))
    write_weights(folder, state)
    size = sum(one.size for one in written.values())
    return float((sum(one.error for one in written.values()) / size) ** 0.5) if size else 0.0


def write_weights(folder: Path, state: dict[str, Tensor]) -> None:
    """Write the tensors of an adapter into its folder, as peft does."""
    # clones, because safetensors refuses tensors that share memory
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def read_lora_folder(folder: Path, method: str | None = None) -> tuple[ZooConfig, dict[str, Tensor]]:
    """Return a stock LoRA folder as an adapter of the zoo: its config, and its tensors under the zoo's keys.

    Args:
        folder: the folder.
        method: name of the method of the LoRA family to read it as; None takes the one whose folders look so.

    Raises:
        ModelError: it uses something that no method of the zoo computes, or not what `method` does.
    """
    stock = peft.LoraConfig.from_pretrained(str(folder))
    plain = peft.LoraConfig()
    used = [f.name for f in dataclasses.fields(stock) if getattr(stock, f.name) != getattr(plain, f.name)]
    used = [f"bias={stock.bias}" if name == "bias" else name for name in used if name not in _READ]
    used += [] if stock.init_lora_weights in _STARTS else [f"init_lora_weights={stock.init_lora_weights}"]
    if used:
        raise ModelError(f"{folder}: this LoRA uses {', '.join(used)}, which peftzoo does not read; use it with peft")
    found, looks = _method_of(folder, stock, method)
    state = load_file(folder / WEIGHTS)
    settings: dict[str, Any] = {name: getattr(stock, name) for name in _SHARED}
    settings["target_modules"] = settings["target_modules"] or "all-linear"
    layers = [key.removeprefix(_WRAPPED).removesuffix(".lora_A.weight") for key in state if "lora_A.weight" in key]
    r = _of_layers(layers, stock.rank_pattern, stock.r)
    alpha = _of_layers(layers, stock.alpha_pattern, stock.lora_alpha)
    base_alpha = stock.lora_alpha
    if stock.use_rslora and "use_rslora" not in looks.flags:  # a method without it says alpha / sqrt(r) as alpha / r
        alpha = {name: alpha[name] * r[name] ** 0.5 for name in layers}
        base_alpha = stock.lora_alpha * stock.r**0.5
    config = found.make_config(
        **settings,
        r=stock.r,
        alpha=base_alpha,
        rank_pattern={name: rank for name, rank in r.items() if rank != stock.r} or None,
        alpha_pattern={name: value for name, value in alpha.items() if value != base_alpha} or None,
        dropout=stock.lora_dropout,
        base_fingerprint={},
    )
    return config, dict(_zoo_tensor(key, value, looks) for key, value in state.items())


def _layers(model: nn.Module, adapter_name: str) -> dict[str, ZooLinear]:
    """Return the layers that have the adapter, by their names in the base model."""
    found = {name.removeprefix(_WRAPPED): layer for name, layer in zoo_layers(model, adapter_name)}
    if not found:
        raise ModelError(f"adapter {adapter_name!r} is on no layer of this model")
    return found


def _exact(method: Method, adapter: LinearAdapter) -> _Written:
    factors = adapter.factors()
    if factors is None or (factors.out_scale is not None and method.stock_lora is None):
        raise ModelError(f"a {method.name} adapter is not low-rank; name the rank of a plain LoRA to come near it")
    a, b = factors.dense(adapter.in_features)
    return _Written(a.detach(), b.detach(), factors.scale)


@torch.no_grad()
def _nearest(adapter: LinearAdapter, rank: int) -> _Written:
    """Return the rank-`rank` part of the update, which no other matrix of that rank is closer to."""
    u, s, vt = torch.linalg.svd(adapter.delta_weight(adapter.frozen_weight()), full_matrices=False)
    root, squares = s[:rank].sqrt(), s.double() ** 2
    return _Written(
        root[:, None] * vt[:rank], u[:, :rank] * root, 1.0, float(squares[rank:].sum()), float(squares.sum())
    )


def _shapes(layer: ZooLinear) -> dict[str, tuple[int, ...]]:
    """Return the shapes in which peft has a layer's tensors, by the ends of its keys, where they are no matrices."""
    shape = cast(Tensor, layer.base_layer.weight).shape
    if len(shape) != 4:
        return {}
    return {"lora_A.weight": (-1, *shape[1:]), "lora_B.weight": (shape[0], -1, 1, 1)}


def _stock_config(
    model: nn.Module, config: ZooConfig, stock: StockLora, written: dict[str, _Written], adapter_name: str
) -> peft.LoraConfig:
    ranks = {name: one.a.shape[0] for name, one in written.items()}
    root = 0.5 if "use_rslora" in stock.flags else 1.0
    alphas = {name: _whole(one.scale * ranks[name] ** root) for name, one in written.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    settings: dict[str, Any] = {name: getattr(config, name) for name in _SHARED}
    if isinstance(settings["target_modules"], set):  # an order of its own, so that equal adapters make equal files
        settings["target_modules"] = sorted(settings["target_modules"])
    if 0 in (config.rank_pattern or {}).values():  # peft knows no rank 0: name the layers that are left
        nothing = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        settings |= {"target_modules": sorted(written), **nothing}
    return peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        rank_pattern={name: value for name, value in ranks.items() if value != r},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
        lora_dropout=config.dropout,
        fan_in_fan_out=any(layer.kind.transposed for layer in _layers(model, adapter_name).values()),
        inference_mode=True,
        **settings,
        **dict.fromkeys(stock.flags, True),
    )


def _method_of(folder: Path, stock: peft.LoraConfig, name: str | None) -> tuple[Method, StockLora]:
    """Return the method that computes what a stock config says, and how its folders look."""
    flags = {flag for flag in ("use_dora", "use_rslora") if getattr(stock, flag)}
    methods = [get_method(each) for each in ([name] if name else list_methods())]
    # alpha / sqrt(r) can be said as alpha / r: a method without that flag will do
    for wanted in (flags, flags - {"use_rslora"}):
        for method in methods:
            looks = method.stock_lora
            if looks is not None and looks.flags == wanted and (looks.reads or name):
                return method, looks
    says = " and ".join(sorted(flags)) or "a plain LoRA"
    raise ModelError(f"{folder} is {says}, which {name or 'no method of the zoo'} does not compute")


def _of_layers(layers: list[str], pattern: dict[str, Any], default: Any) -> dict[str, Any]:
    """Return what one of peft's patterns says about each layer; its keys are regular expressions for ends of names."""
    return {name: pattern.get(get_pattern_key(pattern.keys(), name), default) for name in layers}


def _zoo_tensor(key: str, value: Tensor, looks: StockLora) -> tuple[str, Tensor]:
    for end, own in looks.tensors.items():
        if key.endswith(f".{end}"):
            # peft's convolutions have four axes
            return f"{key.removesuffix(end)}peftzoo_adapter.{own}", value.flatten(1) if value.dim() == 4 else value
    return key, value


def _whole(alpha: float) -> float:
    """Return `alpha` without the noise of a product with its divisor, as an int where it is one."""
    alpha = float(f"{alpha:.13g}")
    return int(alpha) if alpha == int(alpha) else alpha
