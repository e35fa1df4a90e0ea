"""From rows to tokens: what is trained, what is cut, what is refused and how it is named."""

from __future__ import annotations

import copy
import gzip
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from train_helpers import ROWS, encoder, small_recipe, write_rows

from peftzoo.errors import DataError, ModelError
from peftzoo.train.causal_lm import CausalLM
from peftzoo.train.data import load_rows, text_columns
from peftzoo.train.recipe import DataSettings, DataSource
from peftzoo.train.tokens import IGNORED, Encoder


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def settings(**changes):
    return DataSettings(train="builtin/iso-dates:train", **changes)


def encode(texts, **changes):
    return encoder().examples(texts, lambda index: f"row {index}", settings(**changes))


def refused(texts, **changes):
    with pytest.raises(DataError) as caught:
        encode(texts, **changes)
    return str(caught.value)


def trained_text(example):
    made = encoder()
    labels = made.collate([example])["labels"][0]
    return made.tokenizer.decode(labels[labels != IGNORED])


def test_prompt_is_masked_and_the_end_is_trained():
    (example,), note = encode([("iso date: May 1\n", "2000-05-01")])
    assert trained_text(example) == "2000-05-01<|end|>"
    assert note is None
    whole = encoder().tokenizer.decode(example.ids)
    assert whole == "iso date: May 1\n2000-05-01<|end|>"


def test_mask_prompt_false_trains_everything():
    (example,), _ = encode([("iso date: May 1\n", "2000-05-01")], mask_prompt=False)
    assert trained_text(example) == "iso date: May 1\n2000-05-01<|end|>"
    assert example.trained == len(example.ids) - 1, "nothing predicts the first token"


def test_text_is_trained_whole():
    (example,), _ = encode([("all of this",)], format="text")
    assert trained_text(example) == "all of this<|end|>"


def test_count_is_the_number_of_terms_in_the_loss(llama):
    examples, _ = encode([("ab", "cdef"), ("a", "b")], mask_prompt=False)
    batch = encoder().collate(examples)
    assert CausalLM.count(batch) == sum(example.trained for example in examples)
    batch["input_ids"] %= 96
    logits = llama(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"].clone()
    labels[labels >= 96] = 5
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    loss = llama(**(batch | {"labels": labels})).loss
    torch.testing.assert_close(loss * CausalLM.count(batch), total)


def test_long_rows_are_cut_and_counted():
    text = "x y z " * 10
    examples, note = encode([("a", text), ("a", "b")], max_length=12)
    assert [len(example.ids) for example in examples] == [12, 3]
    longest = len(encoder().prompts(["a" + text])[0]) + 1
    assert note is not None
    assert "1 of 2 rows" in note
    assert "max_length=12" in note
    assert str(longest) in note


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_completion_cut_off_is_refused_by_row(mask_prompt):
    message = refused([("a", "b"), ("x y z " * 10, "b")], max_length=12, mask_prompt=mask_prompt)
    assert "row 1" in message
    assert "row 0" not in message
    assert "max_length=12" in message


def test_nothing_to_train_on_is_refused_by_row():
    assert "row 1: nothing to train on" in refused([("a",), ("",)], format="text")


def test_empty_prompt_is_refused():
    assert "row 0: the prompt is empty" in refused([("", "b")])


def test_training_pads_on_the_right_generation_on_the_left():
    made = encoder()
    batch = made.collate(encode([("a", "b"), ("a", "bcd")])[0])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["input_ids"][0, 3:].tolist() == [made.padding] * 2
    assert batch["labels"][0, 3:].tolist() == [IGNORED] * 2
    left = made.collate_prompts([[5], [6, 7, 8]])
    assert left["input_ids"].tolist() == [[made.padding, made.padding, 5], [6, 7, 8]]
    assert left["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]


def test_special_tokens_of_the_tokenizer_start_a_row_and_do_not_part_it():
    tokenizer = copy.deepcopy(encoder().tokenizer)
    start, end = tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A <|end|>", special_tokens=[("<|user|>", start), ("<|end|>", end)]
    )
    made = Encoder(tokenizer)
    (example,), _ = made.examples([("ab", "cd")], str, settings())
    assert tokenizer.decode(example.ids) == "<|user|>abcd<|end|>"
    assert tokenizer.decode(made.prompts(["ab"])[0]) == "<|user|>ab"


def test_tokenizer_without_end_is_refused():
    tokenizer = copy.deepcopy(encoder().tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="end-of-sequence"):
        Encoder(tokenizer)


def test_answer_stops_at_the_end_token():
    made = encoder()
    ids = made.prompts(["2000-05-01"])[0]
    assert made.answer([*ids, made.end, *ids]) == "2000-05-01"


def test_sample_shows_what_is_trained():
    shown = CausalLM(small_recipe()).describe(0)
    assert f"{ROWS[0]['prompt'].strip()}\\n[[{ROWS[0]['completion']}<|end|>]]" in shown


def test_sample_of_a_long_row_is_short():
    (example,), _ = encode([("x " * 300, "y " * 300)], max_length=2000)
    shown = encoder().describe(example)
    assert len(shown) < 500
    assert "x [[y" in shown


def test_token_or_place_the_model_lacks_is_refused(monkeypatch, llama):
    task = CausalLM(small_recipe())
    monkeypatch.setattr("peftzoo.train.causal_lm.load_base", lambda *_: llama)
    with pytest.raises(DataError, match="embeddings for 96 tokens"):
        task.load_model(torch.device("cpu"))
    write_rows("long.jsonl", [{"prompt": "a", "completion": "b c " * 200}])
    task = CausalLM(small_recipe("data.train.path=long.jsonl", "data.max_length=400"))
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"256 places; set data\.max_length=256"):
        task.load_model(torch.device("cpu"))


