"""The Triton kernels: each product with each way to cut it, and the ops on top of them.

In Triton's interpreter, or with TRITON_INTERPRET=0 on a GPU. bfloat16 is left to that: the interpreter multiplies its
bit patterns as if they were integers.
"""

from __future__ import annotations

import itertools
import json
import random
import sys

import pytest
import torch
from test_ops import BOUND, DEVICE, assert_near, cast, gradient_of, make, relative_error, run

from peftzoo_kernels import (
    OPS,
    _triton,
    basis_lanes,
    dispatch,
    draw_seed,
    dropped,
    low_rank_linear,
    row_norms,
    row_norms_ref,
)
from peftzoo_kernels.dispatch import Sizes, Tiles, candidates, choose
from peftzoo_kernels.down_grad import down_grad
from peftzoo_kernels.expand import expand
from peftzoo_kernels.frozen_product import frozen_product
from peftzoo_kernels.low_rank_linear import low_rank_linear_ref
from peftzoo_kernels.shrink import shrink
from peftzoo_kernels.up_grads import up_grads

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
# (m, in, out, r), some of them one more than whole tiles
SHAPES = [(1, 16, 33, 1), (65, 100, 136, 5), (64, 192, 16, 16), (70, 96, 64, 17), (33, 65, 49, 3)]


@pytest.fixture(autouse=True)
def _on_the_device():
    if DEVICE == "cuda":
        torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """The names of the kernels that ran."""
    names, launch = [], _triton.launch

    def noting(kernel, *args, **meta):
        names.append(kernel.fn.__name__)
        launch(kernel, *args, **meta)

    for module in ("shrink", "expand", "down_grad", "up_grads", "frozen_product", "row_norms"):
        monkeypatch.setattr(sys.modules[f"peftzoo_kernels.{module}"], "launch", noting)
    return names


def tensors(shape, dtype):
    m, k, n, r = shape
    g = torch.Generator(DEVICE).manual_seed(sum(shape))

    def draw(*sizes):
        return torch.randn(*sizes, dtype=torch.float64, generator=g)

    return {
        "x": draw(m, k).to(dtype),
        "w": (draw(n, k) / k**0.5).to(dtype),
        "a": (draw(r, k) / k**0.5).to(dtype),
        "b": draw(n, r).to(dtype),
        "u": draw(m, r).to(dtype),
        "g": draw(m, n).to(dtype),
        "y": draw(m, n).to(dtype),
        "bias": draw(n).float(),
        "c": (1 + 0.1 * draw(n)).float(),
    }


def near(got, want, dtype):
    assert got.shape == want.shape
    assert relative_error(got, want) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("tiles", [Tiles(32, 32, 32), Tiles(16, 16, 16, split=3)], ids=["whole", "split"])
def test_products_equal_the_librarys(shape, dtype, p, tiles, launched):
    t = tensors(shape, dtype)
    d = {name: value.double() for name, value in t.items()}
    seed = draw_seed(DEVICE) if p else None
    near(shrink(t["x"], t["a"], p, seed, tiles=tiles), shrink(d["x"], d["a"], p, seed, tiles=None), dtype)
    near(down_grad(t["u"], t["x"], p, seed, tiles=tiles), down_grad(d["u"], d["x"], p, seed, tiles=None), dtype)
    near(expand(t["u"], t["a"].t(), None, p, seed, tiles=tiles), expand(d["u"], d["a"].t(), None, p, seed), dtype)
    wanted = {f"_{name}{'_dropped' if p else ''}" for name in ("shrink", "down_grad", "expand")}
    assert wanted == set(launched)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tiles", [Tiles(32, 32, 32), Tiles(16, 16, 16, split=3)], ids=["whole", "split"])
