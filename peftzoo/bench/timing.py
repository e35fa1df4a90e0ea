"""Measuring: runs that take turns in one process, on a CPU's clock or a GPU's events, eagerly or as a CUDA graph.

A busy machine slows whatever runs at that moment. So every round takes all runs, starting with another one each time,
and what is reported are ratios within a round; a time in seconds comes second.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

Mark = Callable[[], None]
# a run is given the number of its round, which picks its input, and a function to call at the start and end of a part
Run = Callable[[int, Mark], None]

WARM_UP = 2  # rounds that are not counted


def alternate(runs: Mapping[str, Run], rounds: int, device: torch.device) -> dict[str, list[list[float]]]:
    """Return by name, for every round, the seconds between the marks that the run made.

    Args:
        runs: by name; each makes the same number of marks every time.
        rounds: how many are counted, after `WARM_UP` that are not.
        device: whose clock counts.
    """
    names = list(runs)
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    for turn in range(rounds + WARM_UP):
        for offset in range(len(names)):
            name = names[(turn + offset) % len(names)]
            taken = _timed(runs[name], turn, device)
            if turn >= WARM_UP:
                seconds[name].append(taken)
    return seconds


def _timed(run: Run, turn: int, device: torch.device) -> list[float]:
    if device.type == "cuda":
        events: list[torch.cuda.Event] = []

        def record() -> None:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        run(turn, record)
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]
    stamps: list[float] = []
    run(turn, lambda: stamps.append(time.perf_counter()))
    return [end - start for start, end in pairwise(stamps)]


def graph_replay(run: Run, turns: int) -> Run:
    """Return a run that replays `run`, captured as one CUDA graph per input: its time without Python and launches.

    Args:
        run: what to capture.
        turns: how many different inputs `run` has.

    Raises:
        RuntimeError: something in it cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # whatever a first call sets up must not be captured
        for turn in range(turns):
            run(turn, _no_mark)
    torch.cuda.current_stream().wait_stream(side)
    graphs = []
    for turn in range(turns):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(turn, _no_mark)
        graphs.append(graph)

    def replay(turn: int, mark: Mark) -> None:
        mark()
        graphs[turn % turns].replay()
        mark()

    return replay


def _no_mark() -> None:
    """Stand for a mark where nobody counts."""


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median and the 20th and 80th percentile."""
    if len(seconds) < 2:
        return dict.fromkeys(("median", "p20", "p80"), seconds[0])
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"median": statistics.median(seconds), "p20": cuts[1], "p80": cuts[7]}


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Return the median over the rounds of one run's time relative to another's of the same round."""
    return statistics.median(one / other for one, other in zip(over, under, strict=True))


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Return what the machine can do at most in this process: FLOP/s of a matrix product, bytes/s of a copy."""
    size = 8192 if device.type == "cuda" else 1024
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(one)

    def marked(work: Callable[[], Any]) -> Run:
        def run(turn: int, mark: Mark) -> None:
            mark()
            work()
            mark()

        return run

    runs = {"gemm": marked(lambda: torch.mm(one, other, out=out)), "copy": marked(lambda: out.copy_(one))}
    best = {name: min(map(sum, found)) for name, found in alternate(runs, 10, device).items()}
    return {
        "gemm_flop_per_second": 2 * size**3 / best["gemm"],
        "copy_bytes_per_second": 2 * out.nbytes / best["copy"],
    }
