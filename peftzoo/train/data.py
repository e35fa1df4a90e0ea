"""Rows of text from where a recipe says they are: built in, a local file, or the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peftzoo import builtin
from peftzoo.core.suggest import nearest
from peftzoo.errors import DataError
from peftzoo.train.files import read_file
from peftzoo.train.recipe import DataSource
from peftzoo.train.rows import Rows, refuse


def load_rows(source: str | DataSource) -> Rows:
    """Return the rows of ``source``, ``data.train`` or ``data.eval`` of a recipe.

    Raises:
        DataError: there is no such data, it cannot be read, or it is empty; the bad lines of a file are named.
    """
    if isinstance(source, str):
        rows = _builtin(source)
    elif source.path is not None:
        rows = read_file(Path(source.path).expanduser(), source.max_rows)
    else:
        rows = _hub(source)
    if not len(rows):
        name = source if isinstance(source, str) else source.path or source.hub
        raise DataError(f"{name}: there are no rows")
    return rows


def text_columns(rows: Rows, fields: Iterable[str], columns: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the text of each field in each row, ``[rows][fields]``.

    Args:
        rows: the rows to read.
        fields: the names the task knows, such as prompt and completion.
        columns: our field -> the column of the data, for those that differ.

    Raises:
        DataError: a row lacks a column or holds something else than text there; each such row is named.
    """
    wanted = [columns.get(field, field) for field in fields]
    problems = [
        f"{rows.where(index)}: {problem}"
        for index, row in enumerate(rows.values)
        if (problem := _problem(row, wanted)) is not None
    ]
    refuse(problems, "every row must hold text in the columns " + ", ".join(wanted))
    return [tuple(row[column] for column in wanted) for row in rows.values]


def _problem(row: Mapping[str, Any], wanted: list[str]) -> str | None:
    for column in wanted:
        if column not in row:
            close = nearest(column, row)
            hint = f"; did you mean {close}?" if close else ""
            return (
                f"there is no column {column} (there is {', '.join(row) or 'nothing'}){hint} Map it in data.columns."
            )
        if not isinstance(row[column], str):
            return f"{column} is {json.dumps(row[column], default=repr)[:40]}, not text"
    return None


def _builtin(name: str) -> Rows:
    data, _, split = name.removeprefix("builtin/").partition(":")
    try:
        rows = builtin.load_rows(data, split)
    except KeyError as error:
        raise DataError(f"{name}: {error.args[0]}") from None
    return Rows(list(rows), lambda index: f"{name} row {index + 1}")


def _hub(source: DataSource) -> Rows:
    # imported here: it takes a second, and neither built-in data nor a local file needs it
    from datasets import Dataset, load_dataset

    try:
        data = load_dataset(source.hub, source.name, split=source.split)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"data {source.hub}: cannot be loaded: {error}") from error
    if not isinstance(data, Dataset):
        raise DataError(f"data {source.hub}: split {source.split} is not a table")
    if source.max_rows is not None:
        data = data.select(range(min(source.max_rows, len(data))))
    return Rows(list(data), lambda index: f"{source.hub} row {index + 1}")
