"""Adapters to and from folders: one call each way for zoo adapters, stock LoRA and peft's own."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import nn

from peftzoo.core.config import ZooConfig
from peftzoo.core.lora_folder import WEIGHTS, read_lora_folder, write_lora_folder, write_weights
from peftzoo.core.names import check_adapter_name
from peftzoo.core.registry import adopting, get_method, reading
from peftzoo.errors import ModelError

CONFIG = "adapter_config.json"


def save_adapter(model: PeftModel, folder: str | Path, adapter_name: str = "default") -> None:
    """Write an adapter of `model` to `folder`: `adapter_config.json` and `adapter_model.safetensors`.

    The LoRA family becomes a stock peft LoRA folder, which opens without peftzoo; every other method keeps the format
    of its peft type.
    """
    config = model.peft_config[adapter_name]
    if isinstance(config, ZooConfig) and get_method(config.method_name).stock_lora is not None:
        write_lora_folder(model, Path(folder), adapter_name)
        return
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    stored = copy.copy(config)
    stored.inference_mode = True
    stored.save_pretrained(str(folder))
    write_weights(Path(folder), state)


def load_adapter(
    base: nn.Module,
    folder: str | Path,
    adapter_name: str = "default",
    is_trainable: bool = False,
    method: str | None = None,
) -> PeftModel:
    """Return `base` with the adapter of `folder` on it; a stock LoRA or RandLoRA becomes the zoo's.

    Args:
        base: the untouched base model.
        folder: a local adapter folder.
        adapter_name: name to give the adapter.
        is_trainable: whether its tensors shall train on.
        method: the method of the LoRA family to take a stock LoRA for, such as lora_fa to train on its B alone; None
            takes the one whose folders look so: lora, rslora or dora.

    Raises:
        ModelError: the folder is not a complete adapter, holds a pickle, or does not fit `base` or `method`.
    """
    folder = Path(folder)
    check_adapter_name(adapter_name)
    config = read_config(folder)
    before = dict(base.named_modules())
    try:
        reader = reading(config.get("peft_type"))
        if reader is not None or (config.get("peft_type") == "LORA" and adopting(config) is None):
            own, state = read_lora_folder(folder, method) if reader is None else reader(folder)
            own.inference_mode = not is_trainable
            model = get_peft_model(base, own, adapter_name)
            set_peft_model_state_dict(model, state, adapter_name)
        else:
            model = PeftModel.from_pretrained(base, str(folder), adapter_name, is_trainable=is_trainable)
        if not isinstance(model.peft_config[adapter_name], ZooConfig):  # those were checked to the last tensor
            _refuse_partial(model, folder, adapter_name)
    except Exception as error:
        _put_back(base, before)
        if isinstance(error, ModelError):
            raise
        if isinstance(error, KeyError):  # peft looks up modules_to_save one by one
            raise ModelError(f"{folder} does not fit this model; 1 missing: {error.args[0]}") from error
        if isinstance(error, (TypeError, ValueError, RuntimeError)):
            raise ModelError(f"{folder}: {error}") from error
        raise
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """Return the `adapter_config.json` of `folder`, after checking that its weights are a readable safetensors file.

    Raises:
        ModelError: one of the two files is missing or broken, or the weights are a pickle.
    """
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder} is no adapter folder: it has no {CONFIG}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ModelError(f"{folder / CONFIG}: {error}") from error
    if config.get("peft_type") not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ModelError(f"{folder / CONFIG}: peft_type {config.get('peft_type')!r} is known to nobody here")
    if not (folder / WEIGHTS).is_file():
        pickled = " (a pickle can run code and is not read)" if (folder / "adapter_model.bin").exists() else ""
        raise ModelError(f"{folder} has no {WEIGHTS}{pickled}")
    try:
        with safe_open(folder / WEIGHTS, framework="pt"):
            pass
    except SafetensorError as error:
        raise ModelError(f"{folder / WEIGHTS}: {error}") from error
    return config


def _put_back(base: nn.Module, before: dict[str, nn.Module]) -> None:
    """Undo an injection that came to nothing: every module of `before` is where it was."""
    for name, module in before.items():
        parent, _, child = name.rpartition(".")
        if name and getattr(before[parent], child) is not module:
            setattr(before[parent], child, module)
    if not any(isinstance(module, BaseTunerLayer) for module in before.values()):
        vars(base).pop("peft_config", None)


def _refuse_partial(model: PeftModel, folder: Path, adapter_name: str) -> None:
    """Raise ModelError unless the file holds exactly the keys of the adapter; peft's own tuners only warn."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        found = set(file.keys())
    want = set(get_peft_model_state_dict(model, adapter_name=adapter_name))
    if found != want:
        wrong = sorted(found ^ want)
        raise ModelError(f"{folder} does not fit this model; {len(wrong)} keys differ, such as {wrong[0]}")
