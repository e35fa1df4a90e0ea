"""Measures the recipes methods/NAME, all of them the task of quickstart/dates; writes docs/zoo.json, zoo.md, zoo.png.

    python docs/measure_zoo.py [FOLDER]

Three seeds of each method at its own default learning rate, one thread and one folder in FOLDER (default runs/zoo)
each, as many side by side as there are cores; what is finished there is not run again. Then the time of a step: all
methods in one process, taking turns, each method's fastest round relative to LoRA's.
"""

from __future__ import annotations

import json
import math
import os
import shutil
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
ROUNDS, STEPS = 20, 2


def rows() -> list[str]:
    """Return the names of the rows: the recipes methods/NAME."""
    return [name.removeprefix("methods/") for name in list_recipes() if name.startswith("methods/")]


def train(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Return the manifest of a finished run, after training it if there is none yet."""
    place = folder / f"{name}-{seed}"
    manifest = place / "run.json"
    if not manifest.exists() or json.loads(manifest.read_text())["status"] != "finished":
        print(f"{name}, seed {seed}", flush=True)
        shutil.rmtree(place, ignore_errors=True)  # what was stopped; a run never writes into the folder of another
        settings = [f"train.seed={seed}", f"output.dir={place}", "output.plots=false"]
        command = [sys.executable, "-m", "peftzoo", "train", f"methods/{name}", *settings]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    facts: dict[str, Any] = json.loads(manifest.read_text())
    size = sum(path.stat().st_size for path in (place / "final").glob("*.safetensors"))
    return facts | {"bytes": size}


def step_times() -> dict[str, float]:
    """Return the time of a training step of each row relative to LoRA's, each that of its fastest round."""
    accelerator = Accelerator(cpu=True)
    takers = {name: taker(load_recipe(f"methods/{name}"), accelerator) for name in rows()}
    fastest = dict.fromkeys(takers, math.inf)  # what else the machine does only ever adds
    for number in range(ROUNDS):
        for name, take in takers.items():
            started = time.perf_counter()
            for _ in range(STEPS):
                take()
            fastest[name] = min(fastest[name], time.perf_counter() - started)
        print(f"timing round {number + 1} of {ROUNDS}", flush=True)
    return {name: seconds / fastest["lora"] for name, seconds in fastest.items()}


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
        "rate; before training it is 0 % for all. Step time is relative to LoRA's: all methods take turns in one",
        "process, and the fastest round of each counts. LoRA+ and rsLoRA take the very step of LoRA, so what they",
        "differ by is noise. One small model and one easy task: every method trains; which is best it does not say.",
        "",
        f"Measured {facts['date']} on one thread of a {facts['device'].upper()} by `python docs/measure_zoo.py` with",
        f"{versions}.",
        "",
        "| method | exact match, 3 seeds | trained parameters | step time | file |",
        "|---|---|---|---|---|",
    ]
    for name, row in table.items():
        scores = " ".join(f"{100 * score:.0f}" for score in row["exact_match"])
        size = f"{row['bytes'] / 1024:,.0f} KiB"
        lines.append(f"| {name} | {scores} % | {row['trained_parameters']:,} | {row['step_time']:.2f} | {size} |")
    return "\n".join([*lines, "", "![Scores, parameters, step times and file sizes](zoo.png)", ""])


def draw(table: dict[str, Any]) -> None:
    """Draw one line per method: the score of each seed, trained parameters, step time, bytes of the file."""
    names = sorted(table, key=lambda name: table[name]["trained_parameters"])
    figure, axes = plt.subplots(1, 4, sharey=True, figsize=(11, 5), layout="constrained")
    for line, name in enumerate(names):
        row = table[name]
        axes[0].plot([100 * score for score in row["exact_match"]], [line] * len(SEEDS), "o", color="C0", alpha=0.5)
        for place, value in zip(axes[1:], ("trained_parameters", "step_time", "bytes"), strict=True):
            place.barh(line, row[value], color="C0", alpha=0.6)
    axes[0].set(xlim=(None, 101), xlabel="exact match of each seed (%)", yticks=range(len(names)), yticklabels=names)
    axes[1].set(xscale="log", xlabel="trained parameters")
    axes[2].set(xlabel="step time, LoRA = 1")
    axes[3].set(xscale="log", xlabel="bytes of the adapter file")
    for place in axes:
        place.grid(axis="x", alpha=0.3)
    figure.suptitle("quickstart/dates, 250 steps, three seeds, default learning rates")
    figure.savefig(DOCS / "zoo.png", dpi=110)


if __name__ == "__main__":
    main()
