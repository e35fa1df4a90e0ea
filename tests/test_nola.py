"""NOLA: what is particular to it, and the defects of its authors' code that ours must not have."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from helpers import assert_close, assert_differs, logits, shake, zoo_layers
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftzoo
from peftzoo.core.basis import BasisSum
from peftzoo.methods.nola import NolaConfig
from peftzoo_kernels import basis


def adapter_of(rows=20, columns=12, **settings):
    """Return a shaken adapter on one layer, and the layer."""
    torch.manual_seed(0)
    layer = shake(peftzoo.attach(nn.Linear(columns, rows), NolaConfig(**{"r": 3, "k": 10, "alpha": 4.0} | settings)))
    return layer.adapter("default"), layer


def dense(adapter):
    """Return A and B of an adapter by the paper's formula, from the definition of the bases, differentiable."""
    found = []
    for coef, one in zip((adapter.alpha, adapter.beta), adapter.sums, strict=True):
        u = basis.basis_ref(one.key, adapter.config.k, one.shape[0] * one.shape[1]).to(coef.dtype)
        found.append((coef @ u / adapter.config.k**0.5).view(one.shape))
    start = basis.basis_ref(adapter.sums[0]._offset_key, 1, found[0].numel()).to(found[0].dtype)
    return found[0] + start.view(found[0].shape) / adapter.in_features**0.5, found[1]


def count_sums(monkeypatch):
    """Return a list that grows with each sum over bases and each contraction with them."""
    calls = []
    for name in ("expand", "gradient"):
        original = getattr(BasisSum, name)
        monkeypatch.setattr(BasisSum, name, lambda self, *args, o=original, n=name: calls.append(n) or o(self, *args))
    return calls


