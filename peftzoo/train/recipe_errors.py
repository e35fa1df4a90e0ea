"""Pydantic's complaints about a recipe as one line per problem: where it stands, what is wrong, what was meant."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from typing_extensions import is_typeddict

from peftzoo.core.suggest import flat, nearest
from peftzoo.train.recipe import RETIRED, Recipe
from peftzoo.train.recipe_method import settings_of
from peftzoo.train.recipe_yaml import Section

Keys = tuple[str, ...]
MAX_SHOWN = 60  # characters of a refused value


def explain(error: ValidationError, recipe: Section, place: str) -> list[str]:
    """Return one line for each problem, unknown keys first.

    Args:
        error: what `Recipe` said about the recipe.
        recipe: what was read.
        place: what to name where a problem has no key that was written, such as ``recipes/x.yaml``.
    """
    known = known_settings(recipe)
    unknown: list[str] = []
    meant: set[Keys] = set()
    missing: list[Keys] = []
    wrong: dict[Keys, list[tuple[str, str]]] = {}
    for entry in error.errors(include_url=False):
        path = _settings_in(entry["loc"], recipe, known)
        if entry["type"] == "extra_forbidden":
            text, stands_for = _unknown_key(path, known)
            unknown.append(f"{place_of(recipe, path, place)}: {text}")
            meant |= stands_for
        elif entry["type"] == "missing":
            missing.append(path)
        else:
            wrong.setdefault(path, []).append(_reason(entry["type"], entry["msg"], entry["input"]))
    return [
        *unknown,
        # a key that is there under a wrong name is not reported a second time
        *(f"{place_of(recipe, path, place)}: {dotted(path)} is missing" for path in missing if path not in meant),
        *(f"{place_of(recipe, path, place)}: {dotted(path)}: {_either(why)}" for path, why in wrong.items()),
    ]


def known_settings(recipe: Section) -> dict[Keys, list[str]]:
    """Return section -> its settings, of the method that the recipe names, or of all where it names none."""
    known = dict(_sections(Recipe, ()))
    known[()].append("extends")
    method = recipe.get("method")
    known["method",].extend(settings_of(method.get("name") if isinstance(method, Section) else None))
    return known


def place_of(recipe: Section, path: Keys, place: str) -> str:
    """Return where the deepest key on the path was written, or `place` if none was."""
    here: Any = recipe
    for key in path:
        if not isinstance(here, Section) or key not in here:
            break
        place, here = here.places[key], here[key]
    return place


def dotted(path: Keys) -> str:
    """Return the path as a user writes it, odd keys quoted and shortened."""
    return ".".join(key if re.fullmatch(r"[\w <>-]{1,60}", key) else reprlib.repr(key) for key in path)


def _sections(annotation: Any, path: Keys) -> Iterator[tuple[Keys, list[str]]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield path, list(annotation.model_fields)
        for name, field in annotation.model_fields.items():
            yield from _sections(field.annotation, (*path, name))
    elif is_typeddict(annotation):
        yield path, list(annotation.__annotations__)
    else:
        for part in get_args(annotation):
            yield from _sections(part, path)


def _settings_in(loc: tuple[int | str, ...], recipe: Section, known: dict[Keys, list[str]]) -> Keys:
    """Return the keys in a location, without the names pydantic gives to branches of a union and items of a list."""
    path: Keys = ()
    here: Any = recipe
    for key in loc:
        written = isinstance(here, Section) and key in here
        if written or key in known.get(path, ()):
            path = (*path, str(key))
            here = here[key] if written else None
    return path


def _unknown_key(path: Keys, known: dict[Keys, list[str]]) -> tuple[str, set[Keys]]:
    """Return what to say about a key that is no setting, and the settings it may stand for."""
    *above, key = path
    section = tuple(above)
    near = nearest(key, known.get(section, []))
    homes = [other for other in known if other != section and any(flat(key) == flat(name) for name in known[other])]
    retired = nearest(key, RETIRED)
    if retired is not None and flat(retired) == flat(key):
        hint = RETIRED[retired]
    elif homes and (near is None or flat(near) != flat(key)):
        places = [f"under {dotted(home)}:" if home else "at the top" for home in homes]
        hint = f"{dotted((key,))} belongs {' or '.join(places)}"
    elif near is not None:
        hint = f"Did you mean {dotted((*section, near))}?"
    else:
        hint = f"{dotted(section) or 'A recipe'} has: {', '.join(known.get(section, []))}"
    stands_for = {(*section, near)} if near is not None else set()
    stands_for |= {(*home, name) for home in homes for name in known[home] if flat(name) == flat(key)}
    return f"{dotted(path)} is not a setting. {hint}", stands_for


def _reason(kind: str, message: str, value: object) -> tuple[str, str]:
    """Return pydantic's message without its preamble, and the value where pydantic leaves it out."""
    if kind in ("rule", "value_error"):
        return message.removeprefix("Value error, "), ""
    if kind in ("model_type", "dict_type"):
        message = "should be a section with settings of its own"
    shown = json.dumps(value, default=repr, ensure_ascii=False)
    shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."
    return re.sub("^(Input|String) ", "", message), f", not {shown}"


def _either(reasons: list[tuple[str, str]]) -> str:
    """Return one sentence for what the branches of a union say of the same value."""
    first, *others = dict.fromkeys(reason for reason, _ in reasons)
    return " or ".join([first, *(other.removeprefix("should be ") for other in others)]) + reasons[-1][1]