def test_frozen_products_equal_the_librarys(shape, dtype, tiles, launched):
    t = tensors(shape, dtype)
    d = {name: value.double() for name, value in t.items()}
    for u, (c, v) in itertools.product((None, "u"), ((None, None), ("c", None), ("c", "y"))):
        if u or c:
            given = [[one[name] if name else None for name in (u, c, v)] for one in (t, d)]
            got, want = up_grads(t["g"], t["b"], *given[0], tiles=tiles), up_grads(d["g"], d["b"], *given[1])
            for name, value in got._asdict().items():
                assert (value is None) == (getattr(want, name) is None), name
                if value is not None:
                    near(value, getattr(want, name), dtype)
    near(expand(t["u"], t["b"], t["bias"], tiles=tiles), expand(d["u"], d["b"], d["bias"]), dtype)
    for bias, c in itertools.product((None, "bias"), (None, "c")):
        optional = [(one[bias] if bias else None, one[c] if c else None) for one in (t, d)]
        got = frozen_product(t["x"], t["w"], t["u"], t["b"], *optional[0], keep=True, tiles=tiles)
        want = frozen_product(d["x"], d["w"], d["u"], d["b"], *optional[1], keep=True)
        near(got[0], want[0], dtype)
        assert (got[1] is None) == (c is None)
        if c:
            near(got[1], want[1], dtype)
    # the gradient of the input: the same product with a transposed weight and a transposed factor
    got, _ = frozen_product(t["g"], t["w"].t(), t["u"], t["a"].t(), tiles=tiles)
    near(got, frozen_product(d["g"], d["w"].t(), d["u"], d["a"].t())[0], dtype)
    assert set(launched) == {"_up_grads", "_expand", "_frozen_product"}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_row_norms(shape, launched):
    t = tensors(shape, torch.float32)
    for weight in (t["w"], t["w"].half(), t["w"].t().contiguous().t()):
        want = row_norms_ref(weight.double(), t["a"].double(), t["b"].double(), 0.5)
        for tiles in (Tiles(32, 0, 32), Tiles(16, 0, 16), None):
            near(row_norms(weight, t["a"], t["b"], 0.5, tiles=tiles), want, torch.float32)
    assert launched.count("_row_squares") == 6


def test_norms_of_a_row_that_cancels():
    """W + D of nothing but rounding: summed tile by tile the norm is right where the three products cancel."""
    a, b = torch.randn(4, 64), torch.randn(16, 4)
    weight = -(b @ a) * (1 + 1e-3)
    want = row_norms_ref(weight.double(), a.double(), b.double())
    near(row_norms(weight, a, b, tiles=Tiles(16, 0, 16)), want, torch.float16)


def test_kernels_drop_what_torch_drops():
    """Bit by bit: a product of ones shows the mask."""
    for n, p in ((8, 0.5), (64, 0.05), (100, 0.3), (13, 0.9)):
        seed = draw_seed(DEVICE)
        shown = expand(torch.ones(50, 1), torch.ones(n, 1), None, p, seed, tiles=Tiles(32, 16))
        assert torch.equal(shown, dropped(torch.ones(50, n), p, seed))


@pytest.mark.parametrize("lane", range(8))
def test_kernels_keep_a_lane_at_the_threshold(lane):
    seed = torch.tensor(11)
    p = (basis_lanes(11, 1, 64).transpose(2, 3).flatten(1)[0, 8 * lane].item() & 0xFFFF) / 65536
    shown = expand(torch.ones(1, 1), torch.ones(64, 1), None, p, seed, tiles=Tiles(32, 16))
    assert shown[0, 8 * lane] > 0
    assert torch.equal(shown, dropped(torch.ones(1, 64), p, seed))


def test_sums_of_parts_are_the_same_bits_every_time():
    t = tensors((200, 96, 64, 8), torch.float32)
    one, other = (
        [*up_grads(t["g"], t["b"], t["u"], t["c"], t["y"], tiles=Tiles(16, 16, 16, split=4)),
         down_grad(t["u"], t["x"], tiles=Tiles(16, 16, 16, split=4))]
        for _ in range(2)
    )  # fmt: skip
    assert all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ops_match_their_reference(op, dtype, monkeypatch):
    """Output and every gradient by name, with all that an op can have and with what may be left out left out."""
    monkeypatch.setenv("PEFTZOO_BACKEND", "triton")
    for without in op.optional:
        inputs = cast(make(op, (33, 64, 48, 5), without), dtype)
        trained = ["x", *(name for name in op.trained if name in inputs)]
        dy = gradient_of(op, inputs)
        got, want = (
            run(op.function, inputs, trained, dy.to(dtype)),
            run(op.reference, cast(inputs, torch.float64), trained, dy),
        )
        assert_near(got, want, 2 * BOUND[dtype])


