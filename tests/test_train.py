"""Whole runs: what they leave behind, that they repeat, and that they end well when something goes wrong."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import peft
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from train_helpers import ROWS, builtin_model, cpu, encoder, read_events, small_recipe, write_rows
from transformers import LlamaForCausalLM

import peftzoo
from peftzoo.errors import CheckpointError, DataError, MemoryLimitError, ModelError, NonFiniteError
from peftzoo.train import causal_lm, loop
from peftzoo.train.check import check
from peftzoo.train.evaluation import Sample, exact_match, generate, mean_loss
from peftzoo.train.loop import train
from peftzoo.train.progress import Report
from peftzoo.train.recipe_file import load_recipe
from peftzoo.train.step import Stepper


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def adapter(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def stop_at(monkeypatch, step, error):
    """Make the step of this number raise."""
    take = Stepper.take

    def stopping(self, *arguments):
        if self.taken + 1 == step:
            raise error
        return take(self, *arguments)

    monkeypatch.setattr(Stepper, "take", stopping)


# evaluation


def test_batched_answers_equal_answers_one_by_one():
    model, made = builtin_model().eval(), encoder()
    prompts = [row["prompt"] for row in ROWS[:7]] + ["a", "reverse: abc\n", "The for statement is used to"]

    def answers(some):
        return generate(model, made, some, max_new_tokens=8, batch_size=4, accelerator=cpu())

    together = answers(prompts)
    assert together == [answers([prompt])[0] for prompt in prompts]
    assert len(set(together)) > 5, "all the same: this comparison would prove nothing"


def test_loss_is_the_mean_over_trained_tokens():
    model, made = builtin_model().eval(), encoder()
    texts = [(row["prompt"], row["completion"] * repeats) for repeats, row in enumerate(ROWS[:5], 1)]
    examples, _ = made.examples(texts, str, small_recipe().data)
    total = 0.0
    for example in examples:
        with torch.no_grad():
            logits = model(example.ids[None].long()).logits[0, :-1].log_softmax(-1)
        chosen = logits.gather(1, example.ids[1:, None].long())[:, 0]
        total -= chosen[example.masked - 1 :].sum().item()
    loss = mean_loss(model, made, examples, batch_size=2, accelerator=cpu())
    assert loss == pytest.approx(total / sum(example.trained for example in examples), rel=1e-5)


def test_exact_match_looks_past_spaces_only():
    samples = [Sample("p", "ab", " ab\n"), Sample("p", "ab", "a b"), Sample("p", "ab", "AB"), Sample("p", "", " ")]
    assert exact_match(samples) == 0.5


# a run


def test_run_folder_holds_all_about_the_run(capsys):
    recipe = small_recipe(
        "train.max_steps=4", "train.logging_steps=2", "eval.steps=2", "eval.metrics=[exact_match, perplexity]",
        "eval.show_samples=2", "output.plots=true",
    )  # fmt: skip
    result = train(recipe)
    assert result.folder == Path("runs/x")
    assert {path.name for path in result.folder.iterdir()} == {
        "final", "loss.png", "metrics.jsonl", "recipe.resolved.yaml", "run.json"
    }  # fmt: skip
    logged = read_events(result.folder, "train")
    assert [event["step"] for event in logged] == [1, 2, 4]
    assert all(event["loss"] > 0 and event["grad_norm"] > 0 and event["elapsed"] > 0 for event in logged)
    assert [event["learning_rate"] for event in logged] == pytest.approx([5e-3, 3.75e-3, 1.25e-3])
    assert logged[-1]["loss"] < logged[0]["loss"]
    per_row = [len(encoder().prompts([row["completion"]])[0]) + 1 for row in ROWS]
    assert logged[-1]["tokens"] == 16 * per_row[0], "every date has as many tokens"
    judged = read_events(result.folder, "eval")
    assert [event["step"] for event in judged] == [0, 2, 4]
    assert judged[-1]["eval_loss"] < judged[0]["eval_loss"]
    facts = json.loads((result.folder / "run.json").read_text())
    assert facts["status"] == "finished"
    assert facts["before"] == result.before.metrics
    assert facts["after"] == result.after.metrics
    assert facts["after"]["eval_loss"] == judged[-1]["eval_loss"]
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["peak_memory_bytes"] > 1e8
    assert facts["steps"] == result.steps == 4
    assert 0 < facts["train_seconds"] == result.seconds
    assert (facts["seed"], facts["device"], facts["processes"]) == (0, "cpu", 1)
    assert facts["trained_parameters"] == sum(tensor.numel() for tensor in adapter(result.folder / "final").values())
    assert load_recipe(str(result.folder / "recipe.resolved.yaml")) == recipe
    assert (result.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert f"row 1 of 40: 33 tokens, 11 of them trained, in [[ ]]: {ROWS[0]['prompt'].strip()}\\n[[" in said
    assert said.count("\nbefore:  iso date") == said.count("\nafter:  iso date") == 2
    assert "exact match: 0.0% before, " in said
    assert said.endswith(f"trained 4 steps in {result.seconds:.1f} s; the run folder is runs/x\n")


def test_saved_adapter_gives_the_last_evaluation_again():
    settings = ("train.max_steps=6", "method.dropout=0.5", "eval.metrics=[exact_match, perplexity]")
    result = train(small_recipe(*settings))
    model = peft.PeftModel.from_pretrained(builtin_model(), str(result.folder / "final")).eval()
    made = encoder()
    examples, _ = made.examples([(row["prompt"], row["completion"]) for row in ROWS[:5]], str, small_recipe().data)
    loss = mean_loss(model, made, examples, batch_size=8, accelerator=cpu())
    assert loss == pytest.approx(result.after.metrics["eval_loss"], rel=1e-5)
    assert abs(loss - result.before.metrics["eval_loss"]) > 0.1
    prompts = [row["prompt"] for row in ROWS[:5]]
    answers = generate(model, made, prompts, max_new_tokens=12, batch_size=8, accelerator=cpu())
    assert answers == [sample.got for sample in result.after.samples]


def test_same_seed_repeats_to_the_bit_and_another_does_not():
    def run(name, *overrides):
        result = train(small_recipe(f"output.dir=runs/{name}", "method.dropout=0.2", "data.eval=null", *overrides))
        return adapter(result.folder / "final"), [event["loss"] for event in read_events(result.folder, "train")]

    (first, losses), (second, repeated), (_, other) = run("a"), run("b"), run("c", "train.seed=1")
    assert losses == repeated
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses != other


@pytest.mark.parametrize("method", ["paca", "sorsa", "vera"])
def test_every_kind_of_method_runs(method):
    result = train(small_recipe(f"method={{name: {method}}}", "train.learning_rate=auto"))
    assert result.after.metrics["eval_loss"] < result.before.metrics["eval_loss"]


def test_layers_on_one_input_are_computed_in_one_call(calls, monkeypatch):
    shared = train(small_recipe("output.dir=shared"))
    assert calls
    assert set(calls) == {2, 3}, "gate and up; q, k and v"
    made = len(calls)
    monkeypatch.setattr(loop, "share_inputs", lambda model: None)
    apart = train(small_recipe("output.dir=apart"))
    assert len(calls) == made
    torch.testing.assert_close(adapter(shared.folder / "final"), adapter(apart.folder / "final"), rtol=1e-3, atol=1e-5)


def test_checkpointed_activations_change_no_bit(monkeypatch):
    take, seen = Stepper.take, []

    def noting(self, *arguments):
        seen.append(self._inner.is_gradient_checkpointing)
        return take(self, *arguments)

    monkeypatch.setattr(Stepper, "take", noting)
    runs = [
        train(small_recipe(f"output.dir={setting}", f"train.{setting}={value}"))
        for setting, value in (("activation_checkpointing", "false"), ("gradient_checkpointing", "true"))
    ]
    assert seen == [False] * 3 + [True] * 3
    first, second = (adapter(run.folder / "final") for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_model_that_cannot_checkpoint_is_refused(monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match=r"train\.activation_checkpointing: .* not support"):
        train(small_recipe("train.activation_checkpointing=true"))


def test_penalty_of_a_method_reaches_the_training():
    def singular_values(gamma):
        recipe = small_recipe(f"method={{name: sorsa, r: 4, gamma: {gamma}}}", f"output.dir=runs/{gamma}")
        return adapter(train(recipe).folder / "final")

    free, held = singular_values(0.0), singular_values(10.0)
    assert any(not torch.equal(free[name], held[name]) for name in free)


def test_bfloat16_run():
    AcceleratorState._reset_state(reset_partial_state=True)
    result = train(small_recipe("train.mixed_precision=bf16", "model.dtype=bfloat16", "train.max_steps=2"))
    assert result.after.metrics["eval_loss"] < result.before.metrics["eval_loss"]
    assert {tensor.dtype for tensor in adapter(result.folder / "final").values()} == {torch.float32}
    assert train(small_recipe()).steps == 3, "the next run of the process may have another precision"


def test_epochs_become_steps():
    recipe = small_recipe(
        "data.eval=null", "train.max_steps=null", "train.num_train_epochs=0.5", "train.gradient_accumulation_steps=3"
    )
    assert train(recipe).steps == 2  # half of 40 rows, 12 a step, the last one filled up


def test_text_without_evaluation(capsys):
    write_rows("text.jsonl", [{"line": f"{row['prompt']}{row['completion']}"} for row in ROWS])
    recipe = small_recipe(
        "data={train: {path: text.jsonl}, format: text, columns: {text: line}, max_length: 16}", "train.max_steps=2"
    )
    result = train(recipe)
    assert result.before is None
    assert result.after is None
    said = capsys.readouterr().out
    assert "data.train: 40 of 40 rows are longer than data.max_length=16 tokens and were cut" in said
    assert "before" not in said


def test_going_on_from_a_saved_adapter():
    first = train(small_recipe())
    saved = f"model.adapter_name_or_path={first.folder / 'final'}"
    second = train(small_recipe(saved))
    assert second.before.metrics["eval_loss"] == pytest.approx(first.after.metrics["eval_loss"], rel=1e-5)
    assert second.after.metrics["eval_loss"] < first.after.metrics["eval_loss"]
    with pytest.raises(ModelError, match="holds no sorsa adapter"):
        train(small_recipe(saved, "method={name: sorsa}"))


# the run folder


def test_occupied_folder_is_left_alone(capsys):
    Path("runs/x").mkdir(parents=True)
    Path("runs/x/precious").write_text("mine")
    assert train(small_recipe()).folder == Path("runs/x-2")
    assert train(small_recipe()).folder == Path("runs/x-3")
    assert [path.name for path in Path("runs/x").iterdir()] == ["precious"]
    assert "runs/x is taken; this run goes to runs/x-2\n" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["a-file", "a-file/below", "/proc/nothing/here"])
def test_unusable_folder_is_refused_before_anything_loads(folder, monkeypatch):
    Path("a-file").touch()
    monkeypatch.setattr("peftzoo.train.loop.TASKS", {})
    with pytest.raises(CheckpointError, match=f"output.dir={folder}: ") as caught:
        train(small_recipe(f"output.dir={folder}"))
    assert caught.value.exit_code == 7


def test_run_that_never_began_leaves_nothing():
    recipe = small_recipe()
    Path("train.jsonl").write_text("nonsense\n")
    with pytest.raises(DataError, match=r"train\.jsonl:1"):
        train(recipe)
    assert list(Path("runs").iterdir()) == []


# early ends


def test_interrupted_run_keeps_its_adapter(monkeypatch, capsys):
    stop_at(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe())
    facts = json.loads(Path("runs/x/run.json").read_text())
    assert (facts["status"], facts["steps"]) == ("interrupted", 2)
    assert not Path("runs/x/final").exists()
    tensors = adapter("runs/x/interrupted")
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    assert "stopped after 2 steps; the adapter as it was then is in runs/x/interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(("rate", "finite"), [("1e30", True), ("1e39", False)])
def test_run_that_diverges_stops_and_saves_no_broken_adapter(rate, finite, capsys):
    with pytest.raises(NonFiniteError, match=r"^step 2: the (loss|gradient norm) is") as caught:
        train(small_recipe(f"train.learning_rate={rate}", "train.max_steps=20"))
    assert caught.value.exit_code == 6
    assert json.loads(Path("runs/x/run.json").read_text())["status"] == "not finite"
    saved = Path("runs/x/interrupted")
    assert saved.exists() == finite
    assert ("was not saved" in capsys.readouterr().out) != finite
    assert not finite or all(tensor.isfinite().all() for tensor in adapter(saved).values())


def test_evaluation_that_is_not_finite_stops(monkeypatch):
    monkeypatch.setattr(causal_lm, "mean_loss", lambda *_, **__: float("nan"))
    with pytest.raises(NonFiniteError, match="the evaluation after step 0: eval loss nan"):
        train(small_recipe())
    assert list(Path("runs").iterdir()) == []


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_says_what_to_change(monkeypatch, error):
    stop_at(monkeypatch, 2, error)
    with pytest.raises(MemoryLimitError) as caught:
        train(small_recipe())
    assert caught.value.exit_code == 5
    lines = str(caught.value).splitlines()
    assert "out of memory on cpu while training" in lines[0]
    assert "1. train.per_device_train_batch_size=2 train.gradient_accumulation_steps=2: " in lines[1]
    assert "2. model.dtype=bfloat16: " in lines[2]
    assert Path("runs/x/interrupted").exists()


def test_other_runtime_errors_stay_themselves(monkeypatch):
    stop_at(monkeypatch, 2, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(small_recipe())
    assert json.loads(Path("runs/x/run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.name_or_path=builtin/nothing", "builtin/nothing: no built-in model"),
        ("model.name_or_path=no/such-model", "no/such-model: cannot be loaded"),
        ("method.target_modules=[q_proj, v_porj]", "v_porj"),
        ("model.adapter_name_or_path=nowhere", "nowhere"),
    ],
)
def test_model_that_cannot_be_had_is_refused(override, says):
    with pytest.raises(ModelError, match=says):
        train(small_recipe(override))


# words


def test_check_needs_no_weights(monkeypatch, capsys):
    monkeypatch.setattr(causal_lm, "load_base", None)
    for method in ("lora", "sorsa", "vera"):
        check(small_recipe(f"method={{name: {method}, r: 4}}"))
    said = capsys.readouterr().out
    assert said.count("model: LlamaForCausalLM, 984,192 parameters") == 3
    assert "trained: 40,960 of 1,025,152 parameters (4.00%)" in said
    assert f"[[{ROWS[0]['completion']}<|end|>]]" in said
    assert not Path("runs").exists()


def test_check_refuses_a_target_that_matches_nothing():
    with pytest.raises(ModelError, match="v_porj"):
        check(small_recipe("method.target_modules=[q_proj, v_porj]"))


def test_reader_that_goes_away_ends_the_printing_only(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        with Report(prints=True, steps=2) as report:
            report.say("one")
            report.step(1, loss=1.0, learning_rate=0.1, rate=1.0, logged=True)
        closed.write("Python's own last words")


def test_narrow_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    read, write = os.openpty()
    with os.fdopen(write, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        with Report(prints=True, steps=2) as report:
            report.say("a [line] as it is")
            report.step(2, loss=1.0, learning_rate=0.1, rate=1.0, logged=False)
    shown = b""
    with suppress(OSError):  # what a terminal without a program at its other end answers
        while part := os.read(read, 1000):
            shown += part
    os.close(read)
    assert b"a [line] as it is" in shown
    assert b"2/2" in shown


def test_only_the_first_process_prints(capsys):
    with Report(prints=False, steps=2) as report:
        report.say("one")
        report.step(1, loss=1.0, learning_rate=0.1, rate=1.0, logged=True)
    assert capsys.readouterr().out == ""


def test_plot_is_optional(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    train(small_recipe("output.plots=true"))
    assert "pip install 'peftzoo[plot]'" in capsys.readouterr().out


def test_public_names_of_peftzoo_are_enough_to_read_a_run():
    train(small_recipe("method={name: sorsa, r: 4}"))
    model = peftzoo.load_adapter(builtin_model(), "runs/x/final")
    assert model.peft_config["default"].task_type == "CAUSAL_LM"
