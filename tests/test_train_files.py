"""Rows of local files: what each format gives, and how what is wrong with one is named."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from train_helpers import ROWS, small_recipe

from peftzoo.errors import DataError
from peftzoo.train.data import load_rows
from peftzoo.train.files import READERS
from peftzoo.train.loop import train
from peftzoo.train.recipe import DataSource

ROW = [{"prompt": "a, b", "completion": 'say "x"\nand\r\nmore'}, {"prompt": "é", "completion": " c "}]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path, rows):
    """Write rows as other programs do."""
    if path.endswith(".csv"):
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def read(path, **settings):
    return load_rows(DataSource(path=path, **settings))


def complaint(path, content):
    Path(path).write_bytes(content)
    with pytest.raises(DataError) as error:
        read(path)
    assert error.value.exit_code == 3
    return str(error.value)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_rows_come_back_as_they_were(suffix):
    assert list(read(write(f"x{suffix}", ROW)).values) == ROW


def test_records_are_named_by_the_line_they_begin_on():
    rows = read(write("x.csv", [*ROW, ROW[1]]))
    assert [rows.where(i) for i in range(3)] == ["x.csv:2", "x.csv:5", "x.csv:6"]
    assert read(write("x.parquet", ROW)).where(1) == "x.parquet row 2"


def test_lines_of_text_are_rows():
    Path("x.txt").write_bytes(b"\xef\xbb\xbf one \r\n\n\t\ntwo\n")
    rows = read("x.txt")
    assert list(rows.values) == [{"text": " one "}, {"text": "two"}]
    assert rows.where(1) == "x.txt:4"


def test_long_fields_are_read():
    long = [{"prompt": "a", "completion": "b" * 300_000}]
    assert list(read(write("x.csv", long)).values) == long


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_max_rows_reads_no_further(suffix):
    path = write(f"x{suffix}", ROW * 3)
    if suffix == ".csv":
        with Path(path).open("a") as file:
            file.write("no record\n")
    assert len(read(path, max_rows=6)) == 6
    assert len(read(path, max_rows=1)) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"prompt,completion\na,b\nc\nd,e\n", "x.csv:3: has 1 fields, and the first line 2"),
        (b'prompt,completion\n"a\nb",c,d\n', "x.csv:2: has 3 fields, and the first line 2"),
        (b"prompt,completion\na,b\n\xff,c\n", "x.csv:3: byte 1 is not UTF-8"),
        (b'prompt,completion\n"a,b\n', "x.csv:2: unexpected end of data"),
        (b'prompt,completion\n"a"b,c\n', "x.csv:2: ',' expected after '\"'"),
        (b"prompt,prompt\na,b\n", "x.csv:1: names the column prompt twice"),
        (b"\xff\n", "x.csv:1: byte 1 is not UTF-8"),
        (b"prompt,completion\n", "x.csv: there are no rows"),
        (b"", "x.csv: there are no rows"),
    ],
)
def test_bad_record_is_named_by_file_and_line(content, says):
    message = complaint("x.csv", content)
    assert says in message
    assert message.count("x.csv:") == 1, "what is right is not named"


def test_every_bad_record_is_counted():
    message = complaint("x.csv", b"prompt,completion\n" + b"a\n" * 30)
    assert "x.csv:11:" in message
    assert "and 20 more" in message


def test_bad_line_of_text_is_named():
    assert "x.txt:2: byte 3 is not UTF-8" in complaint("x.txt", b"a\nbc\xff\n")


@pytest.mark.parametrize("content", [b"", b"prompt,completion\na,b\n", b"PAR1 and nothing of it PAR1"])
def test_file_that_is_no_parquet_is_refused(content):
    assert "x.parquet: is no readable .parquet file" in complaint("x.parquet", content)


@pytest.mark.parametrize("suffix", READERS)
def test_missing_file_is_refused(suffix):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read(f"gone{suffix}")


def test_other_formats_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'x\.xlsx' is no \.jsonl, \.csv, \.parquet or \.txt file"):
        DataSource(path="x.xlsx")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_training_is_the_same_from_every_format(suffix):
    path, losses = write(f"rows{suffix}", list(ROWS)), []
    for where in ("train.jsonl", path):
        result = train(small_recipe(f"data.train.path={where}", f"output.dir=runs/{Path(where).suffix[1:]}"))
        losses.append(result.after.metrics["eval_loss"])
    assert losses[0] == losses[1]
