"""A small valid recipe, and how the tests of recipes read a changed one."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftzoo.errors import RecipeError
from peftzoo.train.recipe import Recipe
from peftzoo.train.recipe_file import load_recipe

SMALL = """\
version: 1
model: {name_or_path: builtin/tiny-docs-1m}
data:
  train: builtin/iso-dates:train
  eval: builtin/iso-dates:test
method:
  name: lora
  r: 4
train:
  max_steps: 20
  learning_rate: 1e-3
output: {dir: runs/x}
"""


def load(text: str | bytes, *overrides: str) -> Recipe:
    """Write the text to x.yaml in the working directory and read it as a recipe."""
    Path("x.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    return load_recipe("x.yaml", overrides)


def complaint(text: str | bytes, *overrides: str) -> str:
    """Return what is said about a recipe that must be refused."""
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)
