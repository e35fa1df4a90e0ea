"""Bad recipes: whatever stands in the file, one clean message says what and where, quickly."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest
import yaml
from recipe_helpers import SMALL, complaint, load

from peftzoo.errors import RecipeError
from peftzoo.train.recipe_file import load_recipe
from peftzoo.train.recipe_yaml import dump, parse


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------- I2: bad input


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("r: 4", "r: lots", '8: method.r: should be a valid integer, not "lots"'),
        ("r: 4", "r: true", "8: method.r: should be a valid integer, not true"),
        ("r: 4", "r: -4", "8: method.r: lora: r=-4 must be an integer >= 1"),
        ("r: 4", "dropout: .nan", "8: method.dropout: should be a finite number, not NaN"),
        ("r: 4", "alpha: 1e999", "8: method.alpha: should be a finite number, not Infinity"),
        ("r: 4", "target_modules: [q, 1]", "8: method.target_modules: should be a valid string"),
        ("r: 4", "alpha: 2\n  lora_alpha: 3", "6: method: lora: "),
        ("lora", "lroa", "7: method.name: unknown method 'lroa'; did you mean lora?"),
        ("lora", "[lora]", "7: method.name: unknown method"),
        ("name: lora", "", "6: method.name is missing"),
        ("max_steps: 20", "max_steps: 20.0", "10: train.max_steps: should be a valid integer, not 20.0"),
        ("max_steps: 20", "max_steps: off", '10: train.max_steps: should be a valid integer, not "off"'),
        ("max_steps: 20", "max_steps: 12:30", '10: train.max_steps: should be a valid integer, not "12:30"'),
        ("max_steps: 20", "max_steps: 0", "10: train.max_steps: should be greater than or equal to 1, not 0"),
        ("max_steps: 20", f"max_steps: {'9' * 90}", "10: train.max_steps: should be less than or equal to 2147483647"),
        ("max_steps: 20", f"max_steps: {'9' * 9000}", "10: a number of 9000 digits"),
        ("max_steps: 20", "mask_prompt: yes", "10: train.mask_prompt is not a setting. mask_prompt belongs under"),
        ("max_steps: 20", "warmup_ratio: 0.1", "10: train.warmup_ratio is not a setting. Write warmup_steps: below 1"),
        ("max_steps: 20", "warmup-ratio: 0.1", "10: train.warmup-ratio is not a setting. Write warmup_steps: below 1"),
        ("max_steps: 20", "warmup_steps: 1.5", "10: train.warmup_steps: should be a valid integer or less than 1"),
        ("max_steps: 20", "max_steps: 20\n  warmup_steps: 20", "11: train.warmup_steps: must be below max_steps 20"),
        ("1e-3", "-1", "11: train.learning_rate: should be greater than 0 or 'auto', not -1"),
        ("1e-3", "true", "11: train.learning_rate: should be a valid number or 'auto', not true"),
        ("1e-3", ".inf", "11: train.learning_rate: should be a finite number or 'auto', not Infinity"),
        ("1e-3", "'1e-3'", "11: train.learning_rate: should be a valid number or 'auto', not \"1e-3\""),
        ("version: 1", "version: true", "1: version: should be a valid integer, not true"),
        ("version: 1", "version: 2", "1: version: should be less than or equal to 1, not 2"),
        ("version: 1", "task: vision", "1: task: should be 'causal-lm', not \"vision\""),
        ("{name_or_path: builtin/tiny-docs-1m}", "tiny", "2: model: should be a section with settings of its own"),
        ("builtin/tiny-docs-1m", "''", "2: model.name_or_path: should have at least 1 character"),
        ("builtin/iso-dates:train", "rows.jsonl", "4: data.train: 'rows.jsonl' is not built-in data such as"),
        ("builtin/iso-dates:train", "{path: rows.xlsx}", "4: data.train.path: 'rows.xlsx' is no .jsonl, .csv"),
        ("builtin/iso-dates:train", "{path: a.jsonl, hub: b}", "4: data.train: give exactly one of path"),
        ("builtin/iso-dates:train", "{path: a.jsonl, split: b}", "4: data.train.split: is for data from the Hub"),
        ("builtin/iso-dates:train", "{pth: a.jsonl}", "4: data.train.pth is not a setting. Did you mean data.train"),
        ("builtin/iso-dates:train", "[a, b]", "4: data.train: should be a valid string"),
        ("builtin/iso-dates:test", "{hub: user/rows}", "5: data.eval.split: name the split"),
        ("data:", "data:\n  columns: {prompt: q, txt: t}", "4: data.columns.txt is not a setting. Did you"),
        ("data:", "data:\n  columns: {text: t}", "4: data.columns.text: format prompt-completion has no field text"),
        ("data:", "data:\n  format: text", " eval.metrics: exact_match compares completions"),
        ("output:", "eval: {metrics: [f1]}\noutput:", "12: eval.metrics: should be 'exact_match' or 'perplexity'"),
        ("  eval: builtin/iso-dates:test", "eval: {steps: 5}", "5: eval.steps: needs rows to evaluate on"),
        ("output: {dir: runs/x}", "", " output is missing"),
        ("  r: 4", "  r: 4\n  r: 4", "9: r stands here twice, first at x.yaml:8"),
        ("  r: 4", "\tr: 4", "8: not YAML: found character '\\t' that cannot start any token; indent with spaces"),
        ("  r: 4", "   r: 4", "8: not YAML: mapping values are not allowed here"),
        ("  r: 4", "  r: [4", "9: not YAML: "),
        ("  r: 4", "  <<: {r: 4}", "8: method.<< is not a setting. method has: name, r"),
        ("  r: 4", "  ? [r]\n  : 4", "8: a key must be text"),
        ("r: 4", "r: &x 4", "8: not YAML: a recipe may not use anchors and aliases"),
        ("r: 4", "r: *x", "8: not YAML: a recipe may not use anchors and aliases"),
        ("r: 4", "r: !!python/object:os.system 4", "8: not YAML: a recipe may not use tags"),
        ("r: 4", "r: !!int 4", "8: not YAML: a recipe may not use tags"),
        ("r: 4", "r: " + "[" * 1000, "8: not YAML: a recipe may not use more than 20 levels"),
        ("r: 4", "r: [" + "1," * 20_000 + "]", "8: not YAML: a recipe may not use more than 10000 values"),
        ("runs/x", '"a\\0b"', "12: text may not hold control characters"),
        ("runs/x", '"\\ud800"', "12: text may not hold control characters"),
        ("runs/x", '"\\UFFFFFFFF"', "1: not YAML: "),
        ("runs/x", "a\0b", "12: character #x0000 is not allowed"),
        ("version: 1", "extends: [a, b]", "1: extends takes exactly one parent"),
        ("version: 1", "extends: nope.yaml", "1: extends: nope.yaml: no such file"),
        ("version: 1", "extends: quickstart/dat", "1: extends: quickstart/dat: no recipe of this name. Did you mean"),
        ("version: 1", "extends: x.yaml", "1: extends: goes in a circle: x.yaml -> x.yaml"),
        ("version: 1", "--- 1\n--- 2", "2: not YAML: but found another document"),
    ],
)  # fmt: skip
def test_bad_value_is_refused_at_its_line(old: str, new: str, expected: str) -> None:
    assert old in SMALL
    started = time.perf_counter()
    message = complaint(SMALL.replace(old, new, 1))
    assert time.perf_counter() - started < 1
    assert f"x.yaml:{expected}" in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "x.yaml: is empty"),
        (b"# nothing\n", "x.yaml: is empty"),
        (b"- version: 1\n", "x.yaml:1: holds a list, not settings"),
        (b"recipe\n", "x.yaml:1: holds a str, not settings"),
        (b"version: 1\nmodel: \xff\xfe\n", "x.yaml:2: is not UTF-8 text (byte 19)"),
        (SMALL.encode("utf-16"), "x.yaml:1: is not UTF-8 text (byte 1)"),
        (b"a: b\n" * 2_000_000, "x.yaml: is larger than 1000000 bytes"),
        (b"[" * 900_000, "x.yaml:1: not YAML: a recipe may not use more than 20 levels"),
        (b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "x.yaml:1: not YAML: a recipe may not use anchors"),
    ],
)
def test_bad_file_is_refused_quickly(content: bytes, expected: str) -> None:
    started = time.perf_counter()
    assert complaint(content).startswith(expected)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("path", ["none.yaml", ".yaml", "x" * 5000 + ".yaml", "folder.yaml", "/dev/zero.yaml"])
def test_unreadable_file_is_refused(path: str) -> None:
    Path("folder.yaml").mkdir()
    with pytest.raises(RecipeError, match=r"no such file|cannot be read"):
        load_recipe(path)


@pytest.mark.parametrize(
    "text", ["\ufeff" + SMALL, SMALL.replace("\n", "\r\n"), SMALL + "...\n"], ids=["BOM", "CRLF", "document end"]
)
def test_harmless_oddities_of_a_file_are_read(text: str) -> None:
    assert load(text.encode()) == load(SMALL)
    changed = text.replace("max_steps", "max_stepz").encode()
    assert complaint(changed).startswith("x.yaml:10: train.max_stepz is not a setting.")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("5.0e-3", 5e-3), ("1E5", 1e5),
        ("-.5e+1", -5.0), (".5", 0.5), ("2.", 2.0), ("-1.5", -1.5), ("+3", 3), ("-7", -7),
        ("010", 10), ("0o17", 15), ("0xFF", 255), (".inf", float("inf")), ("-.INF", float("-inf")), ("true", True),
        ("False", False), ("null", None), ("~", None), ("", None), ("off", "off"), ("yes", "yes"), ("12:30", "12:30"),
        ("1_000", "1_000"), ("2024-01-01", "2024-01-01"), ("'1e-4'", "1e-4"), ("e5", "e5"), (".", "."), ("0b1", "0b1"),
        ("=", "="), ("<<", "<<"), ("tRUE", "tRUE"), ("-", [None]),
    ],
)  # fmt: skip
def test_scalars_are_read_as_in_yaml_1_2(text: str, value: object) -> None:
    read, _ = parse(f"{text}\n", str)
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    "text",
    ["1e-4", "off", "12:30", "null", "", "é", "a\nb", "0o17", "~", " a", "[a", "#x", "a: b", ".5", "+1", "1_000",
     "010", "=", "<<", "2024-01-01", "\ufeff", "\U0001f600", "a" * 500, "- a", "'", '"', "\\", "\t", "yes"],
)  # fmt: skip
def test_written_text_is_read_back_as_the_same_text(text: str) -> None:
    written = dump({"a": text, "b": [text, {"c": text}]})
    read, _ = parse(written, str)
    assert read == {"a": text, "b": [text, {"c": text}]}
    assert yaml.safe_load(written) == read


# ---------------------------------------------------------------- I3: fuzz

NASTY = [
    "true", "-1", "0", "1e999", ".nan", "[]", "{}", "''", "null", "off", "1e-4", "99999999999999999999", "[[1]]", "é",
    "{a: b}", "&x", "*x", "!!python/object:a.b {}", "|", ">-", "%", "@", "`", "\t", "\0", "\x85", '"\\xzz"', "'",
    "? ", ": ",
    "- ", "# ", "---", "...", "extends: x.yaml", "extends: quickstart/dates", "<<: {}", "\ufeff", "\U0001f600", "lora",
]  # fmt: skip


def mutate(text: str, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 2, 3))):
        lines = text.split("\n")
        at, line = rng.randrange(len(text) + 1), rng.randrange(len(lines))
        kind = rng.randrange(8)
        if kind == 0:
            text = text[:at] + rng.choice(NASTY) + text[at:]
        elif kind == 1:
            text = text[:at] + text[at + rng.randrange(1, 9) :]
        elif kind == 2:
            text = text[:at] + chr(rng.randrange(1, 300)) + text[at + 1 :]
        elif kind == 3:
            lines[line] = re.sub(r":.*", lambda _: ": " + rng.choice(NASTY), lines[line])
        elif kind == 4:
            lines.insert(line, rng.choice(lines))
        elif kind == 5:
            lines[line] = " " * rng.randrange(6) + lines[line].strip()
        elif kind == 6:
            del lines[line]
        else:
            text = text[:at]
        if kind in (3, 4, 5, 6):
            text = "\n".join(lines)
        if not text:
            break
    content = bytearray(text.encode("utf-8", "replace"))
    if content and rng.random() < 0.1:
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def test_no_mutation_of_a_recipe_ends_in_a_traceback() -> None:
    rng = random.Random(0)
    seeds = [SMALL, SMALL.replace("method:\n  name: lora", "method:\n  name: vera\n  d_initial: 0.2")]
    valid = 0
    for case in range(2000):
        content = mutate(seeds[case % 2], rng)
        started = time.perf_counter()
        recipe, message = None, "x.yaml"
        try:
            recipe = load(content)
        except RecipeError as error:
            message = str(error)
        assert all(re.match(r"x\.yaml|/.*\.yaml:", line) for line in message.split("\n")), (content, message)
        if recipe is not None:
            valid += 1
            assert load(dump(recipe.model_dump())) == recipe
        assert time.perf_counter() - started < 2, content
    print(f"{valid} of 2000 mutations are valid recipes")
    assert 50 < valid < 1000
