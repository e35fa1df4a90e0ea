"""The words around a run: what begins, and how good the model was before and is after."""

from __future__ import annotations

import json
from collections.abc import Mapping

from peftzoo.train.evaluation import Evaluation, Sample

LONGEST = 60  # characters of a text


def metrics_line(metrics: Mapping[str, float]) -> str:
    """Return all metrics on one line."""
    return ", ".join(f"{_words(name)} {_number(name, value)}" for name, value in metrics.items())


def comparison(before: Evaluation, after: Evaluation, shown: int) -> str:
    """Return the two evaluations below each other: the first ``shown`` answers of each, then the metrics."""
    lines = []
    for title, found in (("before", before), ("after", after)):
        lines += [f"{title}:  {_sample(sample)}" for sample in found.samples[:shown]]
    for name, value in after.metrics.items():
        lines.append(f"{_words(name)}: {_number(name, before.metrics[name])} before, {_number(name, value)} after")
    return "\n".join(lines)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(name: str, value: float) -> str:
    return f"{value:.1%}" if name == "exact_match" else f"{value:.4g}"


def _sample(sample: Sample) -> str:
    return f"{_visible(sample.prompt)} -> {_visible(sample.got)} (expected {_visible(sample.expected)})"


def _visible(text: str) -> str:
    """Return the text on one line, cut if it is long."""
    line = json.dumps(text.strip(), ensure_ascii=False)[1:-1]
    return line if len(line) <= LONGEST else line[: LONGEST - 3] + "..."
