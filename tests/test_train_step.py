"""One step, the order of the rows, the schedule, the checks: on models small enough to work out by hand."""

from __future__ import annotations

from itertools import chain, islice
from types import SimpleNamespace

import peft
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from helpers import make_batches, shake, trained_values, zoo_layers
from pairs import run_pair
from torch import nn
from train_helpers import cpu, small_recipe

from peftzoo import LoraConfig, SorsaConfig
from peftzoo.core import hooks
from peftzoo.core.groups import parameter_groups
from peftzoo.core.registry import get_method
from peftzoo.errors import ModelError, NonFiniteError
from peftzoo.train.checks import check_gradients, check_trained, parameter_counts, trained_table
from peftzoo.train.optim import make_optimizer
from peftzoo.train.order import Order
from peftzoo.train.step import Stepper


class Toy(nn.Module):
    """Its loss is a mean of squares over the rows it is given."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))

    def forward(self, x):
        return SimpleNamespace(loss=(x @ self.w).square().mean())


def stepper(model, rate=0.1, max_grad_norm=0.0):
    accelerator = cpu()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    return Stepper(accelerator, wrapped, prepared, max_grad_norm)


def rows(count, seed=0):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


def take(made, *parts):
    return made.take([{"x": part} for part in parts], [len(part) for part in parts])


def test_accumulation_equals_one_large_batch():
    data = rows(7)
    whole, parted = Toy(), Toy()
    one = take(stepper(whole), data)
    three = take(stepper(parted), data[:1], data[1:3], data[3:])  # unequal parts: a mean of means would be wrong
    torch.testing.assert_close(parted.w, whole.w)
    assert three.loss == pytest.approx(one.loss, rel=1e-6)
    assert three.grad_norm == pytest.approx(one.grad_norm, rel=1e-6)
    assert three.tokens == one.tokens == 7


def test_steps_do_not_see_each_other():
    model, data = Toy(), rows(4)
    made = stepper(model, rate=0.1)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(model(data).loss, [model.w])
        wanted = model.w.detach() - 0.1 * gradient
        take(made, data)
        torch.testing.assert_close(model.w.detach(), wanted)
    assert made.taken == 2


def test_gradient_is_clipped_and_its_norm_reported():
    model, data = Toy(), rows(4)
    (gradient,) = torch.autograd.grad(model(data).loss, [model.w])
    before = model.w.detach().clone()
    result = take(stepper(model, rate=0.1, max_grad_norm=0.25), data)
    assert result.grad_norm == pytest.approx(gradient.norm().item(), rel=1e-6)
    assert result.grad_norm > 0.25
    torch.testing.assert_close(model.w.detach(), before - 0.1 * 0.25 * gradient / gradient.norm(), rtol=1e-4, atol=0)


def test_penalty_comes_after_clipping_and_once_a_step(monkeypatch):
    model, data, rate = Toy(), rows(4), 0.1
    monkeypatch.setattr(hooks, "penalty", lambda inner, accumulation: 0.03 * inner.w.sum())
    (gradient,) = torch.autograd.grad(model(data).loss, [model.w])
    before = model.w.detach().clone()
    take(stepper(model, rate=rate, max_grad_norm=0.25), *data.split(1))
    # the penalty's gradient, 0.03, is divided by the peak rate, is not clipped, and four batches do not divide it
    wanted = before - rate * (0.25 * gradient / gradient.norm() + 0.03 / rate)
    torch.testing.assert_close(model.w.detach(), wanted, rtol=1e-4, atol=0)


def test_penalty_knows_the_micro_batches_of_its_step(monkeypatch):
    model, seen = Toy(), []
    monkeypatch.setattr(hooks, "penalty", lambda inner, accumulation: seen.append(accumulation))
    made = stepper(model)
    take(made, *rows(4).split(1))
    take(made, rows(3))
    assert seen == [4, 1]


def test_regularizer_is_of_the_loss(monkeypatch):
    """Its gradient is added once a step, whatever the batches, and is clipped and counted with the loss's."""
    model, data, rate = Toy(), rows(4), 0.1
    monkeypatch.setattr(hooks, "regularizer", lambda inner: 0.3 * inner.w.square().sum())
    (gradient,) = torch.autograd.grad(model(data).loss + 0.3 * model.w.square().sum(), [model.w])
    before, loss = model.w.detach().clone(), model(data).loss.item()
    result = take(stepper(model, rate=rate, max_grad_norm=0.25), *data.split(1))
    assert result.grad_norm == pytest.approx(gradient.norm().item(), rel=1e-6)
    assert result.loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(model.w.detach(), before - rate * 0.25 * gradient / gradient.norm(), rtol=1e-4, atol=0)


