"""What core offers to methods beyond factors: per-layer settings, shared state, caches, calibration, convolutions."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import peft
import pytest
import torch
from helpers import assert_close, logits, shake, zoo_layers
from torch import nn
from torch.nn import functional as F

import peftzoo
from peftzoo import Factors, LinearAdapter, LoraConfig, ZooConfig
from peftzoo.core import registry
from peftzoo.core.cache import StepCache
from peftzoo.errors import ModelError


@dataclass
class ScaledConfig(ZooConfig):
    """A method of this test: a LoRA whose outputs are scaled, that meets its siblings and keeps a cache."""

    from_data: bool = False

    @property
    def needs_data(self):
        return self.from_data


class Scaled(LinearAdapter):
    """LoRA with a factor of every output."""

    def __init__(self, config, in_features, out_features):
        super().__init__(config, in_features, out_features)
        self.a = nn.Parameter(torch.empty(config.r, in_features))
        self.b = nn.Parameter(torch.empty(out_features, config.r))
        self.m = nn.Parameter(torch.empty(out_features))
        self.cache = StepCache()
        self.cache.drop_on_load(self)
        self.computed = 0
        self.met = ()

    def init(self, weight):
        self.a.fill_(0.1)
        self.b.zero_()
        self.m.fill_(1.0)

    @classmethod
    def share(cls, adapters):
        for adapter in adapters:
            adapter.met = (*adapter.met, tuple(adapters))

    def factors(self):
        return Factors(self.a, self.b, scale=self.config.scale, out_scale=self.m)

    def double(self):
        def compute():
            self.computed += 1
            return 2 * self.b

        return self.cache.get(compute, self.b)

    def regularizer(self):
        return self.b.square().sum()


@pytest.fixture
def scaled(monkeypatch):
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    if "method_name" in vars(ScaledConfig):
        del ScaledConfig.method_name
    peftzoo.register(
        "scaled", config=ScaledConfig, paper="none", trains=("a", "b", "m"), layers=("linear", "conv1d", "conv2d")
    )(Scaled)
    return peftzoo.get_method("scaled")


def test_an_output_scale_acts_on_the_frozen_product_and_not_on_the_bias(scaled):
    layer = shake(peftzoo.attach(nn.Linear(6, 5), ScaledConfig(r=2, alpha=6.0)))
    adapter, x = layer.adapter("default"), torch.randn(4, 6)
    base = layer.base_layer
    want = adapter.m * (x @ base.weight.T + 3.0 * x @ adapter.a.T @ adapter.b.T) + base.bias
    assert_close(layer(x), want)
    assert_close(adapter(x), x @ adapter.delta_weight(base.weight).T)
    base.register_forward_hook(lambda *_: None)  # called by itself from here on
    assert_close(layer(x), want)
    with pytest.raises(ModelError, match="stands on no layer"):
        Scaled(adapter.config, 6, 5)(x)


def test_the_frozen_weight_holds_no_adapter(scaled):
    layer = shake(peftzoo.attach(nn.Linear(6, 5), ScaledConfig(r=2)))
    frozen = layer.base_layer.weight.detach().clone()
    layer.merge()
    assert not torch.equal(layer.base_layer.weight, frozen)
    assert torch.equal(layer.adapter("default").frozen_weight(), frozen)
    again = pickle.loads(pickle.dumps(layer))
    again.unmerge()
    with torch.no_grad():
        again.base_layer.weight.zero_()
    assert torch.equal(layer.adapter("default").frozen_weight(), frozen), "a copy reads its own layer"
    assert not again.adapter("default").frozen_weight().any()


def test_adapters_of_one_model_meet_once(scaled, llama):
    model = peft.get_peft_model(copy.deepcopy(llama), ScaledConfig(r=2))
    model.add_adapter("second", ScaledConfig(r=3))
    for name in ("default", "second"):
        adapters = [layer.adapter(name) for layer in zoo_layers(model).values()]
        assert all(adapter.met == (tuple(adapters),) for adapter in adapters)
    twin = copy.deepcopy(model)
    adapters = [layer.adapter("default") for layer in zoo_layers(twin).values()]
    assert adapters[3].met[0][0] is adapters[0], "a copy of a model shares within itself"


def test_rank_and_alpha_of_single_layers(llama, tokens):
    config = LoraConfig(
        r=4,
        alpha=8.0,
        target_modules=["q_proj", "k_proj", "o_proj"],
        rank_pattern={"q_proj": 2, "layers.1.self_attn.q_proj": 6, "k_proj": 0},
        alpha_pattern={"layers.1.self_attn.q_proj": 6.0},
    )
    model = peft.get_peft_model(copy.deepcopy(llama), config)
    found = {name.removeprefix("base_model.model.model.layers."): layer for name, layer in zoo_layers(model).items()}
    ranks = {name: layer.adapter("default").config.r for name, layer in found.items()}
    assert ranks == {
        "0.self_attn.q_proj": 2,
        "0.self_attn.o_proj": 4,
        "1.self_attn.q_proj": 6,
        "1.self_attn.o_proj": 4,
    }
    scales = {name: layer.adapter("default").config.scale for name, layer in found.items()}
    assert scales == {
        "0.self_attn.q_proj": 4.0,
        "0.self_attn.o_proj": 2.0,
        "1.self_attn.q_proj": 1.0,
        "1.self_attn.o_proj": 2.0,
    }
    for bad in ({"rank_pattern": {"q_proj": -1}}, {"alpha_pattern": {"q_proj": 0.0}}, {"lr_ratios": {"b": -2.0}}):
        with pytest.raises(ValueError, match=f"lora: {next(iter(bad))}="):
            LoraConfig(**bad)


def test_an_adapter_that_needs_data_is_not_used_without(scaled, llama, tokens):
    model = peft.get_peft_model(copy.deepcopy(llama), ScaledConfig(r=2, from_data=True))
    with pytest.raises(ModelError, match=r"peftzoo\.calibrate"):
        model(tokens)
    with model.disable_adapter():
        model(tokens)
    for layer in zoo_layers(model).values():
        layer.calibrated("default")
    assert_close(logits(model, tokens), logits(llama, tokens))


def test_regularizers_are_summed_over_layers(scaled, llama):
    model = shake(peft.get_peft_model(copy.deepcopy(llama), ScaledConfig(r=2)))
    want = sum(layer.adapter("default").b.square().sum() for layer in zoo_layers(model).values())
    assert_close(peftzoo.regularizer(model), want)
    assert peftzoo.regularizer(copy.deepcopy(llama)) is None


def test_a_cached_value_is_made_anew_only_when_its_tensors_change(scaled):
    layer = shake(peftzoo.attach(nn.Linear(6, 5), ScaledConfig(r=2)))
    adapter = layer.adapter("default")

    def fresh():
        before = adapter.computed
        assert torch.equal(adapter.double(), 2 * adapter.b)
        return adapter.computed > before

    assert fresh()
    assert not fresh()
    with torch.no_grad():
        adapter.b.add_(1.0)
    assert fresh()
    for fused in (True, False):
        optimizer = torch.optim.AdamW([adapter.b], lr=0.1, fused=fused)
        adapter.b.grad = torch.ones_like(adapter.b)
        optimizer.step()
        assert fresh()
        assert not fresh()
    state = {key: value + 1 for key, value in adapter.state_dict().items()}
    adapter.load_state_dict(state)
    assert fresh()
    adapter.load_state_dict({key: value + 1 for key, value in state.items()}, assign=True)
    assert fresh()
    twin = copy.deepcopy(layer).adapter("default")
    twin.computed = 0
    twin.double()
    assert twin.computed == 1, "a copy starts with an empty cache"
    assert not fresh()
    adapter.b.data = adapter.b.data + 1  # what FSDP does: other memory, same version
    assert fresh()


def test_a_step_of_any_optimizer_counts_although_versions_do_not_show_it():
    parameter, cache = nn.Parameter(torch.ones(3)), StepCache()
    other = nn.Parameter(torch.ones(1))
    assert cache.get(lambda: parameter.sum().item(), parameter) == 3
    parameter.data.add_(1.0)  # behind the version's back, as under FSDP
    other.grad = torch.ones(1)
    torch.optim.SGD([other], lr=0.1).step()
    assert cache.get(lambda: parameter.sum().item(), parameter) == 6


CONVS = {
    "plain": {"kernel_size": 3},
    "strided, padded": {"kernel_size": (3, 5), "stride": 2, "padding": (1, 2)},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": "same"},
    "reflected": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "single pixels": {"kernel_size": 1, "bias": False},
}


@pytest.mark.parametrize("settings", CONVS.values(), ids=CONVS)
def test_an_adapter_on_a_convolution_is_its_delta_weight(settings):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, **settings)
    layer = shake(peftzoo.attach(copy.deepcopy(conv), LoraConfig(r=2, alpha=4.0)))
    x = torch.randn(3, 4, 9, 11)
    delta = layer.get_delta_weight("default")
    assert delta.shape == conv.weight.shape
    want = conv._conv_forward(x, conv.weight + delta, conv.bias)
    assert_close(layer(x), want)
    layer.merge()
    assert_close(layer(x), want)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, conv.weight)


def test_an_update_of_full_rank_on_a_convolution(scaled, monkeypatch):
    monkeypatch.setattr(Scaled, "factors", lambda self: None)
    monkeypatch.setattr(Scaled, "delta_weight", lambda self, weight: self.b @ self.a + weight)
    layer = shake(peftzoo.attach(nn.Conv2d(4, 6, 3, padding=1), ScaledConfig(r=2)))
    x, adapter = torch.randn(3, 4, 5, 7), layer.adapter("default")
    weight = 2 * layer.base_layer.weight + (adapter.b @ adapter.a).view(6, 4, 3, 3)
    y = layer(x)
    assert_close(y, F.conv2d(x, weight, layer.base_layer.bias, padding=1))
    y.sum().backward()
    assert adapter.a.grad.abs().max() > 0


def test_a_grouped_convolution_is_refused():
    with pytest.raises(ModelError, match="Conv2d"):
        peftzoo.attach(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), LoraConfig(target_modules=["0"]))
