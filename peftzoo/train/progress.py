"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere, nothing but from one process."""

from __future__ import annotations

import os
import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from typing_extensions import Self


class Report:
    """Prints a run. As a context it shows a bar while steps are taken and tidies up whatever happens.

    A reader that goes away (``| head``) ends the printing and not the training.
    """

    def __init__(self, *, prints: bool, steps: int) -> None:
        self._prints = prints and sys.stdout is not None
        self._steps = steps
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        if self._prints and sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TimeRemainingColumn(),
                console=Console(),
                expand=True,
            )
            self._task = self._bar.add_task(f"step 0/{self._steps}", total=self._steps)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, text: str) -> None:
        """Print lines of text."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._prints:
            self._write(text)

    def step(self, number: int, *, loss: float, learning_rate: float, rate: float, logged: bool) -> None:
        """Show that step ``number`` is done; without a terminal only if it is ``logged``.

        Args:
            number: steps taken.
            loss: in nats.
            learning_rate: where the schedule stands.
            rate: steps per second.
            logged: the recipe asks for a line after this step.
        """
        line = f"step {number}/{self._steps}  loss {loss:.4f}  lr {learning_rate:.2e}  {rate:.1f} steps/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=number, description=line)
        elif logged:
            left = (self._steps - number) / rate
            self.say(f"{line}  {left:.0f} s left")

    def _write(self, text: str) -> None:
        try:
            print(text, flush=True)
        except OSError:
            self._prints = False
            # Python flushes stdout once more when it ends, which would fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
