"""What run.json says about a run besides its results: versions, machine, sizes."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel

from peftzoo.train.checks import parameter_counts
from peftzoo.train.recipe import Recipe

PACKAGES = ("torch", "transformers", "peft", "accelerate", "peftzoo")


def recipe_digest(recipe: Recipe) -> str:
    """Return the SHA-256 of the recipe with every default spelled out, in hexadecimal."""
    settings = json.dumps(recipe.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()


def describe_run(recipe: Recipe, accelerator: Accelerator, model: PeftModel) -> dict[str, Any]:
    """Return what is known of a run before its first step, ready for JSON."""
    device = accelerator.device
    trained, total = parameter_counts(model)
    return {
        "model": recipe.model.name_or_path,
        "dtype": str(model.dtype).removeprefix("torch."),
        "method": recipe.method.name,
        "recipe_sha256": recipe_digest(recipe),
        "seed": recipe.train.seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "trained_parameters": trained,
        "parameters": total,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
