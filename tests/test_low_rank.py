"""The LoRA family against stock peft: starts, outputs, gradients and merged weights, with weights copied over.

What no comparison with peft can show is tested on its own: exact starts on an untouched base, the cost of DoRA's norm.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from helpers import SeededDropout, assert_all_close, assert_close, assert_differs, logits, shake, zoo_layers
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import peftzoo
from peftzoo.methods import dora

# name of a case: (method, its settings, those of stock peft); r=3 and alpha=7 make every factor other than 1
CASES = {
    "default": ("lora", {}, {}),
    "gaussian": ("lora", {"start": "gaussian"}, {"init_lora_weights": "gaussian"}),
    "pissa": ("lora", {"start": "pissa"}, {"init_lora_weights": "pissa"}),
    "olora": ("lora", {"start": "olora"}, {"init_lora_weights": "olora"}),
    "rslora": ("rslora", {}, {"use_rslora": True}),
    "rslora pissa": ("rslora", {"start": "pissa"}, {"use_rslora": True, "init_lora_weights": "pissa"}),
    "lora_fa": ("lora_fa", {}, {}),
    "lora_fa pissa": ("lora_fa", {"start": "pissa"}, {"init_lora_weights": "pissa"}),
    "lora_plus": ("lora_plus", {}, {}),
    "dora": ("dora", {}, {"use_dora": True}),
    "dora pissa": ("dora", {"start": "pissa"}, {"use_dora": True, "init_lora_weights": "pissa"}),
    "dora olora": ("dora", {"start": "olora"}, {"use_dora": True, "init_lora_weights": "olora"}),
}
FAMILY = sorted({method for method, *_ in CASES.values()})
# peft's own OLoRA takes the axes of a Conv1D for those of a linear layer, and its product does not chain
ON_CONV1D = [name for name in CASES if "olora" not in name]


def linears():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 7))


def conv1ds():
    torch.manual_seed(0)
    net = nn.Sequential(Conv1D(20, 12), nn.Tanh(), Conv1D(7, 20))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.3)
    return net


def convs():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, (3, 2), stride=2, padding=1), nn.Tanh(), nn.Conv2d(6, 5, 1, bias=False))


def pair(net, case, **more):
    """Return copies of `net` with the zoo's adapter and with stock peft's, r 3 and 2, scales other than 1."""
    method, settings, stock = CASES[case]
    shared = {"r": 3, "target_modules": ["0", "2"], "rank_pattern": {"2": 2}, "alpha_pattern": {"2": 5.0}}
    config = peftzoo.get_method(method).make_config(alpha=7.0, **shared, **settings)
    stock_config = peft.LoraConfig(lora_alpha=7.0, **shared, **stock, **more)
    ours, theirs = get_peft_model(copy.deepcopy(net), config), get_peft_model(copy.deepcopy(net), stock_config)
    if method == "lora_fa":
        for name, parameter in theirs.named_parameters():
            parameter.requires_grad_("lora_B" in name)
    return ours, theirs


def stock_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def tensors(layer):
    """Return peft's tensors of a layer under our names, as matrices."""
    found = {"a": layer.lora_A["default"].weight, "b": layer.lora_B["default"].weight}
    if layer.lora_magnitude_vector:
        found["m"] = layer.lora_magnitude_vector["default"].weight
    return found


def copy_over(theirs, ours):
    """Give our layers the tensors that peft's have now."""
    with torch.no_grad():
        for name, layer in stock_layers(theirs).items():
            for own, value in tensors(layer).items():
                target = getattr(zoo_layers(ours)[name].adapter("default"), own)
                target.copy_(value.reshape(target.shape))


def anchor_over(theirs, ours):
    """Give our layers the start that peft's have now: the signs of singular vectors are anybody's."""
    with torch.no_grad():
        for name, layer in stock_layers(theirs).items():
            adapter = zoo_layers(ours)[name].adapter("default")
            for own, value in tensors(layer).items():
                if hasattr(adapter, f"{own}0"):
                    getattr(adapter, f"{own}0").copy_(value)


def passed(model, x):
    """Return the output, the gradient of x, and the gradients of the trained tensors by layer and our name."""
    x = x.clone().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    (y * weights).sum().backward()
    found = {"y": y.detach(), "dx": x.grad}
    for name, layer in stock_layers(model).items():
        gradients = {own: value.grad for own, value in tensors(layer).items() if value.grad is not None}
        # a convolution's have four axes
        found |= {f"{name}.{own}": g.flatten(1) if g.dim() > 1 else g for own, g in gradients.items()}
    for name, layer in zoo_layers(model).items():
        found |= {f"{name}.{own}": value.grad for own, value in layer.adapter("default").named_parameters()}
    return found


