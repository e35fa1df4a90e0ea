"""SALT: rescale the top singular values, low-rank update of the rest (Elsayed et al. 2025, BMVC, arXiv:2503.16055).

With the thin SVD W = U diag(S) V^T, m = min(out, in), the authors put U relu(C) V^T in W's place; their core C is
diag(a * S_k + b) on the first k values and diag(S_tail) + X Y on the others. As an update of W,

    dW = scale * (U_k diag(relu(a * S_k + b) - S_k) V_k^T + P Q),    P = U_tail X,  Q = Y V_tail^T,

where at the start a = 1, b = 0, Y [r, m - k] = 0 and X [m - k, r] is uniform within sqrt(6 / r). The ReLU is on the k
values alone: on all of C (`core_relu: full`, the authors' code) it cuts off each negative entry of X Y as well. U_tail
and V_tail are any bases of the trailing spaces, but in `full` the singular vectors, which are all saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from peftzoo.core.adapter import Factors
from peftzoo.core.config import ZooConfig
from peftzoo.core.random import stream_key, uniform
from peftzoo.core.registry import register
from peftzoo.core.sharding import whole
from peftzoo.core.tail import TailAdapter, product_norm


@dataclass
class SaltConfig(ZooConfig):
    """Settings of SALT; `r` is the rank of X Y.

    Attributes:
        ratio: share of the singular values that is scaled and shifted, 0 < ratio <= 1.
        k: their number, in place of `ratio`.
        core_relu: what of the core passes a ReLU: the k scaled values, nothing, or all of it.
        regularization: weight in the loss of |a * S_k + b - S_k| + |X Y|_F, summed over layers, >= 0.
    """

    ratio: float = 0.1
    k: int | None = None
    core_relu: Literal["top", "none", "full"] = "top"
    regularization: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("ratio", 0 < self.ratio <= 1, "above 0 and at most 1")
        self._require("k", self.k is None or self.k >= 1, "at least 1, or none")
        self._require("regularization", self.regularization >= 0, "at least 0")

    def refusal(self, kind: str) -> str | None:
        """Refuse the dense core on a packed weight: each forward would build the whole weight anew."""
        dense = self.core_relu == "full" and kind.startswith("bnb")
        return "core_relu=full needs a weight that is not packed; use top or none" if dense else None


@register(
    "salt",
    config=SaltConfig,
    paper="arXiv:2503.16055",
    lr_factor=1.0,
    trains=("x", "y", "scale", "shift"),
    layers=("linear", "conv1d", "conv2d", "bnb-4bit", "bnb-8bit"),
    to_lora="exact",
    tiny={"r": 4, "alpha": 6.0, "k": 4, "regularization": 0.01},
)
class Salt(TailAdapter):
    """Scales and shifts the top singular values, low-rank update of the rest."""

    config: SaltConfig

    def __init__(self, config: SaltConfig, in_features: int, out_features: int) -> None:
        k = config.k or max(1, int(config.ratio * min(in_features, out_features)))
        super().__init__(config, in_features, out_features, k, whole_svd=config.core_relu == "full")
        self.scale, self.shift = nn.Parameter(torch.ones(k)), nn.Parameter(torch.zeros(k))

    def init(self, weight: Tensor) -> None:
        """Decompose `weight` ([out, in]) and start X; a, b and Y are there."""
        key, bound = stream_key(self.config.seed, self.layer_name, "x"), (6 / self.config.r) ** 0.5
        self.x.copy_(uniform(key, self.x.shape, -bound, bound))
        self.decompose(weight)

    def low_rank(self, p: Tensor, q: Tensor) -> Factors:
        """Return V_k^T and Q [k + r, in], U_k and P [out, k + r], and between them the change of S_k and ones."""
        top = self.scale * self.s + self.shift
        change = (top.relu() if self.config.core_relu == "top" else top) - self.s
        s = torch.cat((change, change.new_ones(len(q))))
        return Factors(torch.cat((self.vt, q)), torch.cat((self.u, p), dim=1), s, self.config.scale)

    def dense(self) -> Tensor:
        """Return dW, [out, in], of `core_relu: full`."""
        top, tail = self.s.tensor_split([self.k])
        core = torch.block_diag((self.scale * top + self.shift).diag(), tail.diag() + self.x @ self.y)
        return self.config.scale * self.u @ (core.relu() - self.s.diag()) @ self.vt

    def regularizer(self) -> Tensor | None:
        """Return the weighted |a * S_k + b - S_k| + |X Y|_F, a scalar."""
        weight, s = self.config.regularization, self.s[: self.k]
        a, b, x, y = map(whole, (self.scale, self.shift, self.x, self.y))
        return weight * ((a * s + b - s).norm() + product_norm(x, y)) if weight else None