def grid():
    """Yield settings in which every value of every axis appears, in random company (performance.md 6)."""
    axes = {
        "m": [1, 17, 64, 65, 200, 0],
        "k": [32, 96, 100, 192],
        "n": [16, 33, 136],
        "r": [1, 2, 3, 8, 12, 16, 17, 32, 64, 100, 128, 256],
        "trained": [names for size in (1, 2, 3) for names in itertools.combinations(("a", "b", "s"), size)],
        "s": ["vector", "zeros", None],
        "bias": [True, False],
        "scale": [0.0, 0.5, 2.0],
        "p": [0.0, 0.3],
        "strides": ["plain", "x", "weight", "factors", "3-D"],
        "out_scale": [True, False],
    }
    rng = random.Random(0)
    length = 2 * max(map(len, axes.values()))
    columns = {name: (values * length)[:length] for name, values in axes.items()}
    for values in columns.values():
        rng.shuffle(values)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize("case", grid(), ids=lambda case: "-".join(map(str, case.values())))
def test_low_rank_linear_over_the_grid(case, monkeypatch, launched):
    monkeypatch.setenv("PEFTZOO_BACKEND", "triton")
    m, k, n, r = (case[name] for name in "mknr")
    dtype = DTYPES[(m + r) % len(DTYPES)]
    inputs = make(next(op for op in OPS if op.name == "low_rank_linear"), (m, k, n, r))
    inputs |= {"scale": case["scale"], "dropout": case["p"], "bias": inputs["bias"] if case["bias"] else None}
    inputs["s"] = None if case["s"] is None else inputs["s"] * (case["s"] == "vector")
    inputs["out_scale"] = inputs["out_scale"] if case["out_scale"] else None
    inputs = cast(inputs, dtype)
    if case["strides"] == "3-D":
        inputs["x"] = inputs["x"].view(m, 1, k)
    strided = {"x": ("x",), "weight": ("weight",), "factors": ("a", "b")}.get(case["strides"], ())
    for name in strided:  # a slice of every second column of something wider
        inputs[name] = torch.stack((inputs[name], inputs[name].flip(0)), -1)[..., 0]
        assert not inputs[name].is_contiguous() or not inputs[name].numel() or 1 in inputs[name].shape
    trained = ["x", *(name for name in case["trained"] if inputs[name] is not None)]
    trained += ["out_scale"] if case["out_scale"] else []
    dy = torch.randn(*inputs["x"].shape[:-1], n, dtype=torch.float64)
    got = run(low_rank_linear, inputs, trained, dy.to(dtype))
    want = run(low_rank_linear_ref, cast(inputs, torch.float64), trained, dy)
    assert_near(got, want, 2 * BOUND[dtype])
    assert bool(launched) == (m > 0)


def test_the_update_alone_is_right_too():
    """W's size would hide a broken update."""
    op = next(op for op in OPS if op.name == "low_rank_linear")
    inputs = cast(make(op, (33, 64, 48, 5), {"bias", "out_scale"}), torch.float32)
    frozen = inputs["x"].double() @ inputs["weight"].double().T
    want = low_rank_linear_ref(**cast(inputs, torch.float64)) - frozen
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTZOO_BACKEND", "triton")
        got = low_rank_linear(**inputs).double() - frozen
    assert relative_error(got, want) <= 10 * BOUND[torch.float32]


