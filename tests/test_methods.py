"""The suite every registered method gets, without a line of its own."""

from __future__ import annotations

import copy
import io
import json
import pickle

import peft
import pytest
import torch
from helpers import assert_close, assert_differs, logits, shake, tiny_config, zoo_layers
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

import peftzoo
from peftzoo.errors import ModelError


def adapted(method, model, **settings):
    return get_peft_model(copy.deepcopy(model), tiny_config(method, **settings))


def trained_names(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_starts_at_base(method, llama, tokens):
    assert_close(logits(adapted(method, llama), tokens), logits(llama, tokens))


def test_starts_at_base_on_conv1d(method, gpt2, tokens):
    model = adapted(method, gpt2)
    assert_close(logits(model, tokens), logits(gpt2, tokens))
    assert_differs(logits(shake(model), tokens), logits(gpt2, tokens))


def test_forward_is_delta_weight(method, llama):
    layers = zoo_layers(shake(adapted(method, llama)))
    for layer in layers.values():
        adapter, weight = layer.peftzoo_adapter["default"], layer.frozen_weight()
        x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(2))
        want = x @ adapter.delta_weight(weight).T
        assert want.abs().max() > 1e-3
        assert_close(adapter(x), want)
        # the fused path, which takes the frozen product along
        assert_close(layer(x), x @ (weight + adapter.delta_weight(weight)).T)
    assert bool(layers) != method.adopted


def test_fused_is_unfused(method, llama, tokens):
    """A base layer with a hook of its own is called itself; output and gradients stay the same."""
    fused = shake(adapted(method, llama))
    unfused = copy.deepcopy(fused)
    calls = []
    for layer in zoo_layers(unfused).values():
        layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    outputs = []
    for model in (fused, unfused):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        outputs.append({"loss": loss} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert bool(calls) != method.adopted
    for name, value in outputs[0].items():
        assert_close(value, outputs[1][name])


def test_merge(method, llama, tokens):
    model = shake(adapted(method, llama))
    want = logits(model, tokens)
    assert_differs(want, logits(llama, tokens))
    merged = model.merge_and_unload(safe_merge=True)
    assert_close(logits(merged, tokens), want, 1e-4)
    assert not zoo_layers(merged)


def test_merge_on_conv1d(method, gpt2, tokens):
    model = shake(adapted(method, gpt2))
    want = logits(model, tokens)
    assert_close(logits(model.merge_and_unload(), tokens), want, 1e-4)


def test_merge_unmerge_disable_unload(method, llama, tokens):
    model = shake(adapted(method, llama))
    before, untouched = logits(model, tokens), logits(llama, tokens)
    model.merge_adapter()
    assert_close(logits(model, tokens), before, 1e-4)
    model.unmerge_adapter()
    assert_close(logits(model, tokens), before)
    with model.disable_adapter():
        assert_close(logits(model, tokens), untouched)
    assert_close(logits(model, tokens), before)
    assert_close(logits(model.unload(), tokens), untouched)


def test_save_load(method, llama, tokens, tmp_path):
    model = shake(adapted(method, llama))
    # an adapter that went through other hands: every saved tensor, trained or not, must come from the file
    for layer in zoo_layers(model).values():
        for buffer in layer.peftzoo_adapter.buffers():
            buffer.copy_(buffer.roll(1) if buffer.is_floating_point() else (buffer + 1) % layer.in_features)
    want = logits(model, tokens)
    model.save_pretrained(tmp_path)
    loaders = {
        "from_pretrained": lambda base: PeftModel.from_pretrained(base, tmp_path),
        "low_cpu_mem_usage": lambda base: PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True),
        "load_adapter": lambda base: peftzoo.load_adapter(base, tmp_path),
    }
    for name, load in loaders.items():
        loaded = load(copy.deepcopy(llama)).eval()
        assert_close(logits(loaded, tokens), want, what=name)
        assert type(loaded.peft_config["default"]) is method.config
        assert not trained_names(loaded)
    trainable = peftzoo.load_adapter(copy.deepcopy(llama), tmp_path, is_trainable=True)
    assert trained_names(trainable) == trained_names(model)


