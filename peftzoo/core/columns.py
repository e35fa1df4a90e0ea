"""Which input columns of a weight an adapter takes: drawn, or by their norm, or by the gradient that reaches them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from peftzoo.core.adapter import LinearAdapter
from peftzoo.core.calibrate import Start, call
from peftzoo.core.config import ZooConfig
from peftzoo.core.layer import ZooLinear, zoo_layers
from peftzoo.core.processes import of_all
from peftzoo.core.random import permutation, stream_key
from peftzoo.errors import DataError
from peftzoo_kernels import mm_float32


@dataclass
class ColumnSettings(ZooConfig):
    """Settings of an adapter of some columns; `r` is how many.

    Attributes:
        selection: "random", or the columns of largest ("norm_top") or smallest ("norm_low") Euclidean norm, or those
            to which the loss on calibration data has the largest gradient ("gradient").
        share_indices: one choice for the layers of one parent module with as many inputs, such as query, key and
            value: their scores are summed.
        max_batches: batches of which "gradient" takes the gradient; at least 1.
    """

    selection: Literal["random", "norm_top", "norm_low", "gradient"] = "random"
    share_indices: bool = False
    max_batches: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("max_batches", self.max_batches >= 1, "at least 1")

    @property
    def needs_data(self) -> bool:
        """Whether the columns are chosen by their gradient."""
        return self.selection == "gradient"


class ColumnAdapter(LinearAdapter):
    """An adapter of r input columns.

    Attributes:
        columns: their indices in ascending order, [r] int64; saved, because a file must not depend on how a later
            version would choose them.
    """

    config: ColumnSettings
    columns: Tensor

    def __init__(self, config: ColumnSettings, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        if config.r > in_features:
            name = config.method_name
            raise ValueError(f"{name}: r={config.r} columns asked of a layer with {in_features} inputs")
        self.register_buffer("columns", torch.full((config.r,), -1))
        self._scores: Tensor | None = None

    @property
    def group(self) -> str:
        """The name that the layers with one choice have in common."""
        parent = self.layer_name.rpartition(".")[0]
        return f"{parent}:{self.in_features}" if self.config.share_indices else self.layer_name

    def init(self, weight: Tensor) -> None:
        """Choose among the columns of `weight` ([out, in]), unless data are to."""
        selection = self.config.selection
        if selection == "gradient":
            return
        if selection == "random":
            order = permutation(stream_key(self.config.seed, self.group, "columns"), self.in_features)
            scores = -torch.argsort(order)
        else:
            scores = weight.square().sum(0).cpu() * (1 if selection == "norm_top" else -1)
        self.columns.copy_(_best([scores], self.config.r))
        self._scores = scores if self.config.share_indices else None

    @classmethod
    def share(cls, adapters: Sequence[Self]) -> None:
        """Choose anew for the layers that share a choice, by the sum of their scores; not where a file has chosen."""
        fresh = {adapter.layer_name: adapter for adapter in adapters if adapter._scores is not None}
        chosen = _choose(fresh, {name: cast(Tensor, adapter._scores) for name, adapter in fresh.items()})
        for name, adapter in fresh.items():
            adapter.columns.copy_(chosen[name])
            adapter._scores = None


def by_gradient(model: nn.Module, adapters: dict[str, ColumnAdapter], batches: Iterable[Any]) -> dict[str, Start]:
    """Return the columns of largest gradient: the `calibrate` of a method whose adapters are of columns.

    Raises:
        DataError: the model computes no loss from a batch, or none that depends on every layer.
    """
    limit = next(iter(adapters.values())).config.max_batches
    chosen = _choose(adapters, column_gradients(model, adapters, batches, limit))
    return {name: Start(a.config.r, a.config.alpha, {"columns": chosen[name]}) for name, a in adapters.items()}


def column_gradients(
    model: nn.Module, layers: Collection[str], batches: Iterable[Any], limit: int
) -> dict[str, Tensor]:
    """Return the squared norms of the columns of dL/dW, summed over batches and processes, by layer; [in] float32.

    W is the frozen weight of a layer, packed or not, and L the loss of one batch. dL/dW = dy^T x is made, looked at
    and dropped for one layer after the other, as the backward comes by.

    Args:
        model: a model whose adapters are off.
        layers: names of layers with an adapter.
        batches: what the model is called with; the first `limit` are used.
        limit: at least 1.

    Raises:
        DataError: the model computes no loss from a batch, or none with a finite gradient to every layer.
    """
    watched = {layer.layer_name: layer for _, layer in zoo_layers(model) if layer.layer_name in layers}
    scores = {name: torch.zeros(layer.in_features) for name, layer in watched.items()}

    def watch(layer: nn.Module, args: Any, kwargs: Any, y: Tensor) -> Tensor:
        x = (args[0] if args else kwargs["x"]).detach()

        def look(dy: Tensor) -> None:
            gradient = mm_float32(dy.reshape(-1, dy.shape[-1]).t(), x.reshape(-1, x.shape[-1]).to(dy.dtype))
            scores[cast(ZooLinear, layer).layer_name] += gradient.square().sum(0).float().cpu()

        y = y if y.requires_grad else y.detach().requires_grad_()  # where the graph begins
        y.register_hook(look)
        return y

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [layer.register_forward_hook(watch, with_kwargs=True) for layer in watched.values()]
    try:
        for parameter in trained:  # such as modules to save: no gradient may be left on them
            parameter.requires_grad_(False)
        for batch in islice(batches, limit):
            with torch.enable_grad():
                _loss(call(model, batch)).backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    return _total(scores)


def _loss(output: Any) -> Tensor:
    loss = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise DataError(
            "the gradient of the loss is to choose the columns, and the model computes no loss from the calibration "
            "batches; give them labels, or choose by norm"
        )
    return loss


def _total(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the sums over all processes.

    Raises:
        DataError: a layer got no gradient, or one that is not finite.
    """
    shares = of_all(scores)
    scores = {name: torch.stack([share[name] for share in shares]).sum(0) for name in scores}
    for name, score in scores.items():
        if not 0 < score.sum() < math.inf:
            raise DataError(f"the loss on the calibration batches has no finite gradient to {name} other than 0")
    return scores


def _choose(adapters: Mapping[str, ColumnAdapter], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the columns of each layer, by the sum of the scores of the layers that share a choice with it."""
    groups: dict[str, list[Tensor]] = defaultdict(list)
    for name, adapter in adapters.items():
        groups[adapter.group].append(scores[name])
    return {name: _best(groups[adapter.group], adapter.config.r) for name, adapter in adapters.items()}


def _best(scores: list[Tensor], r: int) -> Tensor:
    """Return the r columns of the highest total in ascending order, the first of equal ones; [r] int64."""
    return torch.stack(scores).sum(0).argsort(descending=True, stable=True)[:r].sort().values
