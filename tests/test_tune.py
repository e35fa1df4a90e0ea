"""`bench tune`, in Triton's interpreter: what is measured is right, and heeded from then on."""

from __future__ import annotations

import os

import pytest
import torch
from typer.testing import CliRunner

from peftzoo.bench import tune
from peftzoo.bench.tune import LIBRARY, TuneSettings
from peftzoo.cli import app
from peftzoo.errors import BenchmarkError, CheckpointError, RecipeError
from peftzoo_kernels import dispatch
from peftzoo_kernels.dispatch import Sizes, Tiles

pytestmark = pytest.mark.skipif(os.environ["TRITON_INTERPRET"] == "0", reason="takes the interpreter for a GPU")
CPU = torch.device("cpu")
SMALL = TuneSettings(shapes=("24,40,33",), ranks=(4,), dropouts=(0.3,), dtypes=("float32",), rounds=1)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dispatch._table.cache_clear()
    yield
    dispatch._table.cache_clear()


def times(monkeypatch, slow):
    """Let the clock say that whatever `slow` names takes longer."""

    def alternate(runs, rounds, device):
        return {name: [[2.0 if slow(name) else 1.0]] * 2 for name in runs}

    monkeypatch.setattr(tune, "alternate", alternate)


def test_every_product_of_a_layer_is_measured():
    found = {one.sizes: one for one in tune.tune(SMALL, CPU, lambda line: None)}
    products = {(sizes.product, sizes.drops) for sizes in found}
    assert products == set(dispatch._SHIPPED)
    for sizes, one in found.items():
        assert next(iter(one.seconds)) == LIBRARY
        assert len(one.seconds) == 1 + len(dispatch.candidates(sizes)), sizes


def test_the_faster_way_is_kept_and_taken(monkeypatch):
    path = dispatch.cache_file("cpu")
    monkeypatch.setenv("PEFTZOO_BACKEND", "triton")
    monkeypatch.setattr(tune, "can_run", lambda x: True)
    for slow, wanted in ((lambda name: name == LIBRARY, True), (lambda name: name != LIBRARY, False)):
        times(monkeypatch, slow)
        found = tune.tune(SMALL, CPU, lambda line: None)
        assert all((one.tiles is not None) == wanted for one in found)
        dispatch.keep([(one.sizes, one.tiles) for one in found], path)
        sizes = Sizes("shrink", 24, 40, 0, 4, torch.float32)
        row = dispatch._nearest(sizes, dispatch._table("cpu"))
        assert row is not None
        assert row.tiles == next(one.tiles for one in found if one.sizes == sizes)


def test_a_kernel_that_is_wrong_is_never_taken(monkeypatch):
    real = tune.shrink
    monkeypatch.setattr(tune, "shrink", lambda *args, tiles: real(*args, tiles=tiles) * (1 if tiles is None else 1.1))
    with pytest.raises(BenchmarkError, match=r"shrink 64x32 of 4 warps.*off by"):
        tune.tune(SMALL, CPU, lambda line: None)


def test_a_kernel_that_does_not_fit_is_passed_over(monkeypatch):
    real, (first, *others) = tune.shrink, dispatch.candidates(Sizes("shrink", 24, 40, 0, 4, torch.float32))
    assert others

    def shrink(*args, tiles):
        if tiles == first:
            raise tune.triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
        return real(*args, tiles=tiles)

    monkeypatch.setattr(tune, "shrink", shrink)
    for one in tune.tune(SMALL, CPU, lambda line: None):
        passed = first in dispatch.candidates(one.sizes) and one.sizes.product == "shrink"
        assert len(one.seconds) == 1 + len(dispatch.candidates(one.sizes)) - passed


def test_lines_say_what_was_measured():
    one = tune.Measured(
        Sizes("shrink", 8, 40, 0, 4, torch.bfloat16, True),
        Tiles(64, 0, 32, 4, 3, 2),
        {LIBRARY: 2e-3, "64x32 of 4 warps, 3 stages split 2": 1e-3},
    )
    said = "shrink dropped m=8 k=40 r=4 bfloat16: 64x32 of 4 warps, 3 stages split 2 1.000 ms; library 2.000"
    assert str(one) == said


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"shapes": ("8,8",)}, "--shape 8,8 is not M,K,N"),
        ({"shapes": ("8,8,8+8",)}, "give M,K,N"),
        ({"ranks": (300,)}, "--rank 300 must be from 1 to 256"),
        ({"dropouts": (1.0,)}, "--dropout 1 must be at least 0 and below 1"),
        ({"dtypes": ("float64",)}, "--dtype float64 is not one of bfloat16, float16, float32"),
    ],
)
def test_bad_settings_are_refused(settings, says):
    with pytest.raises(RecipeError) as error:
        tune.tune(TuneSettings(**({"shapes": ("8,8,8",)} | settings)), CPU, lambda line: None)
    assert says in str(error.value)


def test_the_command_writes_the_table(tmp_path):
    arguments = ["--shape", "24,40,33", "--rank", "4", "--dropout", "0.3", "--dtype", "float32", "--rounds", "1"]
    done = CliRunner().invoke(app, ["bench", "tune", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    path = dispatch.cache_file("cpu")
    assert path.is_file()
    assert f"wrote them to {path}" in done.output.replace("\n", "")
    elsewhere = tmp_path / "table.json"
    CliRunner().invoke(app, ["bench", "tune", *arguments, "--out", str(elsewhere)], catch_exceptions=False)
    assert elsewhere.is_file()


@pytest.mark.parametrize("held", ["no table", "[]", '{"rows": [{}]}', None])
def test_a_file_that_is_no_table_is_left_alone(held, tmp_path):
    path = tmp_path if held is None else tmp_path / "table.json"
    if held is not None:
        path.write_text(held)
    with pytest.raises(CheckpointError, match="cannot be written" if held is None else "is no table"):
        tune.store([], CPU, path)
    assert held is None or path.read_text() == held


def test_without_a_gpu_the_command_says_so(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RecipeError, match="measures kernels on a GPU, and torch sees none"):
        CliRunner().invoke(app, ["bench", "tune"], catch_exceptions=False)
