"""The processes of a run: how they find each other, how many threads each takes, what only the first one does."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from transformers.utils import logging

from peftzoo.errors import RecipeError
from peftzoo.train.checks import check_environment, check_world

T = TypeVar("T")
CORES = torch.get_num_threads()  # torch starts with one thread for each physical core that the process may use
MOST_THREADS = 4
SETTLE_SECONDS = 0.5


@contextmanager
def joined_processes(mixed_precision: str, digest: str) -> Iterator[Accelerator]:
    """Have all processes of the launch meet; give the accelerator of this one, and part again at the end.

    Args:
        mixed_precision: no, bf16 or fp16.
        digest: of the recipe; it must be the same everywhere.

    Raises:
        RecipeError: the processes would not train together, or the device does not know the precision.
    """
    check_environment()
    on_cpu = not torch.accelerator.is_available()
    if on_cpu and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(min(CORES, MOST_THREADS) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1))
    try:
        # without cpu=True several processes on a machine without GPU would each believe to be alone
        accelerator = Accelerator(mixed_precision=mixed_precision, cpu=on_cpu)
    except ValueError as error:
        raise RecipeError(f"train.mixed_precision={mixed_precision}: {error}") from error
    try:
        check_world(accelerator, digest)
        if not (accelerator.is_main_process and sys.stderr.isatty()):
            logging.disable_progress_bar()
        yield accelerator
    finally:
        if accelerator.num_processes > 1:
            # The threads of gloo may still be letting go of tensors, for which they need Python's lock. A group that
            # is taken down meanwhile waits for them and keeps the lock: on a busy machine 4 of 16 runs hung or
            # crashed at their very end, and with this pause none of 64.
            time.sleep(SETTLE_SECONDS)
        accelerator.end_training()
        # accelerate remembers device and precision for good; the next run of this process may want others
        AcceleratorState._reset_state(reset_partial_state=True)


def from_first(work: Callable[[], T]) -> T:
    """Return what ``work`` returns on the first process, on all; what it raises there is raised on all."""
    outcome: list[T | Exception | None] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = work()
        except Exception as error:  # the others wait for an answer, whatever happens
            outcome[1] = error
    broadcast_object_list(outcome)
    if isinstance(outcome[1], Exception):
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]
