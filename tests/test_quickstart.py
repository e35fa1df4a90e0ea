"""The main job on the built-in model and data, as a newcomer runs it: a model that cannot do a task learns it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import logits
from peft import PeftModel
from processes import PEFTZOO, ROOT, start
from train_helpers import builtin_model, cpu, encoder

import peftzoo
from peftzoo.builtin import load_rows, model_path
from peftzoo.train.evaluation import generate

METHODS = ["lora", "paca", "sorsa"]
HELD_OUT = load_rows("iso-dates", "test")
EXPECTED = [row["completion"] for row in HELD_OUT]


@dataclass(frozen=True)
class Run:
    """A run of the quickstart: its folder, what it printed, its manifest."""

    folder: Path
    said: str
    facts: dict


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory):
    """Return a call that gives the run of a method; each is trained once."""
    runs = {}

    def run(name):
        if name not in runs:
            folder = tmp_path_factory.mktemp("quickstart") / name
            # all cores, as for a newcomer, however few the tests themselves may take
            done = start(
                *PEFTZOO, "train", "quickstart/dates", f"method.name={name}", f"output.dir={folder}",
                OMP_NUM_THREADS=None,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
            runs[name] = Run(folder, done.stdout, json.loads((folder / "run.json").read_text()))
        return runs[name]

    return run


@pytest.fixture(params=METHODS)
def run(request, quickstart):
    return quickstart(request.param)


def answers(model):
    """Return the model's answers to the held-out questions, as the trainer's evaluation gets them."""
    prompts = [row["prompt"] for row in HELD_OUT]
    return generate(model.eval(), encoder(), prompts, max_new_tokens=16, batch_size=100, accelerator=cpu())


@pytest.fixture(scope="session")
def untrained_answers():
    return answers(builtin_model())


def share(got):
    return sum(answer.strip() == expected for answer, expected in zip(got, EXPECTED, strict=True)) / len(EXPECTED)


def test_a_model_that_cannot_do_it_learns_it(run):
    assert len(EXPECTED) == len(set(EXPECTED)) == 100
    assert run.facts["before"]["exact_match"] <= 0.05
    assert run.facts["after"]["exact_match"] >= (0.9 if run.facts["method"] == "lora" else 0.8)
    assert run.facts["train_seconds"] <= 120
    assert (run.facts["status"], run.facts["steps"], run.facts["processes"]) == ("finished", 250, 1)


def test_it_says_what_it_did(run):
    lines = run.said.splitlines()
    for when in ("before", "after"):
        samples = [line for line in lines if line.startswith(f"{when}: ")]
        assert len(samples) == 4
        for sample, row in zip(samples, HELD_OUT, strict=False):
            assert sample.startswith(f"{when}:  {row['prompt'].strip()} -> ")
            assert sample.endswith(f" (expected {row['completion']})")
    before, after = (run.facts[when]["exact_match"] for when in ("before", "after"))
    assert lines[-2] == f"exact match: {before:.1%} before, {after:.1%} after"
    assert lines[-1] == f"trained 250 steps in {run.facts['train_seconds']:.1f} s; the run folder is {run.folder}"


def test_it_leaves_a_whole_folder(run):
    assert {path.name for path in run.folder.iterdir()} == {
        "final", "loss.png", "metrics.jsonl", "recipe.resolved.yaml", "run.json"
    }  # fmt: skip
    assert {path.name for path in (run.folder / "final").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    losses = [json.loads(line)["loss"] for line in (run.folder / "metrics.jsonl").open() if '"train"' in line]
    assert len(losses) == 26
    assert losses[-1] < 0.1 * losses[0]


def test_the_saved_adapter_gives_the_answers_of_the_run(run, untrained_answers):
    got = answers(peftzoo.load_adapter(builtin_model(), run.folder / "final"))
    assert share(got) == run.facts["after"]["exact_match"]
    shown = [line.split(" -> ")[1].split(" (expected ")[0] for line in run.said.splitlines() if line[:6] == "after:"]
    assert [answer.strip() for answer in got[:4]] == shown
    assert share(untrained_answers) == run.facts["before"]["exact_match"]


STOCK = """\
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
tokens = tokenizer(prompts)["input_ids"]
answers = {}
for length in {len(ids) for ids in tokens}:  # prompts of one length need no padding
    rows = [row for row, ids in enumerate(tokens) if len(ids) == length]
    asked = torch.tensor([tokens[row] for row in rows])
    written = model.generate(input_ids=asked, max_new_tokens=16, do_sample=False)[:, length:]
    answers |= dict(zip(rows, tokenizer.batch_decode(written, skip_special_tokens=True)))
assert not [name for name in sys.modules if name.startswith("peftzoo")]
print(json.dumps([answers[row] for row in range(len(prompts))]))
"""


def test_stock_peft_gives_the_same_answers_without_peftzoo(quickstart):
    folder = quickstart("lora").folder / "final"
    prompts = json.dumps([row["prompt"] for row in HELD_OUT])
    done = start(sys.executable, "-c", STOCK, model_path("tiny-docs-1m"), folder, prompts, PYTHONPATH=None)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == answers(peftzoo.load_adapter(builtin_model(), folder))


def test_every_loader_gives_the_same_logits(run):
    folder = run.folder / "final"
    # in float64, because logits of 10 summed in another order differ by 1e-5 in float32
    native = builtin_model().double()
    native.load_adapter(str(folder))
    tokens = torch.tensor(encoder().prompts([row["prompt"] for row in HELD_OUT[:1]])) % 1024
    seen = [
        logits(model.eval(), tokens)
        for model in (
            peftzoo.load_adapter(builtin_model().double(), folder),
            PeftModel.from_pretrained(builtin_model().double(), folder),
            native,
        )
    ]
    assert (seen[0] - logits(builtin_model().double().eval(), tokens)).abs().max() > 1
    assert (seen[1] - seen[0]).abs().max() <= 1e-5
    assert (seen[2] - seen[0]).abs().max() <= 1e-5


def test_two_processes_train_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = start(
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / "configs" / "cpu2.yaml",
        "-m", "peftzoo", "train", "quickstart/dates", "train.max_steps=20",
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in Path("runs").iterdir()] == ["dates"]
    facts = json.loads(Path("runs/dates/run.json").read_text())
    assert (facts["status"], facts["processes"], facts["steps"]) == ("finished", 2, 20)
    assert done.stdout.count("the run folder is runs/dates") == 1
    assert "64 rows" in done.stdout, "two processes take the rows of two"


def test_the_resolved_recipe_repeats_the_run_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # dropout draws on the global generator: the hard case
    settings = ("method.name=sorsa", "method.dropout=0.1", "train.max_steps=5", "train.seed=3", "data.eval=null")
    for arguments in (("quickstart/dates", *settings), ("runs/dates/recipe.resolved.yaml",)):
        done = start(*PEFTZOO, "train", *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in Path("runs").iterdir()} == {"dates", "dates-2"}
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        first, second = (Path("runs", folder, "final", name).read_bytes() for folder in ("dates", "dates-2"))
        assert first == second
    recipes = [
        json.loads(Path("runs", name, "run.json").read_text())["recipe_sha256"] for name in ("dates", "dates-2")
    ]
    assert recipes[0] == recipes[1]
