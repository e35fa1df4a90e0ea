"""Reads a recipe by name or path, with its parent and the overrides of a command line, and writes it out complete."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from peftzoo.core.resources import find_recipe
from peftzoo.errors import RecipeError
from peftzoo.train.recipe import Recipe
from peftzoo.train.recipe_errors import explain
from peftzoo.train.recipe_yaml import NotYaml, Section, dump, parse

MAX_BYTES = 1_000_000
COMMAND_LINE = "command line"


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return a recipe, checked and complete.

    Args:
        recipe: the path of a file ending in .yaml, or the name of a recipe that comes with peftzoo.
        overrides: settings such as ``train.max_steps=20``, in YAML, the later one winning; checked like the file.

    Raises:
        RecipeError: names every problem, one a line, with the file and line where it stands.
    """
    path = _locate(recipe)
    section, problems = _read(path, ())
    for override in overrides:
        problems += _override(section, override)
    try:
        checked = Recipe.model_validate(section)
    except ValidationError as error:
        problems += explain(error, section, _typed(path))
    if problems:
        raise RecipeError("\n".join(problems))
    return checked


def write_resolved(recipe: Recipe, path: Path) -> None:
    """Write a recipe with every default spelled out; the file alone repeats the run and loads back equal."""
    path.write_text(f"# peftzoo train {_typed(path)}\n{dump(recipe.model_dump())}", encoding="utf-8")


def _locate(recipe: str, folder: Path = Path()) -> Path:
    return folder / recipe if recipe.endswith((".yaml", ".yml")) else find_recipe(recipe)


def _typed(path: Path) -> str:
    """Return the path as a user would type it: relative where it lies below the working directory."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _read(path: Path, children: tuple[Path, ...]) -> tuple[Section, list[str]]:
    """Return the settings of a file on top of its parent's, and the problems that did not stop the reading.

    Args:
        path: the file.
        children: the files that led here through `extends`, resolved.
    """
    name = _typed(path)
    try:
        section, problems = parse(_text(path), lambda line: f"{name}:{line}")
    except NotYaml as error:
        raise RecipeError(f"{name}:{error.line}: {error.reason}") from None
    if section is None:
        raise RecipeError(f"{name}: is empty; a recipe has at least model, data, method and output")
    if not isinstance(section, Section):
        raise RecipeError(f"{name}:1: holds a {type(section).__name__}, not settings such as `model:`")
    if "extends" not in section:
        return section, problems
    place, wanted = section.places.pop("extends"), section.pop("extends")
    if not isinstance(wanted, str):
        raise RecipeError(f"{place}: extends takes exactly one parent, the name or path of a recipe, not {wanted!r}")
    chain = (*children, path.resolve())
    try:
        parent = _locate(wanted, path.parent)
        if parent.resolve() in chain:
            circle = " -> ".join(_typed(file) for file in (*chain, parent))
            raise RecipeError(f"goes in a circle: {circle}")
        if not parent.is_file():
            raise RecipeError(f"{_typed(parent)}: no such file")
    except (RecipeError, OSError) as error:
        raise RecipeError(f"{place}: extends: {error}") from None
    inherited, earlier = _read(parent, chain)
    _merge(inherited, section)
    return inherited, earlier + problems


def _text(path: Path) -> str:
    name = _typed(path)
    try:
        if not path.is_file():
            raise RecipeError(f"{name}: no such file. Recipes that come with peftzoo are named without .yaml")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{name}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{name}: is larger than {MAX_BYTES} bytes, the most a recipe may have")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{name}:{line}: is not UTF-8 text (byte {error.start + 1})") from None


def _merge(parent: Section, child: Section) -> None:
    """Put the child's settings over the parent's: section by section, anything else as a whole."""
    for key, value in child.items():
        inherited = parent.get(key)
        if isinstance(inherited, Section) and isinstance(value, Section):
            _merge(inherited, value)
            parent.places[key] = child.places[key]
        else:
            parent.put(key, value, child.places[key])


def _override(recipe: Section, override: str) -> list[str]:
    """Set ``a.b=c`` in the recipe; return what is wrong with it."""
    dotted, equals, text = override.partition("=")
    *above, key = dotted.split(".")
    if not equals or not all((*above, key)):
        return [f"{COMMAND_LINE}: {override!r} is not of the form section.setting=value"]
    if dotted == "extends":
        return [f"{COMMAND_LINE}: extends can only stand in a file"]
    try:
        value, problems = parse(text, lambda line: COMMAND_LINE)
    except NotYaml as error:
        return [f"{COMMAND_LINE}: {dotted}: {error.reason}"]
    here = recipe
    for depth, name in enumerate(above, 1):
        if here.get(name) is None:
            here.put(name, Section(), COMMAND_LINE)
        if not isinstance(here[name], Section):
            section = ".".join(above[:depth])
            return [f"{COMMAND_LINE}: {dotted}: {section} is {here[name]!r}; set {section} as a whole"]
        here = here[name]
    here.put(key, value, COMMAND_LINE)
    return problems
