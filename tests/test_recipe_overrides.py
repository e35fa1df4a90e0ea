"""What stands on the command line, and what comes from a parent, is checked like the file and reported where it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from recipe_helpers import SMALL, complaint, load

from peftzoo.errors import RecipeError
from peftzoo.train.recipe_file import load_recipe


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------- overrides


def test_the_misspelt_override_of_the_readme() -> None:
    message = complaint(SMALL, "train.learning_rte=1e-3")
    assert message == "command line: train.learning_rte is not a setting. Did you mean train.learning_rate?"


def test_overrides_are_yaml_and_the_later_one_wins() -> None:
    recipe = load(
        SMALL,
        "train.max_steps=5",
        "train.max_steps=7",
        "train.learning_rate=1e-4",
        "eval.generate.max_new_tokens=3",
        "method.target_modules=[q_proj, v_proj]",
        "data.train={path: a.jsonl, max_rows: 2}",
        "data.eval=",
        "model.revision=off",
        "output={dir: a=b}",
    )
    assert recipe.train.max_steps == 7
    assert recipe.train.learning_rate == 1e-4
    assert recipe.eval.generate.max_new_tokens == 3
    assert recipe.method.settings["target_modules"] == ["q_proj", "v_proj"]
    assert recipe.data.train.path == "a.jsonl"
    assert recipe.data.eval is None
    assert recipe.model.revision == "off"
    assert recipe.output.dir == "a=b"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.max_steps", "command line: 'train.max_steps' is not of the form section.setting=value"),
        ("=3", "command line: '=3' is not of the form"),
        ("train..seed=3", "command line: 'train..seed=3' is not of the form"),
        ("train.seed=[1", "command line: train.seed: not YAML: "),
        ("train.seed=&a 1", "command line: train.seed: not YAML: a recipe may not use anchors"),
        ("train={seed: 1, seed: 2}", "command line: seed stands here twice"),
        ("train.seed=true", "command line: train.seed: should be a valid integer, not true"),
        ("trian.seed=1", "command line: trian is not a setting. Did you mean train?"),
        ("train.max-steps=1", "command line: train.max-steps is not a setting. Did you mean train.max_steps?"),
        ("learning_rate=1", "command line: learning_rate is not a setting. learning_rate belongs under train:"),
        ("method.rnk=1", "command line: method.rnk is not a setting."),
        ("data.train.max_rows=3", "command line: data.train.max_rows: data.train is 'builtin/iso-dates:train'; set"),
        ("extends=quickstart/dates", "command line: extends can only stand in a file"),
    ],
)
def test_bad_override_is_refused(override: str, expected: str) -> None:
    assert complaint(SMALL, override).startswith(expected)


# ---------------------------------------------------------------- extends


def test_extends_merges_sections_and_replaces_lists() -> None:
    child = "extends: sub/parent.yaml\ntrain: {seed: 3}\nmethod: {target_modules: [v]}\n"
    parent = "extends: quickstart/dates\ntrain: {seed: 2, max_steps: 9}\nmethod: {target_modules: [q, k]}\n"
    Path("sub").mkdir()
    Path("child.yaml").write_text(child, encoding="utf-8")
    Path("sub/parent.yaml").write_text(parent, encoding="utf-8")
    recipe = load_recipe("child.yaml", ["train.logging_steps=1"])
    assert (recipe.train.seed, recipe.train.max_steps, recipe.train.logging_steps) == (3, 9, 1)
    assert recipe.method.settings["target_modules"] == ["v"]
    assert recipe.method.settings["r"] == 16
    assert recipe.train.per_device_train_batch_size == 32


def test_a_bad_key_is_reported_in_the_file_where_it_stands() -> None:
    parent = SMALL.replace("max_steps", "max_stepz") + "version: 1\n"
    Path("parent.yaml").write_text(parent, encoding="utf-8")
    assert complaint("extends: parent.yaml\ntrain:\n  sede: 3\n").split("\n") == [
        "parent.yaml:13: version stands here twice, first at parent.yaml:1",
        "parent.yaml:10: train.max_stepz is not a setting. Did you mean train.max_steps?",
        "x.yaml:3: train.sede is not a setting. Did you mean train.seed?",
    ]


def test_a_section_in_two_files_stands_in_the_child() -> None:
    Path("parent.yaml").write_text(SMALL, encoding="utf-8")
    message = complaint("extends: parent.yaml\nmethod:\n  alpha: 2\n  lora_alpha: 2\n")
    assert message.startswith("x.yaml:2: method: lora: ")


def test_extends_in_a_circle_is_refused() -> None:
    Path("b.yaml").write_text("extends: x.yaml\n", encoding="utf-8")
    assert complaint("extends: b.yaml\n") == "b.yaml:1: extends: goes in a circle: x.yaml -> b.yaml -> x.yaml"


def test_paths_outside_the_working_directory_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("x.yaml").write_text(SMALL.replace("max_steps", "max_stepz"), encoding="utf-8")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    with pytest.raises(RecipeError, match=re.escape(f"{tmp_path / 'x.yaml'}:10: train.max_stepz")):
        load_recipe(str(tmp_path / "x.yaml"))
