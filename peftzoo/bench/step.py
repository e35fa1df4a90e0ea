"""`bench step`: the trainer's step on a whole model, ours beside peft's.

On a CPU the built-in model, on a GPU random weights in the shape of Llama-3-8B. All models of a case stand on the same
frozen tensors and train from the same values; the floor goes forward and backward through the frozen model, down to
its embeddings.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from peftzoo.bench.kernels import DTYPES, relative_error
from peftzoo.bench.layers import FLOOR, INPUTS, OURS, PEFT, chosen
from peftzoo.bench.report import Row, append, compared
from peftzoo.bench.timing import Mark, Run, alternate
from peftzoo.builtin import model_path
from peftzoo.core.calibrate import calibrate, uncalibrated
from peftzoo.core.fuse import fuse
from peftzoo.core.groups import parameter_groups
from peftzoo.core.peft_methods import prepare
from peftzoo.core.registry import get_method
from peftzoo.errors import RecipeError
from peftzoo.train.models import load_base, share_inputs
from peftzoo.train.recipe import ModelSettings
from peftzoo.train.step import Stepper

BUILTIN = "tiny-docs-1m"
POSITIONS = 8192  # of the random model
MODEL_DTYPES = ("float32", "bfloat16", "float16")
# what peft's LoRA needs to be told to be the method of this name
STOCK: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"use_dora": True}}
# how a trained tensor's name goes on after the layer's: as ours
SPELLINGS = {
    "peftzoo_adapter.default.": "",
    "lora_A.default.weight": "a",
    "lora_B.default.weight": "b",
    "lora_magnitude_vector.default.weight": "m",
}
SHIPPED = (PEFT, f"{PEFT}-fused")  # with the dtypes that peft gives its adapters
BAR = 0.92  # the most that a step of the built-in model may take of peft's
# relative error of the loss and every gradient, through all layers
BOUNDS = {torch.float32: 1e-3, torch.float16: 0.2, torch.bfloat16: 0.2}
RATE = 1e-6  # so small that a hundred steps leave the values what they were checked for


@dataclass(frozen=True)
class StepSettings:
    """What `bench step` runs; 0 is the default of the device.

    Attributes:
        methods: of the registry.
        rank: of every adapter.
        batch: rows of a step.
        sequence: tokens of a row.
        layers: blocks of the random model; a GPU's alone.
        dtype: of the model, by torch's name; "" is the device's default.
        checkpointing: recompute each block in the backward.
        only: implementations, beside the floor; empty means all, on a CPU without `peft-compiled`.
        rounds: in which every implementation takes a step.
    """

    methods: Sequence[str] = ("lora",)
    rank: int = 16
    batch: int = 0
    sequence: int = 0
    layers: int = 0
    dtype: str = ""
    checkpointing: bool = False
    only: Sequence[str] = ()
    rounds: int = 0


def run(
    settings: StepSettings,
    device: torch.device,
    path: Path,
    facts: dict[str, Any],
    show: Callable[[str, list[Row]], None],
) -> list[Row]:
    """Measure the steps of every method and write their rows into `path`.

    Args:
        settings: what to run.
        device: where.
        path: JSONL file that exists.
        facts: of the environment, a part of every row.
        show: called with what is about to be measured and no rows, then with every row of it.

    Raises:
        RecipeError: a setting cannot be, or nothing is left to run.
        BenchmarkError: an implementation computes something else than it should.
    """
    cuda = device.type == "cuda"
    todo = plan(settings, device)
    base = base_model(settings, device)
    batch, sequence = settings.batch or (2 if cuda else 32), settings.sequence or (4096 if cuda else 32)
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(base.config.vocab_size, (batch, sequence), generator=generator) for _ in range(INPUTS)]
    batches = [{"input_ids": one.to(device), "labels": one.to(device)} for one in tokens]
    rounds = settings.rounds or 20
    found = []
    for number, (method, names) in enumerate(todo, 1):
        show(f"{number}/{len(todo)}  a step of {batch} x {sequence} tokens with {method}: {', '.join(names)}", [])
        work = Work(method, settings.rank, base, batches, settings.checkpointing)
        rows = [row | {"environment": facts} for row in measure(work, names, rounds)]
        append(path, rows)
        show("", rows)
        found += rows
    return found


def plan(settings: StepSettings, device: torch.device) -> list[tuple[str, list[str]]]:
    """Return each method with the names of its implementations.

    Raises:
        RecipeError: a setting cannot be, or nothing is left to run.
    """
    cuda = device.type == "cuda"
    if settings.layers and not cuda:
        raise RecipeError("--layers is for the random model on a GPU; on a CPU the built-in model is measured")
    if settings.dtype and settings.dtype not in MODEL_DTYPES:
        raise RecipeError(f"--dtype {settings.dtype} is not one of {', '.join(MODEL_DTYPES)}")
    places = POSITIONS if cuda else AutoConfig.from_pretrained(model_path(BUILTIN)).max_position_embeddings
    if settings.sequence > places:
        raise RecipeError(f"--sequence {settings.sequence} is more than the model's {places}")
    found, known = [], set()
    for method in settings.methods:
        try:
            get_method(method)
        except KeyError as error:
            raise RecipeError(f"--method {error.args[0]}") from None
        half = [f"{PEFT}-half"] if _dtype(settings, device).itemsize == 2 else []
        stock = [PEFT, *half, f"{PEFT}-fused", f"{PEFT}-compiled"] if method in STOCK else []
        there = [FLOOR, *stock, OURS, f"{OURS}-apart"]
        known.update(there)
        slow = set() if cuda else {f"{PEFT}-compiled"}
        names = chosen(there, settings.only, slow)
        if len(names) > 1:
            found.append((method, names))
    for name in settings.only:
        if name not in known:
            raise RecipeError(f"--only {name} is not one of {', '.join(sorted(known))}")
    if not found:
        raise RecipeError(f"nothing to run: peft's own are there for {' and '.join(STOCK)} alone")
    return found


def _dtype(settings: StepSettings, device: torch.device) -> torch.dtype:
    return DTYPES[settings.dtype or ("bfloat16" if device.type == "cuda" else "float32")]


def base_model(settings: StepSettings, device: torch.device) -> PreTrainedModel:
    """Return the frozen model: the built-in one, or on a GPU random weights in the shape of Llama-3-8B."""
    dtype = _dtype(settings, device)
    if device.type != "cuda":
        name: Any = str(dtype).removeprefix("torch.")
        return load_base(AutoModelForCausalLM, ModelSettings(name_or_path=f"builtin/{BUILTIN}", dtype=name), device)
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
        num_hidden_layers=settings.layers or 4, max_position_embeddings=POSITIONS, rope_theta=500000.0,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(False)


@dataclass(frozen=True)
class Work:
    """What all implementations of a method have in common.

    Attributes:
        method: of the registry.
        rank: of every adapter.
        base: the frozen model, whose tensors all share.
        batches: the model's arguments by name, each [batch, sequence]; they take turns.
        checkpointing: recompute each block in the backward.
    """

    method: str
    rank: int
    base: PreTrainedModel
    batches: Sequence[dict[str, Tensor]]
    checkpointing: bool


def measure(work: Work, names: Sequence[str], rounds: int) -> list[Row]:
    """Return the rows of one method: each implementation, first found right.

    Raises:
        BenchmarkError: one computes something else than it should.
    """
    base, device = work.base, work.base.device
    models = {name: prepared(name, work) for name in names}
    errors = _checked(models, work)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
    runs = {name: taker(name, model, accelerator, work.batches) for name, model in models.items()}
    peaks = {name: _peak(one, device) for name, one in runs.items()}
    seconds = {name: [part[0] for part in taken] for name, taken in alternate(runs, rounds, device).items()}
    tokens = work.batches[0]["input_ids"]
    of_case = {
        "op": f"step {work.method}",
        "shape": [*tokens.shape, base.config.num_hidden_layers],
        "r": work.rank,
        "p": 0,
        "tokens": tokens.numel(),
        "checkpointing": work.checkpointing,
        "rounds": rounds,
    }
    return [
        {"implementation": name, "direction": "step", "dtype": str(base.dtype).removeprefix("torch.")}
        | of_case
        | figures
        | {
            "trained_parameters": sum(value.numel() for value in trained(models[name]).values()),
            "peak_bytes": peaks[name],
            "max_relative_error": errors[name],
        }
        for name, figures in compared(seconds, FLOOR, PEFT).items()
    ]


def bars(rows: Sequence[Row]) -> list[str]:
    """Return the line of the bar, if the rows say something about it; it is for the built-in model on a CPU."""
    return [
        f"training step / peft's: {row['time_to_peft']:.2f} (bar {BAR:.2f}; built-in model, "
        f"{row['shape'][0]} x {row['shape'][1]} tokens, r={row['r']}, {row['dtype']})"
        for row in rows
        if row["op"] == "step lora" and row["implementation"] == OURS and row["time_to_peft"] is not None
    ]


def prepared(name: str, work: Work) -> nn.Module:
    """Return a model on the frozen tensors of the base, with trained values that every implementation has alike."""
    base = work.base
    model: Any = copy.deepcopy(base, {id(tensor): tensor for tensor in chain(base.parameters(), base.buffers())})
    model.train()
    if work.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if name == FLOOR:
        model.enable_input_require_grads()
        return model
    model = _ours(model, work) if name.startswith(OURS) else _peft(name, model, work)
    _fill(model, work.method in STOCK)
    if name == OURS:
        share_inputs(model)
    if name == f"{PEFT}-fused":
        fuse(model)
    if name in SHIPPED and base.dtype.itemsize == 2:  # as trainers run it: float32 adapters under autocast
        model.forward = torch.autocast(base.device.type, base.dtype)(model.forward)
    if name == f"{PEFT}-compiled":
        torch.compiler.reset()  # what other models compiled counts against the limit of recompilations
        model.compile(dynamic=False)
    return model


def _peft(name: str, model: PreTrainedModel, work: Work) -> nn.Module:
    settings = STOCK[work.method] | {"r": work.rank, "lora_alpha": 2 * work.rank, "target_modules": "all-linear"}
    return peft.get_peft_model(model, peft.LoraConfig(**settings), autocast_adapter_dtype=name in SHIPPED)


def _ours(model: PreTrainedModel, work: Work) -> nn.Module:
    method = get_method(work.method)
    wanted = {"r": work.rank, "alpha": 2.0 * work.rank, "target_modules": "all-linear"}
    config = method.make_config(**{key: value for key, value in wanted.items() if key in method.settings})
    if method.adopted:
        prepare(config, model, method.layers)
    adapted = peft.get_peft_model(model, config)
    if uncalibrated(adapted, "default"):
        calibrate(adapted, work.batches, progress=lambda _: None)
    return adapted


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained tensors by name; those of LoRA and DoRA have one spelling, whoever wrote the layer."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for theirs, ours in SPELLINGS.items():
                name = name.replace(theirs, ours)
            found[name] = parameter
    return found


def _fill(model: nn.Module, stock: bool) -> None:
    """Move every trained tensor away from its start, at which some gradients are zero; alike where names are alike."""
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(trained(model).items()):
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if stock and parameter.dim() == 2:
                parameter.copy_(0.3 * noise / parameter.shape[1] ** 0.5)
            else:
                noise = noise.to(parameter)
                parameter.mul_(1 + 0.1 * noise).add_(noise, alpha=0.01)


def results(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    """Return the loss and the gradient of every trained tensor by name."""
    loss = model(**batch).loss
    loss.backward()
    found = {"loss": loss.detach()} | {name: value.grad for name, value in trained(model).items()}
    model.zero_grad()
    return found


def _checked(models: dict[str, nn.Module], work: Work) -> dict[str, float | None]:
    """Return the largest relative error of each model, after finding it right; None where there is no other.

    Raises:
        BenchmarkError: a loss or gradient is missing, not finite, zero, or too far from stock peft's in wide floats.
    """
    base = work.base
    batch = {name: value[:1] for name, value in work.batches[0].items()}  # a row is enough to see a mistake
    want: dict[str, Any] = {}
    if work.method in STOCK:
        wide = torch.float32 if base.device.type == "cuda" else torch.float64
        exact = replace(work, base=copy.deepcopy(base).to(wide), checkpointing=False)
        want = results(prepared(PEFT, exact).to(wide), batch)
    errors: dict[str, float | None] = {}
    for name, model in models.items():
        errors[name] = None
        if name != FLOOR:
            got = results(model, batch)
            # what peft has no counterpart of is held to being there, finite and not zero
            found = [
                relative_error(name, key, value, want.get(key, value), BOUNDS[base.dtype])
                for key, value in got.items()
            ]
            errors[name] = max(found) if want else None
    return errors


def taker(name: str, model: nn.Module, accelerator: Accelerator, batches: Sequence[dict[str, Tensor]]) -> Run:
    """Return a run that takes the trainer's step, or goes forward and backward through the frozen floor."""
    if name == FLOOR:

        def take(batch: dict[str, Tensor]) -> None:
            model(**batch).loss.backward()

    else:
        optimizer = AdamW(parameter_groups(model, RATE, 0.0), lr=RATE, fused=True)
        ready, prepared_optimizer = accelerator.prepare(model, optimizer)
        stepper = Stepper(accelerator, ready, prepared_optimizer, max_grad_norm=1.0)

        def take(batch: dict[str, Tensor]) -> None:
            stepper.take([batch], [batch["labels"][:, 1:].numel()])

    def run(turn: int, mark: Mark) -> None:
        mark()
        take(batches[turn % len(batches)])
        mark()

    return run


def _peak(one: Run, device: torch.device) -> int | None:
    """Return the bytes that a step takes beside what it starts with; None where nobody counts."""
    if device.type != "cuda":
        return None
    one(0, lambda: None)  # the optimizer makes its state
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    one(0, lambda: None)
    return torch.cuda.max_memory_allocated(device) - before
