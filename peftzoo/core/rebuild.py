"""What a file leaves out is made again from the frozen weight as soon as the file is read."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from peftzoo.core.adapter import LinearAdapter, unloaded_tensors


def rebuild_on_load(adapter: LinearAdapter) -> None:
    """Have `adapter.factors()` called whenever a state dict was loaded into it.

    So a base that does not fit is refused then, and not at the first forward; nor is anything left to be made while a
    compiler looks on. Loaders that set tensors one by one leave it to the first forward all the same.
    """
    adapter.register_load_state_dict_post_hook(_rebuild)  # type: ignore[no-untyped-call]


def _rebuild(module: nn.Module, _: Any) -> None:
    # found by the argument, not closed over: a deep copy of an adapter keeps its hooks
    adapter = cast(LinearAdapter, module)
    if adapter._read_weight is not None and not adapter.frozen_weight().is_meta and not unloaded_tensors(adapter):
        adapter.factors()
