"""Every registered method under DDP and FSDP2: two processes train what one would have trained."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import assert_all_close, assert_trained, take_steps, trained_values
from processes import ROOT, environment
from training_runs import MICRO_BATCHES, RATE, STEPS, started

import peftzoo

TESTS = ROOT / "tests"


@pytest.fixture(params=peftzoo.list_methods())
def method(request):
    """Every method, those that change the base for good too: training is training."""
    return peftzoo.get_method(request.param)


@pytest.fixture(scope="session")
def two_ranks(request, tmp_path_factory):
    """What two processes made of every method that is asked about, in one start of the two."""
    asked = [item for item in request.session.items if "two_ranks" in getattr(item, "fixturenames", ())]
    names = sorted({item.callspec.params["method"] for item in asked})
    folder = tmp_path_factory.mktemp("two-ranks")
    path = f"{ROOT}:{ROOT / 'kernels'}:{TESTS}"
    command = [sys.executable, str(TESTS / "workers" / "two_ranks.py"), str(folder), *names]
    pipe = subprocess.PIPE
    ranks = [
        subprocess.Popen(command, env=environment(PYTHONPATH=path, RANK=rank), stdout=pipe, stderr=subprocess.STDOUT)
        for rank in "01"
    ]
    try:
        said = [rank.communicate(timeout=400)[0].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return lambda name, rank: (
        torch.load(path) if (path := folder / f"{name}-{rank}.pt").exists() else pytest.fail(said[rank][-3000:])
    )


@pytest.fixture
def alone(method, llama):
    """The same run in one process: losses, the tensors at its end."""
    model = started(method, llama)
    start = trained_values(model)
    losses = take_steps(model, STEPS, RATE, MICRO_BATCHES)
    assert_trained(trained_values(model), start)
    return {"losses": losses, "tensors": trained_values(model)}


def assert_same_run(got, alone):
    assert "error" not in got, got["error"]
    assert got["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert_all_close(got["tensors"], alone["tensors"], 1e-4)


@pytest.mark.parametrize("rank", [0, 1])
def test_ddp_equals_one_process(method, two_ranks, alone, rank):
    assert_same_run(two_ranks(method.name, rank)["ddp"], alone)


@pytest.mark.parametrize("rank", [0, 1])
def test_fsdp_equals_one_process(method, two_ranks, alone, rank):
    """Each block sharded over two processes, and the rest."""
    got = two_ranks(method.name, rank)["fsdp"]
    if method.fsdp:
        assert_same_run(got, alone)
    else:
        with pytest.raises(AssertionError):  # or the declaration is out of date
            assert_same_run(got, alone)
        assert "FSDP" in (ROOT / "docs" / "methods" / f"{method.name}.md").read_text(), "why it does not is told"
