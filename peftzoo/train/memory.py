"""Memory: how much was used, and what to change when there is not enough."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from peftzoo.errors import MemoryLimitError
from peftzoo.train.recipe import Recipe

# what torch's CPU allocator says; it has no error class of its own
CPU_MESSAGES = ("can't allocate memory", "not enough memory")


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes this process has used so far, of the GPU or else resident; None where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    from resource import RUSAGE_SELF, getrusage

    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def explain_out_of_memory(recipe: Recipe, device: torch.device, doing: str) -> Iterator[None]:
    """Turn running out of memory inside the block into a MemoryLimitError that says what to change.

    Args:
        recipe: the run's settings, from which the remedies are made.
        device: where it runs.
        doing: loading, calibrating, training or evaluating.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        peak = (peak_memory(device) or 0) / 2**30
        advice = "".join(f"\n  {rank}. {remedy}" for rank, remedy in enumerate(remedies(recipe, device, doing), 1))
        raise MemoryLimitError(
            f"out of memory on {device} while {doing} (peak {peak:.2f} GiB); try:{advice}"
        ) from error


def remedies(recipe: Recipe, device: torch.device, doing: str) -> list[str]:
    """Return the settings to change, the one that helps most at the least cost first."""
    found = []
    train = recipe.train
    if doing == "evaluating" and recipe.eval.per_device_eval_batch_size > 1:
        size = recipe.eval.per_device_eval_batch_size // 2
        found.append(f"eval.per_device_eval_batch_size={size}: half the activations, the same metrics")
    if doing in ("calibrating", "training") and train.per_device_train_batch_size > 1:
        size = train.per_device_train_batch_size
        parts = 2 if size % 2 == 0 else size
        found.append(
            f"train.per_device_train_batch_size={size // parts} "
            f"train.gradient_accumulation_steps={train.gradient_accumulation_steps * parts}: "
            f"1/{parts} of the activations, the same result"
        )
    if recipe.model.dtype == "float32":
        found.append("model.dtype=bfloat16: half the memory of the base model")
    if doing == "training" and train.mixed_precision == "no" and device.type != "cpu":
        found.append("train.mixed_precision=bf16: about half the activations")
    if doing in ("calibrating", "training") and recipe.data.max_length > 64:
        found.append(f"data.max_length={recipe.data.max_length // 2}: cuts longer rows")
    found.append("a smaller model in model.name_or_path")
    return found


def _is_out_of_memory(error: Exception) -> bool:
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(message in str(error) for message in CPU_MESSAGES)