def test_saved_files_are_equal(method, llama, tmp_path):
    """Two runs of one seed write the same bytes."""
    files = []
    for run in ("one", "two"):
        adapted(method, llama).save_pretrained(tmp_path / run)
        names = ["adapter_model.safetensors"] + ([] if method.adopted else ["adapter_config.json"])
        files.append([(tmp_path / run / name).read_bytes() for name in names])
    assert files[0] == files[1]


def test_only_adapter_trains(method, llama, tokens):
    model = shake(adapted(method, llama))
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        ours = "base_layer" not in name and not set(method.trains).isdisjoint(name.split("."))
        assert parameter.requires_grad == ours, name
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_two_adapters(method, llama, tokens):
    model = shake(adapted(method, llama))
    first = logits(model, tokens)
    model.add_adapter("second", tiny_config(method))
    assert_close(logits(model, tokens), first)
    model.set_adapter("second")
    assert_close(logits(model, tokens), logits(llama, tokens))
    second = logits(shake(model, seed=8), tokens)
    assert_differs(second, first)
    model.set_adapter("default")
    assert_close(logits(model, tokens), first)
    model.delete_adapter("second")
    assert_close(logits(model, tokens), first)
    assert not [name for name in model.state_dict() if "second" in name]


def test_transformers_native(method, llama, tokens, tmp_path):
    model = copy.deepcopy(llama)
    if not method.injectable:
        with pytest.raises(ValueError, match="shared state"):
            model.add_adapter(tiny_config(method))
        return
    model.add_adapter(tiny_config(method))
    want = logits(shake(model), tokens)
    assert_differs(want, logits(llama, tokens))
    model.save_pretrained(tmp_path)
    loaded = copy.deepcopy(llama)
    loaded.load_adapter(str(tmp_path))
    assert_close(logits(loaded, tokens), want)
    loaded.delete_adapter("default")
    assert_close(logits(loaded, tokens), logits(llama, tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_base(method, llama, tokens, dtype):
    half = copy.deepcopy(llama).to(dtype)
    model = adapted(method, half)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert_close(logits(model, tokens).float(), logits(half, tokens).float(), 2e-2)
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_autocast(method, llama, tokens):
    model = shake(adapted(method, llama))
    want = logits(model, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens, labels=tokens).loss
        got = logits(model, tokens)
    loss.backward()
    assert ((got.float() - want).norm() / want.norm()) < 5e-2  # bfloat16 keeps 8 bits, here through 15 layers
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def quantised(model, bits):
    """Return a copy of `model` whose block linears are bitsandbytes layers."""
    import bitsandbytes as bnb

    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            if bits == 4:
                packed = bnb.nn.Linear4bit(
                    module.in_features, module.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
                )
                packed.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            else:
                packed = bnb.nn.Linear8bitLt(
                    module.in_features, module.out_features, bias=False, has_fp16_weights=False
                )
                packed.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, packed.to("cpu"))
    return model


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(method, wide_llama, tokens, bits):
    if f"bnb-{bits}bit" not in method.layers:
        with pytest.raises((ModelError, ValueError)):
            adapted(method, quantised(wide_llama, bits))
        return
    base = quantised(wide_llama, bits)
    model = adapted(method, base)
    assert_close(logits(model, tokens), logits(base, tokens), 1e-4)
    model(tokens, labels=tokens).loss.backward()
    assert any(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    assert_differs(logits(shake(model), tokens), logits(base, tokens))
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    wanted = [layer.get_base_weight() + layer.get_delta_weight("default") for layer in layers]
    packed = [layer.get_base_weight() for layer in layers]
    model.merge_adapter()
    for layer, want in zip(layers, wanted, strict=True):
        # packing anew rounds every weight to one of 16, or 256, steps of its block
        assert (layer.get_base_weight() - want).norm() < (0.12 if bits == 4 else 0.02) * want.norm()
    model.unmerge_adapter()
    if not method.adopted:  # peft's own subtract and pack a second time
        for layer, want in zip(layers, packed, strict=True):
            assert_close(layer.get_base_weight(), want, 1e-2)


def test_pickle_and_deepcopy(method, llama, tokens):
    model = shake(adapted(method, llama))
    want = logits(model, tokens)
    assert_close(logits(copy.deepcopy(model), tokens), want)
    assert_close(logits(pickle.loads(pickle.dumps(model)), tokens), want)
    config = pickle.loads(pickle.dumps(model.peft_config["default"]))
    assert type(config) is method.config
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)


def test_learns(method, llama):
    torch.manual_seed(0)
    model = adapted(method, llama).train()
    batch = torch.randint(0, 96, (8, 12), generator=torch.Generator().manual_seed(3))
    rate = 2e-2 * method.lr_factor * (5 if method.adopted else 1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(60):
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        peftzoo.after_step(model)
        losses.append(loss.item())
    assert losses[-1] < (0.9 if method.adopted else 0.5) * losses[0], losses[::20]


def test_gradient_checkpointing_changes_nothing(method, llama, tokens):
    plain = shake(adapted(method, llama)).train()
    again = copy.deepcopy(plain)
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (plain, again):
        model(tokens, labels=tokens).loss.backward()
    for (name, one), (_, two) in zip(plain.named_parameters(), again.named_parameters(), strict=True):
        if one.requires_grad:
            assert_close(two.grad, one.grad, what=name)


def test_compiles(zoo_method, llama):
    """One layer compiles to one graph that computes the same, with a changing number of tokens."""
    method = zoo_method
    torch._dynamo.reset()
    layer = next(iter(zoo_layers(shake(adapted(method, llama))).values()))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5, 8):
        x = torch.randn(rows, layer.in_features)
        assert_close(compiled(x), layer(x))


def test_dropout_drops_in_training_only(method, llama, tokens):
    model = shake(adapted(method, llama, dropout=0.5))
    kept = logits(model.eval(), tokens)
    assert_close(logits(model, tokens), kept)
    torch.manual_seed(0)
    one = logits(model.train(), tokens)
    assert_differs(one, kept)
    torch.manual_seed(0)
    assert_close(logits(model, tokens), one)


def test_seed_alone_decides_the_start(method, llama):
    states = []
    for seed, global_seed in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        model = adapted(method, llama, seed=seed)
        if not method.adopted:
            assert torch.equal(torch.get_rng_state(), before), "the global generator was touched"
        states.append(peft.get_peft_model_state_dict(model))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    drawn = [key for key in states[0] if not torch.equal(states[0][key], states[2][key])]
    assert bool(drawn) != (method.name == "sorsa"), "every method but SORSA, whose start is an SVD, draws"


def test_config_rejects(method):
    with pytest.raises(ValueError, match="did you mean dropout"):
        method.make_config(dropuot=0.1)
    if method.adopted:
        return
    for name, bad in {"r": 0, "alpha": -1.0, "dropout": 1.0, "target_modules": []}.items():
        with pytest.raises(ValueError, match=f"{method.name}: {name}="):
            method.make_config(**{name: bad})
    with pytest.raises(ValueError, match="did you mean alpha"):
        method.config(alhpa=1.0)


def test_a_rank_above_the_size_works_or_is_refused(zoo_method):
    config, refusal = tiny_config(zoo_method, r=9), None
    try:
        layer = shake(peftzoo.attach(nn.Linear(8, 8), config))
    except ValueError as error:
        refusal = str(error)
    if refusal is None:
        weight = layer.frozen_weight()
        want = torch.eye(8) @ (weight + layer.adapter("default").delta_weight(weight)).T + layer.bias
        assert_close(layer(torch.eye(8)), want)
    else:
        assert f"{zoo_method.name}: r=9" in refusal
        with pytest.raises(ModelError, match=f"0: {zoo_method.name}: r=9"):
            peftzoo.attach(nn.Sequential(nn.Linear(8, 8)), config)


def test_attach_without_transformers(zoo_method):
    method = zoo_method
    module = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 7)).double()
    x = torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = module(x)
    model = peftzoo.attach(module, tiny_config(method))
    assert_close(model(x), want, 1e-12)
    assert_differs(shake(model)(x), want)
    single = peftzoo.attach(nn.Linear(12, 20), tiny_config(method))
    assert [name.rsplit(".", 1)[-1] for name in trained_names(single)] == list(method.trains)


