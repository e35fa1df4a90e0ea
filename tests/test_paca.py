"""PaCA: which columns are trained; how they stand in the weight is in test_in_place.py."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_close, logits, make_batches, quantised, shake, zoo_layers
from pairs import run_pair
from peft import PeftModel, get_peft_model
from torch import nn

from peftzoo import PacaConfig, calibrate
from peftzoo.errors import DataError, ModelError


def adapted(model, **settings):
    return get_peft_model(copy.deepcopy(model), PacaConfig(**({"r": 4, "alpha": 6.0} | settings)))


def columns(model, name="default"):
    return {place.split("layers.")[-1]: layer.adapter(name).columns for place, layer in zoo_layers(model).items()}


# ---------------------------------------------------------------- the choice of columns


def best(scores, r=4):
    return scores.topk(r).indices.sort().values


@pytest.mark.parametrize(("selection", "sign"), [("norm_top", 1), ("norm_low", -1)])
def test_columns_by_norm(llama, selection, sign):
    model = adapted(llama, selection=selection)
    for layer in zoo_layers(model).values():
        assert torch.equal(layer.adapter("default").columns, best(sign * layer.frozen_weight().norm(dim=0)))


def test_columns_are_distinct_and_sorted(llama):
    for selection in ("random", "norm_top", "norm_low"):
        for chosen in columns(adapted(llama, selection=selection, r=9)).values():
            assert (chosen.diff() > 0).all()
            assert 0 <= chosen.min() <= chosen.max() < 48


def test_random_columns_differ_from_layer_to_layer(llama):
    chosen = columns(adapted(llama))
    assert len({tuple(value.tolist()) for value in chosen.values()}) > 10


@pytest.mark.parametrize("selection", ["random", "norm_top", "norm_low", "gradient"])
def test_shared_indices(llama, selection):
    """Layers with one parent and one number of inputs have one choice: the best of their sum."""
    model = adapted(llama, selection=selection, share_indices=True)
    if selection == "gradient":
        batches = calibration()
        calibrate(model, batches)
    chosen = columns(model)
    for block in "01":
        attention = [chosen[f"{block}.self_attn.{name}_proj"] for name in "qkvo"]
        mlp = [chosen[f"{block}.mlp.{name}_proj"] for name in ("gate", "up")]
        assert all(torch.equal(attention[0], other) for other in attention)
        assert torch.equal(*mlp)
        assert not torch.equal(attention[0], mlp[0])
        mlp_layers = [llama.model.layers[int(block)].mlp.gate_proj, llama.model.layers[int(block)].mlp.up_proj]
        norms = sum(layer.weight.square().sum(0) for layer in mlp_layers)
        gradients = sum(column_gradients(llama)[f"model.layers.{block}.mlp.{name}_proj"] for name in ("gate", "up"))
        want = {"norm_top": norms, "norm_low": -norms, "gradient": gradients}
        if selection != "random":
            assert torch.equal(mlp[0], best(want[selection]))
    assert not torch.equal(chosen["0.mlp.gate_proj"], chosen["1.mlp.gate_proj"])
    alone = columns(adapted(llama, selection="norm_top"))
    assert not torch.equal(alone["0.mlp.gate_proj"], alone["0.mlp.up_proj"])


def test_a_shared_draw_does_not_depend_on_which_layers_share_it(llama):
    every, some = adapted(llama, share_indices=True), adapted(llama, share_indices=True, target_modules=["v_proj"])
    for name, chosen in columns(some).items():
        assert torch.equal(chosen, columns(every)[name])


def test_shared_indices_come_from_the_file(llama, tokens, tmp_path):
    """What was chosen counts, whatever the base's norms would choose now."""
    model = shake(adapted(llama, selection="norm_top", share_indices=True))
    for layer in zoo_layers(model).values():
        layer.adapter("default").columns.copy_(torch.arange(4))
    want = logits(model, tokens)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path).eval()
    assert_close(logits(loaded, tokens), want)
    assert all(torch.equal(chosen, torch.arange(4)) for chosen in columns(loaded).values())


