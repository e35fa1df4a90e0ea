"""Pre-train `tiny-docs-1m`, the built-in language model.

Run it with ``python -m peftzoo.builtin.pretrain_tiny_docs --out FOLDER``.

Half of each batch is Python's own documentation (the reference topics of `pydoc_data` and the docstrings of the
standard library), half is small string tasks made up on the spot. A step count ends the run, never a clock, so a run
can be repeated: the same Python, package versions, seed and step count read the same text in the same order.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import math
import platform
import random
import re
import sysconfig
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peftzoo.builtin.string_tasks import string_task

EOS, PAD, USER, ASSISTANT = "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCABULARY = 1024
LENGTH = 256
IGNORED = -100  # the label that torch's cross entropy leaves out

# ---------------------------------------------------------------------------------------------------------------------
# Text: Python's documentation
# ---------------------------------------------------------------------------------------------------------------------

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data"}
SHORTEST_DOCUMENT = 40  # characters; below this docstrings say little more than the name of their function
# The built-in fine-tuning task must be new to the model, so a line with one of its answers or prompts is left out.
HELD_BACK = re.compile(r"\d{4}-\d{2}-\d{2}|iso date:", re.IGNORECASE)


def docstrings(source: str) -> Iterator[str]:
    """Yield the cleaned docstrings of one Python source text; the source is parsed and never run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def documents() -> list[str]:
    """Return the reference topics and standard-library docstrings of this Python, each text once, sorted."""
    texts = list(topics.values())
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in library.rglob("*.py"):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(library).parts):
            texts += docstrings(path.read_text(encoding="utf-8"))
    kept = ("\n".join(line for line in text.strip().splitlines() if not HELD_BACK.search(line)) for text in texts)
    return sorted({text for text in kept if len(text) >= SHORTEST_DOCUMENT})


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and model
# ---------------------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts`; each digit is a token of its own, so a number's place values line up."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a freshly initialised Llama of 984,192 parameters; torch's global seed decides the values."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


class Batches:
    """The training batches: the first half of the rows is documentation, the second half packed string tasks."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: list[str], rows: int, seed: int) -> None:
        """Tokenise `texts` into one stream; `rows` (even) rows of `LENGTH` tokens make a batch."""
        self.tokenizer = tokenizer
        self.stream = token_stream(tokenizer, texts)
        self.rows = rows
        self.rng = random.Random(seed)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Return the next token ids and labels, both int64 of shape [rows, LENGTH]."""
        half = self.rows // 2
        starts = [self.rng.randrange(len(self.stream) - LENGTH) for _ in range(half)]
        windows = torch.stack([self.stream[start : start + LENGTH] for start in starts])
        tasks = torch.tensor([self._task_row() for _ in range(half)])
        return torch.cat([windows, tasks[:, 0]]), torch.cat([windows, tasks[:, 1]])

    def _task_row(self) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        while len(ids) < LENGTH:
            prompt, answer = string_task(self.rng)
            if self.rng.randrange(8) == 0:  # often enough that the chat markers are trained
                prompt = f"{USER}{prompt.rstrip()}{ASSISTANT}"
            question, reply = self.tokenizer.encode(prompt), self.tokenizer.encode(answer + EOS)
            ids += question + reply
            # A prompt is drawn at random: nothing in it can be learnt, and its loss would only add noise.
            labels += [IGNORED] * len(question) + reply
        return ids[:LENGTH], labels[:LENGTH]


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Return all `texts`, each closed by the end token, as one int64 vector."""
    return torch.tensor([token for text in texts for token in tokenizer.encode(text + EOS, verbose=False)])


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def losses(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean loss (nats per token) of the upper half of the rows, documentation, and of the lower, tasks."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    half = len(ids) // 2
    documentation, tasks = (
        functional.cross_entropy(part.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
        for part, wanted in ((logits[:half], labels[:half, 1:]), (logits[half:], labels[half:, 1:]))
    )
    return documentation, tasks


@torch.inference_mode()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Return the model's loss on `texts` in bits per UTF-8 byte, over windows of `LENGTH` tokens."""
    stream = token_stream(tokenizer, texts)
    windows = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    nats = torch.cat(
        [
            functional.cross_entropy(
                model(input_ids=part, use_cache=False).logits[:, :-1].flatten(0, 1),
                part[:, 1:].flatten(),
                reduction="none",
            )
            for part in windows.split(16)
        ]
    )
    bytes_per_token = sum(len(text.encode()) for text in texts) / len(stream)
    return nats.mean().item() / math.log(2) / bytes_per_token


