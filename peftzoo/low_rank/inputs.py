"""The inputs of layers, as rows: which rows count, and which layers see the same ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftzoo.core.calibrate import call
from peftzoo.core.layer import ZooLinear
from peftzoo.core.processes import of_all
from peftzoo.core.random import stream_key, uniform
from peftzoo.errors import ModelError

RowMasks = Mapping[torch.Size, Tensor]


def row_masks(batch: Any, label_mask: bool) -> RowMasks:
    """Return which tokens of a batch count, by shape [rows, length]: those attended to and, if asked, labelled."""
    masks: dict[torch.Size, Tensor] = {}
    if isinstance(batch, Mapping):
        for name in ("attention_mask", "decoder_attention_mask", "labels"):
            value = batch.get(name)
            if isinstance(value, Tensor) and value.dim() == 2 and (name != "labels" or label_mask):
                counts = value != -100 if name == "labels" else value.bool()
                masks[value.shape] = masks.get(value.shape, counts) & counts
    return masks


def input_rows(layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], masks: RowMasks) -> Tensor:
    """Return the input of a call of `layer` as rows [t, in], float32 at least.

    Of inputs in the shape of the batch's tokens only those that count; of a convolution the patches. Inputs of any
    other shape (experts, pooled states) are taken whole.

    Raises:
        ModelError: an input is not finite.
    """
    assert isinstance(layer, ZooLinear)
    x: Tensor = (args[0] if args else kwargs["x"]).detach()
    if isinstance(layer.base_layer, nn.Conv2d):
        rows = _patches(layer.base_layer, x)
    else:
        mask = masks.get(x.shape[:-1])
        if mask is None and x.dim() == 2:
            mask = next((m.flatten() for m in masks.values() if m.numel() == len(x)), None)
        rows = x.reshape(-1, x.shape[-1]) if mask is None else x[mask.to(x.device)]
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if not torch.isfinite(rows).all():
        raise ModelError(f"the inputs of {layer.layer_name} are not finite; load the model in bfloat16 or float32")
    return rows


def shared_inputs(model: nn.Module, layers: Mapping[str, ZooLinear], batch: Any, masks: RowMasks) -> list[list[str]]:
    """Return the names of `layers` in groups that see the same input, found by a run of `batch`.

    Two inputs are one if every row of the one has the same product with a random direction, to the last bit, as the
    same row of the other. Nothing larger than a column is kept.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def note(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, kwargs: Any) -> None:
            rows = input_rows(layer, args, kwargs, masks)
            key = stream_key(0, "", f"direction of {rows.shape[1]}")
            with torch.autocast(rows.device.type, enabled=False):
                seen[name].append(rows @ uniform(key, (rows.shape[1],), -1.0, 1.0).to(rows))

        return hook

    handles = [layer.register_forward_pre_hook(note(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    first: dict[str, str] = {}
    for name, columns in seen.items():
        same = (other for other in first.values() if _equal(seen[other], columns))
        same = (other for other in same if layers[other].in_features == layers[name].in_features)
        first[name] = next(same, name)
    everywhere = of_all(first)  # equal on every process, or not equal
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in layers:
        groups[tuple(one[name] for one in everywhere)].append(name)
    return list(groups.values())


def _equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether two layers saw the same; not where one saw nothing, of which nothing follows."""
    if sum(map(len, one)) == 0 or len(one) != len(other):
        return False
    pairs = zip(one, other, strict=True)
    return all(a.shape == b.shape and a.device == b.device and torch.equal(a, b) for a, b in pairs)


def _patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return the patches that a convolution multiplies its weight [out, in * kh * kw] with, [n, in * kh * kw]."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode)
    columns = F.unfold(x, conv.kernel_size, conv.dilation, 0, conv.stride)
    return columns.transpose(1, 2).flatten(0, 1)
