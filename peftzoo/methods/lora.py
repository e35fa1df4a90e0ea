"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685).

    dW = scale * B A,    A in R^{r x in},  B in R^{out x r},  scale = alpha / r

with A drawn uniformly from +-1/sqrt(in), as the authors' code and peft do, and B = 0, so dW = 0 at the start; other
starts are in `peftzoo.low_rank.starts`. Without `alpha` the scale is 1.

What is saved is a stock peft LoRA folder.
"""

from __future__ import annotations

from dataclasses import dataclass

from peftzoo.core.registry import register
from peftzoo.core.stock_lora import StockLora
from peftzoo.low_rank.adapter import ALIASES, LowRank, LowRankConfig
from peftzoo.low_rank.eva import eva_start


@dataclass
class LoraConfig(LowRankConfig):
    """Settings of LoRA: those of the family."""


@register(
    "lora",
    config=LoraConfig,
    paper="arXiv:2106.09685",
    trains=("a", "b"),
    layers=("linear", "conv1d", "conv2d", "bnb-4bit", "bnb-8bit"),
    to_lora="exact",
    stock_lora=StockLora(reads=True),
    calibrate=eva_start,
    aliases=ALIASES,
    tiny={"r": 4, "alpha": 6.0},
)
class Lora(LowRank):
    """Trains two thin matrices, down to r and up again."""
