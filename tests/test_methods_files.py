"""The files of every registered method: what is written, read, refused, and taken elsewhere as a plain LoRA."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from helpers import adapted, assert_close, assert_differs, logits, refused, shake, trained_names, zoo_layers
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import peftzoo
from peftzoo.core.lora_folder import write_lora_folder
from peftzoo.errors import ModelError


def test_save_load(method, llama, tokens, tmp_path):
    model = shake(adapted(method, llama))
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


def test_every_frozen_tensor_of_a_file_is_read(zoo_method, llama, tokens, tmp_path):
    """A file that went through other hands: nothing is drawn or computed anew, but what is checked against it."""
    path = saved(zoo_method, llama, tmp_path)
    whole = peftzoo.load_adapter(copy.deepcopy(llama), tmp_path).eval()
    state = load_file(path)
    for name in sorted({key.rsplit(".", 1)[-1] for key in state} - set(zoo_method.trains)):
        other = {key: moved(value) if key.endswith(f".{name}") else value for key, value in state.items()}
        save_file(other, path, {"format": "pt"})
        refusal = ""
        try:
            loaded = peftzoo.load_adapter(copy.deepcopy(llama), tmp_path).eval()
            got = logits(loaded, tokens)
        except ModelError as error:
            refusal = str(error)
        if refusal:
            assert "made on" in refusal, name
        else:
            read = peft.get_peft_model_state_dict(loaded)
            assert all(torch.equal(read[key], value) for key, value in other.items())
            assert_differs(got, logits(whole, tokens))


def moved(tensor):
    """Return other values of the same kind: numbers in another order, indices one on."""
    return tensor.roll(1) if tensor.is_floating_point() else (tensor + 1) % (tensor.max() + 1)


def test_saved_files_are_equal(method, llama, tmp_path):
    """Two runs of one seed write the same bytes."""
    files = []
    for run in ("one", "two"):
        adapted(method, llama).save_pretrained(tmp_path / run)
        names = ["adapter_model.safetensors"] + ([] if method.adopted else ["adapter_config.json"])
        files.append([(tmp_path / run / name).read_bytes() for name in names])
    assert files[0] == files[1]


def test_lora_folder(zoo_method, llama, tokens, tmp_path):
    """What is a LoRA of low rank is a stock LoRA folder with the same logits in stock peft; the rest says why not."""
    method = zoo_method
    model = shake(adapted(method, llama))
    if method.to_lora != "exact" and method.stock_lora is None:
        why = "cannot be written as a plain LoRA" if method.to_lora is None else "name the rank of a plain LoRA"
        with pytest.raises(ModelError, match=f"{method.name} adapter .*{why}"):
            write_lora_folder(model, tmp_path)
        assert not list(tmp_path.iterdir())
        return
    assert write_lora_folder(model, tmp_path) == 0
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "LORA"
    stock = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path)
    assert not zoo_layers(stock)
    assert_close(logits(stock, tokens), logits(model, tokens))
    ours = peftzoo.load_adapter(copy.deepcopy(llama), tmp_path)
    assert zoo_layers(ours)
    assert_close(logits(ours, tokens), logits(model, tokens))


def test_lora_folder_on_conv1d(zoo_method, gpt2, tokens, tmp_path):
    method = zoo_method
    if refused(method, "conv1d", gpt2):
        return
    model = shake(adapted(method, gpt2))
    rank = None if method.to_lora == "exact" or method.stock_lora else 32  # all there is
    if method.to_lora is not None:
        write_lora_folder(model, tmp_path, rank=rank)
        assert_close(logits(PeftModel.from_pretrained(copy.deepcopy(gpt2), tmp_path), tokens), logits(model, tokens))


@pytest.mark.parametrize("rank", [2, 32])
def test_nearest_lora(zoo_method, llama, tokens, tmp_path, rank):
    """A plain LoRA of a given rank is the nearest there is, in every layer, and how near is what is said."""
    method = zoo_method
    model = shake(adapted(method, llama))
    if method.to_lora is None:
        with pytest.raises(ModelError, match=f"{method.name} adapter cannot be written as a plain LoRA"):
            write_lora_folder(model, tmp_path, rank=rank)
        return
    error = write_lora_folder(model, tmp_path, rank=rank)
    stock = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path)
    off = size = least = 0.0
    for name, layer in zoo_layers(model).items():
        want = layer.get_delta_weight("default").detach().double()
        off += (stock.get_submodule(name).get_delta_weight("default").double() - want).square().sum().item()
        least += torch.linalg.svdvals(want)[rank:].square().sum().item()
        size += want.square().sum().item()
    assert error == pytest.approx((off / size) ** 0.5, abs=1e-5)
    assert off == pytest.approx(least, rel=1e-3, abs=1e-8 * size)
    print(f"{method.name}: a plain LoRA of rank {rank} is off by {error:.1e} of the update")
    if rank == 32:
        assert_close(logits(stock, tokens), logits(model, tokens), 1e-4)
    else:
        assert error > 1e-3


def test_peft_converts_to_lora(method, llama, tokens):
    if method.to_lora is None:
        return
    # of rank 16, which is all the rank there is
    model = shake(adapted(method, llama, target_modules=["k_proj", "v_proj"]))
    config, state = peft.convert_to_lora(model, rank=16)
    converted = get_peft_model(copy.deepcopy(llama), config).eval()
    peft.set_peft_model_state_dict(converted, state)
    assert_close(logits(converted, tokens), logits(model, tokens), 1e-4)


def neighbours():
    """Return every method of ours with the next in the alphabet, the last with the first."""
    names = [name for name in peftzoo.list_methods() if not peftzoo.get_method(name).adopted]
    return list(zip(names, names[1:] + names[:1], strict=True))


@pytest.mark.parametrize(("first", "second"), neighbours())
def test_files_of_two_methods_on_one_base(first, second, llama, tokens, tmp_path):
    """Each alone as on a base of its own, both together as the sum of their updates, in any order of loading."""
    wants, deltas = {}, []
    for name in (first, second):
        model = shake(adapted(peftzoo.get_method(name), llama), seed=len(wants))
        model.save_pretrained(tmp_path / name)
        wants[name] = logits(model, tokens)
        deltas.append({key: layer.get_delta_weight("default") for key, layer in zoo_layers(model).items()})
    both = copy.deepcopy(llama)
    for update in deltas:
        for key, delta in update.items():
            both.get_submodule(key.removeprefix("base_model.model.")).weight.data += delta
    model = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / second, second)
    model.load_adapter(tmp_path / first, first)
    for name in (first, second, first):
        model.set_adapter(name)
        assert_close(logits(model, tokens), wants[name], what=name)
    model.base_model.set_adapter([first, second])
    assert_close(logits(model, tokens), logits(both, tokens), 1e-4)
    model.delete_adapter(first)
    model.set_adapter(second)
    assert_close(logits(model, tokens), wants[second])
    with model.disable_adapter():
        assert_close(logits(model, tokens), logits(llama, tokens))


def saved(method, llama, folder):
    shake(adapted(method, llama)).save_pretrained(folder)
    return folder / "adapter_model.safetensors"


def edits():
    def missing(state):
        del state[next(iter(state))]

    def extra(state):
        state["base_model.model.model.layers.7.self_attn.q_proj.peftzoo_adapter.a"] = torch.ones(2, 2)

    def doubled(state):
        key = next(key for key, value in state.items() if value.dim())
        state[key] = torch.cat((state[key], state[key]))

    def broken(state):
        key = next(key for key, value in state.items() if value.is_floating_point())
        state[key] = state[key].clone().flatten().index_fill(0, torch.tensor([0]), float("nan")).view(state[key].shape)

    return {"missing": missing, "unexpected": extra, "misshapen": doubled, "not finite": broken}


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