# ---------------------------------------------------------------- columns by gradient


def calibration():
    return [{"input_ids": tokens, "labels": tokens} for tokens in make_batches(3, rows=2, seed=11)]


def column_gradients(llama, batches=None):
    """What the issue asks for, the plain way: squared column norms of the weight gradients, summed over batches."""
    model = copy.deepcopy(llama)
    totals = {}
    for batch in calibration() if batches is None else batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                totals[name] = totals.get(name, 0) + module.weight.grad.square().sum(0)
    return totals


def test_columns_of_largest_gradient(llama):
    model = adapted(llama, selection="gradient")
    with pytest.raises(ModelError, match=r"peftzoo\.calibrate"):
        logits(model, make_batches(1)[0])
    assert set(calibrate(model, calibration()).values()) == {4}
    want = column_gradients(llama)
    for name, layer in zoo_layers(model).items():
        assert torch.equal(layer.adapter("default").columns, best(want[name.removeprefix("base_model.model.")])), name
        assert not layer.adapter("default").p.any()
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_columns_of_largest_gradient_in_no_more_batches_than_asked(llama):
    model = adapted(llama, selection="gradient", max_batches=1)
    calibrate(model, calibration())
    want = column_gradients(llama, calibration()[:1])
    more = column_gradients(llama)
    chosen = columns(model)
    assert all(torch.equal(chosen[n.split("layers.")[-1]], best(s)) for n, s in want.items() if "layers" in n)
    assert any(not torch.equal(chosen[n.split("layers.")[-1]], best(s)) for n, s in more.items() if "layers" in n)


def test_columns_of_largest_gradient_on_packed_and_transposed_weights(wide_llama, gpt2):
    packed = quantised(wide_llama, 4)
    model = adapted(packed, selection="gradient")
    calibrate(model, calibration())
    unpacked = copy.deepcopy(wide_llama)
    for name, layer in zoo_layers(model).items():
        unpacked.get_submodule(name.removeprefix("base_model.model.")).weight.data = layer.frozen_weight()
    want = column_gradients(unpacked)
    for name, layer in zoo_layers(model).items():
        assert torch.equal(layer.adapter("default").columns, best(want[name.removeprefix("base_model.model.")])), name
    model = adapted(gpt2, selection="gradient", target_modules=["c_fc"])
    calibrate(model, calibration())
    plain = copy.deepcopy(gpt2)
    totals = 0
    for batch in calibration():
        plain.zero_grad()
        plain(**batch).loss.backward()
        totals = totals + plain.transformer.h[0].mlp.c_fc.weight.grad.square().sum(1)  # stored [in, out]
    (layer,) = zoo_layers(model).values()
    assert torch.equal(layer.adapter("default").columns, best(totals))


def test_modules_that_are_trained_too_keep_no_gradient_of_the_calibration(llama):
    model = adapted(llama, selection="gradient", modules_to_save=["embed_tokens"])
    calibrate(model, calibration())
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 15
    assert torch.equal(columns(model)["0.mlp.up_proj"], best(column_gradients(llama)["model.layers.0.mlp.up_proj"]))


def test_batches_without_a_loss_are_refused(llama):
    with pytest.raises(DataError, match="give them labels"):
        calibrate(adapted(llama, selection="gradient"), [{"input_ids": make_batches(1)[0]}])


TWO_PROCESSES = """\
from helpers import make_llama
from test_paca import adapted, calibrate, calibration, columns

model = adapted(make_llama(), selection="gradient")
batches = calibration()
calibrate(model, batches[:2] if rank == 0 else batches[2:])
torch.save(columns(model), f"{folder}/{rank}.pt")
"""


def test_two_processes_choose_what_one_would(llama, tmp_path):
    run_pair(TWO_PROCESSES, tmp_path)
    model = adapted(llama, selection="gradient")
    calibrate(model, calibration())
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == columns(model).keys()
        assert all(torch.equal(found[name], chosen) for name, chosen in columns(model).items())
