"""The suite every registered method gets, without a line of its own."""

from __future__ import annotations

import copy
import hashlib
import io
import pickle
from types import SimpleNamespace

import peft
import pytest
import torch
from helpers import (
    adapted,
    assert_close,
    assert_differs,
    logits,
    quantised,
    ready,
    refused,
    shake,
    tiny_config,
    trained_names,
    zoo_layers,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import peftzoo
from peftzoo.errors import ModelError


def test_starts_at_base(method, llama, tokens):
    assert_close(logits(adapted(method, llama), tokens), logits(llama, tokens))


def test_starts_at_base_on_conv1d(method, gpt2, tokens):
    if refused(method, "conv1d", gpt2):
        return
    model = adapted(method, gpt2)
    assert_close(logits(model, tokens), logits(gpt2, tokens))
    assert_differs(logits(shake(model), tokens), logits(gpt2, tokens))


def test_forward_is_delta_weight(method, llama):
    layers = zoo_layers(shake(adapted(method, llama)))
    for layer in layers.values():
        adapter, weight = layer.peftzoo_adapter["default"], layer.frozen_weight()
        x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(2))
        want = x @ adapter.delta_weight(weight).T
        assert want.abs().max() > 1e-3
        assert_close(adapter(x), want)
        # the fused path, which takes the frozen product along
        assert_close(layer(x), x @ (weight + adapter.delta_weight(weight)).T)
    assert bool(layers) != method.adopted


