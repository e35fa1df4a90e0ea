"""SORSA: the penalty in every precision, over processes, and under rates of single tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_all_close, make_batches, shake, zoo_layers
from pairs import run_pair
from peft import get_peft_model
from torch import nn

import peftzoo
from peftzoo import SorsaConfig


def adapted(model, **settings):
    return get_peft_model(copy.deepcopy(model), SorsaConfig(**({"r": 4, "gamma": 0.1} | settings)))


def departure(q):
    """What the paper writes, in float64: |q q^T - I|_F of q [r, n]."""
    q = q.detach().double()
    return (q @ q.T - torch.eye(len(q))).norm().item()


def test_svd_of_a_half_precision_base_runs_in_float32(llama):
    """§8.1: the authors' cast to float32 is thrown away, so the SVD runs in the stored dtype, or not at all."""
    half = copy.deepcopy(llama).to(torch.bfloat16)
    model = adapted(half)
    for layer in zoo_layers(model).values():
        adapter = layer.adapter("default")
        assert adapter.u.dtype == torch.float32
        # to the precision of float32: bfloat16 would leave 1e-2
        assert departure(adapter.u.T) < 1e-5
        assert departure(adapter.vt) < 1e-5
        exact = torch.linalg.svdvals(layer.base_layer.weight.detach().double())[:4]
        torch.testing.assert_close(adapter.s.detach().double(), exact, rtol=1e-5, atol=0)


def test_penalty_is_float32_under_autocast_and_in_half_precision(llama):
    """§8.3: the authors' regularizer runs in bfloat16 under autocast, where rounding alone is 5e-3."""
    model = adapted(llama, gamma=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        penalty = peftzoo.penalty(model)
    assert penalty.dtype == torch.float32
    assert penalty < 1e-5
    layers = zoo_layers(shake(model)).values()
    for layer in layers:
        layer.adapter("default").to(torch.bfloat16)
    want = sum(departure(a.u.T) + departure(a.vt) for a in (layer.adapter("default") for layer in layers)) / 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = peftzoo.penalty(model)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(want / len(layers), rel=1e-5)


def test_penalty_is_smooth_at_the_start(llama):
    """§6: at exact orthonormality the norm's gradient is rounding noise of size 1; epsilon takes it away."""
    model = adapted(llama, gamma=1.0)
    layer = next(iter(zoo_layers(model).values())).adapter("default")
    with torch.no_grad():
        layer.u.copy_(torch.eye(layer.u.shape[0], 4))
        layer.vt.copy_(torch.eye(4, layer.vt.shape[1]))
    layer.penalty().backward()
    assert layer.u.grad.abs().max() < 1e-6
    assert layer.penalty().item() == pytest.approx(1e-6 * 4**0.5, rel=1e-3)
    # far from it epsilon is nothing
    shake(layer)
    assert layer.penalty().item() == pytest.approx((departure(layer.u.T) + departure(layer.vt)) / 2, rel=1e-5)


def test_penalty_is_divided_by_the_accumulation_on_request_only(llama):
    """§8.2: the authors' trainer divides a term that it adds once per step by the micro-batches of the step."""
    plain, divided = shake(adapted(llama)), shake(adapted(llama, divide_by_accumulation=True))
    whole = peftzoo.penalty(plain, 1)
    assert peftzoo.penalty(plain, 8) == whole
    assert peftzoo.penalty(divided, 1) == whole
    torch.testing.assert_close(peftzoo.penalty(divided, 8), whole / 8)
    assert peftzoo.penalty(adapted(llama, gamma=0.0)) is None


def test_singular_values_are_not_penalised(llama):
    model = shake(adapted(llama))
    peftzoo.penalty(model).backward()
    for layer in zoo_layers(model).values():
        adapter = layer.adapter("default")
        assert adapter.s.grad is None
        assert adapter.u.grad.abs().max() > 0
        assert adapter.vt.grad.abs().max() > 0


def test_rank_above_the_size_is_refused():
    """§3: the authors' layer silently trains fewer triplets than it was asked for."""
    with pytest.raises(ValueError, match=r"sorsa: r=9 exceeds the rank of a \[8, 12\] weight"):
        peftzoo.attach(nn.Linear(12, 8), SorsaConfig(r=9))


SHARDED = """\
import torch
from helpers import make_batches, make_llama, shake, zoo_layers
from test_sorsa import adapted
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
import peftzoo

model = shake(adapted(make_llama(), gamma=0.3, r=3))
for block in model.base_model.model.model.layers:
    fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
batch = make_batches(1)[0]
model(input_ids=batch, labels=batch).loss.backward()
trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
assert all(isinstance(p, DTensor) for p in trained.values())
penalty = peftzoo.penalty(model)
gradients = torch.autograd.grad(penalty, list(trained.values()), allow_unused=True)
found = {"penalty": penalty.detach()}
for (name, p), gradient in zip(trained.items(), gradients):
    assert (gradient is None) == name.endswith(".s")
    if gradient is not None:
        p.grad.add_(gradient)
    found[name] = p.grad.full_tensor()
torch.save(found, f"{folder}/{rank}.pt")
"""


def test_penalty_of_sharded_tensors(llama, tmp_path):
    """Outside of a forward FSDP2 leaves shards where the trained tensors were; two processes, the numbers of one."""
    run_pair(SHARDED, tmp_path)
    model = shake(adapted(llama, gamma=0.3, r=3))
    batch = make_batches(1)[0]
    model(input_ids=batch, labels=batch).loss.backward()
    penalty = peftzoo.penalty(model)
    penalty.backward()
    want = {n: p.grad for n, p in model.named_parameters() if p.requires_grad} | {"penalty": penalty.detach()}
    for rank in range(2):
        assert_all_close(torch.load(tmp_path / f"{rank}.pt"), want)
