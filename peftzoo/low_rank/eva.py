"""The start of EVA: explained variance adaptation (Paischer et al. 2024, arXiv:2410.07170).

A of each layer gets the directions in which the layer's inputs vary most on the data that will be trained on, B = 0:

    A_l = V_l[:r_l],    V_l the principal components of the inputs x_l, centred (if asked, row i over sqrt(s_i)).

With rho > 1 ranks are dealt out: every layer offers its first round(rho r) components, and of all of them the sum of r
with the largest share of their layer's variance are taken. A layer may end with any rank from 0 to round(rho r).

Layers with one input (query, key and value) share one PCA. Batches are taken until the last one has turned no
component in use by more than arccos(tau): away from what it was or, where the PCA is exact, out of the space that all
components spanned; and where the PCA is exact, no longer than until all batches have been seen once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from peftzoo.core.adapter import LinearAdapter
from peftzoo.core.calibrate import Batches, Start, call
from peftzoo.core.config import ZooConfig
from peftzoo.core.layer import ZooLinear, zoo_layers
from peftzoo.core.processes import of_first
from peftzoo.core.suggest import some
from peftzoo.errors import DataError
from peftzoo.low_rank.inputs import RowMasks, input_rows, row_masks, shared_inputs
from peftzoo.low_rank.pca import Components, make_pca

# a direction with less of the variance than this is rounding, and turns as it likes
_NO_VARIANCE = 1e-9


@dataclass
class EvaSettings(ZooConfig):
    """Settings of the EVA start; without effect on any other.

    Attributes:
        rho: ranks may grow to round(rho * r) where another layer gives some up; 1 leaves all at r. At least 1.
        tau: cosine between a direction and what it was before, from which on it counts as settled; 0 to 1.
        whiten: divide each direction by the root of its singular value.
        adjust_scale: give a layer whose rank changed the alpha that leaves its scale as it was.
        pca: "covariance" (exact), "incremental" (less memory), or "auto": covariance for layers of up to 1024 inputs.
        label_mask: take only tokens that have a label, where batches have labels.
        max_batches: batches after which directions that still turn are taken as they are; at least 1.
    """

    rho: float = 2.0
    tau: float = 0.99
    whiten: bool = False
    adjust_scale: bool = True
    pca: Literal["auto", "covariance", "incremental"] = "auto"
    label_mask: bool = True
    max_batches: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("rho", 1 <= self.rho < float("inf"), "a finite number >= 1")
        self._require("tau", 0 <= self.tau <= 1, "at least 0 and at most 1")
        self._require("max_batches", self.max_batches >= 1, "at least 1")


class _Input:
    """What some layers share: their input, and the PCA of it.

    Attributes:
        layers: their names, in the model's order.
        pca: of the input.
        settled: which components have stopped turning, [n].
    """

    def __init__(self, layers: Sequence[str], adapters: Mapping[str, LinearAdapter]) -> None:
        self.layers = layers
        first = adapters[layers[0]]
        config, in_features = cast(EvaSettings, first.config), first.in_features
        n = max(components(adapters[layer]) for layer in layers)
        self.pca = make_pca(config.pca, n, in_features, config.seed, layers[0])
        self.tau = config.tau
        self.settled = torch.zeros(n, dtype=torch.bool)
        self._looked_at: Components | None = None

    def look(self, *, all_seen: bool) -> None:
        """Bring the components up to date and compare them with what they were."""
        before, now = self._looked_at, self.pca.solve()
        self._looked_at = now
        if now is None:
            return
        if all_seen and self.pca.exact:
            self.settled[:] = True
        elif before is not None and now is not before:
            self.settled = self._still(before, now)

    def _still(self, before: Components, now: Components) -> Tensor:
        cosines = before.directions @ now.directions.T
        # exact: with the span of what was. Directions of nearly equal variance turn among themselves for ever, and
        # which of them is which means nothing to a product B A. Otherwise one by one, as the authors, but without
        # regard to the sign: a direction that flips is the same.
        cosines = cosines.norm(dim=0) if self.pca.exact else cosines.diagonal().abs()
        return ((cosines >= self.tau) | (now.ratios < _NO_VARIANCE)).cpu()


def eva_start(model: nn.Module, adapters: dict[str, LinearAdapter], batches: Batches) -> dict[str, Start]:
    """Return the start of every layer from its inputs; the `calibrate` of the methods of the LoRA family.

    Raises:
        DataError: a layer never saw as many rows as it needs components.
        ModelError: inputs that are not finite.
    """
    modules = {layer.layer_name: layer for _, layer in zoo_layers(model) if layer.layer_name in adapters}
    with torch.no_grad():
        inputs, ranks = _observe(model, modules, adapters, batches)
        return {
            layer: _start(cast(EvaSettings, adapters[layer].config), ranks[layer], one.pca.components)
            for one in inputs
            for layer in one.layers
        }


def components(adapter: LinearAdapter) -> int:
    """Return the number of components that a layer offers: round(rho r), at most its inputs."""
    config = cast(EvaSettings, adapter.config)
    return min(round(config.r * config.rho), adapter.in_features)


def redistribute(ratios: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Return the ranks under which the `budget` components of largest ratio are in use.

    Equal ratios are dealt to the lower component first, then in the order of the layers: of layers with one input the
    first gets most, on every machine.

    Args:
        ratios: of each layer's components, [n] in descending order.
        budget: sum of the ranks, as far as there are components.
    """
    offers = [
        (-ratio, component, place, layer)
        for place, (layer, values) in enumerate(ratios.items())
        for component, ratio in enumerate(values.tolist())
    ]
    ranks = dict.fromkeys(ratios, 0)
    for *_, layer in sorted(offers)[:budget]:
        ranks[layer] += 1
    return ranks


