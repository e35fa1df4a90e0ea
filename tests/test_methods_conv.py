"""Every method of the zoo on convolutions: those that declare them, and the refusal of the others."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_close, assert_differs, assert_trained, ready, shake, tiny_config, trained_values, zoo_layers
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

import peftzoo
from peftzoo.errors import ModelError

LAYERS = ["first", "second", "mix", "last"]


@pytest.fixture(params=[name for name in peftzoo.list_methods() if "conv2d" in peftzoo.get_method(name).layers])
def conv_method(request):
    return peftzoo.get_method(request.param)


@pytest.fixture(scope="module")
def images():
    return torch.randn(6, 2, 9, 9, generator=torch.Generator().manual_seed(4))


def adapted(method, net, **settings):
    config = tiny_config(method, **({"target_modules": LAYERS} | settings))
    batches = [torch.randn(16, 2, 9, 9, generator=torch.Generator().manual_seed(5))]
    return ready(get_peft_model(copy.deepcopy(net), config), batches=batches)


def test_some_method_adapts_convolutions():
    assert [name for name in peftzoo.list_methods() if "conv2d" in peftzoo.get_method(name).layers]


def test_starts_at_base(conv_method, conv_net, images):
    model = adapted(conv_method, conv_net)
    assert len(zoo_layers(model)) == len(LAYERS)
    assert_close(model(images), conv_net(images))


def test_forward_is_delta_weight(conv_method, conv_net, images):
    """A layer is the convolution with the weight plus its update, in stride, padding, dilation and bias."""
    seen = {}
    model = shake(adapted(conv_method, conv_net))
    for name, layer in zoo_layers(model).items():
        layer.register_forward_hook(lambda _, inputs, y, name=name: seen.update({name: (inputs[0], y)}))
    model(images)
    for name, layer in zoo_layers(model).items():
        x, y = seen[name]
        changed, delta = copy.deepcopy(layer.get_base_layer()), layer.get_delta_weight("default")
        assert delta.shape == changed.weight.shape
        assert delta.abs().max() > 1e-3
        changed.weight.data += delta
        assert_close(y, changed(x))


def test_gradients_are_those_of_the_delta_weight(conv_method, conv_net, images):
    model = shake(adapted(conv_method, conv_net).double())
    layer = zoo_layers(model)["base_model.model.first"]
    tensors = [p for p in layer.parameters() if p.requires_grad]
    base, x = layer.get_base_layer(), images.double().requires_grad_()
    ours, weight = layer(x), base.weight + layer.get_delta_weight("default")
    want = F.conv2d(x, weight, base.bias, base.stride, base.padding, base.dilation)
    pull = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(6))
    for got, expected in zip(*(torch.autograd.grad(y, [x, *tensors], pull) for y in (ours, want)), strict=True):
        assert expected.abs().max() > 0
        assert_close(got, expected, 1e-9)


def test_merge_unmerge_unload(conv_method, conv_net, images):
    model = shake(adapted(conv_method, conv_net))
    want = model(images)
    assert_differs(want, conv_net(images))
    model.merge_adapter()
    assert_close(model(images), want)
    model.unmerge_adapter()
    assert_close(model(images), want)
    assert_close(copy.deepcopy(model).merge_and_unload(safe_merge=True)(images), want)
    assert torch.equal(model.unload()(images), conv_net(images))


def test_save_load(conv_method, conv_net, images, tmp_path):
    model = shake(adapted(conv_method, conv_net))
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(conv_net), tmp_path, low_cpu_mem_usage=low_memory)
        assert_close(loaded(images), model(images))
    assert_close(peftzoo.load_adapter(copy.deepcopy(conv_net), tmp_path)(images), model(images))


def test_learns(conv_method, conv_net, images):
    torch.manual_seed(0)
    model = adapted(conv_method, conv_net).train()
    start = trained_values(model)
    labels = torch.arange(6) % 3
    tensors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(tensors, lr=2e-2 * conv_method.lr_factor)
    losses = []
    for _ in range(150):
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        peftzoo.after_step(model)
        losses.append(loss.item())
    assert_trained(trained_values(model), start)
    assert losses[-1] < 0.5 * losses[0], losses[::20]


def test_what_a_convolution_does_not_declare_is_refused(zoo_method, conv_net):
    """By name, before anything is changed; grouped convolutions by all."""
    net = copy.deepcopy(conv_net)
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    for module, targets in ((grouped, ["0"]), *([] if "conv2d" in zoo_method.layers else [(net, ["first"])])):
        with pytest.raises(ModelError, match=rf"{zoo_method.name} cannot adapt {targets[0]} \(Conv2d\)"):
            peftzoo.attach(module, tiny_config(zoo_method, target_modules=targets))
        assert not zoo_layers(module)
