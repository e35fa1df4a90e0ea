"""What the tests of fuse share: stock models and comparisons."""

from __future__ import annotations

import copy

import peft
import torch
from helpers import shake
from peft import get_peft_model

import peftzoo

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


def unfused(model):
    model = copy.deepcopy(model)
    peftzoo.unfuse(model)
    return model
