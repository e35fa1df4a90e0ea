"""Trained columns that stand in the frozen weight itself: the same function, never stale, the base to the bit."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from helpers import (
    assert_all_close,
    assert_close,
    assert_trained,
    logits,
    make_batches,
    quantised,
    shake,
    take_steps,
    trained_values,
    zoo_layers,
)
from pairs import run_pair
from peft import PeftModel, get_peft_model
from test_methods_training import trainer
from test_paca import adapted, calibration
from torch import nn
from transformers import LlamaForCausalLM

import peftzoo
from peftzoo import LoraConfig, PacaConfig, calibrate
from peftzoo.core.fingerprint import fingerprint
from peftzoo.errors import ModelError

RATE = 1e-2


def in_place(model, **settings):
    """A model whose trained columns stand in its weights, moved from their start."""
    return shake(adapted(model, in_place=True, **settings))


def base_weights(model):
    """Return copies of the frozen weights as they stand in memory, asking nobody."""
    layers = zoo_layers(model).items()
    return {name.removeprefix("base_model.model."): layer.base_layer.weight.detach().clone() for name, layer in layers}


def assert_base(model, llama):
    """Every frozen weight is the base's own, bit for bit."""
    found = base_weights(model)
    assert found
    for name, weight in found.items():
        assert torch.equal(weight, llama.get_submodule(name).weight), name


def assert_written(model, llama):
    found = base_weights(model)
    assert all(not torch.equal(weight, llama.get_submodule(name).weight) for name, weight in found.items())


# ---------------------------------------------------------------- the same function


