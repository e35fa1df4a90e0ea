"""The stock peft RandLoRA folder, read as an adapter of the zoo with the same outputs.

Peft draws its random matrices in bfloat16 from a generator of its own, so they have to come from the folder, which
holds a copy of both for every layer and one more. The zoo's file holds them once, as large as they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
from safetensors.torch import load_file
from torch import Tensor

from peftzoo.core.config import ZooConfig
from peftzoo.core.lora_folder import WEIGHTS
from peftzoo.errors import ModelError

_SAME = (
    *("task_type", "base_model_name_or_path", "revision", "target_modules", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "r"),
)
_NAMES = {".randlora_lambda": ".peftzoo_adapter.lam", ".randlora_gamma": ".peftzoo_adapter.gamma"}


def read_randlora_folder(folder: Path, make_config: Callable[..., Any]) -> tuple[ZooConfig, dict[str, Tensor]]:
    """Return a stock peft RandLoRA folder as an adapter of the zoo: its config, and its tensors under the zoo's keys.

    Args:
        folder: the folder.
        make_config: makes the config of the method that reads it.

    Raises:
        ModelError: the random matrices are not in it, or biases were trained.
    """
    stock = peft.RandLoraConfig.from_pretrained(str(folder))
    if stock.bias != "none":
        raise ModelError(f"{folder}: this RandLoRA trains biases, which peftzoo does not read; use it with peft")
    state = load_file(folder / WEIGHTS)
    a, b = ([value for key, value in state.items() if key.endswith(f".randlora_{name}")] for name in "AB")
    if not a or not b:
        raise ModelError(f"{folder}: peft saved this RandLoRA without its random matrices; save_projection=True does")
    own = {
        f"{key.removesuffix(ending)}{name}": value
        for ending, name in _NAMES.items()
        for key, value in state.items()
        if key.endswith(ending)
    }
    widest = max(value.shape[1] for key, value in own.items() if key.endswith(".gamma"))
    bases = max(value.shape[1] for key, value in own.items() if key.endswith(".lam"))
    first = min(key.split(".peftzoo_adapter.")[0] for key in own) + ".peftzoo_adapter"  # as `share_matrices` has it
    own[f"{first}.basis_a"] = a[0][:, 0, :widest].contiguous()
    own[f"{first}.basis_b"] = b[0][:, :bases].flatten(1).t().contiguous()
    beside = {key: value for key, value in state.items() if ".randlora_" not in key}
    config = make_config(
        **{name: getattr(stock, name) for name in _SAME},
        alpha=stock.randlora_alpha,
        dropout=stock.randlora_dropout,
        scale_mode="peft",
        bases="stored",
        base_fingerprint={},
    )
    return config, own | beside
