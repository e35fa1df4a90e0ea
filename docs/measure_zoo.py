"""Measures every named method on quickstart/dates and writes docs/zoo.json, docs/zoo.md and docs/zoo.png.

    python docs/measure_zoo.py [FOLDER]

Three seeds of each method at its own default learning rate, one run after another, each a folder in FOLDER (default
runs/zoo); what is finished there is not run again. Then the time of a step: all methods in one process, taking turns,
each relative to LoRA's step of the same round.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import peftzoo
from peftzoo.core.resources import list_recipes

DOCS = Path(__file__).parent
SEEDS = (0, 1, 2)
ROUNDS, STEPS = 9, 3
STARTS = ("pissa", "olora")


def rows() -> dict[str, list[str]]:
    """Return the arguments of `peftzoo train` for each row of the table."""
    recipes = list_recipes()
    found = {}
    for name in peftzoo.list_methods():
        own = f"quickstart/dates-{name}"
        found[name] = [own] if own in recipes else ["quickstart/dates", f"method.name={name}"]
    return found | {f"lora, start {s}": ["quickstart/dates", f"method.start={s}"] for s in STARTS}


def train(label: str, arguments: list[str], seed: int, folder: Path) -> dict[str, Any]:
    """Return the manifest of a finished run, after training it if there is none yet."""
    place = folder / f"{label.replace(', start ', '-')}-{seed}"
    manifest = place / "run.json"
    if not manifest.exists():
        print(f"{label}, seed {seed}", flush=True)
        settings = [f"train.seed={seed}", f"output.dir={place}", "output.plots=false"]
        if "seed" in peftzoo.get_method(label.split(",")[0]).settings:
            settings.append(f"method.seed={seed}")
        command = [sys.executable, "-m", "peftzoo", "train", *arguments, *settings]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    facts: dict[str, Any] = json.loads(manifest.read_text())
    size = sum(path.stat().st_size for path in (place / "final").glob("*.safetensors"))
    return facts | {"bytes": size}


def step_times() -> dict[str, float]:
    """Return the time of a training step of each row relative to LoRA's, the median over rounds."""
    from accelerate import Accelerator

    from peftzoo.train.loop import prepare_steps
    from peftzoo.train.recipe_file import load_recipe

    accelerator = Accelerator(cpu=True)
    takers = {
        label: prepare_steps(load_recipe(arguments[0], arguments[1:]), accelerator)
        for label, arguments in rows().items()
    }
    ratios: dict[str, list[float]] = {label: [] for label in takers}
    for number in range(ROUNDS + 1):
        seconds = {}
        for label, take in takers.items():
            started = time.perf_counter()
            for _ in range(STEPS):
                take()
            seconds[label] = time.perf_counter() - started
        if number:  # the first round warms up
            for label, value in seconds.items():
                ratios[label].append(value / seconds["lora"])
        print(f"timing round {number} of {ROUNDS}", flush=True)
    return {label: statistics.median(values) for label, values in ratios.items()}


def main() -> None:
    """Train, time, write."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/zoo")
    found = {label: [train(label, a, seed, folder) for seed in SEEDS] for label, a in rows().items()}
    times = step_times()
    table = {
        label: {
            "exact_match": [run["after"]["exact_match"] for run in runs],
            "trained_parameters": runs[0]["trained_parameters"],
            "bytes": runs[0]["bytes"],
            "step_time": round(times[label], 2),
        }
        for label, runs in found.items()
    }
    first = next(iter(found.values()))[0]
    facts = {key: first[key] for key in ("device", "threads", "versions")} | {"date": time.strftime("%Y-%m-%d")}
    (DOCS / "zoo.json").write_text(json.dumps({"facts": facts, "methods": table}, indent=1) + "\n")
    (DOCS / "zoo.md").write_text(page(table, facts))
    draw(table)


def page(table: dict[str, Any], facts: dict[str, Any]) -> str:
    """Return the table as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        "# Every named method on quickstart/dates",
        "",
        "Exact match on the 100 held-out rows after 250 steps, three seeds each, at the method's own default learning",
        "rate; before training it is 0 % for all. Step time is relative to LoRA's, all methods taking turns in one",
        f"process. Measured {facts['date']} on a {facts['device']} with {facts['threads']} threads ({versions}) by",
        "`python docs/measure_zoo.py`. One small model and one easy task: this shows that every method trains, not",
        "which is best.",
        "",
        "| method | exact match, 3 seeds | trained parameters | step time | file |",
        "|---|---|---|---|---|",
    ]
    for label, row in table.items():
        scores = " ".join(f"{100 * score:.0f}" for score in row["exact_match"])
        size = f"{row['bytes'] / 1024:,.0f} KiB"
        lines.append(f"| {label} | {scores} % | {row['trained_parameters']:,} | {row['step_time']:.2f} | {size} |")
    return "\n".join([*lines, "", "![Exact match against trained parameters](zoo.png)", ""])


def draw(table: dict[str, Any]) -> None:
    """Draw the mean exact match against the trained parameters; the bar spans the seeds."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for label, row in table.items():
        scores = [100 * score for score in row["exact_match"]]
        mean = statistics.mean(scores)
        axes.errorbar(row["trained_parameters"], mean, [[mean - min(scores)], [max(scores) - mean]], fmt="o", ms=4)
        axes.annotate(label, (row["trained_parameters"], mean), xytext=(4, 4), textcoords="offset points", size=8)
    axes.set(xscale="log", xlabel="trained parameters", ylabel="exact match after 250 steps (%)", ylim=(-5, 105))
    axes.set_title("quickstart/dates, three seeds, default learning rates")
    axes.grid(alpha=0.3)
    figure.savefig(DOCS / "zoo.png", dpi=120)


if __name__ == "__main__":
    main()
