"""Rows of local files, one reader for each format; what is wrong is named by file and line."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from peftzoo.errors import DataError
from peftzoo.train.rows import Rows, refuse


def read_file(path: Path, max_rows: int | None) -> Rows:
    """Return the rows of a file, of the format that its name ends in.

    Args:
        path: ends in one of ``READERS``.
        max_rows: read no further than so many rows.

    Raises:
        DataError: it cannot be read, or has bad lines, each of which is named.
    """
    try:
        return READERS[path.suffix](path, max_rows)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _jsonl(path: Path, max_rows: int | None) -> Rows:
    return _lines(path, max_rows, "every line of a .jsonl file must be one JSON object in UTF-8", _object)


def _text(path: Path, max_rows: int | None) -> Rows:
    return _lines(path, max_rows, "every line of a .txt file must be text in UTF-8", lambda line: {"text": line})


def _lines(path: Path, max_rows: int | None, rule: str, parse: Callable[[str], Mapping[str, Any]]) -> Rows:
    """Return one row for each line that is not blank."""
    values: list[Mapping[str, Any]] = []
    numbers: list[int] = []
    problems: list[str] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if len(values) == max_rows:
                break
            if line.strip():
                try:
                    values.append(parse(_decoded(line).rstrip("\r\n")))
                    numbers.append(number)
                except ValueError as error:
                    problems.append(f"{path}:{number}: {error}")
    refuse(problems, rule)
    return Rows(values, lambda index: f"{path}:{numbers[index]}")


def _object(line: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at column {error.colno}") from error
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__}, not an object")
    return value


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8") from error


def _csv(path: Path, max_rows: int | None) -> Rows:
    """Return one row for each record; the first line names the columns. A record may go over several lines."""
    rule = "a .csv file must be records in UTF-8 as long as its first line, which names the columns"
    values: list[Mapping[str, Any]] = []
    numbers: list[int] = []
    problems: list[str] = []
    csv.field_size_limit(sys.maxsize)
    with path.open("rb") as file:
        reader = csv.reader(map(_decoded, file), strict=True)
        end = 0
        try:
            columns = next(reader, [])
            if repeated := [column for column in columns if columns.count(column) > 1]:
                problems.append(f"{path}:1: names the column {repeated[0]} twice")
            end = reader.line_num
            for record in _until(reader, lambda: len(values) == max_rows):
                start, end = end + 1, reader.line_num
                if len(record) == len(columns):
                    values.append(dict(zip(columns, record, strict=True)))
                    numbers.append(start)
                elif record:
                    problems.append(f"{path}:{start}: has {len(record)} fields, and the first line {len(columns)}")
        except (csv.Error, ValueError) as error:  # where the next record begins cannot be told
            problems.append(f"{path}:{end + 1}: {error}")
    refuse(problems, rule)
    return Rows(values, lambda index: f"{path}:{numbers[index]}")


def _until(records: Iterator[list[str]], enough: Callable[[], bool]) -> Iterator[list[str]]:
    while not enough() and (record := next(records, None)) is not None:
        yield record


def _parquet(path: Path, max_rows: int | None) -> Rows:
    # imported here: it takes a second, and no other format needs it
    import pyarrow
    from pyarrow import parquet

    values: list[Mapping[str, Any]] = []
    try:
        with path.open("rb") as handle, parquet.ParquetFile(handle) as file:
            for batch in file.iter_batches():
                values += batch.to_pylist()
                if max_rows is not None and len(values) >= max_rows:
                    break
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: is no readable .parquet file: {error}") from error
    return Rows(values[:max_rows], lambda index: f"{path} row {index + 1}")


READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet, ".txt": _text}
SUFFIXES = ", ".join([*list(READERS)[:-1], f"or {list(READERS)[-1]}"]).replace(", or", " or")
