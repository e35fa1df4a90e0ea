"""Measures the recipes methods/NAME, all of them the task of quickstart/dates; writes docs/zoo.json, zoo.md, zoo.png.

    python docs/measure_zoo.py [FOLDER]

Three seeds of each method at its own default learning rate, one thread and one folder in FOLDER (default runs/zoo)
each, as many side by side as there are cores; what is finished there is not run again. Then the time of a step: all
methods in one process, taking turns, each relative to LoRA's step of the same round.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["OMP_NUM_THREADS"] = "1"

import matplotlib

matplotlib.use("Agg")
from accelerate import Accelerator
from matplotlib import pyplot as plt

from peftzoo.core.resources import list_recipes
from peftzoo.train.calibration import calibrate_adapter
from peftzoo.train.models import add_adapter
from peftzoo.train.optim import make_optimizer
from peftzoo.train.order import Order
from peftzoo.train.progress import Report
from peftzoo.train.recipe import Recipe
from peftzoo.train.recipe_file import load_recipe
from peftzoo.train.step import Stepper
from peftzoo.train.tasks import TASKS

DOCS = Path(__file__).parent
SEEDS = (0, 1, 2)
ROUNDS, STEPS = 9, 3


def rows() -> list[str]:
    """Return the names of the rows: the recipes methods/NAME."""
    return [name.removeprefix("methods/") for name in list_recipes() if name.startswith("methods/")]


def train(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Return the manifest of a finished run, after training it if there is none yet."""
    place = folder / f"{name}-{seed}"
    manifest = place / "run.json"
    if not manifest.exists() or json.loads(manifest.read_text())["status"] != "finished":
        print(f"{name}, seed {seed}", flush=True)
        settings = [f"train.seed={seed}", f"output.dir={place}", "output.plots=false"]
        command = [sys.executable, "-m", "peftzoo", "train", f"methods/{name}", *settings]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    facts: dict[str, Any] = json.loads(manifest.read_text())
    size = sum(path.stat().st_size for path in (place / "final").glob("*.safetensors"))
    return facts | {"bytes": size}


def step_times() -> dict[str, float]:
    """Return the time of a training step of each row relative to LoRA's, the median over rounds."""
    accelerator = Accelerator(cpu=True)
    takers = {name: taker(load_recipe(f"methods/{name}"), accelerator) for name in rows()}
    ratios: dict[str, list[float]] = {name: [] for name in takers}
    for number in range(ROUNDS + 1):
        seconds = {}
        for name, take in takers.items():
            started = time.perf_counter()
            for _ in range(STEPS):
                take()
            seconds[name] = time.perf_counter() - started
        if number:  # the first round warms up
            for name, value in seconds.items():
                ratios[name].append(value / seconds["lora"])
        print(f"timing round {number} of {ROUNDS}", flush=True)
    return {name: statistics.median(values) for name, values in ratios.items()}


def taker(recipe: Recipe, accelerator: Accelerator) -> Callable[[], object]:
    """Return a function that takes the next training step of `recipe`."""
    task = TASKS[recipe.task](recipe)
    rows_of_step = recipe.train.per_device_train_batch_size
    order = Order(len(task.examples), recipe.train.seed, rows_of_step, accumulation=1, processes=1, process=0)
    model = add_adapter(task.load_model(accelerator.device), recipe, task.peft_task_type)
    calibrate_adapter(model, task, order, accelerator, Report(prints=False, steps=1))
    optimizer, _ = make_optimizer(model.train(), recipe, steps=250)
    stepper = Stepper(accelerator, *accelerator.prepare(model, optimizer), recipe.train.max_grad_norm)
    batches = (task.collate([task.examples[row] for row in part]) for step in order for part in step)
    return lambda: stepper.take([batch := next(batches)], [task.count(batch)])


def main() -> None:
    """Train, time, write."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/zoo")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = {name: [pool.submit(train, name, seed, folder) for seed in SEEDS] for name in rows()}
        found = {name: [run.result() for run in of_name] for name, of_name in runs.items()}
    times = step_times()
    table = {
        name: {
            "exact_match": [run["after"]["exact_match"] for run in runs],
            "trained_parameters": runs[0]["trained_parameters"],
            "bytes": runs[0]["bytes"],
            "step_time": round(times[name], 2),
        }
        for name, runs in found.items()
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
    for name, row in table.items():
        scores = " ".join(f"{100 * score:.0f}" for score in row["exact_match"])
        size = f"{row['bytes'] / 1024:,.0f} KiB"
        lines.append(f"| {name} | {scores} % | {row['trained_parameters']:,} | {row['step_time']:.2f} | {size} |")
    return "\n".join([*lines, "", "![Exact match against trained parameters](zoo.png)", ""])


def draw(table: dict[str, Any]) -> None:
    """Draw the mean exact match against the trained parameters; the bar spans the seeds."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for name, row in table.items():
        scores = [100 * score for score in row["exact_match"]]
        mean = statistics.mean(scores)
        axes.errorbar(row["trained_parameters"], mean, [[mean - min(scores)], [max(scores) - mean]], fmt="o", ms=4)
        axes.annotate(name, (row["trained_parameters"], mean), xytext=(4, 4), textcoords="offset points", size=8)
    axes.set(xscale="log", xlabel="trained parameters", ylabel="exact match after 250 steps (%)", ylim=(-5, 105))
    axes.set_title("quickstart/dates, three seeds, default learning rates")
    axes.grid(alpha=0.3)
    figure.savefig(DOCS / "zoo.png", dpi=120)


if __name__ == "__main__":
    main()
