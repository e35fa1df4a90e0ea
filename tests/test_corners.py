"""Corners that two mechanisms share: merged and disabled, merged and moved, loaded beside another adapter."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from helpers import assert_close, assert_differs, logits, shake, zoo_layers
from peft import PeftModel, get_peft_model
from torch import nn

import peftzoo
from peftzoo import LoraConfig, PacaConfig, SorsaConfig
from peftzoo.errors import ModelError


def test_disabling_a_merged_adapter_gives_the_base(base, llama, tokens):
    model = shake(get_peft_model(base, LoraConfig(r=4)))
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), logits(llama, tokens))


def test_unloading_a_merged_adapter_gives_the_base(base, llama, tokens):
    model = shake(get_peft_model(base, LoraConfig(r=4)))
    model.merge_adapter()
    assert torch.equal(logits(model.unload(), tokens), logits(llama, tokens))


def test_a_merged_model_can_be_cast_and_unmerged(base, llama, tokens):
    model = shake(get_peft_model(base, LoraConfig(r=4)))
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), logits(copy.deepcopy(llama).bfloat16(), tokens))


def test_an_adapter_added_to_a_merged_model_knows_the_base(base, llama, tokens, tmp_path):
    model = shake(get_peft_model(base, LoraConfig(r=4)))
    model.merge_adapter()
    model.add_adapter("second", SorsaConfig(r=4))
    model.unmerge_adapter()
    model.set_adapter("second")
    want = logits(shake(model), tokens)
    peftzoo.save_adapter(model, tmp_path, "second")
    assert_close(logits(peftzoo.load_adapter(copy.deepcopy(llama), tmp_path), tokens), want)


def test_an_adapter_beside_a_stock_one_knows_the_base(base, llama, tmp_path):
    stock = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), base, "stock")
    model = peft.inject_adapter_in_model(PacaConfig(target_modules=["up_proj"]), stock, "default")
    layer = model.model.layers[0].mlp.up_proj
    assert layer.adapter("default").config.base_fingerprint == (
        get_peft_model(copy.deepcopy(llama), PacaConfig()).peft_config["default"].base_fingerprint
    )


@pytest.mark.parametrize("size", [1e-4, 1e-3])
def test_small_steps_of_sorsa_survive_bfloat16(size):
    """The update is a difference of two large products; half precision must not drown it."""
    torch.manual_seed(0)
    layer = peftzoo.attach(nn.Linear(256, 256, bias=False), SorsaConfig(r=16))
    adapter = layer.adapter("default")
    with torch.no_grad():
        for tensor in (adapter.u, adapter.s, adapter.vt):
            tensor += size * torch.randn_like(tensor)
    x = torch.randn(64, 256)
    want = x.bfloat16().double() @ adapter.double().delta_weight(layer.frozen_weight().double()).T
    got = adapter.float()(x.bfloat16())
    assert ((got.double() - want).norm() / want.norm()).item() < 1e-2


def test_mixed_batches_are_refused(base, tokens):
    model = get_peft_model(base, LoraConfig(r=4))
    with pytest.raises(ModelError, match="adapter_names"):
        model(tokens, adapter_names=["default", "__base__"])


def test_the_fast_path_of_torchs_encoder_is_refused():
    encoder = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    with pytest.raises(ModelError, match=r"0\.linear1 \(within TransformerEncoderLayer\)"):
        peftzoo.attach(encoder, LoraConfig(r=2, target_modules=["linear1"]))


@pytest.mark.parametrize("start", ["pissa", "olora", "lora_ga"])
def test_stock_lora_whose_start_edits_the_base_is_refused(llama, tmp_path, start):
    get_peft_model(copy.deepcopy(llama), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"init_lora_weights": true', f'"init_lora_weights": "{start}"'))
    with pytest.raises(ModelError, match=f"init_lora_weights={start}"):
        peftzoo.load_adapter(copy.deepcopy(llama), tmp_path)


def test_dropout_of_a_stock_lora_is_read(llama, tmp_path):
    stock = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.25)
    get_peft_model(copy.deepcopy(llama), stock).save_pretrained(tmp_path)
    model = peftzoo.load_adapter(copy.deepcopy(llama), tmp_path, is_trainable=True)
    assert model.peft_config["default"].dropout == 0.25


def test_conv1d_models_pickle(gpt2, tokens):
    model = shake(get_peft_model(copy.deepcopy(gpt2), LoraConfig(r=4)))
    assert_close(logits(pickle.loads(pickle.dumps(model)), tokens), logits(model, tokens))


def test_a_config_is_not_changed_by_its_use(llama, gpt2):
    config = LoraConfig(r=4)
    for base, layers in ((llama, 14), (gpt2, 4), (llama, 14)):
        assert len(zoo_layers(get_peft_model(copy.deepcopy(base), config))) == layers
    assert (config.target_modules, config.base_fingerprint) == ("all-linear", None)


def test_attaching_twice_gives_two_adapters_on_one_layer():
    layer = peftzoo.attach(nn.Linear(8, 6), LoraConfig(r=2))
    again = peftzoo.attach(layer, PacaConfig(r=2), "columns")
    assert again is layer
    assert set(layer.peftzoo_adapter) == {"default", "columns"}
    assert layer.active_adapters == ["columns"]


def test_adapters_in_the_dtype_of_the_base_on_request(llama, tokens):
    half = copy.deepcopy(llama).bfloat16()
    model = get_peft_model(half, LoraConfig(r=4), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert_differs(logits(shake(model), tokens).float(), logits(copy.deepcopy(llama).bfloat16(), tokens).float())


@pytest.mark.parametrize("hook", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_of_the_base_layer_are_called(hook):
    base = nn.Linear(8, 6)
    called = []
    getattr(base, f"register_{hook}")(lambda *_: called.append(1))
    peftzoo.attach(base, LoraConfig(r=2))(torch.randn(3, 8, requires_grad=True)).sum().backward()
    assert called


def test_a_loaded_model_compiles_to_one_graph(llama, tokens, tmp_path):
    shake(get_peft_model(copy.deepcopy(llama), LoraConfig(r=4))).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path).eval()
    torch._dynamo.reset()
    layer = next(iter(zoo_layers(model).values()))
    x = torch.randn(5, layer.in_features)
    assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_an_adapter_without_memory_says_so(llama, tokens):
    model = get_peft_model(copy.deepcopy(llama), PacaConfig(r=4), low_cpu_mem_usage=True)
    with pytest.raises(ModelError, match="never came from a file"):
        model(tokens)


def test_a_config_class_serves_one_method():
    with pytest.raises(ValueError, match="LoraConfig belongs to lora"):
        peftzoo.register("lora2", config=LoraConfig, paper="none")(peftzoo.get_method("lora").adapter)
    assert "lora2" not in peftzoo.list_methods()
