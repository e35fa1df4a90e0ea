"""`bench kernels`: one adapted layer, forward and backward, in every implementation there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from peftzoo.bench import layers
from peftzoo.bench.layers import (
    DROP_SEED,
    FLOOR,
    INPUTS,
    OPS,
    OURS,
    PEFT,
    Candidate,
    Case,
    candidate,
    chosen,
    reference,
    using_backend,
)
from peftzoo.bench.report import Row, append, compared
from peftzoo.bench.timing import alternate, graph_replay, spread
from peftzoo.errors import BenchmarkError, RecipeError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# relative error of an output or gradient: half precision rounds at every pass, and peft makes many
BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
DIRECTIONS = ("forward", "backward")

# the shapes of the bars, and a group; on a GPU the layers of Llama-3-8B alone and as they share an input, and odd ones
CPU_SHAPES = ("2048,1024,1024", "2048,1024,2816", "2048,1024,1024+256+256")
CUDA_SHAPES = (
    *(
        f"{m},{size}"
        for m in (512, 2048, 8192, 16384)
        for size in ("4096,4096", "4096,1024", "4096,14336", "14336,4096", "4096,4096+1024+1024", "4096,14336+14336")
    ),
    "8191,4100,1000",
)
# the most that ours may be of peft's: a layer's overhead over the frozen layer for lora, its time for dora
BARS = {
    "lora": ("overhead_to_peft", 0.75, "LoRA layer overhead"),
    "dora": ("time_to_peft", 0.72, "DoRA layer time"),
}


@dataclass(frozen=True)
class KernelSettings:
    """What `bench kernels` runs; an empty list is the default of the device.

    Attributes:
        shapes: M,K,N each, or M,K,N+N+... for layers on one input.
        ranks: of the updates.
        dropouts: those other than 0 are for `lora` and `dora`.
        dtypes: names of torch's.
        ops: of `OPS`; empty means all.
        only: implementations, beside the floor; empty means all, on a CPU without `peft-compiled` and `zoo-cublas`.
        rounds: in which every implementation has its turn; 0 is the default of the device.
    """

    shapes: Sequence[str] = ()
    ranks: Sequence[int] = ()
    dropouts: Sequence[float] = ()
    dtypes: Sequence[str] = ()
    ops: Sequence[str] = ()
    only: Sequence[str] = ()
    rounds: int = 0


def plan(settings: KernelSettings, device: torch.device) -> list[tuple[Case, list[str]]]:
    """Return the cases and the names of each one's implementations.

    Raises:
        RecipeError: a setting cannot be, or nothing is left to run.
    """
    cuda = device.type == "cuda"
    shapes = [sizes_of(text) for text in settings.shapes or (CUDA_SHAPES if cuda else CPU_SHAPES)]
    ranks = settings.ranks or ((8, 16, 64, 256) if cuda else (16,))
    dropouts = settings.dropouts or (0.0, 0.05)
    dtypes = settings.dtypes or (("bfloat16",) if cuda else ("float32",))
    for value in ranks:
        if value < 1:
            raise RecipeError(f"--rank {value} must be at least 1")
    for chance in dropouts:
        if not 0 <= chance < 1:
            raise RecipeError(f"--dropout {chance:g} must be at least 0 and below 1")
    known("--dtype", dtypes, DTYPES)
    known("--op", settings.ops, OPS)
    # on a CPU a compilation takes longer than all the rest, and ours runs on the library anyhow
    slow = set() if cuda else {"peft-compiled", f"{OURS}-cublas"}
    found, names_there = [], set()
    for op, dtype, (m, k, ns), r, p in product(settings.ops or OPS, dtypes, shapes, ranks, dropouts):
        if (op == "group") != (len(ns) > 1) or (p and op not in ("lora", "dora")):
            continue
        case = Case(op, m, k, ns, r, p, DTYPES[dtype], device)
        there = layers.names(op, p, case.dtype, device)
        names_there.update(there)
        names = chosen(there, settings.only, slow)
        if len(names) > 1:
            found.append((case, names))
    known("--only", settings.only, names_there)
    if not found:
        raise RecipeError("nothing to run: one shape M,K,N goes with lora, dora and out_scale, M,K,N+N with group")
    return found


def known(option: str, given: Sequence[str], there: Collection[str]) -> None:
    """Refuse a name that is not there.

    Raises:
        RecipeError: one is not.
    """
    for name in given:
        if name not in there:
            raise RecipeError(f"{option} {name} is not one of {', '.join(sorted(there))}")


def sizes_of(text: str) -> tuple[int, int, tuple[int, ...]]:
    """Return M, K and every N of a shape.

    Raises:
        RecipeError: it is none.
    """
    try:
        m, k, n = text.split(",")
        sizes = int(m), int(k), *map(int, n.split("+"))
    except ValueError:
        raise RecipeError(f"--shape {text} is not M,K,N, such as 2048,1024,1024 or 2048,1024,1024+256+256") from None
    if min(sizes) < 1:
        raise RecipeError(f"--shape {text}: every size must be at least 1")
    return sizes[0], sizes[1], sizes[2:]


def run(
    settings: KernelSettings,
    device: torch.device,
    path: Path,
    facts: dict[str, Any],
    show: Callable[[str, list[Row]], None],
) -> list[Row]:
    """Measure every case and write its rows into `path`.

    Args:
        settings: what to run.
        device: where.
        path: JSONL file that exists.
        facts: of the environment, a part of every row.
        show: called with what is about to be measured and no rows, then with every row of it.

    Raises:
        RecipeError: as for `plan`.
        BenchmarkError: an implementation computes something else than it should.
    """
    found = []
    todo = plan(settings, device)
    rounds = settings.rounds or (50 if device.type == "cuda" else 7)
    for number, (case, names) in enumerate(todo, 1):
        show(f"{number}/{len(todo)}  {case.op} {case.shape} r={case.r} p={case.p:g}: {', '.join(names)}", [])
        rows = [row | {"environment": facts} for row in measure(case, names, rounds)]
        append(path, rows)
        show("", rows)
        found += rows
    return found


def measure(case: Case, names: Sequence[str], rounds: int) -> list[Row]:
    """Return the rows of one case: each implementation, first found right, in each direction.

    Raises:
        BenchmarkError: one computes something else than it should.
    """
    candidates = [candidate(name, case) for name in names]
    facts = {one.name: _checked(one, case) for one in candidates}
    reference.cache_clear()  # on a GPU it would take the memory of the runs
    runs = {one.name: (lambda turn, mark, one=one: one.run(case, turn, mark)) for one in candidates}
    parts = alternate(runs, rounds, case.device)
    seconds = {
        direction: {name: [part[place] for part in taken] for name, taken in parts.items()}
        for place, direction in enumerate(DIRECTIONS)
    } | {"both": {name: [sum(part) for part in taken] for name, taken in parts.items()}}
    graphs = _graph_seconds(runs, rounds, case) if case.device.type == "cuda" else {}
    size = {"op": case.op, "shape": [case.m, case.k, list(case.ns)], "r": case.r, "p": case.p}
    rows = []
    for direction, taken in seconds.items():
        for name, figures in compared(taken, FLOOR, PEFT).items():
            rows.append(
                {"implementation": name, "direction": direction, "dtype": str(case.dtype).removeprefix("torch.")}
                | size
                | figures
                | {"flop": case.flop(direction), "bytes": case.bytes(direction), "rounds": rounds}
                | facts[name]
                | ({"graph_seconds": graphs.get(name)} if direction == "both" and graphs else {})
            )
    return rows


def bars(rows: Sequence[Row]) -> list[str]:
    """Return one line for each bar that the rows say something about; bars are for a CPU, without dropout."""
    lines = []
    for row in rows:
        if row["op"] not in BARS or row["implementation"] != OURS or row["direction"] != "both" or row["p"]:
            continue
        key, bar, what = BARS[row["op"]]
        if row[key] is not None:
            m, k, (n,) = row["shape"]
            lines.append(
                f"{what} / peft's: {row[key]:.2f} (bar {bar:.2f}; M={m}, K={k}, N={n}, r={row['r']}, {row['dtype']})"
            )
    return lines


def _checked(one: Candidate, case: Case) -> Row:
    """Return the largest relative error of a candidate and what it keeps, after finding it right.

    Raises:
        BenchmarkError: an output or gradient is missing, not finite, zero or too far from the reference.
    """
    kept: dict[int, int] = {}
    own = {value.untyped_storage().data_ptr() for value in (*case.weights, *one.trained.values())}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    device = case.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    torch.manual_seed(DROP_SEED)
    with using_backend(one.backend):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            ys = one.forward(case.xs[0])
        gradients = one.gradients(ys, case, 0)
    found: Row = {"saved_bytes": sum(kept.values())}
    if device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            one.run(case, 0, lambda: None)
            torch.cuda.synchronize(device)
        found["kernels"] = sum(event.device_type.name == "CUDA" for event in seen.events() or [])
    got = {f"y_{i}": y for i, y in enumerate(ys)} | {f"d_{name}": value for name, value in gradients.items()}
    drops = one.drops if case.p and one.trained else None
    want = reference(case, drops, one.drops_all and drops is not None, bool(one.trained))
    # a dropout that cannot be repeated may be off by what it drops
    unknown = case.p and one.trained and drops is None
    bound = 2 * math.sqrt(case.p / (1 - case.p)) if unknown else BOUNDS[case.dtype]
    errors = [relative_error(one.name, name, value, want[name], bound) for name, value in got.items()]
    return found | {"max_relative_error": None if unknown else max(errors)}


def relative_error(implementation: str, name: str, got: Tensor | None, want: Tensor, bound: float) -> float:
    """Return |got - want| / |want|.

    Raises:
        BenchmarkError: there is no `got`, or it is not finite, zero, or further away than `bound`.
    """
    if got is None:
        raise BenchmarkError(f"{implementation}: {name} is missing; nothing was timed")
    if not torch.isfinite(got).all():
        raise BenchmarkError(f"{implementation}: {name} is not finite; nothing was timed")
    if not got.any():
        raise BenchmarkError(f"{implementation}: {name} is zero; nothing was timed")
    error = float((got.detach().double() - want).norm() / want.norm())
    if error > bound:
        raise BenchmarkError(f"{implementation}: {name} is off by {error:.1e}, over {bound:.0e}; nothing was timed")
    return error


def _graph_seconds(runs: dict[str, Any], rounds: int, case: Case) -> dict[str, dict[str, float]]:
    """Return the times of the runs as CUDA graphs, without those that cannot be captured."""
    graphs = {}
    for name, one in runs.items():
        with suppress(RuntimeError):  # a call that a capture does not allow: the row then has no such time
            graphs[name] = graph_replay(one, INPUTS)
    return {
        name: spread([sum(part) for part in taken]) for name, taken in alternate(graphs, rounds, case.device).items()
    }
