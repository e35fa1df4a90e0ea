"""The picture of a run: the training loss over the steps, and what the evaluations found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WIDE_RANGE = 10  # a loss that falls by more than this factor is drawn on a logarithmic scale


def draw_run(train: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the events of a run into a PNG file.

    Args:
        train: events with step and loss, in nats.
        evaluations: events with step and, where the recipe asked for them, eval_loss and exact_match.
        path: the file to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    lines = axes.plot(*_points(train, "loss"), color="tab:blue", label="training loss")
    if any("eval_loss" in event for event in evaluations):
        lines += axes.plot(*_points(evaluations, "eval_loss"), "o--", color="tab:green", label="held-out loss")
    heights = [event[name] for event in (*train, *evaluations) for name in ("loss", "eval_loss") if name in event]
    if min(heights) > 0 and max(heights) > WIDE_RANGE * min(heights):
        axes.set_yscale("log")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if any("exact_match" in event for event in evaluations):
        right = axes.twinx()
        lines += right.plot(*_points(evaluations, "exact_match"), "s--", color="tab:orange", label="exact match")
        right.set_ylim(-0.05, 1.05)
        right.yaxis.set_major_formatter(PercentFormatter(1.0))
        right.set_ylabel("exact match, held out")
    axes.legend(handles=lines, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=len(lines), frameon=False)
    FigureCanvasAgg(figure).print_png(str(path))


def _points(events: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = [event for event in events if name in event]
    return [event["step"] for event in found], [event[name] for event in found]
