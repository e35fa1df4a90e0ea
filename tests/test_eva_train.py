"""The trainer takes the start of an adapter from its own rows."""

from __future__ import annotations

import copy
import json
from itertools import islice
from pathlib import Path

import peft
import pytest
import torch
from helpers import assert_all_close
from peft import get_peft_model
from safetensors.torch import load_file
from test_eva import LOPSIDED, Lopsided, noise
from test_train_processes import ROOT, launch
from train_helpers import builtin_model, read_events, small_recipe

from peftzoo.core.calibrate import calibrate
from peftzoo.errors import DataError
from peftzoo.train.checks import check_trained
from peftzoo.train.loop import train

EVA = "method={name: eva, r: 4, target_modules: [q_proj, k_proj, o_proj, down_proj]}"


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def manifest(folder):
    return json.loads((Path(folder) / "run.json").read_text())


def weights(folder):
    return load_file(Path(folder) / "final" / "adapter_model.safetensors")


def test_a_run_starts_from_its_own_rows_and_tells_the_ranks(capsys):
    result = train(small_recipe(EVA, "train.max_steps=1", "train.learning_rate=1e-9"))
    ranks = manifest(result.folder)["ranks"]
    assert len(ranks) == 4 * 4
    assert sum(ranks.values()) == 4 * 4 * 4
    assert len(set(ranks.values())) > 2
    said = capsys.readouterr().out
    assert f"calibrated 16 layers on training data: ranks from {min(ranks.values())} to {max(ranks.values())}" in said
    stock = peft.PeftModel.from_pretrained(builtin_model(), result.folder / "final")
    saved = {name: module for name, module in stock.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    for name, module in saved.items():
        a = module.lora_A["default"].weight
        assert len(a) == ranks[name.removeprefix("base_model.model.")]
        assert (a @ a.T - torch.eye(len(a))).abs().max() < 1e-4, "unit vectors at right angles, as long as none moved"
    assert len(saved) == sum(rank > 0 for rank in ranks.values())


def test_a_run_that_goes_on_takes_no_new_start(monkeypatch, capsys):
    first = train(small_recipe(EVA))
    monkeypatch.setattr("peftzoo.train.calibration.calibrate", lambda *_: pytest.fail("its start would be lost"))
    folder = f"model.adapter_name_or_path={first.folder}/final"
    again = train(small_recipe(EVA, folder, "train.max_steps=1", "train.learning_rate=1e-9", "output.dir=runs/again"))
    assert_all_close(weights(again.folder), weights(first.folder))
    assert again.before.metrics == pytest.approx(first.after.metrics, rel=1e-5)
    assert "ranks" not in manifest(again.folder)
    assert "calibrated" not in capsys.readouterr().out.partition("going on from")[2]


def test_the_rows_are_those_of_the_first_steps_in_their_order(monkeypatch):
    class Seen(Exception):
        pass

    def look(model, batches, *_):
        raise Seen([batch["input_ids"] for batch in islice(batches, 4)])

    recipe = small_recipe(EVA, "train.gradient_accumulation_steps=2", "train.seed=3")
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr("peftzoo.train.calibration.calibrate", look)
        with pytest.raises(Seen) as caught:
            train(recipe)
    monkeypatch.setattr("peftzoo.train.loop.Stepper.take", lambda _, batches, counts: steps.extend(batches) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(recipe)
    assert len(steps) == 2
    assert all(torch.equal(got, want["input_ids"]) for got, want in zip(caught.value.args[0], steps, strict=False))


def test_other_methods_take_none(capsys):
    result = train(small_recipe("train.max_steps=1", "data.eval=null"))
    assert "ranks" not in manifest(result.folder)
    assert "calibrat" not in capsys.readouterr().out


def test_same_run_same_bytes():
    one, other = (train(small_recipe(EVA, "data.eval=null", f"output.dir=runs/{name}")) for name in "ab")
    assert weights(one.folder).keys() == weights(other.folder).keys()
    assert all(torch.equal(value, weights(other.folder)[key]) for key, value in weights(one.folder).items())


def test_rows_that_are_too_few_are_the_datas_fault_and_leave_no_folder():
    with pytest.raises(DataError, match=r"takes 60 \(r times rho\)"):
        train(
            small_recipe(
                "method={name: lora, start: eva, r: 30, pca: incremental, max_batches: 3}",
                "train.per_device_train_batch_size=1",
            )
        )
    assert not Path("runs/x").exists()


def test_a_target_without_rank_is_not_a_target_that_matches_nothing():
    base = Lopsided().requires_grad_(False)
    frozen = list(base.parameters())
    model = get_peft_model(base, copy.copy(LOPSIDED))
    calibrate(model, noise())
    check_trained(model, frozen)


def test_two_processes_start_and_train_as_one():
    alone = train(small_recipe(EVA, "output.dir=runs/one"))
    config = str(ROOT / "configs" / "cpu2.yaml")
    halves = [EVA, "train.per_device_train_batch_size=2", "output.dir=runs/two"]
    said = launch("accelerate.commands.launch", "--config_file", config, "launched.py", *halves)
    assert said.count("calibrated 16 layers") == 1
    assert manifest("runs/two")["processes"] == 2
    assert manifest("runs/two")["ranks"] == manifest(alone.folder)["ranks"]
    one, two = read_events("runs/one", "train"), read_events("runs/two", "train")
    for left, right in zip(one, two, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-4)
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-3)
