"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685).

    dW = scale * B A,    A in R^{r x in},  B in R^{out x r},  scale = alpha / r

with A drawn uniformly from +-1/sqrt(in), as the authors' code and peft do, and B = 0, so dW = 0 at the start.
Without `alpha` the scale is 1.

What is saved is a stock peft LoRA folder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftzoo.core.adapter import Factors, LinearAdapter
from peftzoo.core.config import ZooConfig
from peftzoo.core.random import stream_key, uniform
from peftzoo.core.registry import register


@dataclass
class LoraConfig(ZooConfig):
    """Settings of LoRA: those that all methods share."""


@register(
    "lora",
    config=LoraConfig,
    paper="arXiv:2106.09685",
    trains=("a", "b"),
    to_lora="exact",
    stock_lora=True,
    aliases={"lora_alpha": "alpha", "lora_dropout": "dropout"},
    tiny={"r": 4, "alpha": 6.0},
)
class Lora(LinearAdapter):
    """Trains two thin matrices, down to r and up again."""

    def __init__(self, config: LoraConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.a = nn.Parameter(torch.empty(config.r, in_features))
        self.b = nn.Parameter(torch.empty(out_features, config.r))

    def init(self, weight: Tensor) -> None:
        """Draw A and zero B; `weight` ([out, in]) is not read."""
        bound = self.in_features**-0.5
        key = stream_key(self.config.seed, self.layer_name, "a")
        self.a.copy_(uniform(key, tuple(self.a.shape), -bound, bound))
        self.b.zero_()

    def factors(self) -> Factors:
        """Return A [r, in] and B [out, r]."""
        return Factors(self.a, self.b, scale=self.config.scale)
