"""Every recipe that comes with peftzoo: valid without a network, named as it says, and of the paper it names."""

from __future__ import annotations

import re

import pytest
from processes import PEFTZOO, start
from test_counts import empty

import peftzoo
from peftzoo.core.counts import count_trained
from peftzoo.core.resources import find_recipe, list_recipes
from peftzoo.train.recipe_file import load_recipe

PAPERS = [name for name in list_recipes() if name.startswith("papers/")]
STARTS = ("pissa", "olora")  # of the LoRA family, with papers of their own
NAMED = [*peftzoo.list_methods(), *STARTS]
# the models of the recipes whose shapes are known here
SHAPES = {"meta-llama/Llama-2-7b-hf": "LLaMA-2-7B", "meta-llama/Meta-Llama-3-8B": "LLaMA-3-8B"}


def makes(recipe: str) -> str:
    """Return the name of what a recipe trains: its method, or the start that has a paper of its own."""
    method = load_recipe(recipe).method
    start = method.settings.get("start")
    return start if start in STARTS else method.name


def text_of(recipe: str) -> str:
    return find_recipe(recipe).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", list_recipes())
def test_settings_and_method_are_valid(name: str) -> None:
    recipe = load_recipe(name)
    method = peftzoo.get_method(recipe.method.name)
    config = method.make_config(**recipe.method.settings)
    assert type(config) is method.config
    assert recipe.learning_rate > 0
    folder, _, last = name.partition("/")
    assert recipe.output.dir == f"runs/{'dates-' if folder == 'methods' else ''}{last}"


@pytest.mark.parametrize("name", NAMED)
def test_every_method_has_its_recipes(name: str) -> None:
    assert makes(f"methods/{name}") == name
    (paper,) = [recipe for recipe in PAPERS if recipe.startswith(f"papers/{name}-")]
    assert makes(paper) == name


def test_paper_recipes_are_of_named_methods() -> None:
    assert {makes(recipe) for recipe in PAPERS} == set(NAMED)
    assert len(PAPERS) == len(NAMED)


@pytest.mark.parametrize("name", PAPERS)
def test_a_paper_recipe_cites_its_paper_and_says_what_is_not_from_it(name: str) -> None:
    text = text_of(name)
    if makes(name) not in STARTS:
        assert f"{peftzoo.get_method(makes(name)).paper}." in text
    assert re.search(r"^# .*\barXiv:\d{4}\.\d{5}\.$", text, re.MULTILINE)
    assert re.search(r"^# (Ours|Otherwise): ", text, re.MULTILINE)
    assert not load_recipe(name).model.name_or_path.startswith("builtin/")


def claimed() -> dict[str, int]:
    """Return the recipes that say how many parameters they train -> that number."""
    found = {}
    for name in PAPERS:
        said = re.search(r"Trains\s(?:#\s)?([\d,]+)(?:\n#)? parameters", text_of(name))
        if said:
            found[name] = int(said[1].replace(",", ""))
    return found


@pytest.mark.parametrize(("name", "count"), claimed().items())
def test_a_paper_recipe_trains_as_many_parameters_as_it_says(name: str, count: int) -> None:
    recipe = load_recipe(name)
    config = peftzoo.get_method(recipe.method.name).make_config(**recipe.method.settings)
    assert count_trained(empty(SHAPES[recipe.model.name_or_path]), config) == count


def test_the_papers_numbers_are_claimed() -> None:
    assert {name.partition("/")[2].partition("-")[0] for name in claimed()} == {
        *("nola", "paca", "randlora", "sorsa", "vera"),
    }


@pytest.mark.parametrize("name", ["papers/sorsa-llama2-7b-metamath"])
def test_check_without_a_network_gets_as_far_as_the_download(name: str) -> None:
    ran = start(*PEFTZOO, "check", name)
    assert ran.returncode == 4
    assert ran.stdout == "recipe: every setting is known and allowed\n"
    assert ran.stderr.startswith("error: model meta-llama/Llama-2-7b-hf: cannot be loaded: ")
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("name", NAMED)
def test_a_recipe_on_the_built_in_model_checks(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole of `peftzoo check`: the adapter fits the built-in model, and trains some of it."""
    from peftzoo.train.check import check

    check(load_recipe(f"methods/{name}"))
    assert re.search(r"trained: [\d,]+ of [\d,]+ parameters", capsys.readouterr().out)
