"""Our methods against the numbers of their authors' code, read from `tests/golden/` (its README tells the keys)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peftzoo
from peftzoo import LoraConfig, PacaConfig, SorsaConfig
from peftzoo.methods.sorsa import _departure

GOLDEN = Path(__file__).parent / "golden"


def prefixes(name):
    """Return the prefixes of a file that hold a whole case."""
    keys = load_file(GOLDEN / f"{name}.safetensors")
    return sorted(key.removesuffix("W") for key in keys if key.split(".")[-1] == "W" and key.count(".") < 2)


class Case(dict):
    """The tensors of a case by key; knows which of them no one has asked for."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.unread = set(tensors)

    def __getitem__(self, key):
        self.unread.discard(key)
        return super().__getitem__(key)


def read(name, prefix, dtype):
    """Return a case in `dtype` and the bound it has to be met to."""
    case = {
        key.removeprefix(prefix): value
        for key, value in load_file(GOLDEN / f"{name}.safetensors").items()
        if key.startswith(prefix)
    }
    exact = dtype == torch.float64 and case["W"].dtype == torch.float64
    cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in case.items()}
    return Case(cast), 1e-9 if exact else 5e-5


def layer_of(case, config):
    """Return the case's frozen layer with a fresh adapter on it, and that adapter."""
    out_features, in_features = case["W"].shape
    base = nn.Linear(in_features, out_features, dtype=case["W"].dtype)
    with torch.no_grad():
        base.weight.copy_(case["W"])
        base.bias.copy_(case["bias"])
    layer = peftzoo.attach(base, config)
    return layer, layer.adapter("default")


def near(got, want, bound):
    error = (got - want).norm() / want.norm().clamp_min(1e-30)
    assert error <= bound, f"relative error {error:.2e} exceeds {bound:.0e}"


def differs(got, defect):
    error = (got - defect).norm() / defect.norm()
    assert error > 1e-2, "this is what the authors' code gives by mistake"


def run(layer, case):
    """Return the output and the gradient of x; the adapter's gradients stay on it."""
    x = case["x"].clone().requires_grad_()
    y = layer(x)
    y.backward(case["G"])
    return y.detach(), x.grad


both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


PENALTY_KEYS = {"ortho", "normA", "normB", "orthograd_A", "orthograd_B"}


@both_dtypes
@pytest.mark.parametrize("prefix", prefixes("sorsa"))
def test_sorsa(prefix, dtype):
    case, bound = read("sorsa", prefix, dtype)
    r = case["S"].shape[0]
    layer, adapter = layer_of(case, SorsaConfig(r=r, alpha=case["scale"].item() * r, gamma=1.0))

    signs = torch.sign((adapter.vt * case["A_init"]).sum(1))
    near(adapter.vt.detach(), signs[:, None] * case["A_init"], bound)
    near(adapter.u.detach(), signs * case["B_init"], bound)
    near(adapter.s.detach(), case["S_init"], bound)
    start = case["scale"] * (adapter.u0 * adapter.s0) @ adapter.vt0
    near(case["W"] - start, case["W_residual"], bound)

    with torch.no_grad():
        adapter.vt.copy_(case["A"])
        adapter.s.copy_(case["S"])
        adapter.u.copy_(case["B"])
    y, dx = run(layer, case)
    near(y, case["y"], bound)
    near(dx, case["grad_x"], bound)
    near(adapter.vt.grad, case["grad_A"], bound)
    near(adapter.s.grad, case["grad_S"], bound)
    near(adapter.u.grad, case["grad_B"], bound)
    near(layer.frozen_weight() + adapter.delta_weight(layer.frozen_weight()).detach(), case["W_merged"], bound)
    layer.merge()
    near(layer.base_layer.weight.detach(), case["W_merged"], bound)
    assert case.unread == PENALTY_KEYS


@both_dtypes
@pytest.mark.parametrize("prefix", prefixes("sorsa"))
def test_sorsa_penalty(prefix, dtype):
    case, bound = read("sorsa", prefix, dtype)
    layer, adapter = layer_of(case, SorsaConfig(r=case["S"].shape[0], gamma=1.0))
    with torch.no_grad():
        adapter.vt.copy_(case["A"])
        adapter.u.copy_(case["B"])
    near(peftzoo.penalty(layer).detach(), case["ortho"], bound)
    near(adapter.penalty().detach(), (case["normA"] + case["normB"]) / 2, bound)
    near(_departure(adapter.vt).detach(), case["normA"], bound)
    near(_departure(adapter.u.T).detach(), case["normB"], bound)
    adapter.penalty().backward()
    near(adapter.vt.grad, case["orthograd_A"], bound)
    near(adapter.u.grad, case["orthograd_B"], bound)
    assert adapter.s.grad is None
    assert case.unread.isdisjoint(PENALTY_KEYS)


@both_dtypes
@pytest.mark.parametrize("in_place", [False, True], ids=["added", "in place"])
@pytest.mark.parametrize("prefix", prefixes("paca"))
def test_paca(prefix, in_place, dtype):
    case, bound = read("paca", prefix, dtype)
    r = case["indices"].shape[0]
    layer, adapter = layer_of(case, PacaConfig(r=r, alpha=case["scaling"].item() * r, in_place=in_place))
    near(layer(case["x"]).detach(), case["y_base"], bound)
    near(case["W"][:, case["indices"]] / case["scaling"], case["paca_w_init"], bound)
    with torch.no_grad():
        adapter.columns.copy_(case["indices"])
        adapter.p.copy_(case["paca_w"] - case["paca_w_init"])
    for _ in range(2):  # the second pass is where the authors' code answers with the step before
        adapter.p.grad = None
        y, dx = run(layer, case)
        near(y, case["y"], bound)
        near(dx, case["grad_x"], bound)
        near(adapter.p.grad, case["grad_paca_w"], bound)
        assert torch.equal(layer.base_layer.weight, case["W"]) != in_place
        near(layer.base_layer.weight.detach(), case["W_effective" if in_place else "W"], bound)
        differs(y, case["y_stale_even_iter"])
        differs(dx, case["grad_x_stale_even_iter"])
    near(layer.frozen_weight() + adapter.delta_weight(layer.frozen_weight()).detach(), case["W_effective"], bound)
    assert torch.equal(layer.base_layer.weight, case["W"])
    layer.merge()
    near(layer.base_layer.weight.detach(), case["W_effective"], bound)
    assert not case.unread


@both_dtypes
@pytest.mark.parametrize("prefix", [prefix for prefix in prefixes("eva") if prefix == "lora."])
def test_lora(prefix, dtype):
    case, bound = read("eva", prefix, dtype)
    r = case["A"].shape[0]
    layer, adapter = layer_of(case, LoraConfig(r=r, alpha=case["scaling"].item() * r))
    with torch.no_grad():
        adapter.a.copy_(case["A"])
        adapter.b.copy_(case["B"])
    y, dx = run(layer, case)
    near(y, case["y"], bound)
    near(dx, case["grad_x"], bound)
    near(adapter.a.grad, case["grad_A"], bound)
    near(adapter.b.grad, case["grad_B"], bound)


def test_every_case_was_found():
    assert {name: len(prefixes(name)) for name in ("sorsa", "paca", "eva")} == {"sorsa": 3, "paca": 1, "eva": 1}