def test_lora_folder(zoo_method, llama, tokens, tmp_path):
    """What declares `to_lora` is a stock LoRA folder with the same logits in stock peft."""
    from peftzoo.core.lora_folder import write_lora_folder

    method = zoo_method
    model = shake(adapted(method, llama))
    write_lora_folder(model, tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "LORA"
    stock = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path)
    assert not zoo_layers(stock)
    assert_close(logits(stock, tokens), logits(model, tokens))
    ours = peftzoo.load_adapter(copy.deepcopy(llama), tmp_path)
    assert zoo_layers(ours)
    assert_close(logits(ours, tokens), logits(model, tokens))


def test_lora_folder_on_conv1d(zoo_method, gpt2, tokens, tmp_path):
    from peftzoo.core.lora_folder import write_lora_folder

    method = zoo_method
    model = shake(adapted(method, gpt2))
    write_lora_folder(model, tmp_path)
    assert_close(logits(PeftModel.from_pretrained(copy.deepcopy(gpt2), tmp_path), tokens), logits(model, tokens))


def test_peft_converts_to_lora(method, llama, tokens):
    if method.to_lora is None:
        return
    model = shake(adapted(method, llama))
    config, state = peft.convert_to_lora(model, rank=2 * method.tiny["r"])
    converted = get_peft_model(copy.deepcopy(llama), config).eval()
    peft.set_peft_model_state_dict(converted, state)
    assert_close(logits(converted, tokens), logits(model, tokens), 1e-4)


