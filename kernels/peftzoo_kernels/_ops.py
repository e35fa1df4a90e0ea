"""The list of ops, each with what a test or a benchmark needs to call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftzoo_kernels.gather_matmul import gather_matmul, gather_matmul_ref
from peftzoo_kernels.low_rank_linear import (
    LowRankLayer,
    grouped_low_rank_linear,
    grouped_low_rank_linear_ref,
    low_rank_linear,
    low_rank_linear_ref,
)


@dataclass(frozen=True)
class Op:
    """One op.

    Attributes:
        name: its name, also of its benchmark row.
        function: the op; of several outputs, side by side.
        reference: the same in plain torch.
        trained: names of the inputs that may train; `x` comes on top.
        inputs: (m, in, out, r, generator) -> keyword arguments, float64; those that are optional are all given.
        optional: sets of inputs that may be left out together.
        saved: (m, in, out, r, trained) -> elements of size m that the backward keeps.
    """

    name: str
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    trained: tuple[str, ...]
    inputs: Callable[[int, int, int, int, torch.Generator], dict[str, Any]]
    optional: tuple[frozenset[str], ...]
    saved: Callable[[int, int, int, int, frozenset[str]], int]


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator, device=generator.device)


def _low_rank_inputs(m: int, k: int, n: int, r: int, g: torch.Generator) -> dict[str, Any]:
    return {
        "x": _random(g, m, k),
        "weight": _random(g, n, k) / k**0.5,
        "a": _random(g, r, k) / k**0.5,
        "b": _random(g, n, r) / max(r, 1) ** 0.5,
        "s": _random(g, r),
        "bias": _random(g, n),
        "out_scale": 1 + 0.1 * _random(g, n),
        "scale": 0.5,
        "dropout": 0.3,
        "seed": torch.tensor(7 + m),
    }


def _low_rank_saved(m: int, k: int, n: int, r: int, trained: frozenset[str]) -> int:
    kept = {"x": m * k if "a" in trained else 0, "h": m * r if trained & {"b", "s"} else 0}
    return sum(kept.values()) + (m * n if "out_scale" in trained else 0)


def _group_inputs(m: int, k: int, n: int, r: int, g: torch.Generator) -> dict[str, Any]:
    """Return two layers on one input: the first with all there is, the second of another size and without extras."""
    first = _low_rank_inputs(m, k, n, r, g)
    second = _low_rank_inputs(m, k, n + 3, r and r + 2, g)
    return first | {f"{name}_2": second[name] for name in ("weight", "a", "b")} | {"seed_2": second["seed"] + 1}


def _grouped(function: Callable[..., list[Tensor]]) -> Callable[..., Tensor]:
    """Return the op of a group as one of named inputs and one output."""

    def call(
        x: Tensor,
        weight: Tensor | None,
        a: Tensor,
        b: Tensor,
        weight_2: Tensor | None,
        a_2: Tensor,
        b_2: Tensor,
        s: Tensor | None = None,
        bias: Tensor | None = None,
        out_scale: Tensor | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
        seed: Tensor | None = None,
        seed_2: Tensor | None = None,
    ) -> Tensor:
        layers = LowRankLayer(weight, a, b, s, bias, out_scale, scale), LowRankLayer(weight_2, a_2, b_2)
        seeds = [one for one in (seed, seed_2) if one is not None]
        return torch.cat(function(x, layers, dropout, seeds or None), -1)

    return call


def _group_saved(m: int, k: int, n: int, r: int, trained: frozenset[str]) -> int:
    both = 2 * r + 2 if r else 0  # what one layer wants is kept for all
    kept = {"x": m * k if trained & {"a", "a_2"} else 0, "h": m * both if trained & {"b", "s", "b_2"} else 0}
    return sum(kept.values()) + (m * n if "out_scale" in trained else 0)


def _gather_inputs(m: int, k: int, n: int, r: int, g: torch.Generator) -> dict[str, Any]:
    r = min(r, k)
    return {
        "x": _random(g, m, k),
        "weight": _random(g, n, k) / k**0.5,
        "columns": torch.randperm(k, generator=g)[:r].sort().values,
        "p": _random(g, n, r) / max(r, 1) ** 0.5,
        "bias": _random(g, n),
        "scale": 0.5,
    }


NO_DROPOUT = frozenset({"dropout", "seed", "seed_2"})
OPS: tuple[Op, ...] = (
    Op(
        "low_rank_linear",
        low_rank_linear,
        low_rank_linear_ref,
        trained=("a", "b", "s", "out_scale"),
        inputs=_low_rank_inputs,
        optional=(
            frozenset(),
            frozenset({"s", "out_scale"}),
            frozenset({"bias", *NO_DROPOUT}),
            frozenset({"out_scale", *NO_DROPOUT}),
            frozenset({"weight", "bias"}),
            frozenset({"s", "bias", "out_scale", *NO_DROPOUT}),
        ),
        saved=_low_rank_saved,
    ),
    Op(
        "grouped_low_rank_linear",
        _grouped(grouped_low_rank_linear),
        _grouped(grouped_low_rank_linear_ref),
        trained=("a", "b", "s", "out_scale", "a_2", "b_2"),
        inputs=_group_inputs,
        optional=(
            frozenset(),
            frozenset({"seed_2", "out_scale"}),
            NO_DROPOUT,
            frozenset({"s", "out_scale", *NO_DROPOUT}),
            frozenset({"weight", "bias", "weight_2"}),
        ),
        saved=_group_saved,
    ),
    Op(
        "gather_matmul",
        gather_matmul,
        gather_matmul_ref,
        trained=("p",),
        inputs=_gather_inputs,
        optional=(frozenset(), frozenset({"bias"}), frozenset({"weight", "bias"})),
        saved=lambda m, _, __, r, trained: m * r if "p" in trained else 0,
    ),
)
