"""Several processes train together, or say why they do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train_helpers import cpu, read_events, small_recipe

from peftzoo.errors import CheckpointError, RecipeError
from peftzoo.train import checks
from peftzoo.train.checks import check_environment, check_world
from peftzoo.train.loop import train
from peftzoo.train.processes import from_first

ROOT = Path(__file__).parents[1]
LAUNCHED = """\
import os
import sys
import torch
from peftzoo.train.loop import train
from peftzoo.train.recipe_file import load_recipe

train(load_recipe("x.yaml", sys.argv[1:]))
open("seed-" + os.environ["RANK"], "w").write(str(torch.initial_seed()))
"""


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def launch(*arguments):
    Path("launched.py").write_text(LAUNCHED)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *arguments]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said, complained = process.communicate(timeout=200)
    finally:
        process.terminate()  # unlike a kill it lets the launcher end what it started
    assert process.returncode == 0, complained[-3000:]
    return said


def test_two_processes_equal_one():
    """A penalty, accumulation, an uneven number of held-out rows: each could make two processes another run."""
    common = [
        "method={name: sorsa, r: 4, gamma: 1.0}", "train.max_steps=6", "train.gradient_accumulation_steps=2",
        "eval.metrics=[exact_match, perplexity]", "eval.show_samples=1",
    ]  # fmt: skip
    alone = train(small_recipe(*common, "output.dir=runs/one"))
    config = str(ROOT / "configs" / "cpu2.yaml")
    halves = [*common, "train.per_device_train_batch_size=2", "output.dir=runs/two"]
    said = launch("accelerate.commands.launch", "--config_file", config, "launched.py", *halves)
    assert json.loads(Path("runs/two/run.json").read_text())["processes"] == 2
    one, two = read_events("runs/one", "train"), read_events("runs/two", "train")
    assert len(one) == len(two) == 6
    for left, right in zip(one, two, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-5)
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-4)
        assert right["tokens"] == left["tokens"]
    judged = json.loads(Path("runs/two/run.json").read_text())["after"]
    assert judged == pytest.approx(alone.after.metrics, rel=1e-5)
    assert said.count("the run folder is runs/two") == 1, "only one of them speaks"
    assert Path("seed-0").read_text() != Path("seed-1").read_text(), "dropout would be the same in both"


def test_environment_of_a_launcher_that_is_not_there_is_refused_at_once(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = small_recipe()
    started = time.monotonic()
    with pytest.raises(RecipeError, match=r"WORLD_SIZE=2 is set without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        train(recipe)
    assert time.monotonic() - started < 2
    assert not Path("runs").exists()


@pytest.mark.parametrize("lacking", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_an_environment_is_refused(lacking):
    whole = dict.fromkeys(("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), "0") | {"WORLD_SIZE": "2"}
    check_environment(whole)
    del whole[lacking]
    with pytest.raises(RecipeError, match=f"without {lacking}: "):
        check_environment(whole)
    check_environment(whole | {"WORLD_SIZE": "1"})
    check_environment(whole | {"WORLD_SIZE": ""})


def test_world_that_accelerate_does_not_see_is_refused():
    check_world(cpu(), "digest", {"WORLD_SIZE": "1"})
    with pytest.raises(RecipeError, match=r"2 processes .* accelerate sees 1: .*configs/cpu2\.yaml") as caught:
        check_world(cpu(), "digest", {"WORLD_SIZE": "2"})
    assert caught.value.exit_code == 2


def test_different_recipes_are_refused(monkeypatch):
    monkeypatch.setattr(checks, "gather_object", lambda own: [*own, "another"])
    with pytest.raises(RecipeError, match="different recipes"):
        check_world(cpu(), "digest", {})


def test_precision_the_device_lacks_is_refused(monkeypatch):
    def refuse(**_):
        raise ValueError("fp16 mixed precision requires a GPU")

    monkeypatch.setattr("peftzoo.train.processes.Accelerator", refuse)
    with pytest.raises(RecipeError, match=r"train\.mixed_precision=fp16: .*requires a GPU"):
        train(small_recipe("train.mixed_precision=fp16"))


def test_error_of_the_first_process_reaches_all():
    assert from_first(lambda: 3) == 3

    def fail():
        raise CheckpointError("full")

    with pytest.raises(CheckpointError, match="full"):
        from_first(fail)
