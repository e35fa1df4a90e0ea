"""Adapter folders: read back as they were written, and refused in one line when they are not what they should be."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import peft
import pytest
import torch
from helpers import assert_close, assert_differs, logits, shake, zoo_layers
from peft import PeftModel, get_peft_model
from refusal import refused
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

import peftzoo
from peftzoo import LoraConfig, SorsaConfig
from peftzoo.core.fingerprint import difference, fingerprint


def load_stock(model, folder):
    return PeftModel.from_pretrained(model, folder)


@pytest.fixture
def target(llama):
    """Another copy of the base, to load what was saved onto."""
    return copy.deepcopy(llama)


@pytest.mark.parametrize("load", [load_stock, peftzoo.load_adapter])
@pytest.mark.parametrize("config", [LoraConfig, SorsaConfig])
def test_modules_to_save(base, llama, target, tokens, tmp_path, config, load):
    model = shake(get_peft_model(base, config(r=4, modules_to_save=["lm_head"])))
    want = logits(model, tokens)
    peftzoo.save_adapter(model, tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == ("LORA" if config is LoraConfig else "PEFTZOO")
    assert_close(logits(load(copy.deepcopy(llama), tmp_path), tokens), want)
    # the head is part of what was trained: without it, or with another in its place, nothing may load
    state = load_file(tmp_path / "adapter_model.safetensors")
    head = state.pop("base_model.model.lm_head.weight")
    for more, says in (({}, "1 missing: "), ({"base_model.model.lm_head.weight": head[1:]}, "1 misshapen: ")):
        save_file(state | more, tmp_path / "adapter_model.safetensors", {"format": "pt"})
        with refused(target, rf"{says}.*lm_head\.\S*weight"):
            peftzoo.load_adapter(target, tmp_path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias=all"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ],
    ids=str,
)
def test_stock_lora_that_computes_something_else_is_refused(base, target, tmp_path, settings, says):
    stock = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **settings)
    get_peft_model(base, stock).save_pretrained(tmp_path)
    with refused(target, f"this LoRA uses {says}, which peftzoo does not read"):
        peftzoo.load_adapter(target, tmp_path)


@pytest.mark.parametrize("rslora", [False, True])
def test_stock_lora_is_read_with_the_same_logits(base, llama, tokens, tmp_path, rslora):
    settings = {"target_modules": ["q_proj", "down_proj"], "use_rslora": rslora, "layers_to_transform": [1]}
    stock = shake(get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, **settings))).eval()
    stock.save_pretrained(tmp_path)
    ours = peftzoo.load_adapter(copy.deepcopy(llama), tmp_path, is_trainable=True)
    assert len(zoo_layers(ours)) == 2
    assert_close(logits(ours, tokens), logits(stock, tokens))
    assert_differs(logits(ours, tokens), logits(llama, tokens))


class Canary:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in settings.items() if value != "gone"}))


def only_pickle(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Canary(folder / "unpickled")))


def cut(folder, keep):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])


def drop_tensor(folder):
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    del state[sorted(state)[3]]
    save_file(state, path, {"format": "pt"})


DAMAGE = {
    "no folder": (lambda folder: folder.rename(folder.with_name("moved")), "no adapter_config.json"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json"),
    "broken json": (lambda folder: (folder / "adapter_config.json").write_text('{"r": 4,'), "adapter_config.json: "),
    "a list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "not an object"),
    "not utf-8": (lambda folder: (folder / "adapter_config.json").write_bytes(b'{"\xff'), "adapter_config.json: "),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "has no adapter_model.safetensors$",
    ),
    "only a pickle": (only_pickle, "a pickle can run code and is not read"),
    "truncated": (lambda folder: cut(folder, -100), "adapter_model.safetensors: .*incomplete"),
    "header cut": (lambda folder: cut(folder, 6), "adapter_model.safetensors: "),
    "a tensor less": (drop_tensor, "1 missing: "),
    "no type": (lambda folder: edit_config(folder, peft_type="gone"), "peft_type"),
    "strange type": (lambda folder: edit_config(folder, peft_type="NOPE"), "peft_type.*NOPE"),
    "strange rank": (lambda folder: edit_config(folder, r="four"), "r='four'"),
    "other layers": (lambda folder: edit_config(folder, target_modules=["q_porj"]), "q_porj .did you mean q_proj"),
}


@pytest.mark.parametrize("config", [LoraConfig, SorsaConfig])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folder_is_refused(base, target, tokens, tmp_path, config, damage):
    folder = tmp_path / "adapter"
    peftzoo.save_adapter(shake(get_peft_model(base, config(r=4))), folder)
    want = logits(target, tokens)
    harm, says = DAMAGE[damage]
    harm(folder)
    with refused(target, says):
        peftzoo.load_adapter(target, folder)
    assert_close(logits(target, tokens), want)
    assert not (folder / "unpickled").exists()


@pytest.mark.parametrize("config", [LoraConfig, SorsaConfig])
@pytest.mark.parametrize("layers", [1, 3])
def test_adapter_of_a_model_of_another_depth_is_refused(base, llama, tmp_path, config, layers):
    peftzoo.save_adapter(shake(get_peft_model(base, config(r=4, target_modules=["q_proj"]))), tmp_path)
    torch.manual_seed(0)
    sizes = copy.deepcopy(llama.config)
    sizes.num_hidden_layers = layers
    other = LlamaForCausalLM(sizes)
    with refused(other, "does not fit this model|made on another base"):
        peftzoo.load_adapter(other, tmp_path)


def test_fingerprint(base, llama):
    expected = fingerprint(llama)
    assert fingerprint(get_peft_model(base, LoraConfig(modules_to_save=["lm_head"])).get_base_model()) == expected
    assert difference(copy.deepcopy(llama).bfloat16(), expected) is None
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.02)
    assert difference(other, expected).startswith("lm_head.weight samples to [")
    assert "has no parameter" in difference(nn.Linear(2, 2), expected)
    with torch.device("meta"):
        empty = LlamaForCausalLM(llama.config)
    assert fingerprint(empty) is None
    assert difference(empty, expected) is None
