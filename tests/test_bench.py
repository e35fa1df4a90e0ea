"""Benchmarks: what is timed computes the right numbers, rounds rotate, results are written, nonsense is refused."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from processes import ROOT, start
from rich.console import Console
from test_cli import done, refusal, run  # noqa: F401  (fixtures)

from peftzoo import cli
from peftzoo.bench import layers, peers, report, step, timing
from peftzoo.bench.kernels import KernelSettings, plan, relative_error
from peftzoo.bench.layers import Case, candidate, names, reference
from peftzoo.errors import BenchmarkError
from peftzoo_kernels import low_rank_linear_ref

CPU = torch.device("cpu")
SMALL = ("--shape", "24,20,28", "--rounds", "1")


def case(op="lora", ns=(28,), p=0.0, dtype=torch.float64):
    return Case(op, 24, 20, ns, 3, p, dtype, CPU)


def results(one, of_case):
    torch.manual_seed(layers.DROP_SEED)
    with layers.using_backend(one.backend):
        ys = one.forward(of_case.xs[0])
        gradients = one.gradients(ys, of_case, 0)
    return {f"y_{i}": y for i, y in enumerate(ys)} | {f"d_{name}": value for name, value in gradients.items()}


# ---------------------------------------------------------------- the numbers


def test_the_reference_is_the_ops():
    of_case = case("out_scale")
    x = of_case.xs[0].detach().clone().requires_grad_()
    values = {name: value.clone().requires_grad_() for name, value in of_case.factors.items()}
    y = low_rank_linear_ref(
        x, of_case.weights[0], values["a_0"], values["b_0"], out_scale=values["m"], scale=layers.SCALE
    )
    y.backward(of_case.dys[0][0])
    want = {"y_0": y, "d_x": x.grad} | {f"d_{name}": value.grad for name, value in values.items()}
    got = reference(of_case)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12)


CASES = [
    *((op, (28,), p) for op in ("lora", "dora") for p in (0.0, 0.4)),
    ("out_scale", (28,), 0.0),
    ("group", (28, 7, 11), 0.0),
]


@pytest.mark.parametrize(
    ("op", "ns", "p", "name"),
    [
        (op, ns, p, name)
        for op, ns, p in CASES
        for name in names(op, p, torch.float64, CPU)
        if name not in ("floor", "peft-compiled")
    ],
)
def test_every_implementation_gives_the_reference_by_name(op, ns, p, name):
    of_case = case(op, ns, p)
    one = candidate(name, of_case)
    got, want = results(one, of_case), reference(of_case, one.drops, one.drops_all and p > 0)
    assert got.keys() == want.keys()
    for key, value in got.items():
        assert relative_error(name, key, value, want[key], 1e-12) <= 1e-12
    frozen = reference(of_case, updated=False)
    assert (want["y_0"] - frozen["y_0"]).norm() > 0.1 * frozen["y_0"].norm(), "the update must be visible"


@pytest.mark.parametrize("name", ["peft", "peft-half", "unsloth-like", "axolotl-like", "zoo"])
def test_half_precision_gives_factors_gradients_of_their_own(name):
    of_case = case(dtype=torch.bfloat16)
    one = candidate(name, of_case)
    got, want = results(one, of_case), reference(of_case)
    for key, value in got.items():
        relative_error(name, key, value, want[key], 3e-2)
    wide = torch.bfloat16 if name == "peft-half" else torch.float32
    assert (got["y_0"].dtype, got["d_a_0"].dtype) == (torch.bfloat16, wide)


def test_the_epilogue_form_in_tritons_interpreter():
    """The file alone, which needs torch and the ops: importing all of peftzoo would take longer than its kernels."""
    script = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
import torch
spec = spec_from_file_location("epilogue", sys.argv[1])
epilogue = module_from_spec(spec)
spec.loader.exec_module(epilogue)
torch.manual_seed(0)
m, k, n, r, scale = 33, 36, 20, 5, 2.0
x, weight, a, b = (torch.randn(*shape, requires_grad=True) for shape in ((m, k), (n, k), (r, k), (n, r)))
dy = torch.randn(m, n)
for p in (0.0, 0.4):
    torch.manual_seed(5)
    y = epilogue.lorafusion_like(x, weight.detach(), a, b, scale, p)
    got = [y, *torch.autograd.grad(y, (x, a, b), dy)]
    torch.manual_seed(5)
    keep = torch.nn.functional.dropout(torch.ones(m, k), p).double()
    wide = [value.detach().double().requires_grad_() for value in (x, a, b)]
    y = wide[0] @ weight.detach().double().T + scale * (wide[0] * keep) @ wide[1].T @ wide[2].T
    want = [y, *torch.autograd.grad(y, wide, dy.double())]
    for name, one, other in zip(("y", "dx", "da", "db"), got, want):
        error = ((one.double() - other).norm() / other.norm()).item()
        assert error < 1e-6, (p, name, error)
print("right")
"""
    ran = start(sys.executable, "-c", script, ROOT / "peftzoo" / "bench" / "epilogue.py", TRITON_INTERPRET="1")
    assert ran.stdout == "right\n", ran.stderr


