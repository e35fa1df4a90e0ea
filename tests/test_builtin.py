"""The built-in model and data: what is shipped is what was trained, and the task is new to the model."""

from __future__ import annotations

import calendar
import hashlib
import json
import random
import re
from collections.abc import Iterator
from datetime import date
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from peftzoo.builtin import load_rows, model_path, pretrain_tiny_docs

FOLDER = model_path("tiny-docs-1m")
MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
TASKS_DIGEST = "911b6bec16c25668a140de169be05666096dde29baafa80d39387a2ec0e47358"
ROWS_DIGEST = "c06ad9b0d81ae4e60ef52268e43dc75b5dd1f1a28ca6dbcb4e3bec14b4303b05"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32).eval()


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def listed_digests(folder: Path) -> dict[str, str]:
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    return {name: value for value, name in (line.split("  ") for line in lines)}


def true_digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.iterdir() if path.name != "SHA256SUMS")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# The model


def test_every_file_has_its_listed_digest():
    assert listed_digests(FOLDER) == true_digests(FOLDER)


def test_weights_are_small_and_bfloat16():
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size <= 2_100_000
    with safe_open(weights, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_parameter_count(model):
    assert sum(parameter.numel() for parameter in model.parameters()) == 984_192


def test_log_names_no_path():
    assert "/" not in (FOLDER / "train.log").read_text().replace("tokens/s", "")


def test_log_is_of_a_finished_run():
    assert re.search(r"^finished in \d+ seconds$", (FOLDER / "train.log").read_text(), re.MULTILINE)


def test_model_answers_string_tasks_it_has_not_seen(model, tokenizer):
    assert pretrain_tiny_docs.task_accuracy(model, tokenizer, seed=2, rows=110) >= 0.8


def test_generation_stops_at_the_end_token(model, tokenizer):
    prompt = tokenizer("repeat: bana 42\n", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=32, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert tokenizer.decode(ids) == "bana 42" + tokenizer.eos_token


def test_generation_settings_name_the_tokenizers_tokens(model, tokenizer):
    settings = model.generation_config
    assert (settings.eos_token_id, settings.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_model_has_not_learnt_the_date_task(model, tokenizer):
    for row in load_rows("iso-dates", "test")[:10]:
        prompt = tokenizer(row["prompt"], return_tensors="pt")
        ids = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt.input_ids.shape[1] :]
        assert row["completion"] not in tokenizer.decode(ids)


# The tokenizer


@pytest.mark.parametrize(
    "text", ["def f(x):\n    return x  # done\n", " leading, trailing ", "naïve — ∂x/∂t, 日本\t\r\n", "1965-03-25", ""]
)
def test_tokenizer_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_each_digit_is_a_token(tokenizer):
    assert tokenizer.tokenize("1965-03-25") == list("1965-03-25")


def test_prompt_and_completion_split_where_they_meet(tokenizer):
    for row in load_rows("iso-dates", "test"):
        apart = tokenizer.encode(row["prompt"]) + tokenizer.encode(row["completion"])
        assert tokenizer.encode(row["prompt"] + row["completion"]) == apart


def test_chat_template(tokenizer):
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    hello, there = tokenizer.encode("hello"), tokenizer.encode("there")
    assert ids == [user, *hello, assistant, *there, tokenizer.eos_token_id]
    opened = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
    assert opened == [user, *hello, assistant]


# The date task


def spoken_date(prompt: str) -> date:
    """Read a prompt's date independently of the generator: the year has four digits, the day has fewer."""
    (year,) = re.findall(r"\b\d{4}\b", prompt)
    (day,) = re.findall(r"\b(\d{1,2})(?!\d)", prompt)
    (month,) = [number for number, name in enumerate(MONTHS, 1) if re.search(rf"\b{name}", prompt.lower())]
    return date(int(year), month, int(day))


@pytest.mark.parametrize(("split", "count"), [("train", 3000), ("test", 100)])
def test_completions_are_the_prompts_dates(split, count):
    rows = load_rows("iso-dates", split)
    assert len(rows) == count
    for row in rows:
        assert set(row) == {"prompt", "completion"}
        assert row["prompt"].startswith("iso date: ")
        assert row["prompt"].endswith("\n")
        assert spoken_date(row["prompt"]).isoformat() == row["completion"]


def test_ordinals():
    spoken = {
        match
        for row in load_rows("iso-dates", "train")
        for match in re.findall(r"\b(\d{1,2})(st|nd|rd|th)\b", row["prompt"])
    }
    special = {"1": "st", "2": "nd", "3": "rd", "21": "st", "22": "nd", "23": "rd", "31": "st"}
    assert spoken == {(str(day), special.get(str(day), "th")) for day in range(1, 32)}


@pytest.mark.parametrize("split", ["train", "test"])
def test_all_phrasings_and_months_occur(split):
    rows = load_rows("iso-dates", split)
    shapes = {re.sub(r"[A-Z][a-z]+", "M", re.sub(r"\d+(st|nd|rd|th)?", "#", row["prompt"])) for row in rows}
    assert shapes == {
        "iso date: the # of M #\n",
        "iso date: M #, #\n",
        "iso date: # M #\n",
        "iso date: #, M the #\n",
    }
    assert {row["completion"][5:7] for row in rows} == {f"{month:02}" for month in range(1, 13)}


def test_no_date_is_in_both_splits():
    train, test = ([row["completion"] for row in load_rows("iso-dates", split)] for split in ("train", "test"))
    assert len(set(train + test)) == 3100


def test_rows_are_the_same_on_each_machine():
    assert digest([load_rows("iso-dates", split) for split in ("train", "test")]) == ROWS_DIGEST


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(KeyError, match="tiny-docs-1m"):
        model_path("huge-docs")
    with pytest.raises(KeyError, match="iso-dates"):
        load_rows("us-dates", "train")
    with pytest.raises(KeyError, match="train, test"):
        load_rows("iso-dates", "validation")


# The pre-training


def many_string_tasks() -> Iterator[str]:
    rng = random.Random(3)
    return ("".join(pretrain_tiny_docs.string_task(rng)) for _ in range(20_000))


def test_string_tasks_are_the_same_on_each_machine():
    assert digest(list(many_string_tasks())) == TASKS_DIGEST


def test_string_tasks_hold_nothing_of_the_date_task():
    names = "|".join([*MONTHS, *filter(None, calendar.month_name)])
    forbidden = re.compile(rf"\d{{4}}-\d{{2}}-\d{{2}}|\b(iso|{names})\b", re.IGNORECASE)
    assert forbidden.search("iso date: 1 Feb 2014\n2014-02-01")
    for text in many_string_tasks():
        assert not forbidden.search(text)


def test_documents_hold_nothing_of_the_date_task():
    texts = pretrain_tiny_docs.documents()
    assert len(texts) > 3000
    assert texts == sorted(set(texts))
    assert not [text for text in texts if re.search(r"\d{4}-\d{2}-\d{2}|iso date:", text, re.IGNORECASE)]


def test_docstrings_are_read_without_running_the_source():
    source = (
        '"""Module."""\nraise SystemExit\nclass A:\n    """Class."""\n    async def f(): "Method."\ndef g(): pass\n'
    )
    assert sorted(pretrain_tiny_docs.docstrings(source)) == ["Class.", "Method.", "Module."]


def test_rate_warms_up_and_ends_near_zero():
    rates = [pretrain_tiny_docs.rate(step, 1000, 0.5) for step in range(1000)]
    assert rates[0] == pytest.approx(0.025)
    assert rates[19] == rates[20] == max(rates) == 0.5
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert 0 < rates[-1] < 1e-5


def test_loss_counts_answers_only_and_keeps_the_halves_apart(tokenizer, model):
    batches = pretrain_tiny_docs.Batches(tokenizer, ["the quick brown fox\n" * 100], rows=4, seed=0)
    ids, labels = batches.draw()
    assert ids.shape == labels.shape == (4, pretrain_tiny_docs.LENGTH)
    assert torch.equal(ids[:2], labels[:2])
    answered = labels[2:] != pretrain_tiny_docs.IGNORED
    assert torch.equal(ids[2:][answered], labels[2:][answered])
    newline, assistant = tokenizer.encode("\n<|assistant|>")
    for row, kept in zip(ids[2:].tolist(), answered.tolist(), strict=True):
        opened = [before in (newline, assistant) for before in row[:-1]]
        began = [not before and after for before, after in pairwise(kept)]
        assert began == opened
    documentation, tasks = pretrain_tiny_docs.losses(model, ids, labels)
    assert model(input_ids=ids[:2], labels=labels[:2]).loss.item() == pytest.approx(documentation.item(), rel=1e-4)
    assert model(input_ids=ids[2:], labels=labels[2:]).loss.item() == pytest.approx(tasks.item(), rel=1e-4)


def test_bits_per_byte_of_a_uniform_model(tokenizer, model):
    blank = type(model)(model.config)
    torch.nn.init.zeros_(blank.model.embed_tokens.weight)
    texts = ["naïve words " * 400]
    tokens = len(tokenizer.encode(texts[0] + tokenizer.eos_token, verbose=False))
    expected = 10 * tokens / len(texts[0].encode())  # 1,024 equally likely tokens are 10 bits each
    assert pretrain_tiny_docs.bits_per_byte(blank, tokenizer, texts) == pytest.approx(expected, rel=1e-5)


def test_pretraining_repeats_itself(tmp_path, monkeypatch):
    rng = random.Random(0)
    texts = [" ".join(pretrain_tiny_docs.string_task(rng)[0] for _ in range(60)) for _ in range(40)]
    monkeypatch.setattr(pretrain_tiny_docs, "documents", texts.copy)
    monkeypatch.setattr(pretrain_tiny_docs, "task_accuracy", lambda *_: 0.0)
    for run in ("first", "second"):
        pretrain_tiny_docs.pretrain(tmp_path / run, steps=3, rows=2, peak=1e-3, seed=5, evaluate_every=3)
    pretrain_tiny_docs.pretrain(tmp_path / "other", steps=3, rows=2, peak=1e-3, seed=6, evaluate_every=3)
    first, second, other = (listed_digests(tmp_path / run) for run in ("first", "second", "other"))
    assert first == true_digests(tmp_path / "first")
    assert first["model.safetensors"] == second["model.safetensors"] != other["model.safetensors"]
    assert first["tokenizer.json"] == second["tokenizer.json"]
