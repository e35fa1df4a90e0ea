"""LU with a recorded pivot order, so that the same factors can be made again from the same weight.

Partial pivoting may choose otherwise on another machine, or in another dtype, where two candidates nearly tie, and
factors of another order have nothing to do with each other. Given the order they are unique. Only the first r columns
of L and rows of U are made; they depend on nothing but the first r pivot rows.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftzoo.core.adapter import LinearAdapter
from peftzoo.core.config import ZooConfig
from peftzoo.core.random import stream_key, uniform
from peftzoo.core.rebuild import rebuild_on_load
from peftzoo.core.sharding import whole
from peftzoo.errors import ModelError

_BLOCK = 32
# a pivot below this share of the largest weight is what float32 rounding, 8 times over, leaves of a zero
_TINY = 8 * torch.finfo(torch.float32).eps
# relative error of a sketch, which is about that of L diag(z) U. Measured on Gaussian and on trained matrices, r up to
# 768: 0.001 to 0.03 if the weight is rounded to bfloat16, 0.1 and more if its entries move by 3 % of their deviation
_TOLERANCE = 0.05


class LU(NamedTuple):
    """The first r steps of W = L U, the rows of L in the order of W's.

    Attributes:
        lower: [out, r]; entry (rows[i], i) is 1, entry (rows[j], i) is 0 for j < i.
        upper: [r, in], upper triangular; its diagonal holds the pivots.
        pivots: [r]; 1 where the pivot is zero or nearly so.
    """

    lower: Tensor
    upper: Tensor
    pivots: Tensor


def pivot_rows(weight: Tensor, r: int) -> Tensor:
    """Return the rows of `weight` [out, in] that partial pivoting takes in its first r <= min(out, in) steps.

    Returns:
        [r] int32, on the CPU.
    """
    # the first r choices depend on the first r columns alone
    _, swaps, _ = torch.linalg.lu_factor_ex(weight[:, :r].to("cpu", torch.float64))
    order = list(range(weight.shape[0]))
    for place, other in enumerate((swaps - 1).tolist()):
        order[place], order[other] = order[other], order[place]
    return torch.tensor(order[:r], dtype=torch.int32)


def lu_in_order(weight: Tensor, rows: Tensor) -> LU:
    """Return the factors of `weight` [out, in] that take `rows` [r] as pivot rows, in this order.

    Computed in float64 on the CPU and returned so, for the same numbers everywhere. Below a pivot that is zero, or
    nearly so, L is 0: if the order came from this weight, nothing of size is left there.
    """
    tiny, r, rows = _TINY * float(weight.abs().max()), rows.numel(), rows.to(weight.device, torch.long)
    others = torch.ones(len(weight), dtype=torch.bool, device=weight.device).index_fill(0, rows, False)
    order = torch.cat((rows, others.nonzero().flatten()))
    a, top = (part.to("cpu", torch.float64) for part in (weight[:, :r][order], weight[rows]))
    for start in range(0, r, _BLOCK):
        stop = min(start + _BLOCK, r)
        columns = a[start:, start:stop].T.contiguous()  # a block of columns, each of them in one piece
        for k, column in enumerate(columns):
            below = column[k + 1 :]
            below *= 0.0 if column[k].abs() <= tiny else 1.0 / column[k]
            columns[k + 1 :, k + 1 :].addr_(columns[k + 1 :, k], below, alpha=-1)
        a[start:, start:stop] = columns.T
        block, right = a[start:stop, start:stop], a[start:stop, stop:]
        right.copy_(torch.linalg.solve_triangular(block, right, upper=False, unitriangular=True))
        a[stop:, stop:] -= a[stop:, start:stop] @ right
    order, rows = order.cpu(), rows.cpu()
    lower = torch.empty_like(a)
    lower[order] = a.tril(-1)
    lower[rows, torch.arange(r)] = 1.0
    upper = torch.linalg.solve_triangular(a[:r], top, upper=False, unitriangular=True).triu()
    pivots = upper.diagonal()
    return LU(lower, upper, torch.where(pivots.abs() <= tiny, 1.0, pivots))


def sketch(lu: LU) -> Tensor:
    """Return (L^T u) * (U v), [r], for fixed random u and v: every entry of both factors has a part in it."""
    u = uniform(stream_key(0, "", "lu.u"), (lu.lower.shape[0],), -1.0, 1.0).to(lu.lower)
    v = uniform(stream_key(0, "", "lu.v"), (lu.upper.shape[1],), -1.0, 1.0).to(lu.upper)
    return (u @ lu.lower) * (lu.upper @ v)


class LUAdapter(LinearAdapter):
    """An adapter on LU factors of its weight, of which a file holds the pivot rows and a sketch; `factors` uses `lu`.

    Attributes:
        rows: pivot rows in their order, [r] int32.
        sketch: sketch of the factors, [r].
    """

    rows: Tensor
    sketch: Tensor

    def __init__(self, config: ZooConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.steps = min(config.r, in_features, out_features)
        self.register_buffer("rows", torch.empty(self.steps, dtype=torch.int32))
        self.register_buffer("sketch", torch.empty(self.steps))
        self._made: LU | None = None
        rebuild_on_load(self)

    def choose(self, weight: Tensor) -> LU:
        """Choose the pivots of `weight` [out, in], record them, and return the factors, float64 on the CPU.

        Warns of pivots that are zero.
        """
        self.rows.copy_(pivot_rows(weight, self.steps))
        self._made = lu_in_order(weight, self.rows)
        if zeros := int((self._made.pivots != self._made.upper.diagonal()).sum()):
            name = self.layer_name or "layer"
            warnings.warn(f"{name} is singular: {zeros} of {self.steps} pivots are 0 and count as 1", stacklevel=3)
        self.sketch.copy_(sketch(self._made))
        return self._made

    def lu(self) -> LU:
        """Return the recorded factors, on the adapter's device and in its dtype.

        Raises:
            ModelError: the weight is another than the one that was recorded, or the record is damaged.
        """
        if self._made is None:
            self._made = self._again()
        like = next(self.parameters())
        if self._made.lower.device != like.device or self._made.lower.dtype != like.dtype:
            self._made = LU(*(factor.to(like) for factor in self._made))
        return self._made

    def _again(self) -> LU:
        weight, rows, error = whole(self.frozen_weight()), self.rows.unique(), math.inf
        if rows.numel() == self.steps and rows.min() >= 0 and rows.max() < weight.shape[0]:
            lu, expected = lu_in_order(weight, self.rows), self.sketch.to("cpu", torch.float64)
            error = float((sketch(lu) - expected).norm() / expected.norm().clamp_min(1e-30))
            if error <= _TOLERANCE:
                return lu
        raise ModelError(
            f"{self.layer_name or 'layer'}: its LU factors are {error:.1%} away from those the adapter was made on, "
            f"more than {_TOLERANCE:.0%}; load it on the base it was trained on, in the precision it was trained in"
        )

    def _load_from_state_dict(self, *args: Any) -> None:
        before = self.rows.clone(), self.sketch.clone()
        super()._load_from_state_dict(*args)
        if self._made is not None and not all(map(torch.equal, before, (self.rows, self.sketch))):
            self._made = None