# files


def complaint(content, columns=("prompt",), mapped=()):
    Path("bad.jsonl").write_bytes(content)
    with pytest.raises(DataError) as caught:
        text_columns(load_rows(DataSource(path="bad.jsonl")), columns, dict(mapped))
    assert caught.value.exit_code == 3
    return str(caught.value)


GOOD = b'{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"prompt": "a"', "delimiter"),
        (b"[1, 2]", "holds a list"),
        (b'"text"', "holds a str"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"prompt": "a\x00"}', "control character"),
        (b'{"prompt": null}', "prompt is null, not text"),
        (b'{"prompt": 5}', "prompt is 5, not text"),
        (b'{"promt": "a"}', "did you mean promt?"),
        (b"{}", "no column prompt"),
    ],
)
def test_bad_line_is_named_by_file_and_line(line, says):
    message = complaint(GOOD + b"\n" + line + b"\n" + GOOD)
    assert "bad.jsonl:3: " in message
    assert says in message
    assert ":1:" not in message
    assert ":4:" not in message


def test_every_bad_line_is_counted():
    message = complaint(b"nonsense\n" * 30)
    assert "bad.jsonl:1:" in message
    assert "bad.jsonl:10:" in message
    assert "and 20 more" in message


def test_mapped_column_is_named():
    assert "no column question" in complaint(GOOD, mapped={"prompt": "question"}.items())


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_no_rows_is_refused(content):
    assert "bad.jsonl: there are no rows" in complaint(content)


def test_compressed_file_named_jsonl_is_refused():
    assert "bad.jsonl:1: " in complaint(gzip.compress(GOOD * 100))


def test_missing_file_is_refused():
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot be read"):
        load_rows(DataSource(path="gone.jsonl"))


def test_byte_order_mark_and_line_ends_are_no_matter():
    Path("x.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") * 2)
    assert len(load_rows(DataSource(path="x.jsonl"))) == 2


def test_max_rows_reads_no_further():
    Path("x.jsonl").write_bytes(GOOD * 3 + b"nonsense\n")
    assert len(load_rows(DataSource(path="x.jsonl", max_rows=3))) == 3


def test_columns_are_mapped():
    write_rows("x.jsonl", [{"q": "a", "a": "b"}])
    rows = load_rows(DataSource(path="x.jsonl"))
    assert text_columns(rows, ["prompt", "completion"], {"prompt": "q", "completion": "a"}) == [("a", "b")]


def test_unknown_built_in_data_is_refused():
    with pytest.raises(DataError, match="builtin/nothing:train"):
        load_rows("builtin/nothing:train")


def test_hub_data_is_cut_and_named(monkeypatch):
    asked = []

    def load_dataset(*arguments, **settings):
        asked.append((arguments, settings))
        return datasets.Dataset.from_list([{"prompt": str(i)} for i in range(5)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_rows(DataSource(hub="some/data", name="part", split="test", max_rows=2))
    assert asked == [(("some/data", "part"), {"split": "test"})]
    assert [row["prompt"] for row in rows.values] == ["0", "1"]
    assert rows.where(1) == "some/data row 2"


def test_hub_data_that_cannot_be_had_is_refused(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no way there")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="some/data: cannot be loaded: no way there"):
        load_rows(DataSource(hub="some/data", split="test"))