def test_regularizer_under_a_scaled_loss(monkeypatch):
    """With fp16 the gradients are scaled until they are clipped; the regularizer's is added in the same scale."""
    model, data = Toy(), rows(4)
    monkeypatch.setattr(hooks, "regularizer", lambda inner: 0.3 * inner.w.square().sum())
    (gradient,) = torch.autograd.grad(model(data).loss + 0.3 * model.w.square().sum(), [model.w])
    before = model.w.detach().clone()
    accelerator = cpu()
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=1024.0), True
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
    optimizer = AcceleratedOptimizer(torch.optim.SGD([model.w], lr=0.1), scaler=accelerator.scaler)
    accelerator._optimizers = [optimizer]
    made = Stepper(accelerator, model, optimizer, 0.0)
    result = take(made, data)
    assert result.grad_norm == pytest.approx(gradient.norm().item(), rel=1e-6)
    torch.testing.assert_close(model.w.detach(), before - 0.1 * gradient, rtol=1e-5, atol=0)


PAIR = """\
import os
import torch
from test_train_step import Toy, rows, stepper, take
from peftzoo.core import hooks

os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "x", "MASTER_PORT": "1"}
hooks.regularizer = lambda inner: 0.3 * inner.w.square().sum()
hooks.penalty = lambda inner, accumulation: 0.03 * inner.w.sum()
model = Toy()
made = stepper(model)
assert made.accelerator.num_processes == 2
result = take(made, rows(6)[:2] if rank == 0 else rows(6)[2:])
torch.save({"w": model.w.detach(), "grad_norm": result.grad_norm}, f"{folder}/{rank}.pt")
"""


def test_two_processes_add_each_term_once(tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "regularizer", lambda inner: 0.3 * inner.w.square().sum())
    monkeypatch.setattr(hooks, "penalty", lambda inner, accumulation: 0.03 * inner.w.sum())
    model = Toy()
    result = take(stepper(model), rows(6))
    run_pair(PAIR, tmp_path)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found["w"], model.w.detach())
        assert found["grad_norm"] == pytest.approx(result.grad_norm, rel=1e-6)


def test_adapters_are_told_once_after_a_step(monkeypatch):
    model, seen = Toy(), []
    start = model.w.detach().clone()
    monkeypatch.setattr(hooks, "after_step", lambda inner: seen.append(not torch.equal(inner.w, start)))
    take(stepper(model), rows(1), rows(2))
    assert seen == [True]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_loss_stops_before_anything_is_updated(value):
    model = Toy()
    made = stepper(model)
    take(made, rows(2))
    before = model.w.detach().clone()
    with pytest.raises(NonFiniteError, match=r"^step 2: the loss is (nan|inf)"):
        take(made, torch.full((2, 3), value).abs())
    assert torch.equal(model.w, before)
    assert made.taken == 1


def test_non_finite_gradient_stops_and_is_named():
    model = Toy()
    made = stepper(model)
    take(made, rows(2))
    before = model.w.detach().clone()
    handle = model.w.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match=r"^step 2: the gradient norm is (nan|inf); not finite: w"):
        take(made, rows(2))
    handle.remove()
    assert torch.equal(model.w, before)


class Detached(Toy):
    """Trains one tensor that the loss does not see, and one that rests."""

    def __init__(self, unused_grows):
        super().__init__()
        self.unused = nn.Parameter(torch.ones(2))
        self.resting = nn.Parameter(torch.ones(2))
        self.unused_grows = unused_grows

    def forward(self, x):
        loss = super().forward(x).loss + 0 * self.resting.sum()
        return SimpleNamespace(loss=loss + self.unused.sum() if self.unused_grows else loss)


def test_tensor_without_gradient_is_named():
    with pytest.raises(ModelError, match=r"1 of 3 trained tensors have no gradient.*: unused"):
        take(stepper(Detached(unused_grows=False)), rows(2))
    take(stepper(Detached(unused_grows=True)), rows(2))  # a gradient of zeros is legal


def test_non_finite_first_gradient_is_named_unless_it_is_scaled():
    model = Toy()
    model.w.grad = torch.tensor([1.0, float("inf"), 0.0])
    with pytest.raises(ModelError, match="not finite: w"):
        check_gradients(model, scaled=False)
    check_gradients(model, scaled=True)


# the order


