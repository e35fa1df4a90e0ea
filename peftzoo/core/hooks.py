"""What a training loop owes the adapters of a model: the penalty in the loss, a call after each step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from peftzoo.core.adapter import LinearAdapter
from peftzoo.core.layer import ZooLinear


def active_adapters(model: nn.Module) -> Iterator[LinearAdapter]:
    """Yield every active zoo adapter of `model`, layer by layer."""
    for module in model.modules():
        if isinstance(module, ZooLinear):
            yield from module.active()


def penalty(model: nn.Module) -> Tensor | None:
    """Return the extra loss term of the active adapters, a scalar, or None if they have none.

    Each method's terms are averaged over its layers. Add its gradient, divided by the peak learning rate, once per
    optimizer step, after clipping.
    """
    terms: dict[str, list[Tensor]] = defaultdict(list)
    for adapter in active_adapters(model):
        term = adapter.penalty()
        if term is not None:
            terms[adapter.config.method_name].append(term)
    if not terms:
        return None
    first = next(iter(terms.values()))[0].device  # the layers of a large model may lie on several
    means = [torch.stack([term.to(first) for term in layers]).mean() for layers in terms.values()]
    return torch.stack(means).sum()


def after_step(model: nn.Module) -> None:
    """Tell the active adapters that the optimizer has stepped."""
    for adapter in active_adapters(model):
        adapter.after_step()
