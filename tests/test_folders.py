"""Adapter folders: read back as they were written, and refused in one line when they are not what they should be."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path

import peft
import pytest
import torch
from helpers import assert_all_close, assert_close, assert_differs, logits, shake, zoo_layers
from peft import PeftModel, get_peft_model
from refusal import refused
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import peftzoo
from peftzoo import LoraConfig, SorsaConfig
from peftzoo.cli import app
from peftzoo.core.fingerprint import difference, fingerprint
from peftzoo.core.lora_folder import write_lora_folder
from peftzoo.errors import ModelError


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
        ({"bias": "all"}, "bias=all"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
    ids=str,
)
def test_stock_lora_that_computes_something_else_is_refused(base, target, tmp_path, settings, says):
    stock = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **settings)
    get_peft_model(base, stock).save_pretrained(tmp_path)
    with refused(target, f"this LoRA uses {says}, which peftzoo does not read"):
        peftzoo.load_adapter(target, tmp_path)


# what a stock folder says, and the method of the zoo that it is
STOCK = {
    "lora": ({}, "lora"),
    "rslora": ({"use_rslora": True}, "rslora"),
    "dora": ({"use_dora": True}, "dora"),
    "dora with rslora's scale": ({"use_dora": True, "use_rslora": True}, "dora"),
    "ranks and alphas of single layers": (
        {"rank_pattern": {"q_proj": 2, r".*\.1\.mlp\.down_proj": 3}, "alpha_pattern": {"1.self_attn.q_proj": 5}},
        "lora",
    ),
    "the same with rslora": (
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"1.self_attn.q_proj": 5}},
        "rslora",
    ),
    "the same with both": (
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 5}},
        "dora",
    ),
}


def gradients(model, tokens, names):
    """Return the gradients of a loss by layer and by the name in the zoo."""
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        for ending, own in names.items():
            if name.endswith(ending) and parameter.requires_grad:
                found[name.removesuffix(ending) + own] = parameter.grad
    return found


OURS = {f".peftzoo_adapter.default.{name}": f".{name}" for name in ("a", "b", "m")}
THEIRS = {
    ".lora_A.default.weight": ".a",
    ".lora_B.default.weight": ".b",
    ".lora_magnitude_vector.default.weight": ".m",
}


@pytest.mark.parametrize("case", STOCK)
def test_stock_lora_is_read_as_the_method_it_is_and_trains_on(base, llama, tokens, tmp_path, case):
    settings, method = STOCK[case]
    stock = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], **settings)
    stock = shake(get_peft_model(base, stock)).eval()
    stock.save_pretrained(tmp_path)
    ours = peftzoo.load_adapter(copy.deepcopy(llama), tmp_path, is_trainable=True)
    assert ours.peft_config["default"].method == method
    assert_close(logits(ours, tokens), logits(stock, tokens))
    assert_differs(logits(ours, tokens), logits(llama, tokens))
    got, want = gradients(ours, tokens, OURS), gradients(stock, tokens, THEIRS)
    assert len(want) == 4 * (3 if method == "dora" else 2)
    assert_all_close(got, want)
    # and back: what we write of it stock peft reads again, with the same settings where they are said the same way
    peftzoo.save_adapter(ours, tmp_path / "again")
    again = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "again").eval()
    assert not zoo_layers(again)
    assert_close(logits(again, tokens), logits(stock, tokens))
    stored = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (stored["use_dora"], stored["use_rslora"]) == (method == "dora", method == "rslora")
    if not settings or (len(settings) == 1 and "rank_pattern" not in settings):
        assert (stored["r"], stored["lora_alpha"], stored["rank_pattern"]) == (4, 6, {})


def test_stock_lora_of_single_blocks(base, llama, tokens, tmp_path):
    settings = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}
    stock = shake(get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, **settings))).eval()
    stock.save_pretrained(tmp_path)
    ours = peftzoo.load_adapter(copy.deepcopy(llama), tmp_path)
    assert len(zoo_layers(ours)) == 2
    assert_close(logits(ours, tokens), logits(stock, tokens))


def test_stock_lora_is_read_as_the_method_that_is_asked_for(base, llama, tokens, target, tmp_path):
    stock = shake(get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"]))).eval()
    stock.save_pretrained(tmp_path)
    ours = peftzoo.load_adapter(copy.deepcopy(llama), tmp_path, is_trainable=True, method="lora_fa")
    assert_close(logits(ours, tokens), logits(stock, tokens))
    assert {name.rsplit(".", 1)[1] for name, p in ours.named_parameters() if p.requires_grad} == {"b"}
    for method in ("dora", "rslora", "sorsa"):
        with refused(target, f"is a plain LoRA, which {method} does not compute"):
            peftzoo.load_adapter(target, tmp_path, method=method)


WRITTEN = {  # method: settings, flags in the folder, the method it is read back as
    "lora": ({}, (False, False), "lora"),
    "rslora": ({"alpha": 3.0}, (False, True), "rslora"),
    "lora_fa": ({}, (False, False), "lora"),
    "lora_plus": ({}, (False, False), "lora"),
    "dora": ({}, (True, False), "dora"),
}


@pytest.mark.parametrize("start", ["default", "pissa", "olora"])
@pytest.mark.parametrize("method", WRITTEN)
def test_the_lora_family_is_written_as_stock_folders(base, llama, tokens, tmp_path, method, start):
    """Also where layers differ in rank and alpha, and where one has no adapter at all."""
    settings, flags, back_as = WRITTEN[method]
    patterns = {
        "rank_pattern": {"q_proj": 3, "layers.0.mlp.up_proj": 0, "layers.1.mlp.gate_proj": 5},
        "alpha_pattern": {"o_proj": 11.0},
    }
    config = peftzoo.get_method(method).make_config(**{"r": 4, "alpha": 6.0, "start": start} | patterns | settings)
    model = shake(get_peft_model(base, config))
    want = logits(model, tokens)
    assert len(zoo_layers(model)) == 13
    peftzoo.save_adapter(model, tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "LORA"
    assert (stored["use_dora"], stored["use_rslora"]) == flags
    widened = 2 if start != "default" and method != "lora_fa" else 1
    assert stored["r"] == 4 * widened
    assert sorted(stored["rank_pattern"].values()) == [3 * widened] * 2 + [5 * widened]
    stock = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path).eval()
    assert not zoo_layers(stock)
    assert_close(logits(stock, tokens), want)
    ours = peftzoo.load_adapter(copy.deepcopy(llama), tmp_path)
    assert ours.peft_config["default"].method == back_as
    assert_close(logits(ours, tokens), want)


@pytest.mark.parametrize("start", ["default", "pissa"])
def test_stock_folders_of_convolutions_both_ways(conv_net, tmp_path, start):
    conv_net = copy.deepcopy(conv_net)
    conv_net.second.dilation = (1, 1)  # which peft leaves out of its A
    x = torch.randn(3, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    names = [name for name, module in conv_net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    config = LoraConfig(r=2, alpha=3.0, target_modules=names, start=start)
    model = shake(get_peft_model(copy.deepcopy(conv_net), config)).eval()
    peftzoo.save_adapter(model, tmp_path / "ours")
    shapes = {value.dim() for value in load_file(tmp_path / "ours" / "adapter_model.safetensors").values()}
    assert shapes == {2, 4}
    with torch.no_grad():
        want = model(x)
        assert_differs(want, conv_net(x))
        assert_close(PeftModel.from_pretrained(copy.deepcopy(conv_net), tmp_path / "ours").eval()(x), want)
        assert_close(peftzoo.load_adapter(copy.deepcopy(conv_net), tmp_path / "ours").eval()(x), want)
        stock = peft.LoraConfig(r=2, lora_alpha=3, target_modules=names)
        stock = shake(get_peft_model(copy.deepcopy(conv_net), stock), seed=9).eval()
        stock.save_pretrained(tmp_path / "theirs")
        assert_close(peftzoo.load_adapter(copy.deepcopy(conv_net), tmp_path / "theirs").eval()(x), stock(x))


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("rank", [1, 3, 64])
def test_the_nearest_lora_of_a_rank(base, llama, tokens, tmp_path, method, rank):
    """The error that comes back is that of the folder, and no other LoRA of this rank could do better."""
    model = shake(get_peft_model(base, peftzoo.get_method(method).make_config(r=4, alpha=6.0)))
    error = write_lora_folder(model, tmp_path, rank=rank)
    stock = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path).eval()
    wanted = {name: layer.get_delta_weight("default").detach() for name, layer in zoo_layers(model).items()}
    found = {
        name: module.get_delta_weight("default").detach() for name, module in stock.named_modules() if name in wanted
    }
    assert found.keys() == wanted.keys()
    off = sum((found[name] - want).square().sum() for name, want in wanted.items())
    rest = sum(torch.linalg.svdvals(want)[rank:].square().sum() for want in wanted.values())
    size = sum(want.square().sum() for want in wanted.values())
    assert_close(torch.tensor(error), (off / size).sqrt(), 1e-5)
    assert_close(torch.tensor(error), (rest / size).sqrt(), 1e-5)
    if rank == 64 or (method == "dora" and rank > 32):
        assert error < 1e-6
        assert_close(logits(stock, tokens), logits(model, tokens), 1e-4)
    else:
        assert error > 1e-2
    assert not json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"]


def test_what_is_no_lora_needs_a_rank(base, tmp_path, monkeypatch):
    model = shake(get_peft_model(base, LoraConfig(r=4)))
    monkeypatch.setattr(
        type(zoo_layers(model)["base_model.model.model.layers.0.mlp.up_proj"].adapter("default")),
        "factors",
        lambda self: None,
    )
    with pytest.raises(ModelError, match="a lora adapter is not low-rank; name the rank"):
        write_lora_folder(model, tmp_path)
    with pytest.raises(ModelError, match="adapter 'default' is on no layer"):
        write_lora_folder(
            get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig(target_modules=["0"], rank_pattern={"0": 0})),
            tmp_path,
        )


def test_export_of_a_rank_says_its_error(base, llama, tmp_path):
    llama.save_pretrained(tmp_path / "base")
    model = shake(get_peft_model(base, peftzoo.get_method("dora").make_config(r=4, alpha=6.0)))
    peftzoo.save_adapter(model, tmp_path / "adapter")
    runner, flags = CliRunner(), ["--lora", "--base", str(tmp_path / "base")]
    said = runner.invoke(
        app, ["export", str(tmp_path / "adapter"), "--out", str(tmp_path / "near"), "--rank", "3", *flags]
    )
    assert said.exit_code == 0, said.output
    error = float(re.search(r"relative error (\S+) of the update", said.output)[1])
    assert 0.05 < error < 1
    same = runner.invoke(app, ["export", str(tmp_path / "adapter"), "--out", str(tmp_path / "same"), *flags])
    assert same.exit_code == 0, same.output
    assert "relative error" not in same.output
    assert json.loads((tmp_path / "same" / "adapter_config.json").read_text())["use_dora"]


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
