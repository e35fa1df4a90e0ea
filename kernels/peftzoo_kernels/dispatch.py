"""Which implementation makes a product: the library's (cuBLAS, or a CPU's BLAS), or a Triton kernel with which tiles.

Rows that were measured decide, by product, sizes, rank, dtype and dropout, those with the nearest number of rows of x:
first the ones that `peftzoo bench tune` has measured on this machine and keeps in the user's cache, then the ones that
are shipped for the device. Without a row the library's product is taken, and for what no library has (a product with
dropout, norms of a sum) a kernel small enough for every GPU.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from peftzoo_kernels._backend import backend
from peftzoo_kernels._triton import block, can_run, triton


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts its work; what each number is of, the kernel says.

    Attributes:
        m: rows at a time.
        n: columns at a time.
        k: summands at a time.
        warps: of a program.
        stages: loads in flight.
        split: programs that share a sum, whose parts are added in a fixed order.
    """

    m: int = 64
    n: int = 64
    k: int = 32
    warps: int = 4
    stages: int = 2
    split: int = 1


Choice = Tiles | None | Literal["auto"]


class Sizes(NamedTuple):
    """What a choice depends on.

    Attributes:
        product: name of the product.
        m: rows of x.
        k: columns of the wide input, or 0.
        n: columns of the wide output, or 0.
        r: rank.
        dtype: of x.
        drops: whether there is dropout.
    """

    product: str
    m: int
    k: int
    n: int
    r: int
    dtype: torch.dtype
    drops: bool = False


# what only a kernel does without a pass of its own over the activations
KERNEL_BY_DEFAULT = frozenset({"row_norms"})


def library_only(x: Tensor) -> bool:
    """Whether no kernel comes into question, whatever the product: on a CPU, unless it is to interpret them."""
    return x.is_cpu and os.environ.get("PEFTZOO_BACKEND") != "triton"


def choose(
    tiles: Choice, x: Tensor, product: str, m: int, k: int, n: int, r: int, drops: bool = False
) -> Tiles | None:
    """Return the tiles of the kernel for a product, or None for the library's.

    Args:
        tiles: what the caller wants; "auto" leaves it to the backend in force and the table.
        x: a tensor of the product, for its device and dtype.
        product: its name.
        m: rows of x.
        k: columns of the wide input, or 0.
        n: columns of the wide output, or 0.
        r: rank.
        drops: whether there is dropout.

    Raises:
        ValueError: the backend is triton and no kernel can run.
    """
    if tiles != "auto":
        return tiles
    if library_only(x):
        return None
    if torch.compiler.is_compiling():  # outside of the registered ops, whose insides no graph sees
        return None
    chosen = backend()
    if chosen == "triton" and not can_run(x):
        raise ValueError(
            f"PEFTZOO_BACKEND=triton: no kernel can run on {x.device.type}; choose auto, or set TRITON_INTERPRET=1 "
            "before peftzoo is imported"
        )
    if chosen == "cublas" or x.dtype == torch.float64 or not can_run(x) or not 0 < r <= 256 or not m:
        return None
    sizes = Sizes(product, m, k, n, r, x.dtype, drops)
    if (row := _nearest(sizes, _table(device_name(x.device)))) is not None:
        return row.tiles if row.tiles is not None or chosen == "auto" else candidates(sizes)[0]
    if chosen == "triton" or sizes.drops or sizes.product in KERNEL_BY_DEFAULT:
        return candidates(sizes)[0]
    return None


def candidates(sizes: Sizes, target: str = "any") -> list[Tiles]:
    """Return the tiles that are shipped for a product, the first of which fits every GPU; none above rank 256.

    Registers and shared memory of each were measured ahead of time on every target (`kernels/aot.json`).

    Args:
        sizes: of the product.
        target: "sm_90" or the like, for which there may be larger ones; "any" for those that fit everywhere.
    """
    shipped = _SHIPPED[sizes.product, sizes.drops]
    r = block(sizes.r)
    return [tiles for most_r, targets, tiles in shipped if r <= most_r and (targets is None or target in targets)]


