"""What a training loop owes the adapters of a model: their terms of the loss, a call after each step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from peftzoo.core.adapter import LinearAdapter
from peftzoo.core.cache import count_step
from peftzoo.core.layer import zoo_layers
from peftzoo.core.registry import adopting


def active_adapters(model: nn.Module) -> Iterator[LinearAdapter]:
    """Yield every active zoo adapter of `model`, layer by layer."""
    for _, layer in zoo_layers(model):
        yield from layer.active()


def penalty(model: nn.Module, accumulation: int = 1) -> Tensor | None:
    """Return the penalty of the active adapters, a scalar, or None if they have none.

    Each method's terms are averaged over its layers. Add its gradient, divided by the peak learning rate, once per
    optimizer step, after clipping.

    Args:
        model: any model with zoo adapters.
        accumulation: micro-batches of the step.
    """
    terms: dict[str, list[Tensor]] = defaultdict(list)
    for adapter in active_adapters(model):
        term = adapter.penalty(accumulation)
        if term is not None:
            terms[adapter.config.method_name].append(term)
    return _total([_total(layers) / len(layers) for layers in terms.values()]) if terms else None


def regularizer(model: nn.Module) -> Tensor | None:
    """Return the extra term of the loss of the active adapters, summed over layers, or None if they have none.

    Add it to the loss of a step, once however many micro-batches the step has.
    """
    terms = [term for adapter in active_adapters(model) if (term := adapter.regularizer()) is not None]
    terms += _of_adopted(model)
    return _total(terms) if terms else None


def _of_adopted(model: nn.Module) -> list[Tensor]:
    """Return the terms that peft's tuners compute and leave to trainers, each summed over its layers."""
    terms = []
    for tuner in model.modules():
        if isinstance(tuner, BaseTuner):
            makers = {m.name: m for name in tuner.active_adapters if (m := adopting(tuner.peft_config[name]))}
            terms += [method.regularizer(tuner) for method in makers.values() if method.regularizer]
    return terms


def _total(terms: list[Tensor]) -> Tensor:
    # one by one: the layers of a large model may lie on several devices
    return sum((term.to(terms[0].device) for term in terms[1:]), terms[0])


def after_step(model: nn.Module) -> None:
    """Tell the active adapters that the optimizer has stepped, or that trained tensors changed in some other way."""
    count_step()
    for adapter in active_adapters(model):
        adapter.after_step()