def test_factors_and_gradients_are_the_papers():
    _, layer = adapter_of()
    double = copy.deepcopy(layer).double()
    x = torch.randn(7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a, b = dense(double.adapter("default"))
    want = double.base_layer(x) + 4 / 3 * x @ a.T @ b.T
    trained = [double.adapter("default").alpha, double.adapter("default").beta]
    gradients = torch.autograd.grad(want.square().sum(), trained)
    y = double(x)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    for got, right in zip(torch.autograd.grad(y.square().sum(), trained), gradients, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bases_are_summed_once_per_step(llama, tokens, monkeypatch, checkpointing):
    model = get_peft_model(copy.deepcopy(llama), NolaConfig(r=3, k=10, target_modules=["q_proj", "down_proj"])).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    calls = count_sums(monkeypatch)
    for _ in range(2):
        for _ in range(3):  # micro-batches
            model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert calls.count("expand") == 2 * 4 * 2, "steps x layers x factors"
    assert calls.count("gradient") == 6 * 4 * 2, "micro-batches x layers x factors"


def test_a_step_is_seen_by_the_next_forward():
    adapter, layer = adapter_of()
    x = torch.randn(5, 12)

    def double(coefficients):
        with torch.no_grad():
            coefficients.mul_(2)

    for change in (
        lambda: torch.optim.SGD(adapter.parameters(), lr=0.1).step(),
        lambda: adapter.load_state_dict({name: value + 1 for name, value in adapter.state_dict().items()}),
        lambda: double(adapter.alpha),
        lambda: double(adapter.beta),
        lambda: shake(layer, seed=3),
    ):
        before = layer(x)
        before.square().sum().backward()
        change()
        assert_differs(layer(x), before)
        a, b = dense(adapter)
        assert_close(layer(x), layer.base_layer(x) + 4 / 3 * x @ a.T @ b.T)


def test_training_leaves_the_global_generator_alone():
    """The authors' code re-seeds it in every forward and backward, which changes dropout and shuffling."""
    _, layer = adapter_of()
    before = torch.get_rng_state()
    layer(torch.ones(2, 12)).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_merging_does_not_drop_the_adapter(llama, tokens):
    """The authors' merge multiplies A0 and B0 alone, and B0 is 0."""
    model = shake(get_peft_model(copy.deepcopy(llama), NolaConfig(r=3, k=10)))
    want = logits(model, tokens)
    assert_differs(want, logits(llama, tokens))
    assert_close(logits(model.merge_and_unload(), tokens), want, 1e-4)


def test_a0_comes_from_the_seed(llama):
    """The authors draw it from the global generator, so their seeds do not give it back, and have to save it."""
    layers = []
    for global_seed, seed in ((0, 3), (1, 3), (0, 4)):
        torch.manual_seed(global_seed)
        model = get_peft_model(copy.deepcopy(llama), NolaConfig(r=3, k=10, seed=seed))
        layers.append([layer.adapter("default").factors().a.detach() for layer in zoo_layers(model).values()])
    for same, other in zip(layers[0], layers[1], strict=True):
        assert torch.equal(same, other)
    assert all(not torch.equal(one, two) for one, two in zip(layers[0], layers[2], strict=True))
    assert len({tuple(a.flatten()[:4].tolist()) for a in layers[0]}) == len(layers[0]), "and from the name"


def test_a_file_holds_coefficients_alone(llama, tokens, tmp_path):
    """The authors' holds all of A0 and a B0 of zeros beside them."""
    model = shake(get_peft_model(copy.deepcopy(llama), NolaConfig(r=3, k=10)))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert {key.rpartition(".")[2] for key in shapes} == {"alpha", "beta"}
    assert set(shapes.values()) == {(10,)}
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_llama_2_7b_is_a_file_of_one_megabyte():
    with torch.device("meta"):
        config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
        model = get_peft_model(LlamaForCausalLM(config), NolaConfig(r=16, alpha=4, k=512), low_cpu_mem_usage=True)
    state = peft.get_peft_model_state_dict(model)
    assert sum(value.numel() for value in state.values()) == 229_376
    header = sum(len(key) + 80 for key in state)  # dtype, shape and offsets of each
    assert sum(value.nbytes for value in state.values()) + header < 1.1e6


def test_coefficients_stay_float32_on_a_bfloat16_base(llama, tokens):
    """The authors' LLaMA code casts them to bfloat16, where a step of 1e-3 is often rounded away."""
    model = get_peft_model(copy.deepcopy(llama).bfloat16(), NolaConfig(r=3, k=10))
    shake(model)(tokens, labels=tokens).loss.backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            assert not torch.equal(parameter.grad, parameter.grad.bfloat16().float())


@pytest.mark.parametrize("seed", [2**33, 9_999_999_999])
def test_seeds_beyond_32_bits(seed):
    adapter, _ = adapter_of(seed=seed)
    assert not torch.equal(adapter.factors().a, adapter_of(seed=seed % 2**32)[0].factors().a)


def test_fewer_bases_are_the_first_of_more():
    small, _ = adapter_of(k=10)
    large, _ = adapter_of(k=40)
    with torch.no_grad():
        for name in ("alpha", "beta"):
            getattr(large, name).zero_()
            getattr(large, name)[:10] = 2 * getattr(small, name)  # sqrt(40 / 10)
    for got, want in zip(large.factors()[:2], small.factors()[:2], strict=True):
        assert_close(got, want)


def test_resident_bases_give_the_same(llama, tokens):
    outputs = []
    for bases in ("regenerate", "resident"):
        model = shake(get_peft_model(copy.deepcopy(llama), NolaConfig(r=3, k=10, bases=bases)))
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        outputs.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(one, two) for one, two in zip(*outputs, strict=True))


def test_shared_bases_are_kept_once_per_shape(llama, tokens, tmp_path):
    config = NolaConfig(r=3, k=10, bases="resident", share_bases=True)
    model = shake(get_peft_model(copy.deepcopy(llama), config))
    want = logits(model, tokens)
    adapters = [layer.adapter("default") for layer in zoo_layers(model).values()]
    shapes = {one.shape for adapter in adapters for one in adapter.sums}
    assert len({id(one) for adapter in adapters for one in adapter.sums}) == len(shapes) < 2 * len(adapters)
    copied = [layer.adapter("default") for layer in zoo_layers(copy.deepcopy(model)).values()]
    assert len({id(one) for adapter in copied for one in adapter.sums}) == len(shapes)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path), tokens), want)
    bare, _ = adapter_of(32, 32, bases="resident", share_bases=True)
    same = next(adapter for adapter in adapters if adapter.in_features == adapter.out_features == 32)
    assert bare.sums[0].key == same.sums[0].key, "an adapter that stands alone has the bases of its shape"


def test_without_a0_alpha_starts_off_zero():
    """With neither there is no gradient at all."""
    layer = peftzoo.attach(nn.Linear(12, 20), NolaConfig(r=3, k=4000, a0="none"))
    adapter = layer.adapter("default")
    x = torch.randn(5, 12)
    y = layer(x)
    assert torch.equal(y, layer.base_layer(x))
    y.square().sum().backward()
    assert adapter.beta.grad.any()
    a = adapter.factors().a
    assert abs(a.square().mean() - 1 / 36) < 0.5 / 36, "the size of LoRA's start"


@pytest.mark.parametrize(
    ("setting", "value"),
    [("k", 0), ("k", 1.5), ("a0", "zero"), ("bases", "disk"), ("form", "gpt"), ("basis_version", 2)],
)
def test_config_names_the_bound(setting, value):
    with pytest.raises(ValueError, match=f"nola: {setting}={value!r} must be"):
        NolaConfig(**{setting: value})
