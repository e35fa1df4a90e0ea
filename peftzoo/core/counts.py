"""How many parameters a config would train on a model, without weights: seconds also for 70 billion parameters."""

from __future__ import annotations

import copy

import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from peftzoo.core.config import ZooConfig
from peftzoo.core.peft_methods import prepare
from peftzoo.core.registry import adopting
from peftzoo.errors import ModelError


def count_trained(model: nn.Module, config: PeftConfig) -> int:
    """Return the number of parameters that `config` trains on `model`: those of its adapters and `modules_to_save`.

    Args:
        model: on the meta device; left as it is.
        config: of the zoo's or of peft's.

    Raises:
        ValueError: the model has weights, which would be copied.
        ModelError: the config does not fit the model, or its tuner cannot be built without weights (some of peft's).
    """
    if any(not parameter.is_meta for parameter in model.parameters()):
        raise ValueError("count_trained: the model must be on the meta device; build it under torch.device('meta')")
    model, config = copy.deepcopy(model), copy.deepcopy(config)
    method = None if isinstance(config, ZooConfig) else adopting(config)
    name = getattr(config, "method", None) or (method.name if method else str(config.peft_type.value).lower())
    try:
        with torch.device("meta"):
            if not isinstance(config, ZooConfig):
                prepare(config, model, method.layers if method else ())
            adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    except (NotImplementedError, RuntimeError) as error:
        raise ModelError(f"{name} cannot be counted without weights: {error}") from error
    except (ValueError, TypeError) as error:
        raise ModelError(f"{name} does not fit this model: {error}") from error
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
