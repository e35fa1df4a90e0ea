"""Parameter groups: a learning rate of its own for each trained tensor of a method that asks for one (LoRA+)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from peftzoo.core.layer import zoo_layers
from peftzoo.core.suggest import nearest
from peftzoo.errors import ModelError


def parameter_groups(model: nn.Module, learning_rate: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Return what trains in `model` in groups for an optimizer, one for each learning rate.

    `lr_ratios` of an adapter's config, {name of a trained tensor: factor}, multiplies the rate of that tensor in every
    layer; all else that trains has the factor 1. A schedule multiplies the rate of every group alike, so ratios stay.

    Args:
        model: any model, with zoo adapters or without.
        learning_rate: the peak rate of what has no ratio.
        weight_decay: of every group.

    Returns:
        Dictionaries of `params`, `lr` and `weight_decay`, first that of what has no ratio. Any torch optimizer takes
        them, and Hugging Face's Trainer takes that optimizer as `optimizers=(optimizer, None)`.

    Raises:
        ModelError: a ratio is given for what is no trained tensor of the method.
    """
    ratios = dict(_ratios(model))
    grouped: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            grouped.setdefault(ratios.get(id(parameter), 1.0), []).append(parameter)
    order = sorted(grouped, key=lambda ratio: (ratio != 1.0, ratio))
    return [{"params": grouped[r], "lr": learning_rate * r, "weight_decay": weight_decay} for r in order]


def _ratios(model: nn.Module) -> Iterator[tuple[int, float]]:
    """Yield the identity of every tensor that has a ratio, and the ratio."""
    asked: dict[tuple[str, str], set[str]] = {}  # (method, tensor) -> the tensors that there are
    for _, layer in zoo_layers(model):
        for name in layer.peftzoo_adapter:
            adapter = layer.adapter(name)
            tensors = dict(adapter.named_parameters())
            for tensor, ratio in (adapter.config.lr_ratios or {}).items():
                asked.setdefault((adapter.config.method_name, tensor), set()).update(tensors)
                if tensor in tensors:
                    yield id(tensors[tensor]), ratio
    for (method, tensor), there in asked.items():
        if tensor not in there:
            guess = nearest(tensor, there)
            hint = f"did you mean {guess}?" if guess else f"it trains {', '.join(sorted(there)) or 'none'}"
            raise ModelError(f"{method}: lr_ratios names {tensor}, which is no trained tensor of {method}; {hint}")
