"""Finds the recipes and launch configs that come with peftzoo, in a checkout and in an installed wheel alike."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from peftzoo.core.suggest import nearest
from peftzoo.errors import RecipeError

PACKAGE = Path(__file__).parent.parent  # the folder of `peftzoo` itself
MANY = 5  # names in a message


def find_folder(kind: Literal["recipes", "configs"]) -> Path:
    """Return the folder with what comes with peftzoo of this kind.

    Raises:
        RecipeError: the installation lacks it.
    """
    # a wheel carries them inside; only a checkout may look beside the package, where site-packages holds strangers
    for folder in (PACKAGE / "_data" / kind, PACKAGE.parent / kind):
        if folder.is_dir():
            return folder
    raise RecipeError(f"this installation of peftzoo has no folder {kind} in {PACKAGE / '_data'}; install it again")


def list_recipes() -> list[str]:
    """Return the names of the recipes that come with peftzoo, such as ``quickstart/dates``, sorted."""
    folder = find_folder("recipes")
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def find_recipe(name: str) -> Path:
    """Return the file of a recipe that comes with peftzoo.

    Raises:
        RecipeError: there is none of this name; says the nearest names.
    """
    names = list_recipes()
    if name in names:
        return find_folder("recipes") / f"{name}.yaml"
    raise RecipeError(f"{name}: no recipe of this name. {_hint(name, names)} A path to a file ends in .yaml.")


def _hint(name: str, names: list[str]) -> str:
    last = name.rpartition("/")[2]
    near = nearest(name, names)
    same_end = [other for other in names if nearest(last, [other.rpartition("/")[2]])]
    close = list(dict.fromkeys([near, *same_end] if near else same_end))[:MANY]
    return f"Did you mean {' or '.join(close)}?" if close else "`peftzoo recipes` lists them."
