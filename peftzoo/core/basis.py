"""Frozen random matrices known by a seed alone, and sums of them with trained coefficients.

A file names the seed; the numbers are those of `peftzoo_kernels.basis`, definition 1, the same on every device and, in
time, in the registers of a kernel. Configs store `BASIS_VERSION`, and refuse another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftzoo.core.adapter import LinearAdapter
from peftzoo.core.config import ZooConfig
from peftzoo.core.random import stream_key
from peftzoo.errors import ModelError
from peftzoo_kernels import basis_coef_grad, basis_expand, basis_lanes, basis_matrix

BASIS_VERSION = 1


@dataclass
class SeededConfig(ZooConfig):
    """Settings of a method whose frozen matrices follow from the seed.

    Attributes:
        basis_version: definition of the random numbers; set by the library.

    Raises:
        ValueError: another version's.
    """

    basis_version: int = BASIS_VERSION

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("basis_version", self.basis_version == BASIS_VERSION, f"{BASIS_VERSION} in this peftzoo")


class BasisSum:
    """The matrix offset * U0 + scale * sum_b c_b U_b of fixed U, uniform in (-1, 1), with coefficients c.

    Attributes:
        key: key of the random stream that the U_b come from; U0 has one of its own.
        shape: of the matrix.
        scale: factor of the sum.
        offset: factor of U0.
        resident: keep the U_b in memory, 2 bytes an entry, instead of drawing them for each sum and gradient.
    """

    def __init__(
        self,
        stream: tuple[int, str, str],
        shape: tuple[int, int],
        scale: float,
        offset: float = 0.0,
        resident: bool = False,
    ) -> None:
        """Take the bases that `stream` names by seed, layer and tensor."""
        seed, layer, tensor = stream
        self.key = stream_key(seed, layer, tensor)
        self.shape = shape
        self.scale = scale
        self.offset = offset
        self.resident = resident
        self._offset_key = stream_key(seed, layer, f"{tensor} offset")
        self._lanes: Tensor | None = None

    def expand(self, coef: Tensor) -> Tensor:
        """Return the matrix, [*shape], from coefficients [k]."""
        lanes = self._kept(coef.shape[0], coef.device)
        total = self.scale * basis_expand(coef, self.key, self._length, lanes)
        if self.offset:
            total = total + basis_expand(coef.new_full((1,), self.offset), self._offset_key, self._length)
        return total.view(self.shape)

    def gradient(self, grad: Tensor, count: int) -> Tensor:
        """Return the gradient of the first `count` coefficients, [count], from that of the matrix, [*shape]."""
        lanes = self._kept(count, grad.device)
        return self.scale * basis_coef_grad(grad.flatten(), self.key, count, lanes)

    def attach(self, coef: Tensor, matrix: Tensor) -> Tensor:
        """Return `matrix`, which is `expand(coef)` as it was computed before, with its gradient led on to `coef`."""
        if torch.compiler.is_compiling():  # a graph knows no before
            return self.expand(coef)
        attached: Tensor = _Attach.apply(coef, matrix, self)  # type: ignore[no-untyped-call]
        return attached

    @property
    def _length(self) -> int:
        return self.shape[0] * self.shape[1]

    def _kept(self, count: int, device: torch.device) -> Tensor | None:
        if not self.resident or torch.compiler.is_compiling():
            return None
        if self._lanes is None or self._lanes.shape[0] < count or self._lanes.device != device:
            self._lanes = basis_lanes(self.key, count, self._length, device=device)
        return self._lanes[:count]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_lanes": None}  # a copy or a pickle draws them anew


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coef: Tensor, matrix: Tensor, basis: BasisSum) -> Tensor:
        ctx.basis, ctx.count = basis, coef.shape[0]
        return matrix.view_as(matrix)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.basis.gradient(grad, ctx.count), None, None


def frozen_matrix(owner: LinearAdapter, name: str, law: str, size: tuple[int, int]) -> RandomMatrix | GivenMatrix:
    """Return a frozen matrix that the layers of a model may share.

    Args:
        owner: the adapter that needs it, and whose buffer it is if it comes with a file.
        name: its name, which is that of the buffer.
        law: "uniform"; "sparse", one entry in 3 not 0; "very_sparse", one in sqrt(min(in, out)); "stored", in a file.
        size: rows and columns that `owner` needs.
    """
    if law == "stored":
        return GivenMatrix(owner, name, size)
    one_in = {"uniform": None, "sparse": 3.0, "very_sparse": min(owner.in_features, owner.out_features) ** 0.5}
    return RandomMatrix((owner.config.seed, "", name), size, one_in[law])


def share_matrices(adapters: Sequence[LinearAdapter], *names: str) -> None:
    """Let adapters of one model read one frozen matrix per attribute and law, as large as the largest of them needs.

    Those of a file go into it with the first layer by name.
    """
    for name in names:
        first: dict[float | None, RandomMatrix | GivenMatrix] = {}
        for adapter in sorted(adapters, key=lambda adapter: adapter.layer_name):
            own = getattr(adapter, name)
            shared = first.setdefault(own.sparsity, own)
            shared.reserve(*own.size)
            setattr(adapter, name, shared)


class RandomMatrix:
    """A frozen matrix of independent entries of mean 0 and variance 1, as large as anybody asks for.

    An entry depends on the seed and its place alone, not on the size: whoever needs a part of it, alone or beside
    others, finds the same numbers. It is drawn where and when it is first used.

    Attributes:
        key: key of its random stream.
        size: rows and columns to draw, of which everybody reads the beginning.
        sparsity: None for uniform entries, q for ternary ones of which one in q is not 0.
    """

    def __init__(self, stream: tuple[int, str, str], size: tuple[int, int], sparsity: float | None = None) -> None:
        """Take the entries that `stream` names by seed, layer and tensor."""
        self.key = stream_key(*stream)
        self.size = size
        self.sparsity = sparsity
        self._drawn: dict[tuple[Any, ...], Tensor] = {}
        self._parts: dict[str, Tensor] = {}

    def reserve(self, rows: int, columns: int) -> None:
        """Take note that so much will be asked for."""
        self.size = (max(rows, self.size[0]), max(columns, self.size[1]))

    def part(self, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the first rows and columns, [rows, columns]: a view, and the same one each time."""
        place = f"{rows} {columns} {device} {dtype}"
        self._draw(rows, columns, device, dtype, place)
        return self._parts[place]

    # so that a graph takes the drawn numbers as an input, and not their drawing as a part
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _draw(self, rows: int, columns: int, device: torch.device, dtype: torch.dtype, place: str) -> bool:
        self.reserve(rows, columns)
        whole = self._drawn.get((device, dtype))
        if whole is None or whole.shape != self.size:
            whole = self._drawn[device, dtype] = basis_matrix(self.key, *self.size, self.sparsity, device, dtype)
            self._parts = {key: part for key, part in self._parts.items() if not key.endswith(f" {device} {dtype}")}
        self._parts.setdefault(place, whole[:rows, :columns])
        return True

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_drawn": {}, "_parts": {}}  # a copy draws anew