def test_each_pass_sees_each_row_once():
    seen = list(chain.from_iterable(chain.from_iterable(islice(Order(rows=10, seed=3, batch_size=4), 5))))
    first, second = seen[:10], seen[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first != sorted(first)


def test_processes_and_accumulation_divide_the_same_rows():
    def steps(**division):
        return [list(chain(*step)) for step in islice(Order(rows=50, seed=1, **division), 8)]

    whole = steps(batch_size=8)
    assert steps(batch_size=4, accumulation=2) == whole
    shares = [steps(batch_size=4, processes=2, process=process) for process in range(2)]
    assert [left + right for left, right in zip(*shares, strict=True)] == whole
    both = [steps(batch_size=2, accumulation=2, processes=2, process=process) for process in range(2)]
    for one, left, right in zip(whole, *both, strict=True):
        assert sorted(left + right) == sorted(one)
        assert left == one[0:2] + one[4:6]


def test_seed_decides_the_order():
    def first(seed):
        return next(iter(Order(rows=100, seed=seed, batch_size=100)))

    assert first(0) == first(0)
    assert first(0) != first(1)


# the schedule


@pytest.mark.parametrize(
    ("override", "rates"),
    [
        ("train.warmup_steps=0", [1.0, 0.75, 0.5, 0.25]),
        ("train.warmup_steps=2", [0.0, 0.5, 1.0, 0.5]),
        ("train.warmup_steps=0.5", [0.0, 0.5, 1.0, 0.5]),
        ("train.lr_scheduler_type=constant", [1.0] * 4),
    ],
)
def test_schedule(tmp_path, monkeypatch, override, rates):
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe(override, "train.max_steps=4", "train.weight_decay=0.1")
    optimizer, schedule = make_optimizer(Toy(), recipe, 4)
    assert optimizer.defaults["weight_decay"] == 0.1
    seen = []
    for _ in range(4):
        seen.append(schedule.get_last_lr()[0] / recipe.learning_rate)
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx(rates)


def test_auto_rate_is_the_lora_rate_times_the_factor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe("train.learning_rate=auto", "train.lora_learning_rate=1e-3", "method={name: paca}")
    optimizer, _ = make_optimizer(Toy(), recipe, 4)
    assert optimizer.defaults["lr"] == pytest.approx(1e-3 * get_method("paca").lr_factor)


# rates of single tensors


def rates_of(groups, model):
    """Return {last part of a trained tensor's name: the rates it has in the layers}."""
    names = {id(p): n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.requires_grad}
    found = {}
    for group in groups:
        for parameter in group["params"]:
            found.setdefault(names.pop(id(parameter)), set()).add(group["lr"])
    assert not names, "not every trained tensor is in a group"
    return found


def test_every_tensor_has_the_rate_it_is_given(base):
    config = SorsaConfig(r=2, lr_ratios={"s": 16, "vt": 0.5}, target_modules=["q_proj", "up_proj"])
    model = peft.get_peft_model(base, config)
    model.add_adapter("other", LoraConfig(r=2, lr_ratios={"b": 4}, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    model.lm_head.weight.requires_grad_()
    groups = parameter_groups(model, 1e-2, 0.1)
    want = {"u": {1e-2}, "s": {0.16}, "vt": {5e-3}, "a": {1e-2}, "b": {4e-2}, "weight": {1e-2}}
    found = rates_of(groups, model)
    assert found.keys() == want.keys()
    for name, rates in want.items():
        assert sorted(found[name]) == pytest.approx(sorted(rates))
    assert groups[0]["lr"] == 1e-2
    assert {group["weight_decay"] for group in groups} == {0.1}
    assert len(parameter_groups(Toy(), 1e-2)) == 1


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ({"q": 16}, r"sorsa: lr_ratios names q, which is no trained tensor of sorsa; it trains s, u, vt"),
        ({"u": 2, "vt0": 16}, r"sorsa: lr_ratios names vt0, which is .* did you mean vt\?"),
    ],
)
def test_rate_of_a_tensor_that_is_not_trained_is_refused(base, ratios, said):
    model = peft.get_peft_model(base, SorsaConfig(r=2, lr_ratios=ratios))
    with pytest.raises(ModelError, match=said):
        parameter_groups(model, 1e-2)


def test_schedule_keeps_the_ratio(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe("train.warmup_steps=2", "train.max_steps=4", "train.weight_decay=0.1")
    model = peft.get_peft_model(base, LoraConfig(r=2, lr_ratios={"b": 16}))
    optimizer, schedule = make_optimizer(model, recipe, 4)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1]
    for share in (0.0, 0.5, 1.0, 0.5):
        rates = rates_of(optimizer.param_groups, model)
        assert list(rates["a"]) == pytest.approx([share * recipe.learning_rate])
        assert list(rates["b"]) == pytest.approx([16 * share * recipe.learning_rate])
        optimizer.step()
        schedule.step()


def test_a_higher_rate_trains_one_tensor_faster(base):
    """LoRA+ from a recipe's settings to the tensors: one step of sign descent shows each rate."""
    model = shake(peft.get_peft_model(base, LoraConfig(r=2, lr_ratios={"b": 16})))
    accelerator = cpu()
    optimizer = torch.optim.SGD(parameter_groups(model, 0.5))
    wrapped, prepared = accelerator.prepare(model, optimizer)
    before = trained_values(model)
    tokens = make_batches(1)[0]
    loss = model(input_ids=tokens, labels=tokens).loss
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    Stepper(accelerator, wrapped, prepared, 0.0).take([{"input_ids": tokens, "labels": tokens}], [1])
    for (name, value), gradient in zip(trained_values(model).items(), gradients, strict=True):
        rate = 0.5 * (16 if name.endswith(".b") else 1)
        torch.testing.assert_close(value - before[name], -rate * gradient, rtol=1e-4, atol=1e-6)
        assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("warm", [False, True], ids=["constant", "warming up"])
def test_pull_of_a_penalty_is_its_own_whatever_the_rate_of_a_tensor(base, warm):
    """With plain descent at the peak every tensor moves by the penalty's gradient, SORSA's with lr_ratios too."""
    rate = 1e-3
    config = SorsaConfig(r=2, gamma=0.5, lr_ratios={"u": 16, "s": 3}, target_modules=["q_proj"])
    model = shake(peft.get_peft_model(base, config))
    accelerator = cpu()
    optimizer = torch.optim.SGD(parameter_groups(model, rate))
    share = 1.0
    if warm:
        share = 0.25
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: share)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    made = Stepper(accelerator, wrapped, prepared, 0.0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    penalty = hooks.penalty(model)
    pulls = dict(zip(trained, torch.autograd.grad(penalty, list(trained.values()), allow_unused=True), strict=True))
    moves = {}
    tokens = make_batches(1)[0]
    start = trained_values(model)
    for with_penalty in (True, False):
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(start[name])
        if not with_penalty:
            for layer in zoo_layers(model).values():
                layer.adapter("default").config.gamma = 0.0
        made.take([{"input_ids": tokens, "labels": tokens}], [1])
        moves[with_penalty] = trained_values(model)
    for name, pull in pulls.items():
        moved = moves[True][name] - moves[False][name]
        want = torch.zeros_like(moved) if pull is None else -share * pull
        torch.testing.assert_close(moved, want, rtol=1e-3, atol=1e-6)
        assert name.endswith(".s") or moved.abs().max() > 1e-2


# what is trained


def test_table_counts_what_is_trained(base):
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    table = trained_table(model).splitlines()
    assert table[1].split() == ["q_proj", "32", "x", "32", "2", "256"]
    assert table[2].split() == ["down_proj", "32", "x", "48", "2", "320"]
    trained, total = parameter_counts(model)
    assert trained == 576
    assert table[3] == f"trained: 576 of {total:,} parameters ({576 / total:.2%})"


def test_modules_trained_whole_stand_in_the_table(base):
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert trained_table(model).splitlines()[2].split() == ["lm_head", "96", "x", "32", "1", "3,072"]


def test_nothing_or_everything_trained_is_refused(base):
    parameters = list(base.parameters())
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    check_trained(model, parameters)
    with pytest.raises(ModelError, match="some, not none or all"):
        check_trained(model.requires_grad_(False), parameters)
    with pytest.raises(ModelError, match="some, not none or all"):
        check_trained(model.requires_grad_(True), parameters)


def test_base_weight_that_is_trained_is_refused_by_name(base):
    parameters = list(base.parameters())
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    base.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    with pytest.raises(ModelError, match=r"1 weights of the base model are not frozen: .*layers\.1\.mlp\.up_proj"):
        check_trained(model, parameters)


def test_target_that_matches_nothing_is_refused_for_adopted_methods(base):
    parameters = list(base.parameters())
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_porj"]))
    with pytest.raises(ModelError, match=r"v_porj matches no module.* 2 x v_proj"):
        check_trained(model, parameters)
