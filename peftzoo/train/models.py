"""The base model, its tokenizer and the adapter on it, from what a recipe says."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from peftzoo import builtin
from peftzoo.core.fuse import fuse
from peftzoo.core.layer import zoo_layers
from peftzoo.core.peft_methods import prepare
from peftzoo.core.registry import get_method
from peftzoo.core.storage import load_adapter
from peftzoo.errors import ModelError
from peftzoo.train.recipe import ModelSettings, Recipe


def load_tokenizer(model: ModelSettings) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the base model.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    tokenizer: PreTrainedTokenizerBase = _loaded(model, AutoTokenizer.from_pretrained)
    return tokenizer


def load_base(auto_class: Any, model: ModelSettings, device: torch.device) -> PreTrainedModel:
    """Return the base model on ``device``, frozen.

    Args:
        auto_class: the class of transformers that knows the task, such as ``AutoModelForCausalLM``.
        model: the ``model`` section of the recipe.
        device: where the weights go.

    Raises:
        ModelError: there is no such model, or it cannot be read.
    """
    settings = {"dtype": model.dtype, "attn_implementation": model.attn_implementation}
    base: PreTrainedModel = _loaded(model, auto_class.from_pretrained, **settings)
    base.requires_grad_(False)
    base.to(device)
    return base


def empty_base(auto_class: Any, model: ModelSettings) -> PreTrainedModel:
    """Return the base model on the meta device, from its config alone: shapes without weights.

    Raises:
        ModelError: there is no such model, or its config cannot be read.
    """
    config = _loaded(model, AutoConfig.from_pretrained)
    with torch.device("meta"):
        base: PreTrainedModel = auto_class.from_config(config)
    return base.requires_grad_(False)


def add_adapter(base: PreTrainedModel, recipe: Recipe, task_type: str) -> PeftModel:
    """Return ``base`` with the adapter of the recipe on it, ready to train.

    Args:
        base: the frozen base model; on the meta device the adapter has shapes and no values either.
        recipe: says which method with which settings, or which saved adapter to go on from.
        task_type: peft's name of the task, such as CAUSAL_LM.

    Raises:
        ModelError: the adapter does not fit the model.
    """
    folder, method = recipe.model.adapter_name_or_path, get_method(recipe.method.name)
    if folder is not None:
        family = method.name if method.stock_lora is not None else None  # their folders may not say which they are
        model = load_adapter(base, folder, is_trainable=True, method=family)
        if not isinstance(model.peft_config[model.active_adapter], method.config):
            raise ModelError(f"{folder} holds no {method.name} adapter; name its own method in method.name")
        return model
    config = method.make_config(**recipe.method.settings)
    config.task_type = task_type
    empty = base.device.type == "meta"
    try:
        if method.adopted:
            prepare(config, base, method.layers)
        return get_peft_model(base, config, revision=recipe.model.revision, low_cpu_mem_usage=empty)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ModelError(f"method {method.name} on {recipe.model.name_or_path}: {error}") from error


def checkpoint_activations(model: PeftModel) -> None:
    """Let the backward compute each block of ``model`` anew: less memory, about a third more time.

    Raises:
        ModelError: the architecture does not support it.
    """
    base: Any = model.get_base_model()
    # transformers renamed it in 5.23
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ModelError(f"train.activation_checkpointing: {error}") from error


def share_inputs(model: PeftModel) -> None:
    """Let layers of the zoo that are called with one input, such as q, k and v, be computed in one call."""
    if any(zoo_layers(model)):
        fuse(model)


def _loaded(model: ModelSettings, load: Any, **settings: Any) -> Any:
    name = model.name_or_path
    try:
        place = builtin.model_path(name.removeprefix("builtin/")) if name.startswith("builtin/") else name
    except KeyError as error:
        raise ModelError(f"model {name}: {error.args[0]}") from None
    try:
        return load(place, revision=model.revision or "main", **settings)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelError(f"model {name}: cannot be loaded: {error}") from error