_CUDA, _HOPPER = ("sm_80", "sm_90", "sm_100"), ("sm_90",)
# (product, with dropout): (up to which rank, on which targets, None being all, tiles)
_SHIPPED: dict[tuple[str, bool], tuple[tuple[int, tuple[str, ...] | None, Tiles], ...]] = {
    ("shrink", False): (
        (64, None, Tiles(64, 0, 32)),
        (64, _CUDA, Tiles(64, 0, 128, 4, 3)),
        (256, None, Tiles(64, 0, 32, 8)),
    ),
    ("shrink", True): (
        (64, None, Tiles(32, 0, 16, 4, 1)),
        (64, _CUDA, Tiles(64, 0, 32, 4, 2)),
        (256, None, Tiles(32, 0, 16, 8, 1)),
    ),
    ("expand", False): ((256, None, Tiles(64, 64, 0)), (64, _CUDA, Tiles(128, 128, 0, 8))),
    ("expand", True): ((64, None, Tiles(32, 32, 0, 8)), (256, None, Tiles(32, 16, 0, 8))),
    ("down_grad", False): ((256, None, Tiles(32, 64, 0)), (64, _CUDA, Tiles(64, 128, 0, 4, 3, 4))),
    ("down_grad", True): ((16, None, Tiles(32, 16, 0, 4, 1, 4)), (256, None, Tiles(16, 16, 0, 8, 1, 4))),
    ("up_grads", False): (
        (64, None, Tiles(32, 64, 0, 4, 1, 8)),
        (32, _CUDA, Tiles(64, 128, 0, 8, 2, 8)),
        (256, None, Tiles(32, 32, 0, 8, 1, 8)),
    ),
    ("frozen_product", False): (
        (256, None, Tiles(64, 64, 32)),
        (64, _CUDA, Tiles(128, 128, 64, 8, 3)),
        (32, _HOPPER, Tiles(128, 256, 64, 8, 3)),
    ),
    ("row_norms", False): ((64, None, Tiles(64, 0, 32)), (256, None, Tiles(32, 0, 32, 8, 1))),
}


class Row(NamedTuple):
    """One measured choice."""

    m: int
    tiles: Tiles | None


def key(sizes: Sizes) -> tuple[Any, ...]:
    """Return what a row is found by, but for the rows of x; ranks that are padded alike are alike."""
    dtype = str(sizes.dtype).removeprefix("torch.")
    return sizes.product, sizes.k, sizes.n, block(sizes.r), dtype, sizes.drops


def _nearest(sizes: Sizes, table: dict[tuple[Any, ...], list[Row]]) -> Row | None:
    rows = table.get(key(sizes), [])
    return min(rows, key=lambda row: abs(math.log2(row.m / sizes.m)), default=None)


@cache
def _table(device_name: str) -> dict[tuple[Any, ...], list[Row]]:
    """Return the rows for a device, those of the user's cache over the shipped ones."""
    table: dict[tuple[Any, ...], list[Row]] = {}
    shipped = files("peftzoo_kernels") / "tables" / f"{slug(device_name)}.json"
    for source in (shipped, cache_file(device_name)):
        if source.is_file():
            try:
                table |= read_rows(json.loads(source.read_text(encoding="utf-8"))["rows"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                warnings.warn(f"{source} is no table of kernels and is not used ({error!r}); delete it", stacklevel=2)
    return table


def read_rows(rows: Iterable[dict[str, Any]]) -> dict[tuple[Any, ...], list[Row]]:
    """Return the rows of a table's file by key."""
    table: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        found = key(Sizes(row["product"], row["m"], row["k"], row["n"], row["r"], row["dtype"], row["drops"]))
        table[found].append(Row(row["m"], None if row["tiles"] is None else Tiles(**row["tiles"])))
    return dict(table)


def keep(choices: Iterable[tuple[Sizes, Tiles | None]], path: Path) -> None:
    """Write measured choices into a table's file, over those of before for the same sizes; this process heeds them."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    by_sizes = {tuple(row[name] for name in Sizes._fields): row for row in rows}
    for sizes, tiles in choices:
        row = sizes._asdict() | {"dtype": str(sizes.dtype).removeprefix("torch.")}
        by_sizes[tuple(row.values())] = row | {"tiles": None if tiles is None else asdict(tiles)}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}")  # whoever reads meanwhile finds the old table or the new one
    lines = ",\n".join(map(json.dumps, by_sizes.values()))
    new.write_text(f'{{"rows": [\n{lines}\n]}}\n', encoding="utf-8")
    new.replace(path)
    _table.cache_clear()


def cache_file(device_name: str) -> Path:
    """Return where choices measured on this machine are kept: by device and by all that may change them."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    parts = [device_name, torch.__version__, f"triton {triton.__version__ if triton else 'none'}"]
    if torch.version.cuda:
        parts.append(f"cuda {torch.version.cuda}")
    return Path(home) / "peftzoo" / "tiles" / f"{slug(' '.join(parts))}.json"


def slug(name: str) -> str:
    """Return a name as a part of a file's name."""
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in name.lower()).split())


def device_name(device: torch.device) -> str:
    """Return what a device's table goes by."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