def merged_weights(model):
    merged = copy.deepcopy(model).merge_and_unload()
    return {name: value.detach() for name, value in merged.named_parameters()}


def assert_same_function(ours, theirs, x, trained):
    got, want = passed(ours, x), passed(theirs, x)
    assert {name.rsplit(".", 1)[1] for name in want if "." in name} == set(trained)
    assert all(value.abs().max() > 1e-3 for value in want.values())
    assert_all_close(got, want)
    assert_all_close(merged_weights(ours), merged_weights(theirs))


KINDS = {
    "linear": (linears, (5, 12), {}, CASES),
    "conv1d": (conv1ds, (5, 12), {"fan_in_fan_out": True}, ON_CONV1D),
    "conv2d": (convs, (4, 3, 6, 5), {}, ["default", "gaussian"]),
}


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind, (*_, cases) in KINDS.items() for case in cases])
def test_equals_stock_peft(kind, case):
    make, shape, more, _ = KINDS[kind]
    net, x = make(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = pair(net, case, **more)
    before = {name: layer.frozen_weight().clone() for name, layer in zoo_layers(ours).items()}
    for model in (ours, theirs):
        assert_close(model(x), net(x), 1e-6, "at the start, outputs")
    anchor_over(theirs, ours)
    shake(theirs)
    copy_over(theirs, ours)
    assert_differs(ours(x), net(x))
    method = peftzoo.get_method(CASES[case][0])
    assert_same_function(ours, theirs, x, method.trains)
    for name, layer in zoo_layers(ours).items():
        assert torch.equal(layer.frozen_weight(), before[name]), "the base was written"


ANCHORED = [
    (kind, case) for kind in ("linear", "conv1d") for case in KINDS[kind][-1] if case[-5:] in ("pissa", "olora")
]


@pytest.mark.parametrize(("kind", "case"), ANCHORED)
def test_anchored_starts_are_pefts(kind, case):
    make, _, more, _ = KINDS[kind]
    ours, theirs = pair(make(), case, **more)
    for name, layer in stock_layers(theirs).items():
        adapter, want = zoo_layers(ours)[name].adapter("default"), tensors(layer)
        signs = torch.sign((adapter.a * want["a"]).sum(1))  # of a singular triplet they are anybody's
        assert_close(adapter.a, signs[:, None] * want["a"])
        assert_close(adapter.b, signs * want["b"])
        assert torch.equal(adapter.b0, adapter.b)
        assert not hasattr(adapter, "a0") or torch.equal(adapter.a0, adapter.a)
        if "m" in want:
            assert_close(adapter.m, want["m"])


def test_olora_on_conv1d_where_peft_mixes_up_the_axes():
    """Ours is what it is on the linear layer of the same weight."""
    net = conv1ds()
    settings = {"r": 3, "alpha": 7.0, "start": "olora"}
    layer = peftzoo.attach(net[0], peftzoo.LoraConfig(**settings))
    linear = nn.Linear(12, 20)
    with torch.no_grad():
        linear.weight.copy_(layer.frozen_weight())
    same = peftzoo.attach(linear, peftzoo.LoraConfig(**settings))
    assert_close(layer.adapter("default").a, same.adapter("default").a)
    assert_close(layer.adapter("default").b, same.adapter("default").b)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):  # else this test has outlived its reason
        get_peft_model(
            conv1ds(),
            peft.LoraConfig(r=3, init_lora_weights="olora", fan_in_fan_out=True, target_modules=["0"]),
        )(torch.randn(2, 12))


@pytest.mark.parametrize(("case", "kurtosis"), [("default", 1.8), ("gaussian", 3.0)])
def test_drawn_starts_have_pefts_distribution(case, kurtosis):
    net = nn.Sequential(nn.Linear(2048, 8), nn.Tanh(), nn.Linear(8, 8))
    ours, theirs = pair(net, case)
    got = zoo_layers(ours)["base_model.model.0"].adapter("default").a.detach()
    want = stock_layers(theirs)["base_model.model.0"].lora_A["default"].weight.detach()
    assert abs(got.mean()) < 0.05 * want.std()
    assert abs(got.std() / want.std() - 1) < 0.05
    assert abs((got / got.std()).pow(4).mean() - kurtosis) < 0.3
    assert torch.unique(got).numel() > 0.9 * got.numel()


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("method", FAMILY)
def test_a_rank_above_the_weights_is_refused_where_the_start_needs_it(method, start):
    with pytest.raises(ValueError, match=rf"{method}: r=9 exceeds the rank of a \[8, 12\] weight, .*start={start}"):
        peftzoo.attach(nn.Linear(12, 8), peftzoo.get_method(method).make_config(r=9, start=start))
    with pytest.raises(ValueError, match=rf"{method}: start='svd' must be one of default, gaussian"):
        peftzoo.get_method(method).make_config(start="svd")


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("method", FAMILY)
def test_small_steps_survive_half_precision(method, start):
    """The difference of two products in bfloat16 would be rounding, not the step."""
    settings = {"r": 3, "alpha": 7.0, "start": start}
    layer = peftzoo.attach(nn.Linear(12, 20), peftzoo.get_method(method).make_config(**settings))
    adapter = layer.adapter("default")
    with torch.no_grad():
        adapter.b += 1e-3
    update = adapter.delta_weight(layer.frozen_weight()).detach()
    if method != "dora":  # whose output is scaled as a whole
        half = layer.adapter("default")(torch.eye(12).bfloat16()).T.float()
        assert_close(half / update.abs().max(), update / update.abs().max(), 2e-2)


