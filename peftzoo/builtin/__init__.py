"""The built-in model and data, with which the first command runs offline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from . import iso_dates

_MODELS = ("tiny-docs-1m",)
_DATA: dict[str, Callable[[str], list[dict[str, str]]]] = {"iso-dates": iso_dates.rows}


def model_path(name: str) -> Path:
    """Return the folder of the built-in model `name`, ready for `transformers`' ``from_pretrained``.

    Raises:
        KeyError: there is no built-in model of that name.
    """
    if name not in _MODELS:
        raise KeyError(f"no built-in model {name!r}; choose one of {', '.join(_MODELS)}")
    return Path(__file__).parent / name


def load_rows(name: str, split: str) -> list[dict[str, str]]:
    """Return the rows of the built-in data `name`, each with the keys `prompt` and `completion`.

    Raises:
        KeyError: there is no built-in data of that name, or it has no such split.
    """
    if name not in _DATA:
        raise KeyError(f"no built-in data {name!r}; choose one of {', '.join(_DATA)}")
    return _DATA[name](split)