def test_fused_is_unfused(method, llama, tokens):
    """A base layer with a hook of its own is called itself; output and gradients stay the same."""
    fused = shake(adapted(method, llama))
    unfused = copy.deepcopy(fused)
    calls = []
    for layer in zoo_layers(unfused).values():
        layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    outputs = []
    for model in (fused, unfused):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        outputs.append({"loss": loss} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert bool(calls) != method.adopted
    for name, value in outputs[0].items():
        assert_close(value, outputs[1][name])


def test_merge(method, llama, tokens):
    model = shake(adapted(method, llama))
    want = logits(model, tokens)
    assert_differs(want, logits(llama, tokens))
    merged = model.merge_and_unload(safe_merge=True)
    assert_close(logits(merged, tokens), want, 1e-4)
    assert not zoo_layers(merged)


def test_merge_on_conv1d(method, gpt2, tokens):
    if refused(method, "conv1d", gpt2):
        return
    model = shake(adapted(method, gpt2))
    want = logits(model, tokens)
    assert_close(logits(model.merge_and_unload(), tokens), want, 1e-4)


def test_merge_unmerge_disable_unload(method, llama, tokens):
    model = shake(adapted(method, llama))
    before, untouched = logits(model, tokens), logits(llama, tokens)
    model.merge_adapter()
    assert_close(logits(model, tokens), before, 1e-4)
    model.unmerge_adapter()
    assert_close(logits(model, tokens), before)
    with model.disable_adapter():
        assert_close(logits(model, tokens), untouched)
    assert_close(logits(model, tokens), before)
    assert_close(logits(model.unload(), tokens), untouched)


def test_only_adapter_trains(method, llama, tokens):
    model = shake(adapted(method, llama))
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        ours = "base_layer" not in name and not set(method.trains).isdisjoint(name.split("."))
        assert parameter.requires_grad == ours, name
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_two_adapters(method, llama, tokens):
    model = shake(adapted(method, llama))
    first = logits(model, tokens)
    model.add_adapter("second", tiny_config(method))
    ready(model, "second")
    assert_close(logits(model, tokens), first)
    model.set_adapter("second")
    assert_close(logits(model, tokens), logits(llama, tokens))
    second = logits(shake(model, seed=8), tokens)
    assert_differs(second, first)
    model.set_adapter("default")
    assert_close(logits(model, tokens), first)
    model.delete_adapter("second")
    assert_close(logits(model, tokens), first)
    assert not [name for name in model.state_dict() if "second" in name]


def test_transformers_native(method, llama, tokens, tmp_path):
    model = copy.deepcopy(llama)
    if not method.injectable:
        with pytest.raises(ValueError, match="shared state"):
            model.add_adapter(tiny_config(method))
        return
    model.add_adapter(tiny_config(method))
    want = logits(shake(ready(model)), tokens)
    assert_differs(want, logits(llama, tokens))
    model.save_pretrained(tmp_path)
    loaded = copy.deepcopy(llama)
    loaded.load_adapter(str(tmp_path))
    assert_close(logits(loaded, tokens), want)
    loaded.delete_adapter("default")
    assert_close(logits(loaded, tokens), logits(llama, tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_base(method, llama, tokens, dtype):
    half = copy.deepcopy(llama).to(dtype)
    model = adapted(method, half)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert_close(logits(model, tokens).float(), logits(half, tokens).float(), 2e-2)
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_autocast(method, llama, tokens):
    model = shake(adapted(method, llama))
    want = logits(model, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens, labels=tokens).loss
        got = logits(model, tokens)
    loss.backward()
    assert ((got.float() - want).norm() / want.norm()) < 5e-2  # bfloat16 keeps 8 bits, here through 15 layers
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(method, wide_llama, tokens, bits):
    base = quantised(wide_llama, bits)
    if refused(method, f"bnb-{bits}bit", base):
        return
    model = adapted(method, base)
    assert_close(logits(model, tokens), logits(base, tokens), 1e-4)
    model(tokens, labels=tokens).loss.backward()
    assert any(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    assert_differs(logits(shake(model), tokens), logits(base, tokens))
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    wanted = [layer(torch.eye(layer.in_features)).T for layer in layers]
    packed = [layer.get_base_weight() for layer in layers]
    model.merge_adapter()
    for layer, want in zip(layers, wanted, strict=True):
        # packing anew rounds every weight to one of 16, or 256, steps of its block
        assert (layer.get_base_weight() - want).norm() < (0.12 if bits == 4 else 0.02) * want.norm()
    model.unmerge_adapter()
    if not method.adopted:  # peft's own subtract and pack a second time
        for layer, want in zip(layers, packed, strict=True):
            assert_close(layer.get_base_weight(), want, 1e-2)


def test_pickle_and_deepcopy(method, llama, tokens):
    model = shake(adapted(method, llama))
    want = logits(model, tokens)
    assert_close(logits(copy.deepcopy(model), tokens), want)
    assert_close(logits(pickle.loads(pickle.dumps(model)), tokens), want)
    config = pickle.loads(pickle.dumps(model.peft_config["default"]))
    assert type(config) is method.config
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)


def test_learns(method, llama):
    torch.manual_seed(0)
    model = adapted(method, llama).train()
    batch = torch.randint(0, 96, (8, 12), generator=torch.Generator().manual_seed(3))
    rate = 2e-2 * method.lr_factor * (5 if method.adopted else 1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    aim, losses = 0.9 if method.adopted else 0.5, []
    # 60 steps do; a method that trains a handful of numbers in each layer has more
    few = sum(p.numel() for p in model.parameters() if p.requires_grad) < 500
    for _ in range(240 if few else 60):
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        peftzoo.after_step(model)
        losses.append(loss.item())
    assert losses[-1] < aim * losses[0], losses[::20]


def test_gradient_checkpointing_changes_nothing(method, llama, tokens):
    plain = shake(adapted(method, llama)).train()
    again = copy.deepcopy(plain)
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (plain, again):
        model(tokens, labels=tokens).loss.backward()
    for (name, one), (_, two) in zip(plain.named_parameters(), again.named_parameters(), strict=True):
        if one.requires_grad:
            assert_close(two.grad, one.grad, what=name)


def test_compiles(zoo_method, llama):
    """One layer compiles to one graph, where that is declared, with the same outputs and gradients for any tokens."""
    method = zoo_method
    torch._dynamo.reset()
    layer = next(iter(zoo_layers(shake(adapted(method, llama))).values()))
    tensors = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    compiled = torch.compile(layer, fullgraph=method.compile, dynamic=True, backend="aot_eager")
    for rows in (3, 5, 8):
        x = torch.randn(rows, layer.in_features, requires_grad=True)
        pull = torch.randn(rows, layer.out_features)
        want, got = layer(x), compiled(x)
        assert_close(got, want)
        grads = [torch.autograd.grad(y, [x, *tensors], pull) for y in (got, want)]
        for one, two in zip(*grads, strict=True):
            assert two.abs().max() > 0
            assert_close(one, two)
        # what is kept between forwards must not be baked into the graph
        shake(layer, seed=rows)


def test_dropout_drops_in_training_only(method, llama, tokens):
    model = shake(adapted(method, llama, dropout=0.5))
    kept = logits(model.eval(), tokens)
    assert_close(logits(model, tokens), kept)
    torch.manual_seed(0)
    one = logits(model.train(), tokens)
    assert_differs(one, kept)
    torch.manual_seed(0)
    assert_close(logits(model, tokens), one)


def test_seed_alone_decides_the_start(method, llama, tokens, monkeypatch):
    if "seed" not in method.settings:
        assert method.adopted
        return
    states, outputs, draws = [], [], []
    digest = hashlib.sha256
    counting = SimpleNamespace(sha256=lambda name: draws.append(name) or digest(name))  # every draw starts with one
    monkeypatch.setattr("peftzoo.core.random.hashlib", counting)
    for seed, global_seed in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        model = adapted(method, llama, seed=seed)
        if not method.adopted:
            assert torch.equal(torch.get_rng_state(), before), "the global generator was touched"
        states.append(peft.get_peft_model_state_dict(model))
        outputs.append(logits(shake(model), tokens))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert torch.equal(outputs[0], outputs[1])
    # what draws at all, into its file or beside it, draws other numbers from another seed, unless data overrule it
    if method.adopted or not model.peft_config["default"].needs_data:
        assert torch.equal(outputs[0], outputs[2]) != (method.adopted or bool(draws))


def test_config_rejects(method):
    with pytest.raises(ValueError, match="did you mean dropout"):
        method.make_config(dropuot=0.1)
    if method.adopted:
        return
    for name, bad in {"r": 0, "alpha": -1.0, "dropout": 1.0, "target_modules": []}.items():
        with pytest.raises(ValueError, match=f"{method.name}: {name}="):
            method.make_config(**{name: bad})
    with pytest.raises(ValueError, match="did you mean alpha"):
        method.config(alhpa=1.0)


def test_a_rank_above_the_size_works_or_is_refused(zoo_method):
    config, refusal = tiny_config(zoo_method, r=9), None
    try:
        layer = shake(ready(peftzoo.attach(nn.Linear(8, 8), config), batches=[torch.eye(8)]))
    except ValueError as error:
        refusal = str(error)
    if refusal is None:
        weight = layer.frozen_weight()
        want = torch.eye(8) @ (weight + layer.adapter("default").delta_weight(weight)).T + layer.bias
        assert_close(layer(torch.eye(8)), want)
    else:
        assert f"{zoo_method.name}: r=9" in refusal
        with pytest.raises(ModelError, match=f"0: {zoo_method.name}: r=9"):
            peftzoo.attach(nn.Sequential(nn.Linear(8, 8)), config)


def test_attach_without_transformers(zoo_method):
    method = zoo_method
    module = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 7)).double()
    x = torch.randn(16, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = module(x)
    model = ready(peftzoo.attach(module, tiny_config(method)), batches=[x])
    assert_close(model(x), want, 1e-12)
    assert_differs(shake(model)(x), want)
    single = peftzoo.attach(nn.Linear(12, 20), tiny_config(method))
    assert [name.rsplit(".", 1)[-1] for name in trained_names(single)] == list(method.trains)
