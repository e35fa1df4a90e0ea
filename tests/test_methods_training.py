"""How every registered method trains, in the hands of all the loops that people use."""

from __future__ import annotations

import copy

import pytest
from datasets import Dataset
from helpers import (
    adapted,
    assert_all_close,
    assert_close,
    assert_trained,
    logits,
    make_batches,
    quantised,
    ready,
    shake,
    take_steps,
    tiny_config,
    trained_values,
)
from peft import get_peft_model
from train_helpers import builtin_model
from transformers import Trainer, TrainingArguments

import peftzoo
from peftzoo.train.models import load_tokenizer
from peftzoo.train.recipe import ModelSettings

RATE = 1e-2


@pytest.fixture(params=peftzoo.list_methods())
def method(request):
    """Every method, those that change the base for good too: training is training."""
    return peftzoo.get_method(request.param)


def test_accumulation_changes_nothing(method, llama):
    """A step of four micro-batches is the step of the whole batch, also where something is kept between forwards."""
    whole = shake(adapted(method, llama)).train()
    start, parts = trained_values(whole), copy.deepcopy(whole)
    losses = [take_steps(model, make_batches(3), RATE, n) for model, n in ((whole, 1), (parts, 4))]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert_trained(trained_values(whole), start)
    assert_all_close(trained_values(parts), trained_values(whole), 1e-4)


def test_no_forward_uses_what_the_last_step_changed(method, llama, tokens):
    """A copy has kept nothing, so it computes from the tensors as they are."""
    model = shake(adapted(method, llama)).train()
    for batch in make_batches(3):
        before = logits(model, tokens)
        take_steps(model, [batch], RATE, 2)
        assert (logits(model, tokens) - before).abs().max() > 1e-3
        assert_close(logits(model, tokens), logits(copy.deepcopy(model), tokens))
    shake(model)
    assert_close(logits(model, tokens), logits(copy.deepcopy(model), tokens))


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_checkpointed_steps_change_nothing(method, llama, reentrant):
    plain = shake(adapted(method, llama)).train()
    start, again = trained_values(plain), copy.deepcopy(plain)
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    again.enable_input_require_grads()
    losses = [take_steps(model, make_batches(3), RATE, 2) for model in (plain, again)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert_trained(trained_values(plain), start)
    assert_all_close(trained_values(again), trained_values(plain), 1e-4)


def test_a_loaded_adapter_trains_on(method, llama, tmp_path):
    """Two steps, a file, and two steps are four, but for the optimizer's own state, which starts anew in both."""
    model = shake(adapted(method, llama)).train()
    first, second = make_batches(2), make_batches(2, seed=4)
    take_steps(model, first, RATE, 2)
    model.save_pretrained(tmp_path)
    start = trained_values(model)
    loaded = peftzoo.load_adapter(copy.deepcopy(llama), tmp_path, is_trainable=True).train()
    losses = [take_steps(one, second, RATE, 2) for one in (model, loaded)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert_trained(trained_values(model), start)
    assert_all_close(trained_values(loaded), trained_values(model), 1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_trains_on_a_quantised_base(method, wide_llama, bits):
    """The loss falls on a packed base about as it does on the base itself."""
    if f"bnb-{bits}bit" not in method.layers:
        return
    batches = make_batches(1) * 10
    falls = []
    for base in (wide_llama, quantised(wide_llama, bits)):
        losses = take_steps(adapted(method, base).train(), batches, 1e-2 * method.lr_factor)
        falls.append(losses[0] - losses[-1])
    assert falls[0] > 0.5
    assert falls[1] == pytest.approx(falls[0], rel=0.1)


def trainer(model, folder, **settings):
    rows = [{"input_ids": row, "labels": row} for batch in make_batches(4) for row in batch]
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=RATE,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        save_steps=2,
        **settings,
    )
    return Trainer(model, arguments, train_dataset=rows)


def test_trainer_resumes(method, llama, tmp_path):
    """A run of Hugging Face's Trainer that was cut in two ends as if it had not been."""
    one = trainer(adapted(method, llama), tmp_path, max_steps=4)
    start = trained_values(one.model)
    one.train()
    assert_trained(trained_values(one.model), start)
    # another seed: what is not in the checkpoint comes out otherwise
    two = trainer(shake(adapted(method, llama)), tmp_path, max_steps=4)
    two.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert two.state.global_step == 4
    assert_all_close(trained_values(two.model), trained_values(one.model), 1e-6)


def test_sft_trainer(method, tmp_path):
    """TRL adapts the built-in model itself, or takes an adapted one where the start needs data, and trains it."""
    from trl import SFTConfig, SFTTrainer

    model, config = builtin_model(), tiny_config(method)
    if getattr(config, "needs_data", False):
        model, config = ready(get_peft_model(model, config)), None
    arguments = SFTConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=2e-2 * method.lr_factor,
        max_length=32,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    rows = Dataset.from_list([{"text": f"The date of day {day} is the {day}th of May."} for day in range(8)])
    tokenizer = load_tokenizer(ModelSettings(name_or_path="builtin/tiny-docs-1m"))
    sft = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=config)
    start = trained_values(sft.model)
    assert {part for name in start for part in name.split(".")} >= set(method.trains)
    sft.train()
    assert_trained(trained_values(sft.model), start)
    losses = [entry["loss"] for entry in sft.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0], losses
