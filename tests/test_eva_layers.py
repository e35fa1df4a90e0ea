"""The EVA start on every kind of layer and base."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_close, assert_differs, logits, shake
from peft import get_peft_model
from test_eva import TEXTS, adapted, calibrated, directions, noise, off, starts
from test_methods import quantised
from torch import nn

import peftzoo
from peftzoo.core.calibrate import calibrate
from peftzoo.errors import ModelError
from peftzoo.methods.eva import EvaConfig


@pytest.mark.parametrize("bits", [4, 8])
def test_on_a_quantised_base(wide_llama, tokens, bits):
    model = get_peft_model(quantised(wide_llama, bits), EvaConfig(r=3, alpha=6.0))
    with model.disable_adapter():
        want = logits(model, tokens)
    calibrate(model, TEXTS)
    plain = starts(calibrated(wide_llama))
    kept = [name for name, a in starts(model).items() if name in plain and len(plain[name]) == len(a) == 3]
    assert kept
    assert sum(off(starts(model)[name], plain[name]) < 0.5 for name in kept) > len(kept) / 2, "of about these inputs"
    assert_close(logits(model, tokens), want)


def test_native_to_transformers(llama, tokens, tmp_path):
    model = copy.deepcopy(llama)
    model.add_adapter(EvaConfig(r=3, alpha=6.0))
    with pytest.raises(ModelError, match="calibrate"):
        logits(model, tokens)
    calibrate(model, TEXTS)
    want = logits(shake(model), tokens)
    assert_differs(want, logits(llama, tokens))
    model.save_pretrained(tmp_path)
    loaded = copy.deepcopy(llama)
    loaded.load_adapter(str(tmp_path))
    assert_close(logits(loaded, tokens), want)


def test_on_convolutions(conv_net):
    """The input of a convolution are the patches its weight [out, in * kh * kw] is multiplied with."""
    net = copy.deepcopy(conv_net)
    net.second.padding_mode = "circular"
    images = torch.randn(6, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    config = EvaConfig(r=2, rho=1.0, target_modules=["first", "second", "mix", "last"])
    model = peftzoo.attach(copy.deepcopy(net), config)
    calibrate(model, [images])
    x = net.first(images).relu()
    padded = nn.functional.pad(x, net.second._reversed_padding_repeated_twice, "circular")
    patches = nn.functional.unfold(padded, (3, 2), dilation=(1, 2)).mT.flatten(0, 1).detach().double()
    assert torch.allclose(
        patches.float() @ net.second.weight.flatten(1).T, net.second(x).permute(0, 2, 3, 1).flatten(0, 2), atol=1e-5
    )
    assert off(model.second.adapter("default").a.detach(), directions(patches, 2)[0]) < 1e-5


def test_a_layer_called_twice_counts_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(12, 12)

        def forward(self, x):
            return self.inner(self.inner(x).tanh())

    net = Twice()
    model = peftzoo.attach(copy.deepcopy(net), EvaConfig(r=3, rho=1.0, target_modules=["inner"]))
    calibrate(model, noise(1))
    (x,) = noise(1)
    rows = torch.cat((x, net.inner(x).tanh())).detach().double()
    assert off(model.inner.adapter("default").a.detach(), directions(rows, 3)[0]) < 1e-5


def test_half_precision_base(llama, tokens):
    model = adapted(copy.deepcopy(llama).to(torch.bfloat16))
    calibrate(model, TEXTS)
    assert all(a.dtype == torch.float32 for a in starts(model).values())
    assert_close(logits(model, tokens).float(), logits(copy.deepcopy(llama).bfloat16(), tokens).float(), 2e-2)


@pytest.mark.parametrize("pca", ["covariance", "incremental"])
def test_autocast_does_not_reach_the_pca(pca):
    found = []
    for enabled in (True, False):
        layer = peftzoo.attach(nn.Linear(40, 5), EvaConfig(r=3, rho=1.0, pca=pca))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            calibrate(layer, noise(width=40))
        found.append(layer.adapter("default").a.detach())
    assert_close(*found)