def test_the_epilogue_form_is_not_there_on_a_cpu():
    assert "lorafusion-like" not in names("lora", 0.0, torch.float32, CPU)


def test_dora_pays_for_its_norm_in_every_run(monkeypatch):
    of_case, calls = case("dora"), []
    one = candidate("zoo", of_case)
    norms = sys.modules["peftzoo.methods.dora"].row_norms
    monkeypatch.setattr("peftzoo.methods.dora.row_norms", lambda *given: calls.append(1) or norms(*given))
    for turn in range(4):
        one.run(of_case, turn, lambda: None)
    assert len(calls) == 4


def test_a_backend_is_put_back(monkeypatch):
    monkeypatch.setenv("PEFTZOO_BACKEND", "cublas")
    with layers.using_backend("eager"):
        assert layers.os.environ["PEFTZOO_BACKEND"] == "eager"
    assert layers.os.environ["PEFTZOO_BACKEND"] == "cublas"


@pytest.mark.parametrize(
    ("got", "why"),
    [
        (None, "d_a is missing"),
        (torch.zeros(3), "d_a is zero"),
        (torch.tensor([1.0, float("nan"), 2.0]), "d_a is not finite"),
        (torch.tensor([1.0, 2.0, 2.9]), "d_a is off by 2.7e-02, over 1e-05"),
    ],
)
def test_wrong_results_are_refused(got, why):
    with pytest.raises(BenchmarkError, match=f"peer: {why}; nothing was timed"):
        relative_error("peer", "d_a", got, torch.tensor([1.0, 2.0, 3.0]).double(), 1e-5)


def test_what_a_case_costs():
    one = case(dtype=torch.float32)
    frozen, update = 2 * 24 * 20 * 28, 2 * 24 * 3 * (20 + 28)
    assert [one.flop(d) for d in ("forward", "backward", "both")] == [
        frozen + update,
        frozen + 2 * update,
        2 * frozen + 3 * update,
    ]
    x, y, w, factors = 4 * 24 * 20, 4 * 24 * 28, 4 * 20 * 28, 4 * 3 * (20 + 28)
    assert (one.bytes("forward"), one.bytes("backward")) == (x + y + w + factors, y + w + 2 * x + 2 * factors)


