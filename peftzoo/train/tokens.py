"""Text as tokens for a causal language model: which of them are trained, padding, and a look at one row."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peftzoo.errors import ModelError
from peftzoo.train.recipe import DataSettings
from peftzoo.train.rows import refuse

IGNORED = -100
"""The label that the models of transformers leave out of their loss."""

VISIBLE = 200  # characters of a row shown on either side of where training begins


@dataclass(frozen=True)
class Example:
    """One row as tokens.

    Attributes:
        ids: prompt, completion and end-of-sequence token, [length], int32.
        masked: how many tokens at the front are read but not trained.
    """

    ids: Tensor
    masked: int

    @property
    def trained(self) -> int:
        """The number of tokens in the loss; the first of all has nothing before it that could predict it."""
        return len(self.ids) - max(self.masked, 1)


class Encoder:
    """Turns text into the same tokens in training and in generation.

    Prompt and completion are tokenised apart, so that the tokens of a prompt do not depend on what follows.

    Raises:
        ModelError: the tokenizer has no end-of-sequence token, so no answer could end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"{tokenizer.name_or_path}: the tokenizer has no end-of-sequence token")
        self.tokenizer = tokenizer
        self.end: int = tokenizer.eos_token_id
        # Padding is masked everywhere, so any token serves where the tokenizer has none of its own.
        self.padding: int = self.end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._start = _start_tokens(tokenizer)

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text behind the tokenizer's start tokens."""
        return [self._start + ids for ids in self._plain(texts)]

    def examples(
        self, texts: Sequence[tuple[str, ...]], where: Callable[[int], str], data: DataSettings
    ) -> tuple[list[Example], str | None]:
        """Return one example per row, and a note if ``data.max_length`` cut any.

        Args:
            texts: the fields of ``data.format`` for each row.
            where: names row i for a message.
            data: the ``data`` section of the recipe.

        Raises:
            DataError: nothing trained is left of a row; each such row is named.
        """
        prompts = [self._start] * len(texts) if data.format == "text" else self.prompts([text[0] for text in texts])
        completions = [self._closed(ids) for ids in self._plain([text[-1] for text in texts])]
        masks_prompt = data.mask_prompt and data.format != "text"
        examples, problems, lengths = [], [], []
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            ids = torch.tensor((prompt + completion)[: data.max_length], dtype=torch.int32)
            example = Example(ids, masked=len(prompt) if masks_prompt else 0)
            lengths.append(len(prompt) + len(completion))
            if not prompt and data.format != "text":
                problems.append(f"{where(index)}: the prompt is empty")
            elif len(prompt) >= data.max_length:
                problems.append(f"{where(index)}: what comes before the completion has {len(prompt)} tokens")
            elif example.trained < 1:
                problems.append(f"{where(index)}: nothing to train on")
            examples.append(example)
        refuse(problems, f"every row must keep something to train on within data.max_length={data.max_length} tokens")
        cut = sum(length > data.max_length for length in lengths)
        note = f"{cut} of {len(texts)} rows are longer than data.max_length={data.max_length} tokens and were cut"
        return examples, f"{note}; the longest has {max(lengths)}" if cut else None

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels``, each [rows, longest], padded on the right."""
        shape = (len(examples), max(len(example.ids) for example in examples))
        ids, mask, labels = torch.full(shape, self.padding), torch.zeros(shape).long(), torch.full(shape, IGNORED)
        for row, example in enumerate(examples):
            length = len(example.ids)
            ids[row, :length] = example.ids
            mask[row, :length] = 1
            labels[row, example.masked : length] = example.ids[example.masked :]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def collate_prompts(self, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Return ``input_ids`` and ``attention_mask``, each [rows, longest], padded on the left to go on writing."""
        shape = (len(prompts), max(len(prompt) for prompt in prompts))
        ids, mask = torch.full(shape, self.padding), torch.zeros(shape).long()
        for row, prompt in enumerate(prompts):
            ids[row, shape[1] - len(prompt) :] = torch.tensor(prompt)
            mask[row, shape[1] - len(prompt) :] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def answer(self, ids: Sequence[int]) -> str:
        """Return the text of generated tokens up to the end-of-sequence token."""
        tokens = list(ids)
        kept = tokens[: tokens.index(self.end)] if self.end in tokens else tokens
        return str(self.tokenizer.decode(kept, skip_special_tokens=True))

    def describe(self, example: Example) -> str:
        """Return the text of an example on one line, around where its trained tokens begin; they stand in [[ ]]."""
        first = max(example.masked, 1)
        read, trained = self._visible(example.ids[:first]), self._visible(example.ids[first:])
        read = read if len(read) <= VISIBLE else f"...{read[-VISIBLE:]}"
        trained = trained if len(trained) <= VISIBLE else f"{trained[:VISIBLE]}..."
        return f"{len(example.ids)} tokens, {example.trained} of them trained, in [[ ]]: {read}[[{trained}]]"

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        # an empty list of texts is refused by fast tokenizers
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def _closed(self, ids: list[int]) -> list[int]:
        return ids if ids and ids[-1] == self.end else [*ids, self.end]

    def _visible(self, ids: Tensor) -> str:
        return json.dumps(self.tokenizer.decode(ids), ensure_ascii=False)[1:-1]


def _start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts before a text; what it may put behind is left out, completions end themselves."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return list(full[:start])
    return []
