"""fuse and unfuse: the same numbers as stock peft, and what is fused."""

from __future__ import annotations

import copy
import io
import pickle

import peft
import pytest
import torch
from fuse_helpers import BLOCK, CASES, assert_same, step, stock, unfused
from helpers import (
    SeededDropout,
    assert_differs,
    logits,
    make_batches,
    quantised,
    shake,
    take_steps,
)
from peft import get_peft_model
from peft.tuners import lora
from torch import nn

import peftzoo
from peftzoo.core import shared_input, stock_layers
from peftzoo.errors import ModelError

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
    given = x.float() if autocast else x.bfloat16()
    stocks = found(rough, given, autocast)
    peftzoo.fuse(rough)
    got = found(rough, given, autocast)
    assert rough(given).dtype == given.dtype
    errors = [
        {name: ((one[name] - want[name]).norm() / want[name].norm()).item() for name in want} for one in (got, stocks)
    ]
    for name, error in errors[0].items():
        assert error <= (4e-3 if name == "y" else 8e-3), f"{name}: {error:.1e}"
    if autocast:
        assert errors[0]["y"] <= 1.1 * errors[1]["y"]


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
    assert torch.equal(logits(model.merge_and_unload(), tokens), logits(theirs.merge_and_unload(), tokens))


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

    def forward(self, hidden_states, wider):
        return self.q_proj(hidden_states).sum() + self.k_proj(wider).sum() + self.v_proj(hidden_states).sum()


@pytest.mark.parametrize(
    ("block", "want"), [(Block, [("k_proj", "v_proj")]), (Apart, []), (Wide, [])], ids=["cross", "apart", "wide"]
)
def test_only_layers_that_are_called_with_one_input_are_grouped(block, want):
    model = get_peft_model(nn.Sequential(block()), peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"]))
    groups = peftzoo.fuse(model).groups
    assert [tuple(name.rpartition(".")[2] for name in group) for group in groups] == want
