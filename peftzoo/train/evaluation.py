"""How good is the model: greedy answers in batches, exact match, loss and perplexity; all processes share the rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from peftzoo.train.tokens import Encoder, Example


@dataclass(frozen=True)
class Sample:
    """One question of the evaluation: what was asked, what should come, what came."""

    prompt: str
    expected: str
    got: str


@dataclass
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: name -> value; exact_match is a fraction, eval_loss is in nats per trained token.
        samples: the answers that were generated, in the order of the rows.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)


def exact_match(samples: Sequence[Sample]) -> float:
    """Return the fraction of answers that equal the expected one, spaces around them aside."""
    return sum(sample.got.strip() == sample.expected.strip() for sample in samples) / len(samples)


def perplexity(loss: float) -> float:
    """Return exp(loss), or the largest float where that overflows."""
    return math.exp(min(loss, 709.0))


@torch.no_grad()
def generate(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    accelerator: Accelerator,
) -> list[str]:
    """Return the model's greedy answer to each prompt.

    Every process calls this with the same prompts, answers its share and gets all answers.

    Args:
        model: the unwrapped model, in evaluation mode, with a neutral generation config.
        encoder: turns prompts into tokens and tokens into answers.
        prompts: the texts to go on from.
        max_new_tokens: tokens of an answer at most.
        batch_size: prompts per process and forward pass.
        accelerator: knows the processes, the device and the precision.
    """
    tokens = encoder.prompts(prompts)
    answers: list[tuple[int, str]] = []
    for rows in _batches([len(prompt) for prompt in tokens], batch_size, accelerator):
        batch = to_device(encoder.collate_prompts([tokens[row] for row in rows]), accelerator.device)
        with accelerator.autocast():
            written: Tensor = model.generate(**batch, max_new_tokens=max_new_tokens)  # type: ignore[operator]
        news = written[:, batch["input_ids"].shape[1] :].tolist()
        answers += [(row, encoder.answer(new)) for row, new in zip(rows, news, strict=True)]
    return [answer for _, answer in sorted(gather_object(answers))]


@torch.no_grad()
def mean_loss(
    model: nn.Module, encoder: Encoder, examples: Sequence[Example], *, batch_size: int, accelerator: Accelerator
) -> float:
    """Return the mean loss over the trained tokens of all examples, in nats; arguments as of `generate`."""
    sums: list[tuple[float, int]] = []
    for rows in _batches([len(example.ids) for example in examples], batch_size, accelerator):
        part = [examples[row] for row in rows]
        count = sum(example.trained for example in part)
        with accelerator.autocast():
            loss = model(**to_device(encoder.collate(part), accelerator.device)).loss
        sums.append((loss.item() * count, count))
    losses, counts = zip(*gather_object(sums), strict=True)
    return math.fsum(losses) / int(sum(counts))


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the batch with every tensor on ``device``."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _batches(lengths: Sequence[int], batch_size: int, accelerator: Accelerator) -> Iterator[list[int]]:
    """Yield the rows of this process's batches; rows of like length go together, the longest first."""
    by_length = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    mine = by_length[accelerator.process_index :: accelerator.num_processes]
    for start in range(0, len(mine), batch_size):
        yield mine[start : start + batch_size]
