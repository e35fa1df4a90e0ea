"""What the suite over the methods does not see: targets, names, mixed adapters, the registry, configs, merging."""

from __future__ import annotations

import copy
import dataclasses
import re
from importlib.metadata import EntryPoint
from itertools import pairwise

import peft
import pytest
import torch
from helpers import assert_close, assert_differs, logits, shake, zoo_layers
from peft import PeftConfig, PeftModel, get_peft_model
from refusal import refused
from safetensors.torch import load_file
from torch import nn
from train_helpers import small_recipe
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import peftzoo
from peftzoo import LinearAdapter, LoraConfig, PacaConfig, SorsaConfig, ZooConfig
from peftzoo.core import registry
from peftzoo.core.lora_folder import write_lora_folder
from peftzoo.errors import ModelError
from peftzoo.train.loop import train

# ---------------------------------------------------------------- targets


class Mixed(nn.Module):
    """One layer of every kind that is not for us, and one that is."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(4, 5)
        self.conv = nn.Conv1d(3, 3, 1)
        self.table = nn.Embedding(3, 4)
        self.attention = nn.MultiheadAttention(8, 2)


def test_one_misspelt_pattern_of_several_is_refused(base):
    there = "down_proj x2, gate_proj x2, k_proj x2, lm_head x1, o_proj x2, q_proj x2, up_proj x2, v_proj x2$"
    with refused(base, rf"^target_modules: v_porj \(did you mean v_proj\?\) matches no layer .*: {there}"):
        get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_porj", "o_proj"]))


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (r"model\.layers\.1\..*\.(q|v)_proj", {"layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"}),
        (["0.mlp.up_proj"], {"layers.0.mlp.up_proj"}),
        (["lm_head"], {"lm_head"}),
    ],
)
def test_patterns_that_match(base, targets, layers):
    found = zoo_layers(get_peft_model(base, LoraConfig(target_modules=targets)))
    assert {name.removeprefix("base_model.model.").removeprefix("model.") for name in found} == layers


def test_all_linear_is_all_but_the_head(base):
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    found = zoo_layers(get_peft_model(base, LoraConfig()))
    assert {name.removeprefix("base_model.model.") for name in found} == linear - {"lm_head"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_modules": r".*\.nothing"}, r"\.\*\\\.nothing matches no layer"),
        ({"target_modules": "q_proj"}, r"'q_proj' is a regular expression .* write \['q_proj'\]"),
        ({"target_modules": ["embed_tokens"]}, r"model\.embed_tokens \(Embedding\)"),
        ({"target_modules": ["layers.1"]}, r"model\.layers\.1 \(LlamaDecoderLayer\)"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "every layer they match is excluded"),
        ({"exclude_modules": ".*"}, "every layer they match is excluded"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, "excluded; check .* layer indices"),
    ],
    ids=str,
)
def test_targets_of_a_model_that_are_refused(base, settings, says):
    with refused(base, says):
        get_peft_model(base, LoraConfig(**settings))


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("conv", r"conv \(Conv1d\)"),
        ("table", r"table \(Embedding\)"),
        ("attention", r"attention \(MultiheadAttention\)"),
        ("out_proj", r"attention\.out_proj \(NonDynamicallyQuantizableLinear\)"),
        ("all-linear", r"attention\.out_proj \(NonDynamicallyQuantizableLinear\)"),
    ],
)
def test_layers_of_other_types_are_refused_by_name(target, says):
    model = Mixed()
    with refused(model, f"lora cannot adapt {says}"):
        peftzoo.attach(model, LoraConfig(r=2, target_modules=target if target == "all-linear" else ["plain", target]))


def moe(config, model, **sizes):
    torch.manual_seed(0)
    shared = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2}
    return model(config(**shared, **heads, max_position_embeddings=32, **sizes)).eval()


@pytest.mark.parametrize(
    "make",
    [
        lambda: moe(MixtralConfig, MixtralForCausalLM, num_local_experts=3),
        lambda: moe(Qwen3MoeConfig, Qwen3MoeForCausalLM, num_experts=4, moe_intermediate_size=8, head_dim=8),
    ],
    ids=["mixtral", "qwen3-moe"],
)
def test_experts_in_one_parameter_are_refused(make):
    model = make()
    assert any(parameter.dim() == 3 for parameter in model.parameters()), "no experts: nothing would be tested"
    for targets in ("all-linear", ["gate_up_proj"], ["q_proj", "down_proj"], ["experts.down_proj"]):
        with refused(model, r"experts stored as 3-D parameters .*: model\.layers\.0\.mlp\.experts\.\w+"):
            get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    for targets in (["experts"], r".*\.(q_proj|experts)"):
        with refused(model, r"lora cannot adapt model\.layers\.0\.mlp\.experts \(\w+Experts\)"):
            get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    adapted = shake(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "o_proj"])))
    assert len(zoo_layers(adapted)) == 2


# ---------------------------------------------------------------- names of adapters

BAD_NAMES = ["../x", "/abs", "a/b", "", ".", "..", "a.b", "x" * 65, "dеfault", "default\n", "-x", "keys", "train"]  # noqa: RUF001


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
@pytest.mark.filterwarnings("ignore:Unexpected")
def test_adapter_names_that_are_refused(base, llama, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    peftzoo.save_adapter(get_peft_model(copy.deepcopy(llama), PacaConfig()), "saved")
    ways = {
        "get_peft_model": lambda model: get_peft_model(model, LoraConfig(), adapter_name=name),
        "attach": lambda model: peftzoo.attach(model, LoraConfig(), name),
        "attach to one layer": lambda model: peftzoo.attach(model.lm_head, LoraConfig(), name),
        "load_adapter": lambda model: peftzoo.load_adapter(model, "saved", name),
    }
    if name:  # of transformers: takes an empty name for none
        ways["transformers"] = lambda model: model.add_adapter(LoraConfig(), adapter_name=name)
    for call in ways.values():
        with refused(base, "^adapter name "):
            call(base)
    model = get_peft_model(base, LoraConfig())
    with refused(model, "^adapter name "):
        model.add_adapter(name, PacaConfig())
    assert list(model.peft_config) == ["default"]
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("name", ["x" * 64, "My-2nd_adapter", "7"])
def test_adapter_names_that_are_fine(base, llama, tokens, name):
    model = shake(get_peft_model(base, LoraConfig(), adapter_name=name))
    assert_differs(logits(model, tokens), logits(llama, tokens))


# ---------------------------------------------------------------- several adapters, of several methods


@pytest.fixture
def mixed(base):
    """LoRA on all layers, SORSA on the attention, PaCA on two kinds of layers; each moved from its start."""
    model = get_peft_model(base, LoraConfig(r=4, alpha=6.0))
    model.add_adapter("second", SorsaConfig(r=3, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("third", PacaConfig(r=5, alpha=9.0, target_modules=["q_proj", "up_proj"]))
    for seed, name in enumerate(("default", "second", "third")):
        model.set_adapter(name)
        shake(model, seed)
    return model


def alone(llama, model, *names):
    """Return the base with the updates of the named adapters added to its weights by hand."""
    plain = copy.deepcopy(llama)
    with torch.no_grad():
        for path, layer in zoo_layers(model).items():
            weight = plain.get_submodule(path.removeprefix("base_model.model.")).weight
            for name in set(names) & set(layer.peftzoo_adapter):
                weight += layer.adapter(name).delta_weight(layer.frozen_weight())
    return plain


def test_adapters_of_different_methods_on_one_model(mixed, llama, tokens):
    seen = []
    for names in (["default"], ["second"], ["third"], ["default", "second"], ["third", "default", "second"]):
        mixed.base_model.set_adapter(names)
        seen.append(logits(mixed, tokens))
        assert_close(seen[-1], logits(alone(llama, mixed, *names), tokens), 1e-4)
        assert all(active in names for layer in zoo_layers(mixed).values() for active in layer.active_adapters)
        trained = {
            name.split(".peftzoo_adapter.")[1].split(".")[0] for name, p in mixed.named_parameters() if p.requires_grad
        }
        assert trained == set(names)
    for first, second in pairwise(seen):
        assert_differs(first, second)
    with mixed.disable_adapter():
        assert_close(logits(mixed, tokens), logits(llama, tokens))
    mixed.merge_adapter()
    assert_close(logits(mixed, tokens), seen[-1], 1e-4)
    mixed.unmerge_adapter()
    assert_close(logits(mixed, tokens), seen[-1])


def test_layers_without_the_active_adapter_are_the_base(mixed, llama, tokens):
    mixed.set_adapter("second")
    layer = mixed.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    x = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), layer.base_layer(x))
    assert set(layer.peftzoo_adapter) == {"default", "third"}


def test_deleting_one_adapter_leaves_the_others(mixed, llama, tokens):
    mixed.set_adapter("third")
    want = logits(mixed, tokens)
    mixed.delete_adapter("second")
    assert_close(logits(mixed, tokens), want)
    assert not [key for key in mixed.state_dict() if ".second." in key]
    mixed.set_adapter("default")
    assert_close(logits(mixed, tokens), logits(alone(llama, mixed, "default"), tokens), 1e-4)


def test_each_of_several_adapters_is_saved_and_read_back(mixed, llama, tokens, tmp_path):
    wanted = {}
    for name in ("default", "second", "third"):
        mixed.set_adapter(name)
        wanted[name] = logits(mixed, tokens)
        peftzoo.save_adapter(mixed, tmp_path / f"by-{name}", name)
        assert {path.name for path in (tmp_path / f"by-{name}").iterdir()} >= {
            "adapter_config.json", "adapter_model.safetensors"
        }  # fmt: skip
        loaded = peftzoo.load_adapter(copy.deepcopy(llama), tmp_path / f"by-{name}")
        assert_close(logits(loaded, tokens), wanted[name])
    mixed.save_pretrained(tmp_path)
    beside = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path)
    for name in ("second", "third"):
        beside.load_adapter(tmp_path / name, name)
    for name, want in wanted.items():
        beside.set_adapter(name)
        assert_close(logits(beside, tokens), want)
        assert type(beside.peft_config[name]) is type(mixed.peft_config[name])


# ---------------------------------------------------------------- the registry


@pytest.fixture
def own_registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))


@pytest.fixture
def dense(own_registry):
    """A method that is not low-rank: the whole update is trained; counts the calls of `after_step`."""

    @dataclasses.dataclass
    class DenseConfig(ZooConfig):
        """Settings of the whole update."""

    @peftzoo.register("dense", config=DenseConfig, paper="none", trains=("delta",))
    class Dense(LinearAdapter):
        """Trains the whole update."""

        calls = 0

        def __init__(self, config, in_features, out_features):
            super().__init__(config, in_features, out_features)
            self.delta = nn.Parameter(torch.empty(out_features, in_features))

        def init(self, weight):
            self.delta.zero_()

        def delta_weight(self, weight):
            return self.config.scale * self.delta

        def forward(self, x):
            return x @ self.delta_weight(None).T.to(x.dtype)

        def after_step(self):
            Dense.calls += 1

    return Dense


def test_a_method_that_is_registered_is_a_method(dense, base, llama, tokens, tmp_path):
    assert "dense" in peftzoo.list_methods()
    assert peftzoo.get_method("dense").summary == "Trains the whole update."
    config = ZooConfig(method="dense", alpha=4.0)
    assert (type(config), config.r) == (peftzoo.get_method("dense").config, 8)
    model = get_peft_model(base, config)
    assert_close(logits(model, tokens), logits(llama, tokens))
    want = logits(shake(model), tokens)
    assert_differs(want, logits(llama, tokens))
    model.save_pretrained(tmp_path)
    assert_close(logits(PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path), tokens), want)
    with pytest.raises(ModelError, match="a dense adapter cannot be written as a plain LoRA"):
        write_lora_folder(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(logits(model, tokens).float(), want, 5e-2)
    assert_close(logits(model.merge_and_unload(), tokens), want, 1e-4)


def test_after_step_comes_once_per_optimizer_step(dense, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train(small_recipe("method={name: dense}", "train.gradient_accumulation_steps=2", "data.eval=null"))
    layers = {key.rsplit(".", 1)[0] for key in load_file(result.folder / "final" / "adapter_model.safetensors")}
    assert dense.calls == result.steps * len(layers) > 0


def test_names_in_the_registry(own_registry):
    with pytest.raises(ValueError, match=r"'lora' is taken by peftzoo\.methods\.lora"):
        peftzoo.register("lora", config=LoraConfig, paper="")(LinearAdapter)
    with pytest.raises(ValueError, match="'vera' is taken by peft"):
        peftzoo.adopt("vera", config=peft.VeraConfig, paper="", summary="")
    with pytest.raises(KeyError, match="unknown method 'sorsaa'; did you mean sorsa"):
        peftzoo.get_method("sorsaa")
    with pytest.raises(KeyError, match=f"known are {', '.join(peftzoo.list_methods())}"):
        peftzoo.get_method("something else")


def test_plugins(own_registry, tmp_path, monkeypatch):
    (tmp_path / "zoo_plugin.py").write_text(
        "import peft\nfrom peftzoo import adopt\n"
        "adopt('pluginned', config=peft.BOFTConfig, paper='', summary='From elsewhere.')\n"
    )
    (tmp_path / "zoo_broken.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = [
        EntryPoint(name, value, "peftzoo.methods")
        for name, value in {"bad": "zoo_broken", "worse": "zoo_absent:x", "good": "zoo_plugin"}.items()
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: found if group == "peftzoo.methods" else [])
    registry._load_plugins.cache_clear()
    with pytest.warns(UserWarning, match="method plugin") as warned:
        names = peftzoo.list_methods()
    assert "pluginned" in names
    assert {"lora", "sorsa"} < set(names)
    messages = [str(warning.message) for warning in warned]
    assert len(messages) == 2
    assert messages[0] == "method plugin bad (zoo_broken) failed to load: No module named 'no_such_module'"
    assert peftzoo.get_method("pluginned").adopted


def test_a_method_must_say_what_it_adds(base):
    class Silent(LinearAdapter):
        def init(self, weight):
            pass

    adapter = Silent(LoraConfig(), 3, 4)
    for call in (lambda: adapter(torch.ones(2, 3)), lambda: adapter.delta_weight(torch.ones(4, 3))):
        with pytest.raises(TypeError, match=r"Silent gives neither factors\(\) nor forward\(\) and delta_weight\(\)"):
            call()
    with pytest.raises(TypeError, match="abstract"):
        LinearAdapter(LoraConfig(), 3, 4)


# ---------------------------------------------------------------- configs


def test_zoo_config_becomes_the_config_of_its_method():
    config = ZooConfig(method="sorsa", r=3, gamma=0.5)
    assert (type(config), config.r, config.gamma, config.method) == (SorsaConfig, 3, 0.5, "sorsa")
    for settings, says in (
        ({}, "ZooConfig needs method="),
        ({"method": "sorsaa"}, "unknown method 'sorsaa'; did you mean sorsa"),
        ({"method": "vera"}, "vera is peft's own method; use VeraConfig"),
        ({"method": "lora", "gamma": 1.0}, "gamma is not a setting of lora"),
        (
            {"method": "lora", "target_modules": "*q_proj"},
            r"lora: target_modules='\*q_proj' must be .*nothing to repeat",
        ),
        ({"method": "lora", "exclude_modules": "("}, r"lora: exclude_modules='\(' must be "),
    ):
        with pytest.raises(ValueError, match=says):
            ZooConfig(**settings)
    with pytest.raises(ValueError, match="SorsaConfig is the config of sorsa, not of paca"):
        SorsaConfig(method="paca")


def test_one_config_starts_many_models(llama, wide_llama, tokens):
    config = LoraConfig(r=4)
    for base in (llama, llama, wide_llama):
        model = get_peft_model(copy.deepcopy(base), config)
        assert_close(logits(model, tokens), logits(base, tokens))
        assert_differs(logits(shake(model), tokens), logits(base, tokens))


def test_a_config_from_a_file_starts_nothing_unless_told_so(base, llama, tokens, tmp_path):
    peftzoo.get_method("sorsa")
    get_peft_model(base, SorsaConfig(r=4)).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is SorsaConfig
    model = get_peft_model(copy.deepcopy(llama), config)
    for use in (lambda: model(tokens), model.merge_adapter):
        with pytest.raises(ModelError, match=r"never came from a file.*replace\(config, base_fingerprint=None\)"):
            use()
    anew = dataclasses.replace(config, base_fingerprint=None, inference_mode=False)
    model = get_peft_model(copy.deepcopy(llama), anew)
    assert_close(logits(model, tokens), logits(llama, tokens))
    assert any(parameter.requires_grad for parameter in model.parameters())


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_merge_that_is_not_finite_changes_nothing(base, tokens, value, call):
    model = shake(get_peft_model(base, LoraConfig(r=4)))
    layers = zoo_layers(model)
    weights = {name: layer.get_base_weight().clone() for name, layer in layers.items()}
    last = list(layers.values())[-1]
    with torch.no_grad():
        last.adapter("default").b.fill_(value)
        last.adapter("default").a.fill_(100)
    with pytest.raises(
        ModelError, match=rf"merging default into {re.escape(last.layer_name)} gives values that are not"
    ):
        getattr(model, call)()
    assert zoo_layers(model) == layers
    for name, layer in layers.items():
        assert torch.equal(layer.get_base_weight(), weights[name])
        assert not layer.merged


def test_merging_twice_warns_and_does_nothing(base):
    model = shake(get_peft_model(base, LoraConfig(r=4)))
    model.merge_adapter()
    once = {name: layer.get_base_weight().clone() for name, layer in zoo_layers(model).items()}
    with pytest.warns(UserWarning, match="already merged, nothing to do"):
        model.merge_adapter()
    for name, layer in zoo_layers(model).items():
        assert torch.equal(layer.get_base_weight(), once[name])
        assert layer.merged_adapters == ["default"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_unmerge_returns_the_base_bit_for_bit(mixed, dtype):
    mixed.to(dtype)
    weights = {name: layer.get_base_weight().clone() for name, layer in zoo_layers(mixed).items()}
    for names in (["default"], ["third"], ["second"]):  # one after the other, then all of them at once
        mixed.merge_adapter(names)
    changed = [not torch.equal(layer.get_base_weight(), weights[name]) for name, layer in zoo_layers(mixed).items()]
    assert all(changed)
    mixed.unmerge_adapter()
    for name, layer in zoo_layers(mixed).items():
        assert torch.equal(layer.get_base_weight(), weights[name])
        assert layer.get_base_weight().dtype == dtype
