"""peft's own tuners as methods of the zoo: the named ones, and every other type by its name."""

from __future__ import annotations

import copy
import importlib.util

import peft
import pytest
import torch
from helpers import assert_close, assert_differs, logits, shake, tiny_config
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from recipe_helpers import complaint
from test_methods import quantised
from torch import nn
from train_helpers import builtin_model, small_recipe

import peftzoo
from peftzoo.core import hooks, peft_methods
from peftzoo.core.registry import adopting, find_method, list_peft_methods
from peftzoo.errors import ModelError, RecipeError
from peftzoo.train.check import check
from peftzoo.train.loop import train
from peftzoo.train.models import add_adapter

ADOPTED = ["kasa", "miss", "vera"]
# what a type needs beside its defaults to fit the built-in model, 128 wide
SETTINGS = {"c3a": {"block_size": 64}, "vblora": {"vector_length": 64, "num_vectors": 16}}
NEEDS = {"adamss": "sklearn"}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def recipe_of(name, *overrides, **settings):
    section = {"target_modules": "all-linear"} | SETTINGS.get(name, {}) | settings
    written = ", ".join(f"{key}: {value}" for key, value in section.items())
    return small_recipe(f"method={{name: {name}, {written}}}", "train.learning_rate=1e-3", *overrides)


# ---------------------------------------------------------------- every type, by its name


def test_every_type_of_pefts_is_registered_offered_or_refused():
    types = {str(getattr(key, "value", key)).lower() for key in PEFT_TYPE_TO_CONFIG_MAPPING} - {"peftzoo"}
    offered, registered = set(list_peft_methods()), set(peftzoo.list_methods())
    assert offered.isdisjoint(registered)
    refused = {name for name in types - registered - offered if find_method(name) is None}
    assert refused == types - registered - offered
    assert {"boft", "loha", "hra", "fourierft", "ia3", "oft"} <= offered
    assert {"prompt_tuning", "prefix_tuning", "adalora", "xlora", "poly", "ln_tuning"} <= refused


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("prefix_tuning", "peft's prefix_tuning trains tokens before the input; peftzoo trains adapters of layers"),
        ("adaption_prompt", "peft's adaption_prompt does not adapt layers that target_modules names"),
        ("adalora", "peft's adalora must be called between backward and step; eva spreads"),
        ("xlora", "peft's xlora mixes adapters that were trained before"),
        ("bofd", "unknown method 'bofd'; did you mean boft?"),
    ],
)
def test_what_is_refused_is_told_why(name, why):
    with pytest.raises(KeyError) as caught:
        peftzoo.get_method(name)
    assert why in caught.value.args[0]
    text = "method: {name: %s}\n" % name  # noqa: UP031
    assert f"method.name: {why}" in complaint(f"model: {{name_or_path: x}}\n{text}")


