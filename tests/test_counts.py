"""Numbers of trained parameters: those the papers give for real models, whose shapes are built without weights."""

from __future__ import annotations

import time
from functools import cache

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

import peftzoo
from peftzoo.core.counts import count_trained
from peftzoo.errors import ModelError

LLAMA = {  # hidden, MLP, blocks, heads, key-value heads
    "LLaMA-2-7B": (4096, 11008, 32, 32, 32),
    "LLaMA-2-13B": (5120, 13824, 40, 40, 40),
    "LLaMA-2-70B": (8192, 28672, 80, 64, 8),
    "LLaMA-3-8B": (4096, 14336, 32, 32, 8),
    "Llama-3.2-3B": (3072, 8192, 28, 24, 8),
}


@cache
def empty(name):
    """Return a model of the shapes of a published one, on the meta device."""
    with torch.device("meta"):
        if name == "ViT-B":
            return ViTModel(ViTConfig())
        hidden, mlp, blocks, heads, key_values = LLAMA[name]
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            num_key_value_heads=key_values,
            head_dim=128,
        )
        return LlamaForCausalLM(config)


QV, QKVUD = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
PUBLISHED = [
    ("nola", "LLaMA-2-7B", {"k": 512}, 229_376),
    ("nola", "LLaMA-2-13B", {"k": 512}, 286_720),
    ("nola", "LLaMA-2-70B", {"k": 512}, 573_440),
    ("paca", "LLaMA-2-7B", {"r": 16}, 21_757_952),
    ("paca", "LLaMA-3-8B", {"r": 64}, 88_080_384),
    ("sorsa", "LLaMA-2-7B", {"r": 128}, 319_844_352),
    ("randlora", "Llama-3.2-3B", {"r": 32, "target_modules": QV}, 9_289_728),
    ("randlora", "LLaMA-3-8B", {"r": 30, "target_modules": QKVUD}, 56_626_112),
    ("loldu", "LLaMA-2-7B", {"r": 768}, 172_032),
    ("loldu", "ViT-B", {"r": 768, "target_modules": QV}, 18_432),
    ("salt", "LLaMA-2-7B", {"ratio": 0.1, "r": 8}, 13_397_440),
    ("lora", "LLaMA-2-7B", {"r": 16}, 39_976_960),
    # of the reference implementations that are adopted
    ("vera", "LLaMA-2-7B", {"r": 256, "target_modules": "all-linear"}, 32 * (7 * 256 + 42_496)),
    ("miss", "LLaMA-2-7B", {"r": 64, "target_modules": "all-linear"}, 32 * 64 * 42_496),
    ("kasa", "LLaMA-2-7B", {"r": 32, "target_modules": "all-linear"}, 32 * 32 * (78_080 + 7)),
]


@pytest.mark.parametrize(("method", "model", "settings", "count"), PUBLISHED, ids=lambda value: str(value)[:16])
def test_published_number(method, model, settings, count):
    base = empty(model)
    before = list(base.named_modules())
    started = time.perf_counter()
    assert count_trained(base, peftzoo.get_method(method).make_config(**settings)) == count
    assert time.perf_counter() - started < 60
    assert list(base.named_modules()) == before, "the model is left as it is"


def test_it_is_what_is_trained(method, llama):
    """On the meta device as on a model with weights, for every method and its settings that show every part."""
    config = peftzoo.get_method(method.name).make_config(**method.tiny)
    with torch.device("meta"):
        base = LlamaForCausalLM(llama.config)
    counted = count_trained(base, config)
    model = peft.get_peft_model(LlamaForCausalLM(llama.config), config)
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0


def test_modules_to_save_count(llama):
    with torch.device("meta"):
        base = LlamaForCausalLM(llama.config)
    config = peftzoo.LoraConfig(r=2)
    more = peftzoo.LoraConfig(r=2, modules_to_save=["lm_head"])
    assert count_trained(base, more) == count_trained(base, config) + llama.lm_head.weight.numel()


def test_a_model_with_weights_is_refused(llama):
    with pytest.raises(ValueError, match="meta device"):
        count_trained(llama, peftzoo.LoraConfig())


def test_what_cannot_be_counted_says_so(llama):
    with torch.device("meta"):
        base = LlamaForCausalLM(llama.config)
    with pytest.raises(ModelError, match="shira cannot be counted without weights: "):
        count_trained(base, peftzoo.get_method("shira").make_config(r=4, target_modules="all-linear"))
    with pytest.raises(ModelError, match="qq_proj"):
        count_trained(base, peftzoo.LoraConfig(target_modules=["qq_proj"]))
    with pytest.raises(ModelError, match="kasa does not fit this model"):
        count_trained(base, peftzoo.get_method("kasa").make_config(target_modules=["qq_proj"]))