def _observe(
    model: nn.Module, modules: dict[str, ZooLinear], adapters: dict[str, LinearAdapter], batches: Batches
) -> tuple[list[_Input], dict[str, int]]:
    """Run batches through the model until the components that the ranks ask for have settled; return both."""
    settings = cast(EvaSettings, next(iter(adapters.values())).config)
    budget = sum(adapter.config.r for adapter in adapters.values())
    ranks = {layer: components(adapter) for layer, adapter in adapters.items()}
    inputs: list[_Input] = []
    waiting: list[int] = []
    all_seen = False
    for number, (batch, ends) in enumerate(_cycled(batches), 1):
        masks = row_masks(batch, settings.label_mask)
        if not inputs:
            groups = shared_inputs(model, modules, batch, masks)
            inputs = [_Input(layers, adapters) for layers in groups]
            waiting = list(range(len(inputs)))
        watched = [one for i, one in enumerate(inputs) if (not all_seen if one.pca.exact else i in waiting)]
        with _watching(modules, watched, masks):
            call(model, batch)
        last = number == settings.max_batches
        all_seen = of_first(all_seen or ends)  # rounding and shares of the rows must not lead processes apart
        for one in watched:
            if not one.pca.exact or all_seen or _is_looked_at(number, settings.max_batches):
                one.look(all_seen=all_seen)
        if all_seen or last:
            _refuse_unseen(inputs)
        ratios = {layer: one.pca.components.ratios for one in inputs if one.pca.components for layer in one.layers}
        if len(ratios) == len(adapters):
            ranks = redistribute({layer: ratios[layer] for layer in adapters}, budget)
        ranks, waiting = of_first((ranks, [i for i, one in enumerate(inputs) if not _done(one, ranks)]))
        open_layers = [layer for i in waiting for layer in inputs[i].layers]
        settled = len(adapters) - len(open_layers)
        batches.say(f"calibrating: batch {number}, {settled} of {len(adapters)} layers settled")
        if last and open_layers:
            batches.warn(_still_turning(open_layers, settings))
        if last or not open_layers:
            break
    return inputs, ranks


def _is_looked_at(number: int, most: int) -> bool:
    """Whether a covariance is decomposed after this batch: twice in a row, ever more rarely.

    To do so after every batch would cost more than the batches do.
    """
    return any(power & (power - 1) == 0 for power in (number, number + 1)) or number >= most - 1


def _done(one: _Input, ranks: Mapping[str, int]) -> bool:
    used = max(ranks[layer] for layer in one.layers)
    return one.pca.components is not None and bool(one.settled[:used].all())


def _start(config: EvaSettings, rank: int, found: Components | None) -> Start:
    assert found is not None
    if rank == 0:
        return Start(0, None, {})
    # a new tensor: layers with one input share `found`, and the authors' code whitens it once for each of them
    a = found.directions[:rank].clone()
    if config.whiten:
        s = found.singular_values[:rank]
        a /= s.clamp_min(max(1e-6 * float(s[0]), torch.finfo(s.dtype).tiny)).sqrt()[:, None]
    return Start(rank, _alpha(config, rank), {"a": a})


def _alpha(config: EvaSettings, rank: int) -> float | None:
    """Return the alpha under which a layer of this rank keeps its scale, or the config's where it may change."""
    moved = copy.copy(config)
    moved.r = rank
    if not config.adjust_scale or moved.scale == config.scale:
        return config.alpha
    moved.alpha = 1.0
    return config.scale / moved.scale


def _cycled(batches: Batches) -> Iterator[tuple[Any, bool]]:
    """Yield the batches again and again, each with whether it is the last of its round."""
    kept = []
    stream = iter(batches)
    batch = next(stream)
    while True:
        following = next(stream, None)
        kept.append(batch)
        yield batch, following is None
        if following is None:
            break
        batch = following
    while True:
        for place, batch in enumerate(kept, 1):
            yield batch, place == len(kept)


@contextmanager
def _watching(modules: Mapping[str, nn.Module], watched: Sequence[_Input], masks: RowMasks) -> Iterator[None]:
    """Feed the inputs of the layers into their PCAs while the block runs; other hooks stay as they are."""

    def feed(one: _Input) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            with torch.autocast(next(module.parameters()).device.type, enabled=False):
                one.pca.update(input_rows(module, args, kwargs, masks))

        return hook

    handles = [modules[one.layers[0]].register_forward_pre_hook(feed(one), with_kwargs=True) for one in watched]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse_unseen(inputs: Sequence[_Input]) -> None:
    short = [one for one in inputs if one.pca.components is None]
    if short:
        one = short[0]
        seen = "rows in all" if one.pca.exact else "rows in a batch at most"
        raise DataError(
            f"eva: {some([layer for one in short for layer in one.layers])}: {one.pca.most} {seen}, and the start "
            f"takes {one.pca.n} (r times rho). Give larger batches or more of them, lower r or rho, or set "
            "label_mask=False if few tokens have labels"
        )


def _still_turning(layers: Sequence[str], settings: EvaSettings) -> str:
    return (
        f"eva: after max_batches={settings.max_batches} batches the directions of {len(layers)} layers still turn by "
        f"more than tau={settings.tau} allows and are taken as they are: {some(layers)}. Raise max_batches, give "
        "larger batches, or lower tau"
    )