def chosen(tiles, x, sizes):
    return choose(tiles, x, *(value for name, value in sizes._asdict().items() if name != "dtype"))


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU has choices of its own")
class TestChoice:
    """Which implementation makes a product."""

    sizes = Sizes("shrink", 64, 64, 0, 16, torch.float32)

    def test_auto_on_a_cpu_is_the_librarys(self, monkeypatch):
        monkeypatch.delenv("PEFTZOO_BACKEND", raising=False)
        assert chosen("auto", torch.ones(1), self.sizes) is None

    def test_what_the_caller_says_is_taken(self):
        assert chosen(Tiles(16), torch.ones(1), self.sizes) == Tiles(16)
        assert chosen(None, torch.ones(1), self.sizes) is None

    def test_triton_takes_kernels_that_fit_everywhere(self, monkeypatch):
        monkeypatch.setenv("PEFTZOO_BACKEND", "triton")
        assert chosen("auto", torch.ones(1), self.sizes) == candidates(self.sizes)[0]

    def test_no_kernel_for_float64_nothing_or_large_ranks(self, monkeypatch):
        monkeypatch.setenv("PEFTZOO_BACKEND", "triton")
        assert chosen("auto", torch.ones(1, dtype=torch.float64), self.sizes) is None
        assert chosen("auto", torch.ones(1), self.sizes._replace(r=300)) is None
        assert chosen("auto", torch.ones(1), self.sizes._replace(m=0)) is None

    def test_triton_without_a_gpu_is_refused(self, monkeypatch):
        monkeypatch.setenv("PEFTZOO_BACKEND", "triton")
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(ValueError, match="no kernel can run on cpu; choose auto, or set TRITON_INTERPRET=1"):
            chosen("auto", torch.ones(1), self.sizes)

    def test_the_table_of_the_machine_decides_by_the_nearest_size(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("PEFTZOO_BACKEND", "triton")
        small, large = Tiles(16, 0, 16), Tiles(32, 0, 64)
        rows = [(self.sizes._replace(m=64), small), (self.sizes._replace(m=8192), large)]
        path = dispatch.cache_file("cpu")
        dispatch.keep(rows[:1], path)
        dispatch.keep([(rows[0][0], None), *rows[1:]], path)
        dispatch.keep(rows[:1], path)  # over what was there for these sizes, beside the rest
        assert len(json.loads(path.read_text())["rows"]) == 2
        try:
            assert chosen("auto", torch.ones(1), self.sizes._replace(m=100)) == small
            assert chosen("auto", torch.ones(1), self.sizes._replace(m=4000, r=9)) == large
            assert chosen("auto", torch.ones(1), self.sizes._replace(k=128)) == candidates(self.sizes)[0]
        finally:
            dispatch._table.cache_clear()

    @pytest.mark.parametrize("held", ["", "[]", '{"rows": [{"m": 1}]}'])
    def test_a_damaged_table_is_passed_over(self, held, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        path = dispatch.cache_file("a damaged one")
        path.parent.mkdir(parents=True)
        path.write_text(held)
        dispatch._table.cache_clear()
        with pytest.warns(UserWarning, match="is no table of kernels and is not used"):
            assert dispatch._table("a damaged one") == {}

    def test_an_unknown_device_has_no_table(self):
        assert dispatch._table("a GPU of next year") == {}


@pytest.mark.parametrize(("product", "drops"), dispatch._SHIPPED, ids=str)
def test_every_shipped_configuration_is_right(product, drops, launched):
    """The tiles that a GPU gets, as far as an interpreter can tell."""
    seed, p = (draw_seed(DEVICE), 0.3) if drops else (None, 0.0)
    calls = {
        "shrink": lambda t, how: shrink(t["x"], t["a"], p, seed, tiles=how),
        "expand": lambda t, how: expand(t["u"], t["b"], None, p, seed, tiles=how),
        "down_grad": lambda t, how: down_grad(t["u"], t["x"], p, seed, tiles=how),
        "up_grads": lambda t, how: up_grads(t["g"], t["b"], t["u"], tiles=how).db,
        "frozen_product": lambda t, how: frozen_product(t["x"], t["w"], t["u"], t["b"], tiles=how)[0],
        "row_norms": lambda t, how: row_norms(t["w"], t["a"], t["b"], tiles=how),
    }
    for most_r, _, tiles in dispatch._SHIPPED[product, drops]:
        t = tensors((70, 130, 140, min(most_r, 20)), torch.float32)
        want = calls[product]({name: value.double() for name, value in t.items()}, None)
        near(calls[product](t, tiles), want, torch.float32)
    assert len(launched) == len(dispatch._SHIPPED[product, drops])
