"""The start that some methods take from the training data, before the optimizer is made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor

from peftzoo.core.calibrate import calibrate, uncalibrated
from peftzoo.train.order import Order
from peftzoo.train.progress import Report


def calibrate_adapter(
    model: PeftModel, task: Any, order: Order, accelerator: Accelerator, report: Report
) -> dict[str, int] | None:
    """Give the adapter of `model` its start from the rows of a run in the run's own order, if its method takes one.

    Every process runs its own share of the rows, and all end with the same adapters.

    Returns:
        The rank of each layer, 0 where the adapter was taken off; None where no data were needed.

    Raises:
        DataError: the rows are too few to take a start from.
    """
    if not uncalibrated(model, model.active_adapter):
        return None
    with accelerator.autocast():  # on the inputs that the layers will see in training
        ranks = calibrate(model, _batches(task, order), model.active_adapter, report.say)
    values = sorted(ranks.values())
    dealt = f"ranks from {values[0]} to {values[-1]}" if values[0] != values[-1] else f"rank {values[0]} everywhere"
    report.say(f"calibrated {len(ranks)} layers on training data: {dealt}, {values.count(0)} without an adapter")
    return ranks


def _batches(task: Any, order: Order) -> Iterator[dict[str, Tensor]]:
    """Yield the batches of this process as training will see them, without end."""
    for step in order:
        for part in step:
            yield task.collate([task.examples[row] for row in part])
