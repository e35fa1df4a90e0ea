"""fuse and unfuse: the same numbers as stock peft, and never an output that is not the layer's own."""

from __future__ import annotations

import copy
import io
import pickle
import weakref

import peft
import pytest
import torch
from helpers import (
    SeededDropout,
    adapted,
    assert_differs,
    logits,
    make_batches,
    quantised,
    shake,
    take_steps,
    tiny_config,
    zoo_layers,
)
from peft import get_peft_model
from peft.tuners import lora
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftzoo
from peftzoo.core import shared_input, stock_layers
from peftzoo.errors import ModelError

CASES = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "eva": {"init_lora_weights": "eva"},
    "dora pissa": {"use_dora": True, "init_lora_weights": "pissa"},
}
BLOCK = "base_model.model.model.layers.0"


def stock(base, **settings):
    """Return a copy of `base` with a stock peft adapter away from its start; the scale is other than 1."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**({"r": 3, "lora_alpha": 1.0, "target_modules": "all-linear"} | settings))
    return shake(get_peft_model(copy.deepcopy(base), config, low_cpu_mem_usage=False))


def step(model, tokens):
    """Return the logits and every gradient by name."""
    model.zero_grad()
    output = model(input_ids=tokens, labels=tokens)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach()} | gradients


def assert_same(got, want, bound=1e-5):
    """Every tensor within `bound` of the other, as a share of its length."""
    assert got.keys() == want.keys()
    assert len(want) > 1
    for name, value in want.items():
        error = ((got[name] - value).norm() / value.norm().clamp_min(1e-30)).item()
        assert error <= bound, f"{name}: {error:.1e}"


@pytest.fixture
def calls(monkeypatch):
    """The number of layers in each call of the op for groups."""
    found = []
    op = shared_input.grouped_low_rank_linear

    def counted(x, layers, dropout):
        assert shared_input._kept_here.outputs is None, "outputs of before are kept while others are made"
        found.append(len(layers))
        return op(x, layers, dropout)

    monkeypatch.setattr(shared_input, "grouped_low_rank_linear", counted)
    yield found
    assert shared_input._kept_here.outputs is None, "an output was left lying"


# the same numbers


@pytest.mark.parametrize("case", CASES)
def test_equals_stock_peft(case, llama, tokens, calls):
    model = stock(llama, **CASES[case])
    want, keys, classes = step(model, tokens), list(model.state_dict()), [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    assert_differs(want["logits"], logits(llama, tokens))
    report = peftzoo.fuse(model)
    assert len(report.fused) == 14
    assert_same(step(model, tokens), want)
    assert calls == [3, 2, 3, 2]
    assert list(model.state_dict()) == keys
    assert all(isinstance(model.get_submodule(name), lora.Linear) for name in report.fused)
    peftzoo.unfuse(model)
    assert [type(m) for m in model.modules()] == classes
    assert [vars(m).keys() for m in model.modules()] == attributes
    again = step(model, tokens)
    assert all(torch.equal(again[name], value) for name, value in want.items())


@pytest.mark.parametrize("case", ["lora", "dora"])
def test_equals_stock_peft_in_float64(case, llama, tokens):
    model = stock(llama, **CASES[case]).double()
    want = step(model, tokens)
    peftzoo.fuse(model)
    assert_same(step(model, tokens), want, 1e-12)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("case", ["lora", "dora"])
def test_equals_stock_peft_with_dropout(case, share, llama, tokens, monkeypatch, calls):
    model = stock(llama, lora_dropout=0.4, **CASES[case]).train()
    theirs = copy.deepcopy(model)
    for layer in theirs.modules():
        if isinstance(layer, lora.Linear):
            layer.lora_dropout["default"] = SeededDropout(0.4)
    peftzoo.fuse(model, share_inputs=share)
    results = []
    for one in (model, theirs):
        torch.manual_seed(3)
        results.append(step(one, tokens))
    assert_same(*results)
    assert calls == ([3, 2, 3, 2] if share and case == "lora" else [])
    torch.testing.assert_close(logits(model.eval(), tokens), logits(theirs_without(theirs), tokens))


def theirs_without(model):
    """Return a copy of a stock model that drops nothing."""
    model = copy.deepcopy(model).eval()
    for layer in model.modules():
        if isinstance(layer, lora.Linear):
            layer.lora_dropout["default"] = nn.Identity()
    return model


def unfused(model):
    model = copy.deepcopy(model)
    peftzoo.unfuse(model)
    return model


@pytest.mark.parametrize("case", ["lora", "dora"])
def test_equals_stock_peft_on_conv1d(case, gpt2, tokens):
    model = stock(gpt2, fan_in_fan_out=True, target_modules=["c_attn", "c_proj", "c_fc"], **CASES[case])
    want = step(model, tokens)
    report = peftzoo.fuse(model)
    assert set(report.fused.values()) == {f"{'DoRA' if case == 'dora' else 'LoRA'} on conv1d"}
    assert not report.groups
    assert_same(step(model, tokens), want)


@pytest.mark.parametrize("case", ["lora", "dora"])
def test_equals_stock_peft_on_four_bits(case, wide_llama, tokens, calls):
    base = quantised(wide_llama, 4)
    base.is_loaded_in_4bit = True
    model = stock(base, target_modules=["q_proj", "k_proj", "v_proj", "up_proj"], **CASES[case])
    assert type(model.get_submodule(f"{BLOCK}.mlp.up_proj")) is lora.Linear4bit
    step(model, tokens)  # the base settles on the dtype of its products
    want = step(model, tokens)
    report = peftzoo.fuse(model)
    assert len(report.fused) == 8
    assert_same(step(model, tokens), want)
    assert calls == [3, 3]
    again = pickle.loads(pickle.dumps(model))
    assert_same(step(again, tokens), want)
    peftzoo.unfuse(model)
    assert type(model.get_submodule(f"{BLOCK}.mlp.up_proj")) is lora.Linear4bit


@pytest.mark.parametrize("case", ["lora", "dora"])
@pytest.mark.parametrize("autocast", [True, False])
def test_is_as_near_in_bfloat16_as_peft(case, autocast):
    """Against float64, within the bounds of the ops; peft's own update runs in float32 unless there is autocast."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 192))
    exact = stock(net.double(), target_modules=["0"], r=8, **CASES[case]).double()
    rough = stock(net.float() if autocast else net.bfloat16(), target_modules=["0"], r=8, **CASES[case])
    x, weights = (torch.randn(64, size).bfloat16().double() for size in (256, 192))
    with torch.no_grad():  # the numbers that bfloat16 has, in both
        for one, other in zip(exact.parameters(), rough.parameters(), strict=True):
            other.copy_(one.copy_(one.bfloat16()))

    def found(model, x, enabled):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = model(x)
        (y.double() * weights).sum().backward()
        return {"y": y.detach().double()} | {
            n: p.grad.double() for n, p in model.named_parameters() if p.requires_grad
        }

    want = found(exact, x, False)
    peftzoo.fuse(rough)
    given = x.float() if autocast else x.bfloat16()
    got = found(rough, given, autocast)
    assert rough(given).dtype == given.dtype
    for name, value in want.items():
        error = ((got[name] - value).norm() / value.norm()).item()
        assert error <= (4e-3 if name == "y" else 8e-3), f"{name}: {error:.1e}"