@pytest.mark.parametrize("selection", ["random", "norm_top", "norm_low", "gradient"])
def test_in_place_trains_as_the_update_does(llama, tokens, selection):
    added = (
        shake(adapted(llama, selection=selection)) if selection != "gradient" else adapted(llama, selection=selection)
    )
    written = adapted(llama, selection=selection, in_place=True)
    for model in (added, written):
        if selection == "gradient":
            calibrate(model, calibration())
        model.train()
        shake(model)
    start_values = trained_values(added)
    written.load_state_dict(added.state_dict())
    losses = [take_steps(model, make_batches(4), RATE) for model in (added, written)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert_trained(trained_values(added), start_values)
    assert_all_close(trained_values(written), trained_values(added), 1e-4)
    assert_close(logits(written, tokens), logits(added, tokens), 1e-4)


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (2, 0, 12), (2, 1, 3, 12)], ids=str)
def test_inputs_of_any_shape(shape):
    """The authors' layer takes three dimensions only."""
    torch.manual_seed(0)
    linear = nn.Linear(12, 7)
    layers = [shake(peftzoo.attach(copy.deepcopy(linear), PacaConfig(r=3, alpha=6.0, in_place=w))) for w in (0, 1)]
    x, g = torch.randn(shape), torch.randn(*shape[:-1], 7)
    found = []
    for layer in layers:
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(g)
        found.append({"y": y, "dx": leaf.grad, "dp": layer.adapter("default").p.grad})
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_forward_is_the_frozen_product_and_the_backward_keeps_the_trained_inputs_alone(llama, tokens):
    """Zero overhead: not one product more than the base, and x [m, in] is nowhere saved."""
    linear = nn.Linear(48, 40)
    layer = shake(peftzoo.attach(copy.deepcopy(linear), PacaConfig(r=3, in_place=True)))
    x = torch.randn(16, 48, requires_grad=True)
    layer(x)  # writes the columns
    seen, saved = {}, []
    for name, module in {"base": linear, "layer": layer}.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
            module(x)
        counts = {event.key: event.count for event in profile.key_averages() if "mm" in event.key}
        seen[name] = counts
    assert seen["layer"] == seen["base"] != {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        layer(x)
    assert saved == [(16, 3)]


def test_half_precision_base_keeps_small_steps(llama):
    """The columns are rounded in the weight; what is trained is float32, so that steps below its rounding add up."""
    layer = peftzoo.attach(nn.Linear(12, 7).to(torch.bfloat16), PacaConfig(r=3, in_place=True))
    p = layer.adapter("default").p
    frozen = layer.base_layer.weight.detach().clone()
    x = torch.eye(12, dtype=torch.bfloat16)
    assert p.dtype == torch.float32
    for _ in range(512):
        layer(x)
        with torch.no_grad():
            p += 2.0**-12
    chosen = layer.adapter("default").columns
    layer(x)
    want = (frozen[:, chosen].float() + 2.0**-3).to(torch.bfloat16)
    assert torch.equal(layer.base_layer.weight[:, chosen], want)
    layer(x).sum().backward()
    assert p.grad.dtype == torch.float32
    layer.release()
    assert torch.equal(layer.base_layer.weight, frozen)


def test_autocast(llama):
    found = []
    for written in (False, True):
        layer = shake(peftzoo.attach(nn.Linear(12, 7, bias=False), PacaConfig(r=3, in_place=written)))
        layer.base_layer.weight.data = torch.linspace(-1, 1, 84).view(7, 12)
        x = torch.linspace(-2, 2, 60).view(5, 12).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
            assert y.dtype == torch.bfloat16
            y.sum().backward()
        found.append({"y": y.float(), "dx": x.grad, "dp": layer.adapter("default").p.grad})
    assert_all_close(*found, bound=3e-2)


def test_hooked_base_layers_and_trained_bases_get_the_update_added():
    linear = nn.Linear(12, 7)
    layer = shake(peftzoo.attach(copy.deepcopy(linear), PacaConfig(r=3, in_place=True)))
    x = torch.randn(5, 12)
    want = layer(x).detach()
    calls = []
    handle = layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    assert_close(layer(x), want)
    assert calls
    assert torch.equal(layer.base_layer.weight, linear.weight)
    handle.remove()
    layer.base_layer.weight.requires_grad_()
    assert_close(layer(x), want)
    assert torch.equal(layer.base_layer.weight, linear.weight)
    layer(x).sum().backward()
    assert layer.base_layer.weight.grad.abs().max() > 0


def test_compiles_around_the_layer():
    torch._dynamo.reset()
    layer = shake(peftzoo.attach(nn.Sequential(nn.Linear(12, 7), nn.ReLU()), PacaConfig(r=3, in_place=True)))
    compiled = torch.compile(layer, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(5, 12)
        assert_close(compiled(x), layer(x))
        shake(layer)


# ---------------------------------------------------------------- never stale


def assert_fresh(model, tokens):
    """A copy has nothing kept and writes its columns anew."""
    assert_close(logits(model, tokens), logits(copy.deepcopy(model), tokens), 1e-6)


def test_no_second_forward_uses_the_columns_of_the_step_before(llama, tokens):
    """§8.1: the authors' layer refreshes its columns on every other training forward only."""
    added, written = shake(adapted(llama)).train(), in_place(llama).train()
    for model in (added, written):
        model.outputs = []
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        for _ in range(4):
            output = model(tokens, labels=tokens)
            model.outputs.append(output.logits.detach())
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
    for step, (want, got) in enumerate(zip(added.outputs, written.outputs, strict=True)):
        assert_close(got, want, 1e-4, f"step {step}")
        assert step == 0 or (want - added.outputs[step - 1]).abs().max() > 1e-2


def test_evaluation_sees_the_last_step(llama, tokens):
    """§8.1: the authors' layer never refreshes in evaluation, which so misses the last step."""
    added, written = shake(adapted(llama)).train(), in_place(llama).train()
    for model in (added, written):
        take_steps(model, make_batches(2), RATE)
        model.eval()
    assert_close(logits(written, tokens), logits(added, tokens), 1e-4)
    with torch.inference_mode():
        assert_close(written(tokens).logits, logits(added, tokens), 1e-4)
    take_steps(written.train(), make_batches(1), RATE)
    assert_fresh(written.eval(), tokens)


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "not reentrant"])
def test_checkpointing_and_accumulation_change_nothing(llama, checkpointing, micro_batches):
    added, written = shake(adapted(llama)).train(), in_place(llama).train()
    if checkpointing != "none":
        written.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"}
        )
        written.enable_input_require_grads()
    losses = [take_steps(added, make_batches(3), RATE), take_steps(written, make_batches(3), RATE, micro_batches)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert_all_close(trained_values(written), trained_values(added), 1e-4)


def test_trainer_of_hugging_face(llama, tmp_path):
    """It saves in between and resumes, and knows nothing of what stands in the weights."""
    added, written = adapted(llama), in_place(llama)
    written.load_state_dict(added.state_dict())
    start = trained_values(added)
    trainer(added, tmp_path / "added", max_steps=4).train()
    trainer(written, tmp_path / "written", max_steps=4).train()
    assert_trained(trained_values(added), start)
    assert_all_close(trained_values(written), trained_values(added), 1e-4)
    resumed = trainer(in_place(llama), tmp_path / "written", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "written" / "checkpoint-2"))
    assert_all_close(trained_values(resumed.model), trained_values(written), 1e-6)
    resumed.model.set_adapter("default")
    assert_base(resumed.model, llama)


