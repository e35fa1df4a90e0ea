"""LoRA-FA: LoRA with A frozen where it was drawn (Zhang et al. 2023, arXiv:2308.03303).

    dW = scale * B A,    A frozen,  B trained

Only a trained A needs the layer's input in the backward: here that keeps h = x A^T, r numbers a token in place of
`in`. A is saved, so that a file is a stock peft LoRA folder and no draw is repeated on loading.
"""

from __future__ import annotations

from dataclasses import dataclass

from peftzoo.core.registry import register
from peftzoo.core.stock_lora import StockLora
from peftzoo.low_rank.adapter import ALIASES, LowRank, LowRankConfig
from peftzoo.low_rank.eva import eva_start


@dataclass
class LoraFaConfig(LowRankConfig):
    """Settings of LoRA-FA: those of the family."""


@register(
    "lora_fa",
    config=LoraFaConfig,
    paper="arXiv:2308.03303",
    lr_factor=2.0,  # quickstart/dates, 250 steps: x1 reaches 95 %, x2 100 %
    trains=("b",),
    to_lora="exact",
    stock_lora=StockLora(),
    calibrate=eva_start,
    aliases=ALIASES,
    tiny={"r": 4, "alpha": 6.0},
)
class LoraFa(LowRank):
    """LoRA that trains the up factor alone and keeps r numbers a token for it."""

    trains_a = False
