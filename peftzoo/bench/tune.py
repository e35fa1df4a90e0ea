"""`bench tune`: which implementation of each product is the fastest on this device.

What it finds is what `peftzoo_kernels.dispatch` goes by from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftzoo.bench.kernels import BOUNDS, DTYPES, known, relative_error, sizes_of
from peftzoo.bench.timing import Run, alternate, spread
from peftzoo.errors import CheckpointError, RecipeError
from peftzoo_kernels._triton import can_run, triton
from peftzoo_kernels.dispatch import Choice, Sizes, Tiles, cache_file, candidates, device_name, keep
from peftzoo_kernels.down_grad import down_grad
from peftzoo_kernels.expand import expand
from peftzoo_kernels.frozen_product import frozen_product
from peftzoo_kernels.row_norms import row_norms
from peftzoo_kernels.shrink import shrink
from peftzoo_kernels.up_grads import up_grads

# the layers of Llama-3-8B
SHAPES = tuple(
    f"{m},{size}" for m in (512, 2048, 8192) for size in ("4096,4096", "4096,1024", "4096,14336", "14336,4096")
)
LIBRARY = "library"


@dataclass(frozen=True)
class TuneSettings:
    """What `bench tune` measures; an empty list is the default.

    Attributes:
        shapes: M,K,N of a layer each.
        ranks: of the updates; those that are padded alike need one.
        dropouts: 0 is always measured too.
        dtypes: names of torch's.
        rounds: in which every implementation has its turn.
    """

    shapes: Sequence[str] = SHAPES
    ranks: Sequence[int] = (16, 64)
    dropouts: Sequence[float] = (0.05,)
    dtypes: Sequence[str] = ("bfloat16",)
    rounds: int = 20


@dataclass(frozen=True)
class Measured:
    """The times of one product.

    Attributes:
        sizes: of the product.
        tiles: of the fastest kernel, or None where the library is faster.
        seconds: median of each implementation, the library's first.
    """

    sizes: Sizes
    tiles: Tiles | None
    seconds: dict[str, float]

    def __str__(self) -> str:
        sizes = self.sizes
        parts = [f"{name}={value}" for name in "mknr" if (value := getattr(sizes, name))]
        what = " ".join([sizes.product, *(["dropped"] if sizes.drops else []), *parts, str(sizes.dtype)[6:]])
        best = _name(self.tiles)
        others = [f"{name} {self.seconds[name] * 1e3:.3f}" for name in self.seconds if name != best]
        return f"{what}: {best} {self.seconds[best] * 1e3:.3f} ms; {', '.join(others)}"


def tune(settings: TuneSettings, device: torch.device, show: Callable[[str], None]) -> list[Measured]:
    """Measure every product of the layers that the settings name.

    Args:
        settings: what to measure.
        device: where.
        show: called with a line about each product.

    Raises:
        RecipeError: a setting cannot be, or no kernel can run here.
        BenchmarkError: a kernel computes something else than the library.
    """
    if not can_run(torch.empty(0, device=device)):
        raise RecipeError("bench tune measures kernels on a GPU, and torch sees none here")
    known("--dtype", settings.dtypes, DTYPES.keys() - {"float64"})
    layers = [sizes_of(shape) for shape in settings.shapes]
    if group := next((shape for shape, (_, _, ns) in zip(settings.shapes, layers, strict=True) if len(ns) > 1), None):
        raise RecipeError(f"--shape {group}: the products of a group are those of its layers; give M,K,N")
    if wrong := [r for r in settings.ranks if not 1 <= r <= 256]:
        raise RecipeError(f"--rank {wrong[0]} must be from 1 to 256: no kernel takes more")
    if bad := [p for p in settings.dropouts if not 0 <= p < 1]:
        raise RecipeError(f"--dropout {bad[0]:g} must be at least 0 and below 1")
    target, found = _target(device), {}
    for dtype, (m, k, (n,)), r, p in product(settings.dtypes, layers, settings.ranks, settings.dropouts or (0.0,)):
        for sizes, call in products(m, k, n, r, p, DTYPES[dtype], device).items():
            if sizes not in found:
                found[sizes] = measure(sizes, call, candidates(sizes, target), settings.rounds, device)
                show(str(found[sizes]))
    return list(found.values())


def products(
    m: int, k: int, n: int, r: int, p: float, dtype: torch.dtype, device: torch.device
) -> dict[Sizes, Callable[[Choice], Tensor]]:
    """Return every product of a layer x [m, k], W [n, k], forward and backward, on random tensors, given its tiles."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(rows: int, columns: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device, dtype=kind)

    x, dy, w, u = draw(m, k), draw(m, n), draw(n, k) / k**0.5, draw(m, r)
    a, b = draw(r, k, torch.float32) / k**0.5, draw(n, r, torch.float32) / r**0.5

    def up(tiles: Choice) -> Tensor:
        return torch.cat([part.flatten().float() for part in up_grads(dy, b, u, tiles=tiles)[1:3] if part is not None])

    found: dict[Sizes, Callable[[Choice], Tensor]] = {
        Sizes("frozen_product", m, k, n, r, dtype): lambda tiles: frozen_product(x, w, u, b, tiles=tiles)[0],
        Sizes("frozen_product", m, n, k, r, dtype): lambda tiles: frozen_product(dy, w.t(), u, a.t(), tiles=tiles)[0],
        Sizes("expand", m, 0, n, r, dtype): lambda tiles: expand(u, b, tiles=tiles),
        Sizes("up_grads", m, 0, n, r, dtype): up,
        Sizes("row_norms", n, k, 0, r, dtype): lambda tiles: row_norms(w, a, b, 0.5, tiles=tiles),
    }
    for seed in (None, torch.tensor(1, device=device)) if p else (None,):
        found |= {
            Sizes("shrink", m, k, 0, r, dtype, seed is not None): _with_tiles(shrink, x, a, p, seed),
            Sizes("expand", m, 0, k, r, dtype, seed is not None): _with_tiles(expand, u, a.t(), None, p, seed),
            Sizes("down_grad", m, k, 0, r, dtype, seed is not None): _with_tiles(down_grad, u, x, p, seed),
        }
    return found