def test_what_changes_the_trained_tensor_is_seen(llama, tokens):
    model = in_place(llama)
    other = shake(adapted(llama), seed=3)
    logits(model, tokens)
    shake(model, seed=9)
    assert_fresh(model, tokens)
    model.load_state_dict(other.state_dict())
    assert_close(logits(model, tokens), logits(other, tokens))
    for layer in zoo_layers(model).values():  # other columns too
        layer.adapter("default").columns.copy_(torch.arange(4))
    assert_fresh(model, tokens)
    model.load_state_dict(in_place(llama).state_dict(), assign=True)
    assert_fresh(model, tokens)
    model.set_adapter("default")
    assert_base(model, llama)


def test_a_write_through_data_is_seen_after_after_step(llama, tokens):
    model = in_place(llama)
    before = logits(model, tokens)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(2)
    assert_close(logits(model, tokens), before)  # nothing can show it: documented
    peftzoo.after_step(model)
    assert_fresh(model, tokens)
    assert (logits(model, tokens) - before).abs().max() > 1e-2


def test_a_pass_without_adapters_between_forward_and_backward(llama, tokens):
    """What preference training does: the reference is the base, between the policy's forward and its backward."""
    gradients = []
    for written in (False, True):
        model = shake(adapted(llama, in_place=written)).train()
        loss = model(tokens, labels=tokens).loss
        with model.disable_adapter(), torch.no_grad():
            assert_close(model(tokens).logits, logits(llama, tokens), 1e-6)
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        if written:
            assert_base(model, llama)  # the backward leaves the weights as it found them
    assert_all_close(gradients[1], gradients[0])


def test_another_adapter_between_forward_and_backward(llama, tokens):
    gradients = []
    for written in (False, True):
        model = shake(adapted(llama, in_place=written)).train()
        model.add_adapter("second", PacaConfig(r=5, seed=1, in_place=written))
        loss = model(tokens, labels=tokens).loss
        model.set_adapter("second")
        shake(model, seed=9)
        second = model(tokens, labels=tokens).loss
        for layer in zoo_layers(model).values():
            layer.adapter("default").requires_grad_()  # peft freezes what is not active
        loss.backward()
        second.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 28
    assert_all_close(gradients[1], gradients[0])