@torch.inference_mode()
def task_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, rows: int = 440) -> float:
    """Return the share of `rows` fresh string tasks that greedy decoding answers exactly, end token included.

    Greedy decoding gives the reference answer if and only if, fed with that answer, the model ranks each of its tokens
    first; so one forward pass per task is enough.
    """
    rng = random.Random(seed)
    correct = 0
    for _ in range(rows):
        prompt, answer = string_task(rng)
        question, reply = tokenizer.encode(prompt), tokenizer.encode(answer + EOS)
        logits = model(input_ids=torch.tensor([question + reply]), use_cache=False).logits[0]
        correct += logits[len(question) - 1 : -1].argmax(-1).tolist() == reply
    return correct / rows


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate of `step` (from 0): a linear warm-up over 2 % of the run, then a cosine to 0."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model (bfloat16) and tokenizer as `transformers` reads them, and the digests of all files in `folder`."""
    copy.deepcopy(model).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    write_digests(folder)


def write_digests(folder: Path) -> None:
    """Write `SHA256SUMS` over all other files of `folder`, in the format of the ``sha256sum`` tool."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


def pretrain(out: Path, steps: int, rows: int, peak: float, seed: int, evaluate_every: int) -> None:
    """Pre-train from nothing and write the model to `out`, anew after each evaluation.

    Args:
        out: folder of the result; made if missing.
        steps: optimiser steps; decides the length of the run and of its learning-rate schedule.
        rows: rows of `LENGTH` tokens in a batch, an even number.
        peak: the highest learning rate.
        seed: of the initial values, of the held-out documents and of the order of the text.
        evaluate_every: steps between two evaluations; the last step is always followed by one.
    """
    out.mkdir(parents=True, exist_ok=True)
    log = out / "train.log"
    log.write_text("", encoding="utf-8")

    def say(line: str) -> None:
        print(line, flush=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    torch.manual_seed(seed)
    texts = documents()
    random.Random(seed).shuffle(texts)
    held_out, training = texts[: len(texts) // 20], texts[len(texts) // 20 :]
    examples = random.Random(seed)
    tokenizer = train_tokenizer(training + ["".join(string_task(examples)) for _ in range(2000)])
    model = build_model(tokenizer)
    batches = Batches(tokenizer, training, rows, seed)

    say(f"tiny-docs-1m: {sum(p.numel() for p in model.parameters()):,} parameters, float32, 1 thread, seed {seed}")
    say(
        f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"tokenizers {tokenizers.__version__}"
    )
    say(
        f"text: {len(texts):,} documents, {sum(map(len, texts)):,} characters, {len(held_out):,} documents held out, "
        f"{len(batches.stream):,} training tokens, sha256 {hashlib.sha256(chr(0).join(texts).encode()).hexdigest()}"
    )
    say(f"run: {steps:,} steps of {rows} x {LENGTH} tokens, AdamW, peak learning rate {peak:g}, cosine")

    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    begin = time.perf_counter()
    total = torch.zeros(2)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, peak)
        documentation, tasks = losses(model, *batches.draw())
        ((documentation + tasks) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        total += torch.stack([documentation, tasks]).detach()
        done, seconds = step + 1, time.perf_counter() - begin
        if done % 100 == 0:
            say(
                f"step {done:,} loss docs {total[0] / 100:.4f} tasks {total[1] / 100:.4f} "
                f"seconds {seconds:.0f} tokens/s {done * rows * LENGTH / seconds:.0f}"
            )
            total.zero_()
        if done % evaluate_every == 0 or done == steps:
            say(
                f"step {done:,} held-out docs {bits_per_byte(model, tokenizer, held_out):.4f} bits per byte, "
                f"string tasks {task_accuracy(model, tokenizer, seed + 1):.1%} exact"
            )
            if done == steps:
                say(f"finished in {seconds:.0f} seconds")
            export(model, tokenizer, out)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="Pre-train tiny-docs-1m, peftzoo's built-in language model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, tokenizer and log")
    parser.add_argument("--steps", type=int, default=10_000, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=6, help="rows in a batch, even (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=6e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    parser.add_argument("--evaluate-every", type=int, default=1000, help="steps (default: %(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    pretrain(given.out, given.steps, given.rows, given.lr, given.seed, given.evaluate_every)


if __name__ == "__main__":
    main()