@pytest.mark.parametrize("name", [*list_peft_methods(), *ADOPTED])
def test_it_trains_saves_and_goes_on(name):
    """Two steps; the adapter that is left opens again, and evaluates as it did when it was saved."""
    package = NEEDS.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        with pytest.raises(RecipeError, match=r"method\.name: .*pip install"):
            recipe_of(name)
        return
    first = train(recipe_of(name, "train.max_steps=2"))
    assert first.after.metrics["eval_loss"] != first.before.metrics["eval_loss"]
    final = first.folder / "final"
    method = peftzoo.get_method(name)
    loaded = peftzoo.load_adapter(builtin_model(), final)
    assert type(loaded.peft_config["default"]) is method.config
    again = train(recipe_of(name, "train.max_steps=1", f"model.adapter_name_or_path={final}"))
    assert again.before.metrics["eval_loss"] == pytest.approx(first.after.metrics["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "given", "own"),
    [
        ("boft", {"dropout": 0.1}, {"boft_dropout": 0.1}),
        ("vera", {"dropout": 0.1, "seed": 5}, {"vera_dropout": 0.1, "projection_prng_key": 5}),
        ("kasa", {"alpha": 6, "dropout": 0.1}, {"lora_alpha": 6, "lora_dropout": 0.1}),
        ("miss", {"dropout": 0.1}, {"miss_dropout": 0.1}),
        ("psoft", {"alpha": 6, "seed": 5}, {"psoft_alpha": 6, "random_seed": 5}),
        ("supertuning", {"r": 2, "alpha": 6, "dropout": 0.1}, {"lora_alpha": 6, "lora_dropout": 0.1}),
        ("loha", {"alpha": 6}, {"alpha": 6}),
        ("fourierft", {"seed": 5}, {"random_loc_seed": 5}),
    ],
)
def test_the_zoos_spellings_are_understood(name, given, own):
    config = peftzoo.get_method(name).make_config(**given)
    assert {key: getattr(config, key) for key in own} == own
    assert recipe_of(name, **given).method.settings.items() >= own.items()


def test_settings_of_a_type_by_its_name_are_checked():
    with pytest.raises(
        RecipeError, match=r"method\.boft_blok_size is not a setting\. Did you mean .*boft_block_size\?"
    ):
        recipe_of("boft", boft_blok_size=4)
    with pytest.raises(RecipeError, match=r"method\.boft_block_size: should be a valid integer"):
        recipe_of("boft", boft_block_size="many")
    with pytest.raises(RecipeError, match=r"method\.r: You can only specify either r"):
        recipe_of("oft", r=4)


def test_the_runs_seed_is_the_types():
    assert recipe_of("shira", "train.seed=3").method.settings["random_seed"] == 3


def test_check_says_which_tuners_need_weights():
    check(recipe_of("hra"))
    with pytest.raises(ModelError, match="method shira on builtin/tiny-docs-1m"):
        check(recipe_of("shira"))


def test_all_linear_becomes_names_that_can_be_read_back():
    """IA3's own config cannot be read back with the full names that peft writes for all-linear."""
    model = add_adapter(builtin_model(), recipe_of("ia3"), "CAUSAL_LM")
    config = model.peft_config["default"]
    assert config.feedforward_modules < config.target_modules
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert type(config).from_peft_type(**config.to_dict()).target_modules == config.target_modules


def test_all_linear_never_catches_another_layer():
    """Where the ends of the names would match more than the linear layers, the full names stay."""
    model = nn.ModuleDict({"a": nn.ModuleDict({"x": nn.Linear(4, 4)}), "b": nn.ModuleDict({"x": nn.Embedding(4, 4)})})
    config = peft.LoHaConfig(target_modules="all-linear")
    peft_methods.prepare(config, model, ())
    assert config.target_modules == {"a.x"}


# ---------------------------------------------------------------- miss


def test_miss_is_a_sum_over_groups(llama):
    """y += (sum of the groups of r inputs) D, in groups that need not divide the input."""
    config = peftzoo.get_method("miss").make_config(r=5, target_modules=["q_proj"])
    model = shake(get_peft_model(copy.deepcopy(llama), config))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    groups = nn.functional.pad(x, (0, 3)).view(3, 7, 5).sum(1)
    assert_close(layer(x.clone()), x @ layer.base_layer.weight.T + groups @ layer.miss_block["default"])


# ---------------------------------------------------------------- kasa


def kasa(model, **settings):
    return get_peft_model(copy.deepcopy(model), tiny_config(peftzoo.get_method("kasa"), **settings)).eval()


def lora_layers(model):
    return [module for module in model.modules() if hasattr(module, "lora_diag")]


def test_kasa_starts_at_the_base_without_its_smallest_values(llama, tokens):
    model = kasa(llama)
    with model.disable_adapter():
        truncated = logits(model, tokens)
    assert_close(logits(model, tokens), truncated)
    assert_differs(truncated, logits(llama, tokens))
    for layer, was in zip(lora_layers(model), lora_layers_of_base(llama), strict=True):
        u, s, vt = torch.linalg.svd(was)
        k = min(was.shape) - 4
        assert_close(layer.base_layer.weight, u[:, :k] * s[:k] @ vt[:k], 1e-5)


def lora_layers_of_base(llama):
    return [m.weight for name, m in llama.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]


def test_kasa_saves_loads_and_merges(llama, tokens, tmp_path):
    model = shake(kasa(llama))
    want = logits(model, tokens)
    peftzoo.save_adapter(model, tmp_path / "a")
    loaded = peftzoo.load_adapter(copy.deepcopy(llama), tmp_path / "a")
    assert_close(logits(loaded.eval(), tokens), want)
    assert adopting(loaded.peft_config["default"]) is peftzoo.get_method("kasa")
    lazily = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "a", low_cpu_mem_usage=True)
    logits(lazily.eval(), tokens)  # peft corrects the first output for a base that is cut off only now
    assert_close(logits(lazily, tokens), want)
    assert_close(logits(model.merge_and_unload(), tokens), want, 1e-4)


def test_a_plain_lora_folder_is_still_the_zoos(llama, tmp_path):
    get_peft_model(copy.deepcopy(llama), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert isinstance(peftzoo.load_adapter(copy.deepcopy(llama), tmp_path).peft_config["default"], peftzoo.LoraConfig)


def test_kasas_regularizers_are_the_papers(llama):
    model = shake(kasa(llama, kasa_config={"beta": 0.3, "gamma": 0.7}))
    want = torch.zeros(())
    for layer in lora_layers(model):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        eye = torch.eye(4)
        want = want + 0.3 * layer.lora_diag["default"].square().sum()
        want = want + 0.7 * ((b.T @ b - eye).norm() + (a @ a.T - eye).norm())
    assert_close(hooks.regularizer(model), want, 1e-6)
    assert hooks.regularizer(get_peft_model(copy.deepcopy(llama), peft.LoraConfig(target_modules=["q_proj"]))) is None


def test_the_trainer_adds_kasas_regularizers():
    """Plain peft leaves them to whoever remembers: without them singular values are free to grow."""
    norms = []
    for weight in (0.0, 1e3):
        result = train(recipe_of("kasa", kasa_config=f"{{beta: {weight}, gamma: 0.0}}", r=4))
        loaded = peftzoo.load_adapter(builtin_model(), result.folder / "final")
        norms.append(sum(layer.lora_diag["default"].norm().item() for layer in lora_layers(loaded)))
    assert norms[1] < norms[0]


def test_what_makes_kasa_cannot_be_taken_away():
    with pytest.raises(ValueError, match="kasa: kasa_config cannot be null"):
        peftzoo.get_method("kasa").make_config(kasa_config=None)
    with pytest.raises(ValueError, match="use_dora is not a setting of kasa"):
        peftzoo.get_method("kasa").make_config(use_dora=True)
    assert peftzoo.get_method("kasa").make_config().kasa_config == peft.KasaConfig()


@pytest.mark.parametrize("bits", [4, 8])
def test_kasa_on_a_packed_base_is_refused(wide_llama, bits):
    """peft makes a plain LoRA of it there, without a word."""
    base = quantised(wide_llama, bits)
    config = peftzoo.get_method("kasa").make_config(target_modules="all-linear")
    with pytest.raises(ModelError, match=rf"cannot adapt .*bnb-{bits}bit.*adapts linear"):
        peft_methods.prepare(config, base, peftzoo.get_method("kasa").layers)
