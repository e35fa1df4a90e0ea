"""What is in an adapter folder, read from its files alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from peftzoo.core.lora_folder import WEIGHTS
from peftzoo.core.storage import read_config


@dataclass(frozen=True)
class TensorGroup:
    """The tensors of one name over all layers.

    Attributes:
        name: end of their keys.
        count: how many there are.
        shapes: the different shapes, in order of appearance.
        dtype: of the first.
        parameters: elements of all of them.
        norm: Frobenius norm of all of them together.
        finite: whether every element is.
    """

    name: str
    count: int
    shapes: list[tuple[int, ...]]
    dtype: str
    parameters: int
    norm: float
    finite: bool


@dataclass(frozen=True)
class Inspection:
    """An adapter folder.

    Attributes:
        config: its `adapter_config.json`.
        groups: its tensors by name.
        bytes: size of the weights file.
        sha256: digest of the weights file.
    """

    config: dict[str, Any]
    groups: list[TensorGroup]
    bytes: int
    sha256: str

    @property
    def format(self) -> str:
        """Who can open it."""
        kind = self.config.get("peft_type")
        if kind == "PEFTZOO":
            return f"{self.config.get('method')}, a peftzoo adapter: opens in peft after `import peftzoo`"
        return f"{kind}, a stock peft adapter: opens without peftzoo"


def inspect_adapter(folder: Path) -> Inspection:
    """Return what is in an adapter folder.

    Raises:
        ModelError: it is no adapter folder, or a file in it cannot be read.
    """
    config = read_config(folder)
    found: dict[str, list[torch.Tensor]] = {}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  # the file is no mapping
            found.setdefault(_group(key), []).append(file.get_tensor(key))
    groups = [_summary(name, tensors) for name, tensors in sorted(found.items())]
    data = (folder / WEIGHTS).read_bytes()
    return Inspection(config, groups, len(data), hashlib.sha256(data).hexdigest())


def _group(key: str) -> str:
    """Return what a tensor is called within its layer."""
    parts = key.removesuffix(".weight").split(".")
    return parts[-1]


def _summary(name: str, tensors: list[torch.Tensor]) -> TensorGroup:
    return TensorGroup(
        name=name,
        count=len(tensors),
        shapes=list(dict.fromkeys(tuple(tensor.shape) for tensor in tensors)),
        dtype=str(tensors[0].dtype).removeprefix("torch."),
        parameters=sum(tensor.numel() for tensor in tensors),
        norm=sum(tensor.double().square().sum().item() for tensor in tensors) ** 0.5,
        finite=all(bool(torch.isfinite(tensor).all()) for tensor in tensors),
    )
