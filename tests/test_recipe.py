"""Recipes: nothing misspelt passes, every message names its place, and no input ends in a traceback."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from recipe_helpers import SMALL, complaint, load

from peftzoo.core import resources
from peftzoo.core.registry import get_method, list_methods
from peftzoo.core.resources import find_folder, find_recipe, list_recipes
from peftzoo.core.suggest import flat, nearest
from peftzoo.errors import RecipeError
from peftzoo.train.recipe import Recipe
from peftzoo.train.recipe_errors import known_settings
from peftzoo.train.recipe_file import load_recipe, write_resolved
from peftzoo.train.recipe_yaml import Section, dump

Keys = tuple[str, ...]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------- what comes with peftzoo


@pytest.mark.parametrize("path", sorted(find_folder("recipes").rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipe_loads_and_says_its_command(path: Path) -> None:
    name = path.relative_to(find_folder("recipes")).with_suffix("").as_posix()
    assert load_recipe(name) == load_recipe(str(path))
    assert path.read_text(encoding="utf-8").startswith(f"# peftzoo train {name}")


def test_recipes_are_listed() -> None:
    assert {"quickstart/dates", "llm/qwen3-0.6b-sft"} <= set(list_recipes())


@pytest.mark.parametrize("method", list_methods())
def test_quickstart_takes_any_method(method: str) -> None:
    recipe = load_recipe("quickstart/dates", [f"method.name={method}"])
    assert recipe.method.settings["r"] == 16
    assert recipe.method.settings["target_modules"] == "all-linear"
    get_method(method).make_config(**recipe.method.settings)


@pytest.mark.parametrize("name", ["quickstart/date", "dates", "Quickstart/Dates", "date"])
def test_unknown_recipe_names_the_nearest(name: str) -> None:
    with pytest.raises(RecipeError, match=r"no recipe of this name\. Did you mean quickstart/dates\?") as caught:
        load_recipe(name)
    assert str(caught.value).startswith(f"{name}: ")


@pytest.mark.parametrize("name", ["", ".", "..", "../recipes/quickstart/dates", "/etc/passwd", "zzz", "x" * 9999])
def test_unknown_recipe_without_neighbour(name: str) -> None:
    with pytest.raises(RecipeError, match="no recipe of this name"):
        find_recipe(name)


def test_wheel_carries_its_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "peftzoo"
    for folder in (package / "_data" / "recipes" / "a", package.parent / "recipes"):
        folder.mkdir(parents=True)
    (package / "_data" / "recipes" / "a" / "own.yaml").write_text(SMALL, encoding="utf-8")
    (package.parent / "recipes" / "strangers.yaml").write_text(SMALL, encoding="utf-8")
    monkeypatch.setattr(resources, "PACKAGE", package)
    assert list_recipes() == ["a/own"]
    assert load_recipe("a/own").method.name == "lora"
    with pytest.raises(RecipeError, match="no folder configs"):
        find_folder("configs")


# ---------------------------------------------------------------- learning rate


def test_auto_learning_rate_is_the_lora_rate_times_the_factor() -> None:
    for method in list_methods():
        recipe = load(SMALL, f"method={{name: {method}}}", "train.learning_rate=auto", "train.lora_learning_rate=3e-4")
        assert recipe.learning_rate == pytest.approx(3e-4 * get_method(method).lr_factor, rel=1e-12)


@pytest.mark.parametrize(
    ("overrides", "setting", "seed"),
    [
        (["train.seed=3"], "seed", 3),
        (["train.seed=3", "method.name=vera"], "projection_prng_key", 3),
        (["train.seed=3", "method.seed=5"], "seed", 5),
    ],
)
def test_the_seed_of_the_run_is_the_adapters(overrides: list[str], setting: str, seed: int) -> None:
    assert load_recipe("quickstart/dates", overrides).method.settings[setting] == seed


def test_learning_rate_as_a_number_is_absolute() -> None:
    for method in list_methods():
        assert load(SMALL, f"method={{name: {method}}}").learning_rate == 1e-3


# ---------------------------------------------------------------- I1: misspelt keys


def full_recipe() -> dict[str, object]:
    """Return a valid recipe in which every setting at every depth is written."""
    source = {"hub": "user/rows", "name": "main", "split": "train", "max_rows": 10}
    recipe = load(SMALL, f"data.train={json.dumps(source)}", "data.eval={path: rows.jsonl, max_rows: 5}")
    settings = json.loads(recipe.model_dump_json())
    settings["data"]["columns"] = {"prompt": "question", "completion": "answer"}
    del settings["data"]["train"]["path"]
    return settings


def write(settings: object, lines: list[str], at: dict[Keys, int], path: Keys = ()) -> None:
    """Append block YAML of a map to the lines, noting on which line, from 1, each key stands."""
    for key, value in settings.items():
        nested = isinstance(value, dict) and value
        lines.append("  " * len(path) + f"{key}:" + ("" if nested else f" {json.dumps(value)}"))
        at[(*path, key)] = len(lines)
        if nested:
            write(value, lines, at, (*path, key))


def section_at(settings: dict, path: Keys) -> dict:
    for key in path:
        settings = settings[key]
    return settings


def misspell(key: str, edits: int, rng: random.Random) -> str:
    for _ in range(edits):
        at, kind, letter = rng.randrange(len(key) + 1), rng.randrange(4), rng.choice(string.ascii_lowercase)
        if kind == 0 or at == len(key):
            key = key[:at] + letter + key[at:]
        elif kind == 1 and len(key) > 1:
            key = key[:at] + key[at + 1 :]
        elif kind == 2 and at + 1 < len(key):
            key = key[:at] + key[at + 1] + key[at] + key[at + 2 :]
        else:
            key = key[:at] + letter + key[at + 1 :]
    return key


def wrong_keys(settings: dict, known: dict[Keys, list[str]]) -> Iterator[tuple[Keys, Keys, str]]:
    """Yield the path of each key, the path it wrongly gets, and the kind of mistake."""
    rng = random.Random(0)
    at: dict[Keys, int] = {}
    write(settings, [], at)
    for path in at:
        *above, key = path
        section = tuple(above)
        parts = key.split("_")
        variants = [(misspell(key, edits, rng), f"{edits} edits") for edits in (1, 1, 1, 2, 2, 2)]
        variants += [("-".join(parts), "hyphens"), (parts[0] + "".join(p.title() for p in parts[1:]), "camelCase")]
        taken = {flat(name) for name in known[section]}
        for variant, kind in variants:
            if variant != key and (flat(variant) not in taken or kind in ("hyphens", "camelCase")):
                yield path, (*section, variant), kind
        others = [
            other
            for other in known
            if other != section and other[: len(path)] != path and other in (*at, ()) and key not in known[other]
        ]
        for other in rng.sample(others, 2):
            yield path, (*other, key), "wrong section"


def test_every_misspelt_key_is_refused_with_its_place_and_what_was_meant() -> None:
    settings = full_recipe()
    load(dump(settings))
    whole = Section()
    whole["method"] = Section()
    whole["method"]["name"] = "lora"
    known = known_settings(whole)
    cases = list(wrong_keys(settings, known))
    assert len(cases) >= 400
    missed = []
    for path, wrong, kind in cases:
        changed = json.loads(json.dumps(settings))
        value = section_at(changed, path[:-1]).pop(path[-1])
        section_at(changed, wrong[:-1])[wrong[-1]] = value
        lines: list[str] = []
        at: dict[Keys, int] = {}
        write(changed, lines, at)
        first = complaint("\n".join(lines)).split("\n")[0]
        assert first.startswith(f"x.yaml:{at[wrong]}: {'.'.join(wrong)} is not a setting. "), (kind, first)
        home = f"under {'.'.join(path[:-1])}:" if path[:-1] else "at the top"
        meant = f"Did you mean {'.'.join(path)}?" if kind != "wrong section" else home
        found = meant in first
        if not found:
            missed.append((kind, first))
    print(f"{len(cases)} misspelt keys, {len(missed)} without the right suggestion")
    assert len(missed) <= 0.05 * len(cases), missed


def test_a_misspelt_key_is_not_reported_as_missing_too() -> None:
    assert complaint(SMALL.replace("name_or_path", "nam_or_path")).count("\n") == 0


def test_all_problems_in_one_pass() -> None:
    text = SMALL.replace("max_steps: 20", "max_stepz: 20\n  seed: -1").replace("  r: 4", "  r: 4\n  r: 8\n  rr: 2")
    assert complaint(text, "oops", "output.dri=x").split("\n") == [
        "x.yaml:9: r stands here twice, first at x.yaml:8",
        "command line: 'oops' is not of the form section.setting=value",
        "x.yaml:10: method.rr is not a setting. Did you mean method.r?",
        "x.yaml:12: train.max_stepz is not a setting. Did you mean train.max_steps?",
        "command line: output.dri is not a setting. Did you mean output.dir?",
        "x.yaml:13: train.seed: should be greater than or equal to 0, not -1",
    ]


def test_a_key_that_resembles_nothing_gets_the_list_of_its_section() -> None:
    assert complaint(SMALL, "output.wxyzq=1") == (
        "command line: output.wxyzq is not a setting. output has: dir, plots"
    )


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("learningRate", ["learning_rate", "seed"], "learning_rate"),
        ("lerning_rtae", ["learning_rate", "seed"], "learning_rate"),
        ("batch_size", ["per_device_train_batch_size", "seed"], "per_device_train_batch_size"),
        ("batch_size", ["train_batch_size", "eval_batch_size"], None),
        ("esed", ["seed", "speed"], "seed"),
        ("x", ["r"], None),
        ("", ["r"], None),
        ("gamma", [], None),
        ("k" * 1_000_000, ["learning_rate"], None),
    ],
)
def test_nearest(name: str, known: list[str], expected: str | None) -> None:
    assert nearest(name, known) == expected


# ---------------------------------------------------------------- the resolved recipe


@pytest.mark.parametrize("method", list_methods())
def test_resolved_recipe_is_complete_and_loads_back_equal(method: str) -> None:
    recipe = load(SMALL, f"method.name={method}", "data.eval={hub: a/b, split: test}", "data.columns.prompt='1e-4'")
    path = Path("recipe.resolved.yaml")
    write_resolved(recipe, path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# peftzoo train recipe.resolved.yaml\n")
    assert load_recipe(str(path)) == recipe
    written = yaml.safe_load(text)
    assert set(written) == set(Recipe.model_fields)
    assert {field.name for field in get_method(method).settings.values()} == set(written["method"]) - {"name"}
    assert written["eval"]["generate"]["max_new_tokens"] == 16
