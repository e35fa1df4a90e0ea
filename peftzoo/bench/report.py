"""What a benchmark leaves: rows in a JSONL file, tables of them, a picture.

A row is one implementation of one case in one direction; `docs/benchmarks.md` lists its keys. As a program this prints
the Markdown tables of a file: `python -m peftzoo.bench.report FILE`.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from peftzoo.bench.timing import ceilings, median_ratio, spread
from peftzoo.errors import CheckpointError

Row = dict[str, Any]

WHOLE = ("both", "step")  # the directions that tables and pictures show
HEAD = ("implementation", "over the floor", "overhead / peft's", "time / peft's", "ms", "20 to 80 %", "kept", "error")
PACKAGES = ("torch", "peft", "transformers", "peftzoo")


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a figure depends on beside the code, and what the machine does at most, measured now."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "date": time.strftime("%Y-%m-%d"),
    } | ceilings(device, torch.bfloat16 if cuda else torch.float32)


def new_file(folder: Path, name: str) -> Path:
    """Return the empty file `name` in `folder` or, where it is taken, in the first of `folder-2`, ... without it.

    Raises:
        CheckpointError: it cannot be made.
    """
    number = 1
    while True:
        place = folder if number == 1 else Path(f"{folder}-{number}")
        try:
            place.mkdir(parents=True, exist_ok=True)
            (place / name).open("x").close()
            return place / name
        except FileExistsError as error:
            if not place.is_dir():
                raise CheckpointError(f"--out {folder}: {place} is a file; name a folder") from error
        except OSError as error:
            raise CheckpointError(f"--out {folder}: {place} cannot be written: {error.strerror}") from error
        number += 1


def append(path: Path, rows: Iterable[Row]) -> None:
    """Write rows at the end of a file, so that what was measured stays if the rest never is."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read(path: Path) -> list[Row]:
    """Return the rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def compared(seconds: Mapping[str, Sequence[float]], floor: str, peft: str) -> dict[str, Row]:
    """Return by name the times of one direction: ratios within a round first.

    Args:
        seconds: of every round, by implementation.
        floor: the implementation that the others are over.
        peft: the one that they are compared with; it may not be there.
    """
    over = {name: median_ratio(values, seconds[floor]) - 1 for name, values in seconds.items()}
    rows = {}
    for name, values in seconds.items():
        rows[name] = {
            "overhead_percent": 100 * over[name],
            # an overhead that was not seen is no measure of another
            "overhead_to_peft": over[name] / over[peft] if over.get(peft, 0) > 0 and name != floor else None,
            "time_to_peft": median_ratio(values, seconds[peft]) if peft in seconds else None,
            "seconds": spread(values),
        }
    return rows


def cases(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of whole runs by the case they belong to, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["direction"] in WHOLE:
            found.setdefault(f"{panel(row)} r={row['r']}", []).append(row)
    return found


def panel(row: Row) -> str:
    """Return what a picture shows side by side: everything of a case but its rank."""
    sizes = ",".join("+".join(map(str, size)) if isinstance(size, list) else str(size) for size in row["shape"])
    dropout = f" p={row['p']:g}" if row["p"] else ""
    return f"{row['op']} {sizes} {row['dtype']}{dropout}"


def cells(row: Row) -> list[str]:
    """Return a line of a table, under `HEAD`."""

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    times = row["seconds"]
    kept = row.get("saved_bytes")
    return [
        row["implementation"],
        f"{row['overhead_percent']:+.1f} %",
        shown(row["overhead_to_peft"], ".2f"),
        shown(row["time_to_peft"], ".2f"),
        f"{1e3 * times['median']:.2f}",
        f"{1e3 * times['p20']:.2f} to {1e3 * times['p80']:.2f}",
        "" if kept is None else f"{kept / 2**20:.1f} MiB",
        shown(row["max_relative_error"], ".0e"),
    ]


def table(title: str, rows: Sequence[Row]) -> Table:
    """Return one case for a terminal."""
    drawn = Table(*HEAD, title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in drawn.columns[1:]:
        column.justify = "right"
    for row in rows:
        drawn.add_row(*cells(row))
    return drawn


def markdown(rows: Sequence[Row]) -> str:
    """Return all cases as Markdown, and what they were measured on."""
    lines = []
    for title, of_case in cases(rows).items():
        lines += [f"**{title}**", "", f"| {' | '.join(HEAD)} |", "|---" + "|---:" * (len(HEAD) - 1) + "|"]
        lines += [f"| {' | '.join(cells(row))} |" for row in of_case]
        lines.append("")
    found = rows[0]["environment"]
    versions = ", ".join(f"{name} {value}" for name, value in found["versions"].items())
    lines.append(f"{found['device']}, {found['threads']} threads, {versions}, {found['date']}.")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the time over the floor into a PNG file: bars over the rank, one panel for all else of a case.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["direction"] in WHOLE and row["implementation"] != "floor"]
    titles = list(dict.fromkeys(panel(row) for row in shown))
    names = list(dict.fromkeys(row["implementation"] for row in shown))
    across = min(3, len(titles))
    down = -(-len(titles) // across)
    figure = Figure(figsize=(5 * across, 0.6 + 3 * down), dpi=110, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for axes, title in zip(panels, titles, strict=False):
        here = [row for row in shown if panel(row) == title]
        ranks = sorted({row["r"] for row in here})
        present = [name for name in names if any(row["implementation"] == name for row in here)]
        for place, name in enumerate(present):
            mine = [row for row in here if row["implementation"] == name]
            at = [ranks.index(row["r"]) + (place - (len(present) - 1) / 2) * 0.8 / len(present) for row in mine]
            heights = [row["overhead_percent"] for row in mine]
            color = f"C{names.index(name)}"
            axes.bar(at, heights, 0.8 / len(present), color=color, label=name)
        axes.set_title(title, fontsize="small")
        axes.set_xticks(range(len(ranks)), [f"r={r}" for r in ranks])
        axes.set_ylabel("over the frozen floor (%)")
        axes.grid(axis="y", alpha=0.3)
    for axes in panels[len(titles) :]:
        axes.set_axis_off()
    labels = {label: bar for axes in panels for bar, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="outside upper center", ncols=min(5, len(labels)), frameon=False)
    FigureCanvasAgg(figure).print_png(str(path))


if __name__ == "__main__":
    print(markdown(read(Path(sys.argv[1]))), end="")