@pytest.mark.parametrize("start", ["default", "pissa", "olora"])
@pytest.mark.parametrize("method", FAMILY)
def test_every_start_goes_through_files_and_pickles(method, start, llama, tokens, tmp_path):
    config = peftzoo.get_method(method).make_config(r=3, alpha=7.0, start=start, target_modules=["q_proj", "up_proj"])
    model = shake(get_peft_model(copy.deepcopy(llama), config))
    want = logits(model, tokens)
    assert_differs(want, logits(llama, tokens))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path, low_cpu_mem_usage=True)
    assert_close(logits(again, tokens), want)
    assert_close(logits(copy.deepcopy(model), tokens), want)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), logits(llama, tokens))
    assert_close(logits(model.merge_and_unload(), tokens), want, 1e-4)


def test_lora_fa_keeps_no_input():
    """Nothing of the size of x but the weight itself is kept for the backward of the up factor."""

    def kept(method):
        layer = peftzoo.attach(nn.Linear(64, 48), peftzoo.get_method(method).make_config(r=3))
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            layer(torch.randn(1000, 64))
        return max(sizes)

    assert kept("lora_fa") <= 3 * 1000
    assert kept("lora") == 64 * 1000


def test_rslora_without_alpha_is_lora_at_rank_8():
    assert [round(peftzoo.get_method("rslora").make_config(r=r).scale, 6) for r in (2, 8, 32)] == [2.0, 1.0, 0.5]
    assert peftzoo.get_method("rslora").make_config(r=16, alpha=6).scale == 1.5


def test_lora_plus_declares_the_ratio_of_its_up_factor():
    config = peftzoo.get_method("lora_plus").make_config()
    assert config.lr_ratios == {"b": 16.0}
    config.lr_ratios["b"] = 1.0
    assert peftzoo.get_method("lora_plus").make_config().lr_ratios == {"b": 16.0}, "one config changed another"
    assert peftzoo.get_method("lora_plus").make_config(lr_ratios={"b": 4}).lr_ratios == {"b": 4}


