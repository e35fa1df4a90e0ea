"""LoLDU against the numbers of its authors' package; `tests/golden/README.md` tells the keys."""

from __future__ import annotations

import pytest
import torch
from test_golden import both_dtypes, layer_of, near, prefixes, read, run

from peftzoo.methods.loldu import LolduConfig

MOVED = {"G", "z", "y", "grad_z", "grad_scaling", "grad_x", "W_effective"}
CASES = pytest.mark.parametrize("prefix", prefixes("loldu"))


def standing(case, **settings):
    r = case["z_init"].numel()
    return layer_of(case, LolduConfig(r=r, alpha=case["scaling"].item() * r, **settings))


@both_dtypes
@CASES
def test_decomposition(prefix, dtype):
    case, bound = read("loldu", prefix, dtype)
    layer, adapter = standing(case)
    r, permutation = case["z_init"].numel(), case["P"]
    assert torch.equal(adapter.rows.long(), permutation.argmax(0)[:r])
    lower, upper, pivots = adapter.lu()
    near(lower, permutation @ case["L_r"], bound)
    near(lower, case["full_L"][permutation.argmax(1), :r], bound)
    near(upper, case["full_U"][:r], bound)
    near(upper / pivots[:, None], case["U_r"], bound)
    near(adapter.z.detach(), case["z_init"], bound)
    start = case["scaling"] * lower @ torch.diag(adapter.z0 / pivots) @ upper
    near(start, case["W"] - case["W_residual"], bound)  # a residual of all pivots is nothing but rounding
    near(layer(case["x"]).detach(), case["y_step0"], bound)
    assert case.unread == MOVED


@both_dtypes
@CASES
@pytest.mark.parametrize("train_scale", [False, True])
def test_moved(prefix, dtype, train_scale):
    case, bound = read("loldu", prefix, dtype)
    layer, adapter = standing(case, train_scale=train_scale)
    with torch.no_grad():
        adapter.z.copy_(case["z"])
    y, dx = run(layer, case)
    near(y, case["y"], bound)
    near(dx, case["grad_x"], bound)
    near(adapter.z.grad, case["grad_z"], bound)
    if train_scale:
        near(adapter.s.grad, case["grad_scaling"].reshape(1), bound)
    weight = layer.frozen_weight()
    near(weight + adapter.delta_weight(weight).detach(), case["W_effective"], bound)
    assert case.unread & MOVED == (set() if train_scale else {"grad_scaling"})
