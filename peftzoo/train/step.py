"""One optimizer step over all processes: forward, backward, checks, clipping, penalty, update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from peftzoo.core import hooks
from peftzoo.errors import NonFiniteError
from peftzoo.train.checks import check_gradients, non_finite
from peftzoo.train.evaluation import to_device


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes:
        loss: mean over the step's trained tokens of all processes, in nats; without a method's regularizer.
        grad_norm: of the gradient of the loss and the regularizer, before clipping.
        tokens: trained tokens of the step, over all processes.
        skipped: fp16 overflowed, nothing was updated and the loss scale was lowered.
    """

    loss: float
    grad_norm: float
    tokens: int
    skipped: bool


@dataclass
class Stepper:
    """Takes optimizer steps.

    Attributes:
        accelerator: knows the processes, the device and the precision; it must not accumulate by itself.
        model: the prepared model; called with a batch it returns an object whose ``loss`` is a mean.
        optimizer: the prepared optimizer, its schedule made.
        max_grad_norm: the gradient of loss and regularizer is clipped to this norm; 0 does not clip.
        taken: steps taken.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: AcceleratedOptimizer
    max_grad_norm: float
    taken: int = 0

    def __post_init__(self) -> None:
        self._inner = self.accelerator.unwrap_model(self.model)
        self._trained = {name: p for name, p in self._inner.named_parameters() if p.requires_grad}
        # a schedule keeps the peak rate of each group in initial_lr
        groups = self.optimizer.param_groups
        self._peak_rates = {id(p): group.get("initial_lr", group["lr"]) for group in groups for p in group["params"]}

    def take(self, batches: Sequence[dict[str, Tensor]], counts: Sequence[int]) -> StepResult:
        """Take one step on the mean over everything that the batches of all processes count.

        Args:
            batches: this process's batches of the step, the model's arguments by name.
            counts: for each batch how many terms its loss is the mean of.

        Raises:
            NonFiniteError: the loss or a gradient is not finite; nothing was updated.
            ModelError: after the first backward a trained tensor has no gradient.
        """
        number = self.taken + 1
        loss, tokens = self._backward(batches, counts)
        if not math.isfinite(loss):
            raise NonFiniteError(f"step {number}: the loss is {loss}")
        scaler = self.accelerator.scaler
        if self.taken == 0:
            check_gradients(self._inner, scaled=scaler is not None)
        self._add_regularizer()
        limit = self.max_grad_norm or math.inf
        norm = float(self.accelerator.clip_grad_norm_(self._trained.values(), limit))
        if not math.isfinite(norm) and (scaler is None or scaler.get_scale() < 1):
            broken = non_finite({name: parameter.grad for name, parameter in self._trained.items()})
            raise NonFiniteError(f"step {number}: the gradient norm is {norm}; not finite: {', '.join(broken[:3])}")
        self._add_penalty(len(batches))
        self.optimizer.step()
        self.optimizer.zero_grad()
        skipped = bool(self.optimizer.step_was_skipped)
        if not skipped:
            hooks.after_step(self._inner)
        self.taken = number
        return StepResult(loss, norm, tokens, skipped)

    def _backward(self, batches: Sequence[dict[str, Tensor]], counts: Sequence[int]) -> tuple[float, int]:
        """Leave the gradient of the step's mean loss in the model; return that loss and the number of its terms."""
        accelerator = self.accelerator
        total = int(accelerator.reduce(torch.tensor(sum(counts), device=accelerator.device), "sum"))
        loss = torch.zeros((), device=accelerator.device)
        for index, (batch, count) in enumerate(zip(batches, counts, strict=True)):
            # every token weighs the same, whichever batch or process it is in; the wrapper averages over processes
            with nullcontext() if index == len(batches) - 1 else accelerator.no_sync(self.model):
                part = self.model(**to_device(batch, accelerator.device)).loss * (count / total)
                accelerator.backward(part * accelerator.num_processes)
            loss += part.detach()
        return float(accelerator.reduce(loss, "sum")), total

    def _add_regularizer(self) -> None:
        """Add the gradient of the methods' regularizer, scaled as the loss is; once per step, on every process."""
        scaler = self.accelerator.scaler
        regularizer = hooks.regularizer(self._inner)
        if regularizer is not None:
            self._add_gradient(regularizer if scaler is None else regularizer * scaler.get_scale())

    def _add_penalty(self, accumulation: int) -> None:
        """Add the gradient of the methods' penalty; after clipping, and once per step however many batches it has.

        It is divided by the peak rate of each tensor, so that with plain gradient descent its pull is the penalty's
        own weight times where the schedule stands.
        """
        penalty = hooks.penalty(self._inner, accumulation)
        if penalty is not None:
            self._add_gradient(penalty, per_rate=True)

    def _add_gradient(self, term: Tensor, per_rate: bool = False) -> None:
        trained = list(self._trained.values())
        for parameter, gradient in zip(trained, torch.autograd.grad(term, trained, allow_unused=True), strict=True):
            if gradient is not None and parameter.grad is not None:
                parameter.grad.add_(gradient / self._peak_rates[id(parameter)] if per_rate else gradient)
