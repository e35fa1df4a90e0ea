"""In which order the rows are seen, and by which process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch


@dataclass(frozen=True)
class Order:
    """An endless seeded order of rows: each pass is a new permutation, and passes follow without a gap.

    The rows of a step depend on the seed and on the rows per step alone, not on how processes, batches and
    accumulation divide them.

    Attributes:
        rows: number of rows, >= 1.
        seed: of the permutations.
        batch_size: rows per process and forward pass.
        accumulation: forward passes per step.
        processes: how many share a step.
        process: which of them this is.
    """

    rows: int
    seed: int
    batch_size: int
    accumulation: int = 1
    processes: int = 1
    process: int = 0

    @property
    def rows_per_step(self) -> int:
        """Rows of one step, over all processes."""
        return self.batch_size * self.accumulation * self.processes

    def __iter__(self) -> Iterator[list[list[int]]]:
        """Yield for each step the row numbers of this process, one list per forward pass."""
        stream = self._stream()
        while True:
            step = list(islice(stream, self.rows_per_step))
            starts = range(self.process * self.batch_size, self.rows_per_step, self.processes * self.batch_size)
            yield [step[start : start + self.batch_size] for start in starts]

    def _stream(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.randperm(self.rows, generator=generator).tolist()
