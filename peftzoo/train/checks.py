"""What must hold before the first step and after the first backward; each refusal says what to do."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from peft import PeftModel
from torch import Tensor, nn

from peftzoo.core.suggest import some
from peftzoo.errors import ModelError, RecipeError

LAUNCH = (
    "Start it with `accelerate launch --config_file configs/cpu2.yaml -m peftzoo train RECIPE` (or another file of "
    "configs/), or with `torchrun --nproc-per-node 2 -m peftzoo train RECIPE`"
)
SHOWN = 8  # names shown of a long list


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse an environment that announces several processes without saying which one this is.

    Such a process would wait without end for the others.

    Raises:
        RecipeError: WORLD_SIZE is above 1, and a variable that every launcher sets beside it is missing.
    """
    if int(environment.get("WORLD_SIZE") or 1) > 1:
        missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if missing:
            raise RecipeError(
                f"WORLD_SIZE={environment['WORLD_SIZE']} is set without {', '.join(missing)}: this process would wait "
                f"for others that nobody started. {LAUNCH}; or unset WORLD_SIZE to train with one process."
            )


def check_world(accelerator: Accelerator, digest: str, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse processes that would not train together.

    Args:
        accelerator: has formed the process group, if there is one.
        digest: of the recipe of this process.
        environment: of this process.

    Raises:
        RecipeError: the launcher started another number of processes than found each other, they share the model in
            a way the trainer cannot, or their recipes differ.
    """
    started = int(environment.get("WORLD_SIZE") or 1)
    if started != accelerator.num_processes:
        raise RecipeError(
            f"the launcher started {started} processes (WORLD_SIZE), but accelerate sees {accelerator.num_processes}: "
            f"each would train by itself on all the data and write its own result. {LAUNCH}."
        )
    known = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in known:
        raise RecipeError(f"training over {accelerator.distributed_type.value} is not supported. {LAUNCH}.")
    if len(set(gather_object([digest]))) > 1:
        raise RecipeError("the processes were given different recipes; start all of them with the same arguments")


def check_trained(model: PeftModel, base: Sequence[nn.Parameter]) -> None:
    """Refuse a model that does not train what a person would expect from the recipe.

    Args:
        model: the model with its adapter.
        base: the parameters that the model had before.

    Raises:
        ModelError: nothing or everything is trained, a weight of the base is, or an entry of ``target_modules``
            matches no module.
    """
    trained, total = parameter_counts(model)
    if trained == 0 or trained == total:
        raise ModelError(f"{trained:,} of {total:,} parameters are trained; an adapter trains some, not none or all")
    own = {id(parameter) for parameter in base}
    # biases and norms of the base are vectors, and some methods train them on request
    thawed = [name for name, p in model.named_parameters() if p.requires_grad and p.ndim > 1 and id(p) in own]
    if thawed:
        raise ModelError(f"{len(thawed)} weights of the base model are not frozen: {some(thawed, SHOWN)}")
    config = model.peft_config[model.active_adapter]
    targets = getattr(config, "target_modules", None)
    adapted = [name for name, module in model.named_modules() if _is_adapted(module)]
    # layers that were asked for, and that calibration left without a rank
    adapted += [name for name, rank in (getattr(config, "rank_pattern", None) or {}).items() if rank == 0]
    unmatched = [
        target
        for target in ([] if targets is None or isinstance(targets, str) else sorted(targets))
        if not any(f".{name}".endswith(f".{target}") for name in adapted)
    ]
    if unmatched:
        linear = Counter(name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear))
        raise ModelError(
            f"method.target_modules: {', '.join(unmatched)} matches no module. The model has "
            + ", ".join(f"{count} x {suffix}" for suffix, count in linear.items() if suffix != "base_layer")
        )


def check_gradients(model: nn.Module, *, scaled: bool) -> None:
    """Refuse to go on if the first backward left a trained tensor without a finite gradient.

    A gradient of zeros is legal: one factor rests as long as the other is zero.

    Args:
        model: the model, after its first backward.
        scaled: the gradients carry the scale of fp16, under which they may overflow until the scale has fallen.

    Raises:
        ModelError: naming the tensors.
    """
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = [name for name, gradient in trained.items() if gradient is None]
    if missing:
        raise ModelError(
            f"after the first backward {len(missing)} of {len(trained)} trained tensors have no gradient and would "
            f"never learn: {some(missing, SHOWN)}. Target only modules that this task uses."
        )
    broken = [] if scaled else non_finite(trained)
    if broken:
        raise ModelError(
            f"after the first backward {len(broken)} of {len(trained)} trained tensors have a gradient that is not "
            f"finite: {some(broken, SHOWN)}"
        )


def non_finite(tensors: Mapping[str, Tensor | None]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinity."""
    return [name for name, tensor in tensors.items() if tensor is not None and not torch.isfinite(tensor).all()]


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of trained and of all parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def trained_table(model: nn.Module) -> str:
    """Return a table of what is trained: by name and shape of the module, how many there are and their parameters."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for name, module, size in _trained_modules(model):
        groups[name.rpartition(".")[2], _shape(module)].append(size)
    rows = [("module", "weight", "count", "trained parameters")]
    rows += [(name, shape, str(len(sizes)), f"{sum(sizes):,}") for (name, shape), sizes in groups.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    trained, total = parameter_counts(model)
    return "\n".join([*lines, f"trained: {trained:,} of {total:,} parameters ({trained / total:.2%})"])


def _trained_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Yield each module that is trained or carries an adapter: its name, itself, its number of trained parameters."""
    modules = dict(model.named_modules())
    sizes: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = name.split(".")[:-1]
            above = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
            sizes[next((place for place in above if _is_adapted(modules[place])), ".".join(parts))] += (
                parameter.numel()
            )
    for name, size in sizes.items():
        yield name, modules[name], size


def _is_adapted(module: nn.Module) -> bool:
    # peft keeps the module it replaced under one of these two names
    return any(isinstance(getattr(module, name, None), nn.Module) for name in ("base_layer", "original_module"))


def _shape(module: nn.Module) -> str:
    base: Any = module
    while _is_adapted(base):
        base = base.base_layer if hasattr(base, "base_layer") else base.original_module
    # a quantised weight is packed, and only its layer knows its shape
    sizes = (base.out_features, base.in_features) if hasattr(base, "in_features") else _sizes(base)
    return " x ".join(map(str, sizes))


def _sizes(module: nn.Module) -> Sequence[int]:
    return getattr(module, "weight", torch.empty(0)).shape
