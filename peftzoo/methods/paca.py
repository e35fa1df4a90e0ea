"""PaCA: train r columns of the weight itself (Woo et al. 2025, ICLR, arXiv:2503.01905).

Choose a set C of r input columns once (`peftzoo.core.columns` says how) and train only W[:, C]. Written as an update,

    dW[:, C] = scale * P,    P in R^{out x r},  P = 0 at the start,

so the backward needs the r entries x[C] and never the whole of x. The authors train V = W[:, C] / scale + P inside
the weight: the same function and gradients. By default W is only read here, so that adapters can overlap and a packed
W works. With `in_place` the columns stand in W as theirs do and the forward costs nothing extra, but no step sees the
columns of the step before, as every second one of the authors' code does (`peftzoo.core.in_place`).

`alpha` acts as a factor of the learning rate alone: it has no effect on the start.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftzoo.core.adapter import Factors
from peftzoo.core.columns import ColumnAdapter, ColumnSettings, by_gradient
from peftzoo.core.registry import register


@dataclass
class PacaConfig(ColumnSettings):
    """Settings of PaCA; `r` is the number of trained columns.

    Attributes:
        in_place: let the trained columns stand in the frozen weight; not where it is packed or sharded.
    """

    in_place: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("in_place", not (self.in_place and self.dropout), "false where dropout is above 0")


@register(
    "paca",
    config=PacaConfig,
    paper="arXiv:2503.01905",
    lr_factor=1.0,
    trains=("p",),
    to_lora="exact",
    calibrate=by_gradient,
    edits_base="in_place",
    tiny={"r": 4, "alpha": 6.0},
)
class Paca(ColumnAdapter):
    """Trains r columns of the weight, and keeps only their inputs."""

    config: PacaConfig

    def __init__(self, config: PacaConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.in_place = config.in_place
        self.p = nn.Parameter(torch.empty(out_features, config.r))

    def init(self, weight: Tensor) -> None:
        """Choose the columns of `weight` ([out, in]) and zero the update."""
        super().init(weight)
        self.p.zero_()

    def factors(self) -> Factors:
        """Return the columns as the gather that takes the place of A, and P [out, r]."""
        return Factors(self.columns, self.p, scale=self.config.scale)