@pytest.mark.parametrize("case", ["lora", "dora", "pissa"])
def test_trains_alike(case, llama):
    """In float64: AdamW makes steps of what is rounding where a gradient is small."""
    results, batches = [], make_batches(1) * 6
    model = stock(llama, **CASES[case]).double().train()
    fused = copy.deepcopy(model)
    peftzoo.fuse(fused)
    for one in (model, fused):
        losses = take_steps(one, batches, 1e-2, micro_batches=2)
        results.append({"losses": torch.tensor(losses)} | {n: p.detach() for n, p in one.named_parameters()})
    assert results[0]["losses"][-1] < 0.9 * results[0]["losses"][0]
    assert_same(*results, 1e-8)


def test_doras_norm_follows_the_adapter_and_is_taken_once_a_step(llama, tokens, monkeypatch):
    taken = []
    original = stock_layers.row_norms
    monkeypatch.setattr(stock_layers, "row_norms", lambda *args: taken.append(1) or original(*args))
    model = stock(llama, use_dora=True).double()
    theirs = copy.deepcopy(model)
    peftzoo.fuse(model)
    layers = len([m for m in model.modules() if isinstance(m, lora.Linear)])

    def check():
        assert_same(step(model, tokens), step(theirs, tokens), 1e-9)
        logits(model, tokens)
        assert len(taken) == layers
        taken.clear()

    def norms():
        return [layer._norm._value for layer in model.modules() if isinstance(layer, stock_layers.FusedStock)]

    check()
    assert None not in norms()
    for one in (model, theirs):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=1e-2)
        optimizer.step()
    check()
    for one in (model, theirs):
        for layer in one.modules():
            if isinstance(layer, lora.Linear):
                layer.set_scale("default", 2.5)
    check()
    other = {name: value * 1.5 for name, value in theirs.state_dict().items()}
    for one in (model, theirs):
        one.load_state_dict(other)
    assert norms() == [None] * layers, "versions alone do not show that gathered copies of shards were loaded"
    check()
    for one in (model, theirs):
        one.merge_adapter()
        one.unmerge_adapter()
    assert norms() == [None] * layers, "peft writes through .data, which versions do not show"
    check()
    for one in (model, theirs):
        for layer in one.modules():
            if isinstance(layer, lora.Linear):
                layer.base_layer.weight.data = layer.base_layer.weight.data * 0.5
    check()