def saved(method, llama, folder):
    shake(adapted(method, llama)).save_pretrained(folder)
    return folder / "adapter_model.safetensors"


def edits():
    def missing(state):
        del state[next(iter(state))]

    def extra(state):
        state["base_model.model.model.layers.7.self_attn.q_proj.peftzoo_adapter.a"] = torch.ones(2, 2)

    def transposed(state):
        key = next(key for key, value in state.items() if value.dim() == 2 and value.shape[0] != value.shape[1])
        state[key] = state[key].T.contiguous()

    def broken(state):
        key = next(key for key, value in state.items() if value.is_floating_point())
        state[key] = state[key].clone().flatten().index_fill(0, torch.tensor([0]), float("nan")).view(state[key].shape)

    return {"missing": missing, "unexpected": extra, "misshapen": transposed, "not finite": broken}


@pytest.mark.parametrize("damage", list(edits()))
def test_a_file_that_does_not_fit_is_refused(method, llama, tmp_path, damage):
    path = saved(method, llama, tmp_path)
    state = load_file(path)
    edits()[damage](state)
    save_file(state, path, {"format": "pt"})
    if method.adopted:
        if damage in ("missing", "unexpected"):
            with pytest.raises(ModelError):
                peftzoo.load_adapter(copy.deepcopy(llama), tmp_path)
        return
    for load in (PeftModel.from_pretrained, peftzoo.load_adapter):
        with pytest.raises(ModelError, match=damage):
            load(copy.deepcopy(llama), tmp_path)


def test_another_base_is_refused(zoo_method, llama, tokens, tmp_path):
    method = zoo_method
    saved(method, llama, tmp_path)
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.add_(0.1)
        other.model.layers[0].self_attn.q_proj.weight.add_(0.1)
    for load in (
        lambda: PeftModel.from_pretrained(other, tmp_path),
        lambda: other.load_adapter(str(tmp_path)),
        lambda: peftzoo.load_adapter(other, tmp_path),
    ):
        with pytest.raises(ModelError, match="made on another base"):
            load()
    # the same base in another dtype is the same base
    half = copy.deepcopy(llama).bfloat16()
    logits(PeftModel.from_pretrained(half, tmp_path), tokens)


def test_transformers_does_not_hide_a_missing_tensor(zoo_method, llama, tokens, tmp_path):
    method = zoo_method
    path = saved(method, llama, tmp_path)
    state = load_file(path)
    del state[next(key for key in state if key.endswith(method.trains[0]))]
    save_file(state, path, {"format": "pt"})
    model = copy.deepcopy(llama)
    model.load_adapter(str(tmp_path))
    with pytest.raises(ModelError, match="never came from a file"):
        model(tokens)


def test_unknown_field_in_a_file_is_refused(zoo_method, llama, tmp_path):
    method = zoo_method
    saved(method, llama, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"dropout"', '"dropuot"'))
    with pytest.raises(ValueError, match="did you mean dropout"):
        PeftConfig.from_pretrained(tmp_path)
