"""LoRA+: LoRA whose B learns faster than its A (Hayou et al. 2024, arXiv:2402.12354).

    dW = scale * B A,    learning rate of B = ratio * learning rate of A

A network of large width learns features efficiently only if B moves faster than A; the paper recommends a ratio of
16, with a lower rate of A. Here the ratio is the default of `lr_ratios`, a setting that every method of the zoo has,
which names the tensors it is about: peft's optimizer puts every vector of a model into the fast group as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from peftzoo.core.registry import register
from peftzoo.core.stock_lora import StockLora
from peftzoo.low_rank.adapter import ALIASES, LowRank, LowRankConfig
from peftzoo.low_rank.eva import eva_start


@dataclass
class LoraPlusConfig(LowRankConfig):
    """Settings of LoRA+: those of the family, `lr_ratios` being {b: 16} unless it is given."""

    lr_ratios: dict[str, float] | None = field(default_factory=lambda: {"b": 16.0})


@register(
    "lora_plus",
    config=LoraPlusConfig,
    paper="arXiv:2402.12354",
    lr_factor=0.25,  # quickstart/dates, 250 steps: x1 reaches 97 %, x1/4 100 %
    trains=("a", "b"),
    to_lora="exact",
    stock_lora=StockLora(),
    calibrate=eva_start,
    aliases=ALIASES,
    tiny={"r": 4, "alpha": 6.0},
)
class LoraPlus(LowRank):
    """LoRA whose up factor learns 16 times as fast as its down factor."""