def _with_tiles(function: Callable[..., Tensor], *args: Any) -> Callable[[Choice], Tensor]:
    return lambda tiles: function(*args, tiles=tiles)


def measure(
    sizes: Sizes, call: Callable[[Choice], Tensor], kernels: Iterable[Tiles], rounds: int, device: torch.device
) -> Measured:
    """Return the times of a product by the library and by the kernel with each of some tiles, found right before.

    Raises:
        BenchmarkError: a kernel computes something else than the library.
    """
    ways: dict[str, Tiles | None] = {LIBRARY: None}
    want = call(None).double()
    for tiles in kernels:
        try:
            got = call(tiles)
        except triton.runtime.errors.OutOfResources:  # more than the device has: none of its choices then
            continue
        relative_error(f"{sizes.product} {_name(tiles)}", "the product", got, want, 2 * BOUNDS[sizes.dtype])
        ways[_name(tiles)] = tiles
    runs: dict[str, Run] = {name: partial(_run, call, tiles) for name, tiles in ways.items()}
    seconds = {
        name: spread([sum(part) for part in taken])["median"]
        for name, taken in alternate(runs, rounds, device).items()
    }
    return Measured(sizes, ways[min(seconds, key=seconds.__getitem__)], seconds)


def store(found: Iterable[Measured], device: torch.device, out: Path | None = None) -> Path:
    """Keep what was measured, in this machine's table or in `out`, and return where.

    Raises:
        CheckpointError: the file cannot be written, or holds something else than a table.
    """
    path = out or cache_file(device_name(device))
    try:
        keep([(one.sizes, one.tiles) for one in found], path)
    except OSError as error:
        raise CheckpointError(f"the table {path} cannot be written: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no table of `bench tune`; name another file, or delete it") from error
    return path


def _run(call: Callable[[Choice], Tensor], tiles: Tiles | None, turn: int, mark: Callable[[], None]) -> None:
    mark()
    call(tiles)
    mark()


def _name(tiles: Tiles | None) -> str:
    if tiles is None:
        return LIBRARY
    split = f" split {tiles.split}" if tiles.split > 1 else ""
    cut = "x".join(str(size) for size in (tiles.m, tiles.n, tiles.k) if size)
    return f"{cut} of {tiles.warps} warps, {tiles.stages} stages{split}"


def _target(device: torch.device) -> str:
    """Return how `candidates` calls a device."""
    if device.type != "cuda":
        return "any"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"
