"""The list of ops, each with what a test or a benchmark needs to call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftzoo_kernels.gather_matmul import gather_matmul, gather_matmul_ref
from peftzoo_kernels.low_rank_linear import low_rank_linear, low_rank_linear_ref


@dataclass(frozen=True)
class Op:
    """One op.

    Attributes:
        name: its name, also of its file, its registered op `peftzoo::name` and its benchmark row.
        function: the op.
        reference: the same in plain torch.
        trained: names of the inputs that may train; `x` comes on top.
        inputs: (m, in, out, r, generator) -> keyword arguments, float64; those that are optional are all given.
        optional: sets of inputs that may be left out together.
        saved: (m, in, r, trained) -> elements of size m that the backward keeps.
    """

    name: str
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    trained: tuple[str, ...]
    inputs: Callable[[int, int, int, int, torch.Generator], dict[str, Any]]
    optional: tuple[frozenset[str], ...]
    saved: Callable[[int, int, int, frozenset[str]], int]


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _low_rank_inputs(m: int, k: int, n: int, r: int, g: torch.Generator) -> dict[str, Any]:
    return {
        "x": _random(g, m, k),
        "weight": _random(g, n, k) / k**0.5,
        "a": _random(g, r, k) / k**0.5,
        "b": _random(g, n, r) / max(r, 1) ** 0.5,
        "s": _random(g, r),
        "bias": _random(g, n),
        "scale": 0.5,
    }


def _low_rank_saved(m: int, k: int, r: int, trained: frozenset[str]) -> int:
    return (m * k if "a" in trained else 0) + (m * r if trained & {"b", "s"} else 0)


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


OPS: tuple[Op, ...] = (
    Op(
        "low_rank_linear",
        low_rank_linear,
        low_rank_linear_ref,
        trained=("a", "b", "s"),
        inputs=_low_rank_inputs,
        optional=(frozenset(), frozenset({"s"}), frozenset({"bias"}), frozenset({"weight", "bias"})),
        saved=_low_rank_saved,
    ),
    Op(
        "gather_matmul",
        gather_matmul,
        gather_matmul_ref,
        trained=("p",),
        inputs=_gather_inputs,
        optional=(frozenset(), frozenset({"bias"}), frozenset({"weight", "bias"})),
        saved=lambda m, _, r, trained: m * r if "p" in trained else 0,
    ),
)
