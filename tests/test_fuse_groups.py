"""Layers that share their input: never an output that is not the layer's own."""

from __future__ import annotations

import copy
import weakref

import peft
import pytest
import torch
from fuse_helpers import BLOCK, CASES, assert_same, step, stock, unfused
from helpers import (
    adapted,
    assert_differs,
    shake,
    tiny_config,
    zoo_layers,
)
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftzoo
from peftzoo.core import shared_input

# groups


@pytest.fixture
def trio(llama):
    """q, k and v of a fused model, and the same of the stock one."""
    model = stock(llama, lora_dropout=0.3).eval()
    names = [f"{BLOCK}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    theirs = copy.deepcopy(model)
    peftzoo.fuse(model)
    yield [model.get_submodule(name) for name in names], [theirs.get_submodule(name) for name in names]
    shared_input.forget_outputs()


def assert_own(layers, theirs, x):
    """Each layer gives what the stock one gives now."""
    for layer, other in zip(layers, theirs, strict=True):
        torch.testing.assert_close(layer(x), other(x))


def test_one_call_serves_all_and_keeps_nothing(trio, calls):
    layers, theirs = trio
    x = torch.randn(2, 5, 32)
    for _ in range(2):
        assert_own(layers, theirs, x)
    assert calls == [3, 3]
    assert_own(layers[::-1], theirs[::-1], x)
    assert calls == [3, 3, 3]
    assert shared_input._kept_here.outputs is None


def write_to_input(layers, x):
    with torch.no_grad():
        x.mul_(2.0)


def write_to_a_view_of_the_input(layers, x):
    with torch.no_grad():
        x[0].zero_()


def write_to_a_factor(layers, x):
    with torch.no_grad():
        layers[1].lora_A["default"].weight.mul_(2.0)


def replace_a_factor(layers, x):
    layers[1].lora_B["default"].weight = nn.Parameter(layers[1].lora_B["default"].weight.detach() * 2)


def write_to_the_base(layers, x):
    with torch.no_grad():
        layers[1].base_layer.weight.mul_(2.0)


def move_the_base(layers, x):
    layers[1].base_layer.weight.data = layers[1].base_layer.weight.data * 2


def change_the_scale(layers, x):
    layers[1].set_scale("default", 3.0)


def disable(layers, x):
    layers[1].enable_adapters(False)


def merge(layers, x):
    layers[1].merge()
    move_the_base(layers, x)


def switch_adapters(layers, x):
    config = peft.LoraConfig(r=2, init_lora_weights=False)
    torch.manual_seed(0)
    layers[1].update_layer("other", 2, lora_alpha=4, config=config)
    layers[1].set_adapter("other")


def hook_the_base(layers, x):
    layers[1].base_layer.register_forward_hook(lambda module, inputs, y: y * 2)


def hook_the_factor(layers, x):
    layers[1].lora_A["default"].register_forward_hook(lambda module, inputs, y: y * 2)


def hand_over_another_input(layers, x):
    layers[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def change_the_output(layers, x):
    layers[1].register_forward_hook(lambda module, inputs, y: y * 2)


HAZARDS = [
    *(write_to_input, write_to_a_view_of_the_input, write_to_a_factor, replace_a_factor, write_to_the_base),
    *(move_the_base, change_the_scale, disable, merge, switch_adapters, hook_the_base, hook_the_factor),
    *(hand_over_another_input, change_the_output),
]


@pytest.mark.parametrize("hazard", HAZARDS)
def test_what_happens_between_two_calls_is_seen(hazard, trio):
    layers, theirs = trio
    x, y = (torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    before = theirs[1](y)
    layers[0](x)  # leaves outputs for the two others
    for members, given in ((layers, x), (theirs, y)):
        hazard(members, given)
    assert_differs(theirs[1](y), before)
    assert_own(layers[1:], theirs[1:], x)
    assert_own(layers, theirs, x)


def test_another_object_of_the_same_numbers_is_another_input(trio, calls):
    layers, theirs = trio
    x = torch.randn(2, 5, 32)
    layers[0](x)
    assert_own(layers[1:], theirs[1:], x.clone())
    address = id(x)
    layers[0](x)
    del x
    for _ in range(50):  # until one lies where the first lay
        other = torch.randn(2, 5, 32)
        if id(other) == address:
            break
    assert_own(layers[1:], theirs[1:], other)
    shared_input.forget_outputs()


def test_a_call_again_is_not_served_twice(trio):
    layers, _ = trio
    x = torch.randn(2, 5, 32)
    layers[0](x)
    first, second = layers[1](x), layers[1](x)
    torch.testing.assert_close(first, second)
    first.detach().mul_(0.0)
    assert second.abs().max() > 0


def test_switching_to_training_between_two_calls_is_seen(trio):
    layers, theirs = trio
    x = torch.randn(2, 5, 32)
    kept = layers[0](x), layers[1](x)
    for layer in layers:
        layer.train()
    assert not torch.equal(layers[2](x), theirs[2](x)), "nothing was dropped"
    layers[0](x)
    for layer in layers:
        layer.eval()
    assert_own(layers[1:], theirs[1:], x)
    torch.testing.assert_close(kept[1], theirs[1](x))
    shared_input.forget_outputs()


def test_gradients_autocast_and_inference_are_the_callers(trio, calls):
    layers, theirs = trio
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        layers[0](x)
    assert layers[1](x).requires_grad
    with torch.no_grad():
        assert not layers[2](x).requires_grad
    layers[0](x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layers[1](x).dtype == torch.bfloat16
    layers[0](x)
    x.requires_grad_()
    layers[1](x).sum().backward()
    other = x.detach().clone().requires_grad_()
    theirs[1](other).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    shared_input.forget_outputs()
    weight = layers[1].lora_A["default"].weight.requires_grad_(False)
    layers[0](x)
    weight.requires_grad_()
    weight.grad = None
    layers[1](x).sum().backward()
    assert weight.grad is not None
    shared_input.forget_outputs()
    calls.clear()
    with torch.inference_mode():
        inside = torch.randn(2, 5, 32)
        layers[0](inside)
        inside.mul_(2.0)
        assert_own(layers[1:], theirs[1:], inside)
    assert calls == []


def test_different_dropouts_and_unready_siblings_are_computed_alone(trio, calls):
    layers, theirs = trio
    x = torch.randn(2, 5, 32)
    for members in (layers, theirs):
        members[0].train()
        members[0].lora_dropout["default"] = nn.Identity()
        members[2].enable_adapters(False)
    assert_own(layers, theirs, x)
    for members in (layers, theirs):
        members[2].enable_adapters(True)
        members[1].train()
    torch.testing.assert_close(layers[0](x), theirs[0](x))
    assert calls == []


def test_an_unused_output_gives_no_gradient(trio, calls):
    layers, _ = trio
    layers[0](torch.randn(2, 5, 32)).sum().backward()
    assert calls == [3]
    assert layers[0].lora_B["default"].weight.grad is not None
    assert all(layer.lora_A["default"].weight.grad is None for layer in layers[1:])
    assert all(layer.lora_B["default"].weight.grad is None for layer in layers[1:])
    shared_input.forget_outputs()


def test_outputs_may_be_written_to(trio):
    layers, theirs = trio
    x = torch.randn(2, 5, 32, requires_grad=True)
    results = []
    for members in (layers, theirs):
        x.grad = None
        q, k, v = (layer(x) for layer in members)
        (q.mul_(2.0).sum() + k[..., :4].add_(1.0).square().sum() + v.sum()).backward()
        results.append({"x": x.grad.clone()} | {"b": members[1].lora_B["default"].weight.grad})
    assert_same(*results)


def test_an_error_between_two_calls_leaves_nothing_wrong(trio):
    layers, theirs = trio
    x = torch.randn(2, 5, 32)
    handle = layers[1].register_forward_hook(lambda *_: 1 / 0)
    layers[0](x)
    with pytest.raises(ZeroDivisionError):
        layers[1](x)
    handle.remove()
    assert_own(layers, theirs, x)
    with pytest.raises(ValueError, match="do not chain"):
        layers[0](torch.randn(2, 5, 31))
    assert_own(layers, theirs, x)


def test_a_replica_computes_its_own(trio, calls):
    """nn.DataParallel runs copies that share the dictionary of the layer."""
    layers, theirs = trio
    x = torch.randn(2, 5, 32)
    replica = layers[1]._replicate_for_data_parallel()
    replica.lora_A, replica.lora_B = copy.deepcopy(theirs[1].lora_A), copy.deepcopy(theirs[1].lora_B)
    replica.base_layer, replica.lora_dropout = theirs[1].base_layer, theirs[1].lora_dropout
    with torch.no_grad():
        replica.lora_A["default"].weight.mul_(2.0)
    layers[0](x)
    assert_differs(replica(x), theirs[1](x))
    torch.testing.assert_close(layers[1](x), theirs[1](x))
    assert calls == [3]
    shared_input.forget_outputs()


def test_what_nobody_asks_for_goes_with_the_next_group(llama, calls):
    model = stock(llama)
    peftzoo.fuse(model)
    x = torch.randn(2, 32)
    model.get_submodule(f"{BLOCK}.self_attn.q_proj")(x)
    kept = shared_input._kept_here.outputs
    outputs = [weakref.ref(y) for *_, y in kept.outputs.values()]
    del kept
    for name in ("gate_proj", "up_proj"):
        model.get_submodule(f"{BLOCK}.mlp.{name}")(x)
    assert [y() for y in outputs] == [None, None]
    assert calls == [3, 2]
    with torch.no_grad():
        model.get_submodule(f"{BLOCK}.self_attn.q_proj")(x)
        alive = weakref.ref(x)
        del x
        assert alive() is None, "the input is kept as well"
    shared_input.forget_outputs()


def test_backward_hooks_and_torch_func_get_the_stock_result(trio, calls):
    layers, theirs = trio
    x = torch.randn(5, 32)
    seen = []
    layers[1].register_full_backward_hook(lambda module, dx, dy: seen.append(dx[0]))
    given = x.clone().requires_grad_()
    sum(layer(given).sum() for layer in layers).backward()
    other = x.clone().requires_grad_()
    sum(layer(other).sum() for layer in theirs).backward()
    torch.testing.assert_close(given.grad, other.grad)
    assert seen
    mapped = [
        torch.func.vmap(torch.func.grad(lambda row, layer=one: layer(row).sum()))(x) for one in (layers[0], theirs[0])
    ]
    torch.testing.assert_close(*mapped)
    assert calls == []


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", ["lora", "dora"])
def test_gradient_checkpointing(case, reentrant, dropout, llama, tokens, calls):
    model = stock(llama, lora_dropout=dropout, **CASES[case]).train()
    peftzoo.fuse(model)
    model.enable_input_require_grads()
    torch.manual_seed(0)
    want = step(model, tokens)
    grouped = [] if dropout and case == "dora" else [3, 2, 3, 2]
    assert calls == grouped
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(0)
    assert_same(step(model, tokens), want)
    assert len(calls) == 3 * len(grouped), "once in the forward, once in its recomputation"


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [[0], [1], [0, 1], [1, 2], [0, 2]])
def test_a_checkpoint_may_end_between_siblings(inside, reentrant, trio):
    layers, theirs = trio
    results = []
    for members in (layers, theirs):
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        total = 0.0
        regions = [[i for i in range(3) if i in inside], *([i] for i in range(3) if i not in inside)]
        for region in sorted(regions):

            def run(x, region=region, members=members):
                return sum(members[i](x).square().sum() for i in region)

            total = total + (checkpoint(run, x, use_reentrant=reentrant) if region == regions[0] else run(x))
        total.backward()
        results.append(
            {"x": x.grad}
            | {f"{i} {n}": p.grad for i, m in enumerate(members) for n, p in m.named_parameters() if "lora" in n}
        )
    assert_same(*results)
    shared_input.forget_outputs()


@pytest.mark.parametrize("case", ["lora", "dora"])
def test_compiles_in_one_graph(case, llama, calls):
    model = stock(llama, **CASES[case])
    theirs = copy.deepcopy(model)
    peftzoo.fuse(model)
    x = torch.randn(4, 32)
    for name in ("q_proj", "k_proj"):
        one, other = (m.get_submodule(f"{BLOCK}.self_attn.{name}") for m in (model, theirs))
        y = torch.compile(one, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(y, other(x))
        results = []
        for layer, output in ((one, y), (other, other(x))):
            output.square().sum().backward()
            results.append({n: p.grad for n, p in layer.named_parameters() if p.grad is not None})
        assert_same(*results)
    assert calls == []


# the zoo's own layers


def test_zoo_layers_are_grouped(zoo_method, llama, tokens, calls):
    model = shake(adapted(zoo_method, llama, target_modules="all-linear"))
    want = step(model, tokens)
    report = peftzoo.fuse(model)
    assert_same(step(model, tokens), want, 2e-5)
    low_rank = {"dora", "eva", "loldu", "lora", "lora_fa", "lora_plus", "nola", "rslora", "salt", "sorsa"}
    assert calls == ([3, 2, 3, 2] if zoo_method.name in low_rank else [])
    assert bool(report.groups) == bool(calls)
    assert (len(report.left) if zoo_method.name == "randlora" else len(report.fused)) == 14
    peftzoo.unfuse(model)
    calls.clear()
    again = step(model, tokens)
    assert all(torch.equal(again[name], value) for name, value in want.items())
    assert calls == []
    assert not any("shared_input" in vars(layer) for layer in zoo_layers(model).values())


@pytest.mark.parametrize("method", ["lora", "sorsa", "nola"])
def test_zoo_layers_see_what_happens_between_two_calls(method, llama):
    model = shake(adapted(peftzoo.get_method(method), llama, target_modules=["q_proj", "k_proj"]))
    peftzoo.fuse(model)
    q, k = (zoo_layers(model)[f"{BLOCK}.self_attn.{name}"] for name in ("q_proj", "k_proj"))
    x = torch.randn(4, 32)
    before = k(x)
    for parameter in k.parameters():
        if parameter.requires_grad:
            q(x)
            with torch.no_grad():
                parameter.mul_(1.5)
            after = k(x)
            assert not torch.equal(after, before)
            torch.testing.assert_close(after, unfused(k)(x))
            before = after
    q(x)
    k.enable_adapters(False)
    assert torch.equal(k(x), k.base_layer(x))
    shared_input.forget_outputs()


@pytest.mark.parametrize(("other", "together"), [("paca", [2, 2]), ("dora", [3, 3])])
def test_different_methods_in_one_block(other, together, llama, tokens, calls):
    """A gather has an op of its own; what multiplies by matrices goes together."""
    settings = {"r": 3, "target_modules": ["q_proj", "k_proj"]}
    model = get_peft_model(copy.deepcopy(llama), tiny_config(peftzoo.get_method("lora"), **settings))
    model.add_adapter("other", tiny_config(peftzoo.get_method(other), r=2, target_modules=["v_proj"]))
    model.base_model.set_adapter(["default", "other"])
    shake(model)
    want = step(model, tokens)
    peftzoo.fuse(model)
    assert_same(step(model, tokens), want)
    assert calls == together


@pytest.mark.parametrize("in_place", [False, True])
def test_a_group_that_comes_to_hold_a_gather_is_computed_layer_by_layer(in_place, llama, tokens, calls):
    model = adapted(peftzoo.get_method("lora"), llama, target_modules=["q_proj", "k_proj"])
    assert len(peftzoo.fuse(model).groups) == 2
    model.add_adapter("columns", peftzoo.PacaConfig(r=2, in_place=in_place, target_modules=["k_proj"]))
    model.base_model.set_adapter(["default", "columns"])
    for layer in zoo_layers(model).values():
        layer.set_adapter(["columns"] if "columns" in layer.peftzoo_adapter else ["default"])
    shake(model)
    want = step(unfused(model), tokens)
    assert_same(step(model, tokens), want)
    assert calls == []
    q, k = (zoo_layers(model)[f"{BLOCK}.self_attn.{name}"] for name in ("q_proj", "k_proj"))
    held = k._held
    assert (held is not None) == in_place
    q(torch.randn(4, 32))
    assert k._held is held, "its columns were taken out for nothing"
