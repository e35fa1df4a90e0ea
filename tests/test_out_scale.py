"""A trained scale of the outputs: its gradient wants what it multiplies, which the output tells while it can."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from peftzoo_kernels import low_rank_linear, low_rank_linear_ref

M, K, N, R = 24, 10, 7, 3


def parts(dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    shapes = {"x": (M, K), "weight": (N, K), "a": (R, K), "b": (N, R), "out_scale": (N,)}
    drawn = {name: torch.randn(*shape, generator=g, dtype=dtype) for name, shape in shapes.items()}
    for name in ("x", "a", "b", "out_scale"):
        drawn[name].requires_grad_()
    return drawn


def gradients(function, drawn, then=lambda y: y):
    """Return the gradients of every trained part by name, through `then`."""
    named = {name: value for name, value in drawn.items() if value.requires_grad}
    y = then(function(**drawn, scale=0.7))
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(4))
    return dict(zip(named, torch.autograd.grad(y, list(named.values()), dy), strict=True))


def assert_same(got, want):
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def in_place(y):
    y.view(-1)[::2] *= 3.0  # of a view, as after a reshape
    return y.add_(1.0)


def saved(function, **drawn):
    """Return the output, and where each tensor lies that the backward keeps."""
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()) or t, lambda t: t):
        return function(**drawn), kept


def test_the_output_is_kept_in_place_of_a_copy():
    y, kept = saved(low_rank_linear, **parts())
    assert y.data_ptr() in kept


@pytest.mark.parametrize("frozen", [(), ("x",), ("b",), ("a",), ("a", "x")], ids="+".join)
def test_an_output_that_is_written_to_is_no_error(frozen):
    """The frozen layer keeps no output, so models may write into it."""
    drawn = parts()
    for name in frozen:
        drawn[name].requires_grad_(False)
    assert_same(gradients(low_rank_linear, drawn, in_place), gradients(low_rank_linear_ref, drawn, in_place))


@pytest.mark.parametrize("value", [0.0, 1e-300, -1e-9], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=str)
def test_a_scale_of_about_zero_gets_its_gradient(value, dropout):
    drawn = parts()
    with torch.no_grad():
        drawn["out_scale"][2] = value
    seed = torch.tensor(11)

    def dropping(function):
        return lambda **given: function(**given, dropout=dropout, seed=seed if dropout else None)

    got, want = gradients(dropping(low_rank_linear), drawn), gradients(dropping(low_rank_linear_ref), drawn)
    assert want["out_scale"][2].abs() > 0.1
    assert_same(got, want)


def test_a_bias_is_no_part_of_what_is_scaled():
    drawn = parts() | {"bias": torch.randn(N, dtype=torch.float64)}
    assert_same(gradients(low_rank_linear, drawn), gradients(low_rank_linear_ref, drawn))
    y, kept = saved(low_rank_linear, **drawn)
    assert y.data_ptr() not in kept


def test_a_checkpointed_output_is_not_kept():
    """Of a region that is computed anew, no tensor of its size may live on from the first time."""
    drawn = parts()
    outputs = []

    def region(x):
        y = low_rank_linear(**(drawn | {"x": x}))
        outputs.append(y.untyped_storage()._weak_ref())
        return y.sin().sum()

    loss = checkpoint(region, drawn["x"], use_reentrant=False)
    assert torch.UntypedStorage._expired(outputs[0])
    got = torch.autograd.grad(loss, [drawn["out_scale"], drawn["x"]])
    want = torch.autograd.grad(low_rank_linear_ref(**drawn).sin().sum(), [drawn["out_scale"], drawn["x"]])
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
