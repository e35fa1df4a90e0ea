"""Rows of text from where a recipe says they are: built in, a local .jsonl file, or the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftzoo import builtin
from peftzoo.core.suggest import nearest
from peftzoo.errors import DataError
from peftzoo.train.recipe import DataSource

SHOWN = 10  # bad rows named one by one; the rest are counted


@dataclass(frozen=True)
class Rows:
    """Rows and where each came from.

    Attributes:
        values: one mapping from column to value per row.
        where: names row i for a message, such as ``chats.jsonl:12``.
    """

    values: list[Mapping[str, Any]]
    where: Callable[[int], str]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.values)


def load_rows(source: str | DataSource) -> Rows:
    """Return the rows of ``source``, ``data.train`` or ``data.eval`` of a recipe.

    Raises:
        DataError: there is no such data, it cannot be read, or it is empty; the bad lines of a file are named.
    """
    if isinstance(source, str):
        rows = _builtin(source)
    elif source.path is not None:
        rows = _jsonl(Path(source.path).expanduser(), source.max_rows)
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


def refuse(problems: list[str], rule: str) -> None:
    """Raise a DataError that lists ``problems``, one a line, under the ``rule`` they break; none raise nothing."""
    if problems:
        rest = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise DataError("\n  ".join([f"{rule}; these do not:", *problems[:SHOWN], *rest]))


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


def _jsonl(path: Path, max_rows: int | None) -> Rows:
    values: list[Mapping[str, Any]] = []
    lines: list[int] = []
    problems: list[str] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if len(values) == max_rows:
                    break
                if line.strip():
                    try:
                        values.append(_parse(line))
                        lines.append(number)
                    except ValueError as error:
                        problems.append(f"{path}:{number}: {error}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    refuse(problems, "every line of a .jsonl file must be one JSON object in UTF-8")
    return Rows(values, lambda index: f"{path}:{lines[index]}")


def _parse(line: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at column {error.colno}") from error
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__}, not an object")
    return value


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