def test_a_step_between_two_backwards_of_one_forward():
    """The gradient belongs to the forward it comes from."""
    layer = shake(peftzoo.attach(nn.Linear(12, 7), PacaConfig(r=3, in_place=True)))
    x = torch.randn(5, 12, requires_grad=True)
    y = layer(x)
    (want,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    shake(layer, seed=5)
    layer(x)
    assert_close(torch.autograd.grad(y.sum(), x)[0], want, 1e-6)


# ---------------------------------------------------------------- the base comes back


RESTORING = {
    "disable": lambda model: model.disable_adapter_layers(),
    "unload": lambda model: model.unload(),
    "set_adapter": lambda model: model.set_adapter("default"),
    "delete": lambda model: model.delete_adapter("default"),
    "state_dict": lambda model: model.state_dict(),
    "fingerprint": lambda model: fingerprint(model),
    "merge and unmerge": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "unmerge": lambda model: model.unmerge_adapter(),
    "get_base_weight": lambda model: [layer.get_base_weight() for layer in zoo_layers(model).values()],
    "frozen_weight": lambda model: [layer.adapter("default").frozen_weight() for layer in zoo_layers(model).values()],
    "move": lambda model: model.to("cpu"),
    "another adapter": lambda model: model.add_adapter("second", LoraConfig(r=2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("undo", RESTORING.values(), ids=RESTORING)
def test_the_base_comes_back_to_the_bit(llama, undo, dtype):
    base = copy.deepcopy(llama).to(dtype)
    model = in_place(base).train()
    take_steps(model, make_batches(2), RATE)
    logits(model, make_batches(1)[0])
    assert_written(model, base)
    kept = {name: layer.base_layer for name, layer in zoo_layers(model).items()}
    undo(model)
    for name, layer in kept.items():
        assert torch.equal(layer.weight, base.get_submodule(name.removeprefix("base_model.model.")).weight), name


def test_weights_stored_transposed(gpt2, tokens):
    added, written = shake(adapted(gpt2)), in_place(gpt2)
    assert_close(logits(written, tokens), logits(added, tokens))
    assert_written(written, gpt2)
    losses = [take_steps(model, make_batches(3), RATE, 2) for model in (added, written)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert_all_close(trained_values(written), trained_values(added), 1e-4)
    written.set_adapter("default")
    assert_base(written, gpt2)


def test_unloaded_base_is_the_base(llama, tokens):
    model = in_place(llama)
    logits(model, tokens)
    unloaded = model.unload()
    assert isinstance(unloaded, LlamaForCausalLM)
    assert_all_close(unloaded.state_dict(), llama.state_dict(), 0)


def test_base_saved_while_columns_stand_in_it_is_the_base(llama, tokens, tmp_path):
    model = in_place(llama)
    want = logits(model, tokens)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in llama.state_dict().items():
        parts = name.rsplit(".", 1)
        key = f"base_model.model.{name}"
        assert torch.equal(saved.get(key, saved.get(f"base_model.model.{parts[0]}.base_layer.{parts[1]}")), value)
    assert fingerprint(model.base_model.model) == fingerprint(llama)
    assert_close(logits(model, tokens), want, 0)


def test_merged_while_columns_stand_in_the_weight(llama, tokens):
    added, written = shake(adapted(llama)), in_place(llama)
    want = logits(written, tokens)
    written.merge_adapter()
    assert_close(logits(written, tokens), want, 1e-5)
    written.unmerge_adapter()
    assert_base(written, llama)
    assert_close(logits(written, tokens), want, 0)
    merged = [model.merge_and_unload().state_dict() for model in (added, written)]
    assert_all_close(merged[1], merged[0], 0)


def test_several_adapters(llama, tokens):
    """Alone it stands in the weight; beside another both are added, on the base's own weight."""
    models = []
    for written in (False, True):
        model = adapted(llama, in_place=written)
        model.add_adapter("second", LoraConfig(r=2))
        for adapter in ("default", "second"):
            model.set_adapter(adapter)
            shake(model)
        models.append(model)
    for active in ("default", "second", ["default", "second"], "default"):
        for model in models:
            model.base_model.set_adapter(active)
        assert_close(logits(models[1], tokens), logits(models[0], tokens))
        if active != "default":
            assert_base(models[1], llama)
    assert_written(models[1], llama)
    models[1].delete_adapter("default")
    assert_base(models[1], llama)


def test_copies_do_not_write_into_each_other(llama, tokens):
    model = in_place(llama)
    want = logits(model, tokens)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(logits(twin, tokens), want, 0)
        shake(twin)
        logits(twin, tokens)
        assert_close(logits(model, tokens), want, 0)
        twin.unload()
        assert_written(model, llama)
    assert_close(logits(model, tokens), want, 0)
    model.set_adapter("default")
    assert_base(model, llama)


def test_moved_to_another_dtype_it_is_what_it_would_have_been(llama, tokens):
    moved = in_place(llama)
    logits(moved, tokens)
    moved.double()
    want = shake(adapted(llama)).double()
    assert_close(logits(moved, tokens), logits(want, tokens), 1e-9)
    moved.set_adapter("default")
    assert_base(moved, copy.deepcopy(llama).double())


def test_a_base_loaded_while_columns_stand_in_it_takes_over(llama, tokens):
    other = copy.deepcopy(llama)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    model = in_place(llama)
    logits(model, tokens)
    model.load_state_dict(in_place(other).state_dict())
    assert_close(logits(model, tokens), logits(shake(adapted(other)), tokens))
    model.set_adapter("default")
    assert_base(model, other)


def test_files_are_the_same_in_place_and_added(llama, tokens, tmp_path):
    model = in_place(llama)
    want = logits(model, tokens)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path).eval()
    assert loaded.peft_config["default"].in_place
    assert_close(logits(loaded, tokens), want, 0)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    config.in_place = False
    added = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path, config=config).eval()
    assert_close(logits(added, tokens), want)
    assert_base(added, llama)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_base_is_refused_before_anything_is_wrapped(wide_llama, bits):
    base = quantised(wide_llama, bits)
    with pytest.raises(ModelError, match=rf"q_proj \(bnb-{bits}bit\); set in_place to false"):
        get_peft_model(base, PacaConfig(in_place=True))
    assert not zoo_layers(base)
    with pytest.raises(ModelError, match="set in_place to false"):
        peftzoo.attach(base.model.layers[0].mlp.up_proj, PacaConfig(in_place=True))


def test_a_weight_that_others_use_is_refused(llama):
    tied = copy.deepcopy(llama)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    with pytest.raises(ModelError, match=r"the weight of lm_head for all parts"):
        get_peft_model(tied, PacaConfig(target_modules=["lm_head", "q_proj"], in_place=True))
    get_peft_model(tied, PacaConfig(target_modules=["lm_head", "q_proj"]))
    one = nn.Linear(4, 4)
    with pytest.raises(ModelError, match=r"the weight of 0"):
        peftzoo.attach(nn.Sequential(one, nn.ReLU(), one), PacaConfig(r=2, in_place=True))


def test_settings_are_refused():
    with pytest.raises(ValueError, match=r"paca: in_place=True must be false where dropout"):
        PacaConfig(in_place=True, dropout=0.1)
    with pytest.raises(
        ValueError, match=r"paca: selection='best' must be one of random, norm_top, norm_low, gradient"
    ):
        PacaConfig(selection="best")
    with pytest.raises(ValueError, match=r"paca: max_batches=0"):
        PacaConfig(max_batches=0)


def test_a_second_derivative_is_refused():
    layer = peftzoo.attach(nn.Linear(4, 4), PacaConfig(r=2, in_place=True))
    x = torch.randn(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


SHARDED = """\
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from helpers import make_batches, make_llama, take_steps
from test_in_place import in_place
from peftzoo.errors import ModelError

mesh = init_device_mesh("cpu", (2,))
for used in (False, True):
    model = in_place(make_llama())
    if used:
        model(make_batches(1)[0])
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    try:
        model(make_batches(1)[0])
        said = "nothing"
    except ModelError as error:
        said = str(error)
    torch.save(said, f"{folder}/{rank}-{used}.pt")
    # under DDP nothing is in the way
whole = in_place(make_llama()).train()
parallel = torch.nn.parallel.DistributedDataParallel(whole)
halves = [batch.chunk(2)[rank] for batch in make_batches(3)]
take_steps(parallel, halves, 1e-2)
torch.save({n: p.detach() for n, p in whole.named_parameters() if p.requires_grad}, f"{folder}/{rank}.pt")
"""


def test_a_sharded_base_is_refused_and_ddp_trains(llama, tmp_path):
    run_pair(SHARDED, tmp_path)
    alone = shake(adapted(llama)).train()
    take_steps(alone, make_batches(3), RATE)
    for rank in range(2):
        for used in (False, True):
            assert "each process holds a part of the base weight" in torch.load(tmp_path / f"{rank}-{used}.pt")
        assert_all_close(torch.load(tmp_path / f"{rank}.pt"), trained_values(alone), 1e-4)