# peft's own ways


def test_switching_merging_and_files_stay_pefts(llama, tokens, tmp_path):
    model = stock(llama)
    model.add_adapter("second", peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "up_proj"]))
    model.set_adapter("second")
    shake(model)
    theirs = copy.deepcopy(model)
    peftzoo.fuse(model)
    for do in (
        lambda one: None,
        lambda one: one.set_adapter("default"),
        lambda one: one.base_model.set_adapter(["default", "second"]),
        lambda one: one.merge_adapter(["second"]),
        lambda one: one.unmerge_adapter(),
        lambda one: one.add_adapter("third", peft.LoraConfig(r=2, target_modules=["v_proj"])),
        lambda one: one.delete_adapter("second"),
        lambda one: one.set_adapter("default"),
        lambda one: one.base_model.disable_adapter_layers(),
        lambda one: one.base_model.enable_adapter_layers(),
    ):
        for one in (model, theirs):
            torch.manual_seed(0)  # adding an adapter draws its start
            do(one)
        torch.testing.assert_close(logits(model, tokens), logits(theirs, tokens))
    with model.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(logits(model, tokens), logits(theirs, tokens))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path)
    assert peftzoo.fuse(again).groups
    want = logits(theirs, tokens)
    torch.testing.assert_close(logits(again, tokens), want)
    torch.testing.assert_close(logits(model.merge_and_unload(), tokens), want, atol=1e-4, rtol=1e-4)


def test_one_batch_for_several_adapters(llama, tokens):
    model = stock(llama).eval()
    model.add_adapter("second", peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    want = model(tokens, adapter_names=["default", "second"]).logits
    peftzoo.fuse(model)
    assert torch.equal(model(tokens, adapter_names=["default", "second"]).logits, want)


def test_copies_and_pickles_are_fused_on_their_own(llama, tokens, calls):
    model = stock(llama, use_dora=True)
    want = step(model, tokens)
    peftzoo.fuse(model)
    q = model.get_submodule(f"{BLOCK}.self_attn.q_proj")
    x = torch.randn(2, 32)
    y = q(x)  # leaves outputs for k and v
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        calls.clear()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter *= 1.25
        fresh = other.get_submodule(f"{BLOCK}.self_attn.k_proj")
        assert_differs(fresh(x), model.get_submodule(f"{BLOCK}.self_attn.k_proj")(x))
        q(x)
        assert_same(step(other, tokens), step(unfused(other), tokens))
        assert 3 in calls
    torch.testing.assert_close(q(x), y)
    assert_same(step(model, tokens), want)
    alone = copy.copy(q)  # shares all but its identity
    torch.testing.assert_close(alone(x), y)
    shared_input.forget_outputs()


def test_fusing_twice_is_fusing_once(llama, tokens, calls):
    model = stock(llama)
    first = peftzoo.fuse(model)
    assert peftzoo.fuse(model) == first
    step(model, tokens)
    assert calls == [3, 2, 3, 2]
    peftzoo.unfuse(model)
    peftzoo.unfuse(model)
    assert not any(isinstance(m, stock_layers.FusedStock) for m in model.modules())


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


# what is fused, what is left


def test_the_report_says_what_was_done(llama):
    model = stock(llama)
    report = peftzoo.fuse(model)
    assert report.groups[0] == tuple(f"{BLOCK}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj"))
    assert not report.left
    text = str(report)
    assert text.startswith("fused 14 layers\n  LoRA on linear: 14 layers: base_model")
    assert "and 9 more" in text
    assert f"gate_proj, up_proj: in {BLOCK}.mlp" in text
    assert "left" not in text
    assert not peftzoo.fuse(model, share_inputs=False).groups