def test_models_of_a_step_share_what_is_frozen_and_start_alike():
    settings = step.StepSettings()
    base = step.base_model(settings, CPU)
    work = step.Work("dora", 4, base, [{"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}], False)
    models = {name: step.prepared(name, work) for name in ("floor", "peft", "zoo")}
    kept = {value.data_ptr() for value in base.parameters()}
    for model in models.values():
        assert {p.data_ptr() for p in model.parameters() if not p.requires_grad} == kept
    mine, theirs = step.trained(models["zoo"]), step.trained(models["peft"])
    assert mine.keys() == theirs.keys()
    assert len(mine) == 3 * 7 * 4  # a, b and m of seven layers in four blocks
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], msg=name)


# ---------------------------------------------------------------- timing


def test_rounds_rotate_and_inputs_take_turns():
    order = []

    def make(name):
        def one(turn, mark):
            order.append((name, turn))
            mark()
            mark()
            mark()

        return one

    seconds = timing.alternate({name: make(name) for name in "abc"}, 2, CPU)
    rounds = [order[start : start + 3] for start in range(0, len(order), 3)]
    assert len(rounds) == 2 + timing.WARM_UP
    assert [one[0][0] for one in rounds] == list("abca")[: len(rounds)]
    assert all(sorted(name for name, _ in one) == list("abc") for one in rounds)
    assert [{turn for _, turn in one} for one in rounds] == [{turn} for turn in range(len(rounds))]
    assert {name: [len(parts) for parts in found] for name, found in seconds.items()} == {key: [2, 2] for key in "abc"}


def test_ratios_are_of_one_round():
    # the machine is ten times slower in the second round: no ratio may see that
    seconds = {"floor": [1.0, 10.0, 1.0], "peft": [1.5, 15.0, 1.5], "zoo": [1.2, 12.0, 1.2]}
    found = report.compared(seconds, "floor", "peft")
    assert found["zoo"]["overhead_percent"] == pytest.approx(20)
    assert found["zoo"]["overhead_to_peft"] == pytest.approx(0.4)
    assert found["zoo"]["time_to_peft"] == pytest.approx(0.8)
    assert found["zoo"]["seconds"] == pytest.approx({"median": 1.2, "p20": 1.2, "p80": 7.68})
    assert found["floor"]["overhead_to_peft"] is None


def test_ceilings():
    found = timing.ceilings(CPU, torch.float32)
    assert found.keys() == {"gemm_flop_per_second", "copy_bytes_per_second"}
    assert min(found.values()) > 1e8


# ---------------------------------------------------------------- the command line


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_bench_device", lambda: CPU)


def test_bench_kernels(done, tmp_path):  # noqa: F811
    said = done("bench", "kernels", *SMALL, "--shape", "24,20,28+8", "--rank", 3, "--rank", 5)
    assert "(bar 0.75; M=24, K=20, N=28, r=3, float32)" in said
    assert said.count("LoRA layer overhead / peft's: ") == said.count("DoRA layer time / peft's: ") == 2
    rows = rows_of(tmp_path / "runs" / "bench" / "kernels.jsonl")
    assert f"wrote {len(rows)} rows to runs/bench/kernels.jsonl" in said
    assert {(row["op"], row["r"], row["p"]) for row in rows} == {
        *((op, r, p) for op in ("lora", "dora") for r in (3, 5) for p in (0.0, 0.05)),
        *((op, r, 0.0) for op in ("out_scale", "group") for r in (3, 5)),
    }
    assert {row["direction"] for row in rows} == {"forward", "backward", "both"}
    by_name = {row["implementation"]: row for row in rows if (row["op"], row["r"], row["p"]) == ("lora", 3, 0.0)}
    assert by_name.keys() == {"floor", "peft", "unsloth-like", "axolotl-like", "zoo", "zoo-eager"}
    row = by_name["zoo"]
    assert (row["shape"], row["dtype"], row["rounds"]) == ([24, 20, [28]], "float32", 1)
    assert row["flop"] == 2 * 2 * 24 * 20 * 28 + 3 * 2 * 24 * 3 * (20 + 28)
    assert row["saved_bytes"] == 4 * (24 * 20 + 24 * 3)  # x and h
    assert 0 < row["max_relative_error"] < 1e-5
    assert by_name["floor"]["saved_bytes"] == 0
    facts = row["environment"]
    assert {"device", "threads", "versions", "date", "gemm_flop_per_second", "copy_bytes_per_second"} < facts.keys()
    assert (tmp_path / "runs" / "bench" / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_bench_step(done, tmp_path):  # noqa: F811
    size = ("--batch", 2, "--sequence", 8, "--rounds", 1, "--out", "here")
    said = done("bench", "step", "--method", "lora", "--method", "loldu", "--rank", 4, *size)
    assert "training step / peft's: " in said
    assert "(bar 0.92; built-in model, 2 x 8 tokens, r=4, float32)" in said
    rows = rows_of(tmp_path / "here" / "step.jsonl")
    assert [(row["op"], row["implementation"]) for row in rows] == [
        *(("step lora", name) for name in ("floor", "peft", "peft-fused", "zoo", "zoo-apart")),
        *(("step loldu", name) for name in ("floor", "zoo", "zoo-apart")),
    ]
    lora = {row["implementation"]: row for row in rows[:5]}
    assert lora["floor"]["trained_parameters"] == 0 < lora["zoo"]["trained_parameters"]
    assert len({row["trained_parameters"] for row in rows[1:5]}) == 1
    assert all(0 < lora[name]["max_relative_error"] < 1e-3 for name in ("peft-fused", "zoo", "zoo-apart"))
    assert rows[6]["max_relative_error"] is None
    assert (tmp_path / "here" / "step.png").exists()


def test_results_are_never_written_over(done, tmp_path):  # noqa: F811
    for _ in range(2):
        done("bench", "kernels", *SMALL, "--op", "out_scale", "--only", "zoo", "--out", "x")
    assert rows_of(tmp_path / "x" / "kernels.jsonl")
    assert rows_of(tmp_path / "x-2" / "kernels.jsonl")


def test_tables(done, tmp_path, monkeypatch, capsys):  # noqa: F811
    done("bench", "kernels", *SMALL, "--op", "lora", "--dropout", "0", "--only", "peft", "--only", "zoo")
    rows = rows_of(tmp_path / "runs" / "bench" / "kernels.jsonl")
    text = report.markdown(rows)
    assert text.startswith("**lora 24,20,28 float32 r=16**\n\n| implementation | over the floor |")
    assert [line.split(" | ")[0] for line in text.splitlines()[4:7]] == ["| floor", "| peft", "| zoo"]
    console = Console(width=160)
    ((title, of_case),) = report.cases(rows).items()
    console.print(report.table(title, of_case))
    head = capsys.readouterr().out.splitlines()[1]
    assert head.index("over the floor") < head.index("overhead / peft's") < head.index("ms")


def test_without_matplotlib_all_else_is_there(done, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = done("bench", "kernels", *SMALL, "--op", "out_scale")
    assert "kernels.png was not drawn: `pip install 'peftzoo[plot]'`" in said
    assert (tmp_path / "runs" / "bench" / "kernels.jsonl").exists()


def test_a_zero_gradient_ends_with_8(run, tmp_path, monkeypatch):  # noqa: F811
    right = peers.UnslothLike

    class Broken(right):
        @staticmethod
        def backward(ctx, dy):
            dx, _, da, db, _ = right.backward(ctx, dy)
            return dx, None, da, torch.zeros_like(db), None

    monkeypatch.setattr(peers, "UnslothLike", Broken)
    code, _, err = run("bench", "kernels", *SMALL, "--only", "unsloth-like")
    assert (code, err) == (8, "error: unsloth-like: d_b_0 is zero; nothing was timed\n")
    assert rows_of(tmp_path / "runs" / "bench" / "kernels.jsonl") == []


def test_a_wrong_step_ends_with_8(run, monkeypatch):  # noqa: F811
    op = sys.modules["peftzoo.core.adapter"].low_rank_linear
    monkeypatch.setattr("peftzoo.core.adapter.low_rank_linear", lambda *given, **named: 1.1 * op(*given, **named))
    code, _, err = run("bench", "step", "--batch", 2, "--sequence", 8, "--rounds", 1, "--only", "zoo")
    assert code == 8
    assert err.startswith("error: zoo: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["kernels", "--shape", "1,2"], "--shape 1,2 is not M,K,N, such as 2048,1024,1024 or 2048,1024,1024+256+256"),
        (["kernels", "--shape", "8,0,8"], "--shape 8,0,8: every size must be at least 1"),
        (["kernels", "--rank", "0"], "--rank 0 must be at least 1"),
        (["kernels", "--dropout", "1"], "--dropout 1 must be at least 0 and below 1"),
        (["kernels", "--dtype", "int8"], "--dtype int8 is not one of bfloat16, float16, float32, float64"),
        (["kernels", "--op", "vera"], "--op vera is not one of dora, group, lora, out_scale"),
        (["kernels", "--op", "out_scale", "--only", "peft"], "--only peft is not one of floor, zoo"),
        (["kernels", "--op", "group", "--shape", "8,8,8"], "nothing to run: one shape M,K,N goes with"),
        (["step", "--method", "lorra"], "--method"),
        (["step", "--method", "paca", "--only", "peft"], "--only peft is not one of floor, zoo"),
        (["step", "--layers", "2"], "--layers is for the random model on a GPU"),
        (["step", "--dtype", "float64"], "--dtype float64 is not one of float32, bfloat16, float16"),
        (["step", "--sequence", "300"], "--sequence 300 is more than the model's 256"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(refusal, tmp_path, arguments, said):  # noqa: F811
    assert refusal(2, "bench", *arguments).startswith(said)
    assert not list(tmp_path.iterdir()), "nothing may be left behind"


def test_a_file_for_a_folder_is_refused(refusal, tmp_path):  # noqa: F811
    (tmp_path / "taken").write_text("")
    assert refusal(7, "bench", "step", "--out", "taken") == "--out taken: taken is a file; name a folder"


def test_the_grid_of_a_gpu_is_planned():
    found = plan(KernelSettings(), torch.device("cuda"))
    assert {case.op for case, _ in found} == set(layers.OPS)
    assert {case.r for case, _ in found} == {8, 16, 64, 256}
    assert {case.m for case, _ in found} == {512, 2048, 8192, 16384, 8191}
    assert any("peft-half" in names and "peft-compiled" in names for _, names in found)
