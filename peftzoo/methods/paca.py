"""PaCA: train r columns of the weight itself (Woo et al. 2025, ICLR, arXiv:2503.01905).

Choose a set C of r input columns once and train only W[:, C]. Written as an update,

    dW[:, C] = scale * P,    P in R^{out x r},  P = 0 at the start,

so the backward needs the r entries x[C] and never the whole of x. The authors train V = W[:, C] / scale + P inside
the weight; function and gradients are the same, but W is not overwritten here, so disabling is exact, adapters can
overlap, and no step sees the columns of the step before, as every second one of the authors' code does.

`alpha` acts as a factor of the learning rate alone: it has no effect on the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from peftzoo.core.adapter import Factors, LinearAdapter
from peftzoo.core.config import ZooConfig
from peftzoo.core.random import permutation, stream_key
from peftzoo.core.registry import register


@dataclass
class PacaConfig(ZooConfig):
    """Settings of PaCA; `r` is the number of trained columns.

    Attributes:
        selection: "random", or the columns of largest ("norm_top") or smallest ("norm_low") Euclidean norm.
    """

    selection: Literal["random", "norm_top", "norm_low"] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("random", "norm_top", "norm_low")
        self._require("selection", self.selection in known, f"one of {', '.join(known)}")


@register(
    "paca",
    config=PacaConfig,
    paper="arXiv:2503.01905",
    lr_factor=1.0,
    trains=("p",),
    to_lora="exact",
    tiny={"r": 4, "alpha": 6.0},
)
class Paca(LinearAdapter):
    """Trains r columns of the weight, and keeps only their inputs."""

    config: PacaConfig
    columns: Tensor

    def __init__(self, config: PacaConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        if config.r > in_features:
            raise ValueError(f"paca: r={config.r} columns asked of a layer with {in_features} inputs")
        self.p = nn.Parameter(torch.empty(out_features, config.r))
        # saved with the adapter: a file must not depend on how a later version would draw them
        self.register_buffer("columns", torch.empty(config.r, dtype=torch.long))

    def init(self, weight: Tensor) -> None:
        """Choose the columns of `weight` ([out, in]) and zero the update."""
        if self.config.selection == "random":
            order = permutation(stream_key(self.config.seed, self.layer_name, "columns"), self.in_features)
        else:
            order = torch.argsort(weight.norm(dim=0), descending=self.config.selection == "norm_top", stable=True)
        self.columns.copy_(order[: self.config.r].sort().values)
        self.p.zero_()

    def factors(self) -> Factors:
        """Return the columns as the gather that takes the place of A, and P [out, r]."""
        return Factors(self.columns, self.p, scale=self.config.scale)