class GivenMatrix:
    """A frozen matrix that comes with a file and goes into the next: the buffer `name` of one adapter, for all."""

    sparsity = None

    def __init__(self, owner: nn.Module, name: str, size: tuple[int, int]) -> None:
        self.owner = owner
        self.name = name
        self.size = size
        self._parts: dict[tuple[Any, ...], tuple[Tensor, int, Tensor]] = {}

    def reserve(self, rows: int, columns: int) -> None:
        """Make room in the owner for what a file will bring, marked as still to come."""
        self.size = (max(rows, self.size[0]), max(columns, self.size[1]))
        if getattr(self.owner, self.name, torch.empty(0)).shape != self.size:
            like = next(self.owner.parameters())
            self.owner.register_buffer(self.name, like.detach().new_full(self.size, float("nan")))

    def part(self, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the first rows and columns, [rows, columns]: the same tensor each time, until the buffer changes.

        Raises:
            ModelError: no file brought it.
        """
        held: Tensor = getattr(self.owner, self.name, torch.empty(0, 0))
        if torch.compiler.is_compiling():
            return held[:rows, :columns].to(device, dtype)
        key = (rows, columns, device, dtype)
        source, version, part = self._parts.get(key, (None, -1, held))
        if source is not held or version != held._version:
            if held.numel() == 0 or not bool(held.isfinite().all()):
                raise ModelError(f"bases='stored': no file brought {self.name}; choose another setting to start anew")
            part = held[:rows, :columns].to(device, dtype)
            self._parts[key] = held, held._version, part
        return part

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_parts": {}}
