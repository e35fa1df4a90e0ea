"""The stock peft LoRA folder, written from any low-rank zoo adapter and read into the zoo's LoRA.

The folder needs neither peftzoo nor a change of the base: peft, vLLM and whatever else reads LoRA opens it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftzoo.core.config import ZooConfig
from peftzoo.core.layer import ZooLinear
from peftzoo.core.registry import get_method
from peftzoo.errors import ModelError

WEIGHTS = "adapter_model.safetensors"
_WRAPPED = "base_model.model."
# settings that mean the same in a stock LoraConfig and in a ZooConfig
_SHARED = (
    *("task_type", "base_model_name_or_path", "revision", "target_modules", "exclude_modules", "modules_to_save"),
    *("layers_to_transform", "layers_pattern"),
)
# what else a stock LoRA may say without computing anything but x W^T + scale * x A^T B^T on the untouched base
_READ = (
    *_SHARED,
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "fan_in_fan_out", "init_lora_weights", "inference_mode"),
    *("peft_type", "peft_version", "auto_mapping", "megatron_core", "qalora_group_size"),
)
_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # the others edit the base


def write_lora_folder(model: Any, folder: Path, adapter_name: str = "default") -> None:
    """Write an adapter of a peft `model` as a stock peft LoRA folder with the same outputs.

    Raises:
        ModelError: its method is not low-rank, or its layers differ in rank or scale.
    """
    config: ZooConfig = model.peft_config[adapter_name]
    method = get_method(config.method_name)
    state: dict[str, Tensor] = {}
    ranks, scales, transposed = set(), set(), False
    for name, layer in model.named_modules():
        if not isinstance(layer, ZooLinear) or adapter_name not in layer.peftzoo_adapter:
            continue
        factors = layer.adapter(adapter_name).factors()
        if factors is None:
            raise ModelError(f"a {method.name} adapter is not low-rank and cannot be written as a plain LoRA")
        a, b = factors.dense(layer.in_features)
        key = name if name.startswith(_WRAPPED) else _WRAPPED + name
        state |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        ranks.add(a.shape[0])
        scales.add(factors.scale)
        transposed |= layer.kind.transposed
    if len(ranks) > 1 or len(scales) > 1:
        raise ModelError(f"a stock LoRA folder holds one rank and scale; found {sorted(ranks)} and {sorted(scales)}")
    for key, value in get_peft_model_state_dict(model, adapter_name=adapter_name).items():
        if ".peftzoo_adapter." not in key:  # modules_to_save
            state[key] = value
    stock = peft.LoraConfig(
        r=ranks.pop(),
        lora_alpha=1,
        lora_dropout=config.dropout,
        fan_in_fan_out=transposed,
        inference_mode=True,
        **{name: getattr(config, name) for name in _SHARED},
    )
    stock.lora_alpha = _whole(scales.pop() * stock.r)
    if isinstance(stock.target_modules, set):  # an order of its own, so that equal adapters make equal files
        stock.target_modules = sorted(stock.target_modules)
    stock.save_pretrained(str(folder))
    write_weights(folder, state)


def write_weights(folder: Path, state: dict[str, Tensor]) -> None:
    """Write the tensors of an adapter into its folder, as peft does."""
    # clones, because safetensors refuses tensors that share memory
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def read_lora_folder(folder: Path) -> tuple[ZooConfig, dict[str, Tensor]]:
    """Return a stock LoRA folder as the zoo's LoRA: its config and its tensors under the zoo's keys.

    Raises:
        ModelError: it uses something that the zoo's LoRA does not compute.
    """
    stock = peft.LoraConfig.from_pretrained(str(folder))
    plain = peft.LoraConfig()
    used = [f.name for f in dataclasses.fields(stock) if getattr(stock, f.name) != getattr(plain, f.name)]
    used = [f"bias={stock.bias}" if name == "bias" else name for name in used if name not in _READ]
    used += [] if stock.init_lora_weights in _STARTS else [f"init_lora_weights={stock.init_lora_weights}"]
    if used:
        raise ModelError(f"{folder}: this LoRA uses {', '.join(used)}, which peftzoo does not read; use it with peft")
    settings: dict[str, Any] = {name: getattr(stock, name) for name in _SHARED}
    settings["target_modules"] = settings["target_modules"] or "all-linear"
    make = get_method("lora").make_config
    config = make(**settings, r=stock.r, alpha=stock.lora_alpha, dropout=stock.lora_dropout, base_fingerprint={})
    if stock.use_rslora:
        config.alpha = stock.lora_alpha * stock.r**0.5  # its scale is alpha / sqrt(r)
    state = load_file(folder / WEIGHTS)
    names = {".lora_A.weight": ".peftzoo_adapter.a", ".lora_B.weight": ".peftzoo_adapter.b"}
    for ending, own in names.items():
        state = {k.removesuffix(ending) + own if k.endswith(ending) else k: v for k, v in state.items()}
    return config, state


def _whole(alpha: float) -> float:
    """Return `alpha` as an int where it is one, as people write it."""
    return int(alpha) if alpha == int(alpha) else alpha
