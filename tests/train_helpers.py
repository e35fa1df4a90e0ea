"""A run that takes a second: the built-in model on a few rows in files, next to the recipe."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from peftzoo import builtin
from peftzoo.train.models import load_base, load_tokenizer
from peftzoo.train.recipe import ModelSettings, Recipe
from peftzoo.train.recipe_file import load_recipe
from peftzoo.train.tokens import Encoder

ROWS = builtin.load_rows("iso-dates", "train")[:40]
TEXT = """\
model: {name_or_path: builtin/tiny-docs-1m, dtype: float32}
data: {train: {path: train.jsonl}, eval: {path: eval.jsonl}, max_length: 64}
method: {name: lora, r: 4}
train: {max_steps: 3, per_device_train_batch_size: 4, learning_rate: 5e-3, logging_steps: 1}
eval: {metrics: [perplexity], generate: {max_new_tokens: 12}, per_device_eval_batch_size: 8, show_samples: 0}
output: {dir: runs/x, plots: false}
"""


def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def small_recipe(*overrides) -> Recipe:
    """Return the recipe of a small run in the working directory, with its data written there."""
    Path("x.yaml").write_text(TEXT)
    write_rows("train.jsonl", ROWS)
    write_rows("eval.jsonl", ROWS[:5])
    return load_recipe("x.yaml", overrides)


def encoder() -> Encoder:
    return Encoder(load_tokenizer(ModelSettings(name_or_path="builtin/tiny-docs-1m")))


def builtin_model():
    settings = ModelSettings(name_or_path="builtin/tiny-docs-1m", dtype="float32")
    return load_base(AutoModelForCausalLM, settings, torch.device("cpu"))


def cpu() -> Accelerator:
    return Accelerator(cpu=True)


def read_events(folder, kind):
    events = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [event for event in events if event["event"] == kind]
