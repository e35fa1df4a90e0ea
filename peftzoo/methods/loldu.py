"""LoLDU: train r diagonal entries of an LU decomposition (Shi et al. 2024, arXiv:2410.13618).

With partial pivoting W = P L D U: unit lower L, pivots D, unit upper U. The authors keep r columns of P L and r rows
of U, subtract s P L diag(z0) U from W and train z in z0's place. Written as an update of the whole W,

    dW = s P L diag(z - z0) U,    z in R^r,  z = z0 at the start,  s = alpha / r,

so disabling, merging and a packed W stay exact, and every start of z begins at W. Rows of U, divided by pivots, may be
huge: the frozen factor is D U and the coefficient (z - z0) / D. A pivot that is zero, or nearly so, counts as 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from peftzoo.core.adapter import Factors
from peftzoo.core.config import ZooConfig
from peftzoo.core.lu import LUAdapter
from peftzoo.core.random import normal, stream_key, uniform
from peftzoo.core.registry import register

InitMethod = Literal["lu", "uniform", "normal", "constant", "s_uniform", "s_normal", "ones", "zeros"]


@dataclass
class LolduConfig(ZooConfig):
    """Settings of LoLDU.

    Attributes:
        r: pivots per layer; a smaller layer trains all it has, and s stays alpha / r.
        init_method: z0: the pivots, draws around their mean, draws of unit size ("s_..."), or constants.
        train_scale: whether s is trained too.
    """

    r: int = 768
    init_method: InitMethod = "lu"
    train_scale: bool = False


@register(
    "loldu",
    config=LolduConfig,
    paper="arXiv:2410.13618",
    lr_factor=4.0,
    trains=("z",),
    layers=("linear", "conv1d", "conv2d", "bnb-4bit", "bnb-8bit"),
    to_lora="exact",
    tiny={"r": 16, "alpha": 6.0, "init_method": "uniform"},
)
class Loldu(LUAdapter):
    """Trains the first r pivots of the weight's LU decomposition."""

    config: LolduConfig
    z0: Tensor

    def __init__(self, config: LolduConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.z = nn.Parameter(torch.empty(self.steps))
        self.s = nn.Parameter(torch.empty(1)) if config.train_scale else None
        self.register_buffer("z0", torch.empty(self.steps))

    def init(self, weight: Tensor) -> None:
        """Decompose `weight` ([out, in]) and start z."""
        lu = self.choose(weight)
        self.z.copy_(_start(self.config, lu.pivots, stream_key(self.config.seed, self.layer_name, "z")))
        self.z0.copy_(self.z)
        if self.s is not None:
            self.s.fill_(self.config.scale)

    def factors(self) -> Factors:
        """Return D U [r, in], P L [out, r] and (z - z0) / D [r]."""
        lower, upper, pivots = self.lu()
        if self.s is None:
            return Factors(upper, lower, (self.z - self.z0) / pivots, self.config.scale)
        # the authors' residual keeps the first s: the trained one multiplies z, not z - z0
        return Factors(upper, lower, (self.s * self.z - self.config.scale * self.z0) / pivots)


def _start(config: LolduConfig, pivots: Tensor, key: int) -> Tensor:
    mean, shape = pivots.mean(), tuple(pivots.shape)
    return {
        "lu": pivots,
        "uniform": uniform(key, shape, -0.5, 0.5) * mean.abs(),
        "normal": mean + pivots.std(correction=min(1, len(pivots) - 1)) * normal(key, shape),
        "constant": mean.expand(shape),
        "s_uniform": uniform(key, shape, -1.0, 1.0),
        "s_normal": normal(key, shape),
        "ones": torch.ones(shape),
        "zeros": torch.zeros(shape),
    }[config.init_method]
