"""The task causal-lm: learn to go on writing, from rows of prompt and completion or of plain text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from peftzoo.errors import DataError
from peftzoo.train.data import load_rows, text_columns
from peftzoo.train.evaluation import Evaluation, Sample, exact_match, generate, mean_loss, perplexity
from peftzoo.train.models import empty_base, load_base, load_tokenizer
from peftzoo.train.recipe import DataSource, Recipe
from peftzoo.train.tokens import IGNORED, Encoder, Example


class CausalLM:
    """The data, model and judgement of one recipe; reads the data at once, because that is what fails most.

    Attributes:
        peft_task_type: peft's name of the task.
        examples: the training rows.
        notes: what the person should know about the data, one line each.

    Raises:
        DataError: rows that cannot be read, or that leave nothing to train on; each is named.
        ModelError: there is no such tokenizer, or it has no end-of-sequence token.
    """

    peft_task_type = "CAUSAL_LM"

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._encoder = Encoder(load_tokenizer(recipe.model))
        self.notes: list[str] = []
        _, self.examples = self._read("data.train", recipe.data.train)
        self._held_out_texts: list[tuple[str, ...]] = []
        self._held_out: list[Example] = []
        if recipe.data.eval is not None:
            self._held_out_texts, self._held_out = self._read("data.eval", recipe.data.eval)

    def load_model(self, device: torch.device) -> PreTrainedModel:
        """Return the frozen base model on ``device``; it decodes greedily.

        Raises:
            DataError: the data has tokens or positions that the model does not have.
            ModelError: there is no such model, or it cannot be read.
        """
        model = load_base(AutoModelForCausalLM, self._recipe.model, device)
        self._check_fit(model)
        model.config.use_cache = False
        # What a model brings along may sample, or punish repetition; an evaluation must do neither.
        model.generation_config = GenerationConfig(
            eos_token_id=self._encoder.end, pad_token_id=self._encoder.padding, use_cache=True
        )
        return model

    def empty_model(self) -> PreTrainedModel:
        """Return the base model on the meta device: shapes without weights."""
        return empty_base(AutoModelForCausalLM, self._recipe.model)

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return a batch, the model's arguments by name, each [rows, longest]."""
        return self._encoder.collate(examples)

    @staticmethod
    def count(batch: dict[str, Tensor]) -> int:
        """Return the number of tokens that the model's loss on ``batch`` is the mean of."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def describe(self, index: int) -> str:
        """Return training row ``index`` as the model sees it, on one line, with its trained tokens marked."""
        return self._encoder.describe(self.examples[index])

    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> Evaluation | None:
        """Judge ``model`` (not wrapped, in evaluation mode) on the held-out rows, together with all other processes.

        Returns:
            The metrics that ``eval.metrics`` asks for, and the answers that were generated for exact_match or, without
            it, for the first ``eval.show_samples`` rows; None where the recipe has no ``data.eval``.
        """
        if not self._held_out:
            return None
        settings, found = self._recipe.eval, Evaluation()
        batch_size = settings.per_device_eval_batch_size
        if "perplexity" in settings.metrics:
            loss = mean_loss(model, self._encoder, self._held_out, batch_size=batch_size, accelerator=accelerator)
            found.metrics |= {"eval_loss": loss, "perplexity": perplexity(loss)}
        if self._recipe.data.format == "prompt-completion":
            asked = self._held_out_texts[: None if "exact_match" in settings.metrics else settings.show_samples]
            answers = generate(
                model,
                self._encoder,
                [text[0] for text in asked],
                max_new_tokens=settings.generate.max_new_tokens,
                batch_size=batch_size,
                accelerator=accelerator,
            )
            found.samples = [Sample(text[0], text[1], got) for text, got in zip(asked, answers, strict=True)]
        if "exact_match" in settings.metrics:
            found.metrics["exact_match"] = exact_match(found.samples)
        return found

    def _read(self, name: str, source: str | DataSource) -> tuple[list[tuple[str, ...]], list[Example]]:
        data = self._recipe.data
        rows = load_rows(source)
        texts = text_columns(rows, data.format.split("-"), data.columns)
        examples, note = self._encoder.examples(texts, rows.where, data)
        if note is not None:
            self.notes.append(f"{name}: {note}")
        return texts, examples

    def _check_fit(self, model: PreTrainedModel) -> None:
        examples = [*self.examples, *self._held_out]
        highest = max(int(example.ids.max()) for example in examples)
        known = len(model.get_input_embeddings().weight)
        if highest >= known:
            raise DataError(
                f"the tokenizer made token {highest}, and the model has embeddings for {known} tokens only"
            )
        longest = max(len(example.ids) for example in examples)
        places = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if places is not None and longest > places:
            raise DataError(
                f"a row has {longest} tokens, and the model has {places} places; set data.max_length={places}"
            )