class Sizes(TorchDispatchMode):
    """Notes the number of elements of everything that is computed."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not out._is_view():
            self.found.append((str(function), out.numel()))
        return out


def test_dora_norm_makes_neither_an_identity_nor_the_sum():
    """peft makes an identity of [in, in] and W + B A in every forward."""
    weight = torch.randn(96, 128)
    layer = peftzoo.attach(nn.Linear(128, 96), peftzoo.get_method("dora").make_config(r=3, alpha=7.0))
    adapter = shake(layer).adapter("default")
    update = adapter.factors()._replace(out_scale=None)
    with Sizes() as sizes:
        norm = dora.row_norms(weight, update.a, update.b, update.scale)
    assert sizes.found
    assert max(numel for _, numel in sizes.found) <= 128 * 3, sizes.found
    assert_close(norm, (weight + update.scale * update.b @ update.a).norm(dim=1))


@pytest.mark.parametrize("start", ["default", "gaussian", "pissa", "olora"])
def test_dora_starts_with_scales_of_exactly_1(start):
    settings = {"r": 3, "alpha": 7.0, "start": start}
    for layer in (nn.Linear(65, 127), Conv1D(127, 65)):
        adapter = peftzoo.attach(layer, peftzoo.get_method("dora").make_config(**settings)).adapter("default")
        assert torch.equal(adapter.factors().out_scale, torch.ones(127))


def test_dora_norm_is_taken_once_per_step(monkeypatch):
    """Micro-batches, generation and the recomputation under gradient checkpointing reuse it."""
    calls = []
    original = dora.row_norms
    monkeypatch.setattr(dora, "row_norms", lambda *args: calls.append(1) or original(*args))
    layer = peftzoo.attach(nn.Linear(12, 20), peftzoo.get_method("dora").make_config(r=3, alpha=7.0))
    shake(layer)
    calls.clear()
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for step in range(1, 4):
        for _ in range(3):
            layer(torch.randn(4, 12)).square().mean().backward()
        assert len(calls) == step
        optimizer.step()
        adapter = layer.adapter("default")
        want = layer.frozen_weight() + adapter.config.scale * adapter.b @ adapter.a
        assert_close(adapter.m / adapter.factors().out_scale, want.norm(dim=1))
        calls.pop()  # that was the next step's
        with torch.no_grad():
            adapter.b.add_(0.0)


def test_dora_on_a_row_of_zeros_where_peft_divides_zero_by_zero():
    linear = nn.Linear(12, 20)
    with torch.no_grad():
        linear.weight[3] = 0
    layer = peftzoo.attach(linear, peftzoo.get_method("dora").make_config(r=3, alpha=7.0))
    x = torch.randn(5, 12)
    assert torch.equal(layer(x), linear(x))
    layer(x).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.requires_grad)
    assert torch.isfinite(shake(layer)(x)).all()


def test_dora_norm_stays_in_float32_under_autocast():
    layer = shake(peftzoo.attach(nn.Linear(12, 20), peftzoo.get_method("dora").make_config(r=3, alpha=7.0)))
    want = layer.adapter("default").factors().out_scale.detach()
    layer.adapter("default")._norm.drop()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer.adapter("default").factors().out_scale.detach()
    assert torch.equal(got, want)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "base and update"])
def test_dora_drops_what_peft_drops(fused):
    net = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 7))
    method, shared = peftzoo.get_method("dora"), {"r": 3, "target_modules": ["0", "2"]}
    config = method.make_config(alpha=7.0, dropout=0.4, dropout_mode="peft", **shared)
    ours = get_peft_model(copy.deepcopy(net), config).train()
    stock = peft.LoraConfig(lora_alpha=7.0, lora_dropout=0.4, use_dora=True, **shared)
    theirs = shake(get_peft_model(copy.deepcopy(net), stock)).train()
    copy_over(theirs, ours)
    for name in ("0", "2"):
        theirs.get_submodule(f"base_model.model.{name}").lora_dropout["default"] = SeededDropout(0.4)
        if not fused:  # a layer with a hook of its own is called
            ours.get_submodule(f"base_model.model.{name}").base_layer.register_forward_hook(lambda *_: None)
    x, results = torch.randn(5, 12), []
    for model in (ours, theirs):
        torch.manual_seed(3)
        results.append(passed(model, x))
    assert_all_close(*results)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "base and update"])
def test_dora_drops_from_its_factors_alone(fused):
    layer = peftzoo.attach(nn.Linear(12, 7), peftzoo.DoraConfig(r=3, dropout=0.4)).train()
    shake(layer)
    factors, x = layer.adapter("default").factors(), torch.randn(5, 12)
    torch.manual_seed(3)
    kept = SeededDropout(0.4)(x)
    want = F.linear(x, layer.base_layer.weight) + factors.scale * kept @ factors.a.T @ factors.b.T
    want = factors.out_scale * want + layer.base_layer.bias
    if not fused:
        layer.base_layer.register_forward_hook(lambda *_: None)
    torch.manual_seed(3)
    torch.testing.assert_close(layer(x), want)


def packed(bits):
    import bitsandbytes as bnb

    torch.manual_seed(0)
    layers = []
    for in_features, out_features in ((64, 128), (128, 64)):
        weight = torch.randn(out_features, in_features) / 8
        if bits == 4:
            layer = bnb.nn.Linear4bit(
                in_features, out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        else:
            layer = bnb.nn.Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        layers.append(layer.to("cpu"))
    net = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    setattr(net, f"is_loaded_in_{bits}bit", True)  # what peft takes its layers for packed ones by
    return net


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", ["default", "rslora", "lora_fa", "dora"])
def test_equals_stock_peft_on_a_packed_base(case, bits):
    net, x = packed(bits), torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    ours, theirs = pair(net, case)
    assert torch.equal(ours(x), net(x)), "the start is not the base"
    shake(theirs)
    copy_over(theirs, ours)
    assert_differs(ours(x), net(x))
    assert_all_close(passed(ours, x), passed(theirs, x))
    ours.merge_adapter()
    theirs.merge_adapter()
    for name, layer in stock_layers(theirs).items():
        want = peft.utils.integrations.dequantize_module_weight(layer.base_layer)
        assert_close(zoo_layers(ours)[name].get_base_weight(), want)
