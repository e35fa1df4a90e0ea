"""SALT against the numbers of its authors' layer; `tests/golden/README.md` tells the keys."""

from __future__ import annotations

import pytest
import torch
from test_golden import both_dtypes, layer_of, near, prefixes, read, run

import peftzoo
from peftzoo.methods.salt import SaltConfig

CASES = pytest.mark.parametrize("prefix", prefixes("salt"))
TRAINED = {"scale_A": "scale", "shift_B": "shift", "X": "x", "Y": "y"}

# which test reads what; `test_start` all the rest
WITH_RELU = {"y", "grad_x", "W_merged", "core_relu", *(f"grad_{name}" for name in TRAINED)}
WITHOUT_RELU = {"norelu.y", "norelu.grad_x", "core_pre_relu", *(f"norelu.grad_{name}" for name in TRAINED)}
REGULARIZER = {"reg", *(f"reggrad_{name}" for name in TRAINED)}


def standing(case, core_relu):
    """Return the layer, its adapter at the case's values, and U, S, V^T cut as the adapter keeps them."""
    k = int(case["k"])
    config = SaltConfig(r=case["X"].shape[1], k=k, core_relu=core_relu, regularization=1.0)
    layer, adapter = layer_of(case, config)
    with torch.no_grad():
        for name, own in TRAINED.items():
            getattr(adapter, own).copy_(case[name])
        kept = adapter.s.numel()
        adapter.u.copy_(case["U"][:, :kept])
        adapter.s.copy_(case["S"][:kept])
        adapter.vt.copy_(case["Vt"][:kept])
    if core_relu != "full":  # the golden X and Y are coordinates in the golden trailing vectors
        tail = adapter._tail
        adapter._tail = tail._replace(left=case["U"][:, k:], right=case["Vt"][k:])
    return layer, adapter


def merged(layer, adapter):
    weight = layer.frozen_weight()
    return weight + adapter.delta_weight(weight).detach()


@both_dtypes
@CASES
def test_start(prefix, dtype):
    case, bound = read("salt", prefix, dtype)
    k = int(case["k"])
    layer, adapter = layer_of(case, SaltConfig(r=case["X"].shape[1], k=k, core_relu="full"))
    signs = torch.sign((adapter.vt * case["Vt"]).sum(1))
    near(adapter.vt, signs[:, None] * case["Vt"], bound)
    near(adapter.u, signs * case["U"], bound)
    near(adapter.s, case["S"], bound)
    near(layer(case["x"]).detach(), case["y_step0_base"], bound)

    layer, adapter = layer_of(case, SaltConfig(r=case["X"].shape[1], k=k))
    near(layer(case["x"]).detach(), case["y_step0_base"], bound)
    left, right = adapter._tail.left, adapter._tail.right
    near(left @ left.T, case["U"][:, k:] @ case["U"][:, k:].T, bound)
    near(right.T @ right, case["Vt"][k:].T @ case["Vt"][k:], bound)
    assert adapter.x.shape == case["X"].shape
    assert adapter.y.shape == case["Y"].shape
    assert case.unread == WITH_RELU | WITHOUT_RELU | REGULARIZER | {"G", "scale_A", "shift_B"}


@both_dtypes
@CASES
def test_whole_relu(prefix, dtype):
    case, bound = read("salt", prefix, dtype)
    layer, adapter = standing(case, "full")
    y, dx = run(layer, case)
    near(y, case["y"], bound)
    near(dx, case["grad_x"], bound)
    for name, own in TRAINED.items():
        near(getattr(adapter, own).grad, case[f"grad_{name}"], bound)
    near(merged(layer, adapter), case["W_merged"], bound)
    near(case["U"].T @ merged(layer, adapter) @ case["Vt"].T, case["core_relu"], bound)
    assert not case.unread & WITH_RELU


@both_dtypes
@CASES
@pytest.mark.parametrize("core_relu", ["none", "top"])
def test_without_relu(prefix, dtype, core_relu):
    case, bound = read("salt", prefix, dtype)
    k = int(case["k"])
    if core_relu == "top" and (case["core_pre_relu"].diagonal()[:k] <= 0).any():
        pytest.fail("a scaled value is negative, so the mode top is not in this file: compare another")
    layer, adapter = standing(case, core_relu)
    y, dx = run(layer, case)
    near(y, case["norelu.y"], bound)
    near(dx, case["norelu.grad_x"], bound)
    for name, own in TRAINED.items():
        near(getattr(adapter, own).grad, case[f"norelu.grad_{name}"], bound)
    near(case["U"].T @ merged(layer, adapter) @ case["Vt"].T, case["core_pre_relu"], bound)
    assert not case.unread & WITHOUT_RELU


@both_dtypes
@CASES
@pytest.mark.parametrize("core_relu", ["none", "top", "full"])
def test_regularizer(prefix, dtype, core_relu):
    case, bound = read("salt", prefix, dtype)
    layer, adapter = standing(case, core_relu)
    term = peftzoo.regularizer(layer)
    near(term.detach(), case["reg"], bound)
    term.backward()
    for name, own in TRAINED.items():
        near(getattr(adapter, own).grad, case[f"reggrad_{name}"], bound)
    assert not case.unread & REGULARIZER