def bias(model):
    return stock(model, lora_bias=True, target_modules=["q_proj"]), "lora_bias"


def alora(model):
    return stock(model, alora_invocation_tokens=[1], target_modules=["q_proj"]), "variant ALoraLinearVariant"


def embedding(model):
    return stock(model, target_modules=["embed_tokens"]), "lora.layer.Embedding has no fused forward"


def eight_bits(model):
    base = quantised(model, 8)
    base.is_loaded_in_8bit = True
    return stock(base, target_modules=["q_proj"]), "lora.bnb.Linear8bitLt has no fused forward"


def hooked_base(model):
    model = stock(model, target_modules=["q_proj"])
    for layer in model.modules():
        if isinstance(layer, lora.Linear):
            layer.base_layer.register_forward_hook(lambda *_: None)
    return model, "its base layer has hooks"


def replaced_forward(model):
    model = stock(model, target_modules=["q_proj"])
    for layer in model.modules():
        if isinstance(layer, lora.Linear):
            layer.forward = layer.forward
    return model, "a forward of its own"


def inplace_dropout(model):
    model = stock(model, target_modules=["q_proj"])
    for layer in model.modules():
        if isinstance(layer, lora.Linear):
            layer.lora_dropout["default"] = nn.Dropout(0.1, inplace=True)
    return model, "dropout Dropout(p=0.1, inplace=True)"


LEFT = [bias, alora, embedding, eight_bits, hooked_base, replaced_forward, inplace_dropout]


@pytest.mark.parametrize("make", LEFT)
def test_what_is_left_is_said_with_its_reason(make, wide_llama, tokens):
    model, reason = make(copy.deepcopy(wide_llama))
    model.eval()
    classes = [type(m) for m in model.modules()]
    want = logits(model, tokens)
    report = peftzoo.fuse(model)
    assert not report.fused
    assert report.left
    assert all(why.startswith(reason) for why in report.left.values()), report.left
    assert "left" in str(report)
    assert reason in str(report)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(logits(model, tokens), want)


def test_a_model_without_lora_is_refused(llama):
    with pytest.raises(ModelError, match="the model has no adapters; it needs LoRA layers"):
        peftzoo.fuse(copy.deepcopy(llama))
    boft = get_peft_model(copy.deepcopy(llama), peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match=r"only layers of boft\.layer; it needs LoRA layers"):
        peftzoo.fuse(boft)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, hidden_states, key_value_states=None):
        source = hidden_states if key_value_states is None else key_value_states
        return self.q_proj(hidden_states).sum() + self.k_proj(source).sum() + self.v_proj(source).sum()


class Apart(Block):
    def forward(self, query, key, value):
        return self.q_proj(query).sum() + self.k_proj(key).sum() + self.v_proj(value).sum()


class Wide(Block):
    def __init__(self):
        super().__init__()
        self.k_proj = nn.Linear(9, 4)

    def forward(self, hidden_states):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("block", "want"), [(Block, [("k_proj", "v_proj")]), (Apart, []), (Wide, [])], ids=["cross", "apart", "wide"]
)
def test_only_layers_that_are_called_with_one_input_are_grouped(block, want):
    model = get_peft_model(nn.Sequential(block()), peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"]))
    groups = peftzoo.fuse(model).groups
    assert [tuple(name.rpartition(".")[2] for name in group) for group in groups] == want


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
