"""rsLoRA: LoRA whose scale stabilises the rank (Kalajdzievski 2023, arXiv:2312.03732).

    dW = scale * B A,    scale = alpha / sqrt(r)

With LoRA's alpha / r the update, and with it learning, shrinks as r grows; with sqrt(r) it does not.

Without `alpha`, alpha is sqrt(8), so that the scale is 1 at the default rank of 8, where rsLoRA is then LoRA, and a
learning rate found there serves the other ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from peftzoo.core.registry import register
from peftzoo.core.stock_lora import StockLora
from peftzoo.low_rank.adapter import ALIASES, LowRank, LowRankConfig
from peftzoo.low_rank.eva import eva_start


@dataclass
class RsloraConfig(LowRankConfig):
    """Settings of rsLoRA: those of the family; `alpha` is divided by sqrt(r), and none stands for sqrt(8)."""

    @property
    def scale(self) -> float:
        """Factor of the update: alpha / sqrt(r)."""
        return float(((8 if self.alpha is None else self.alpha**2) / self.r) ** 0.5)


@register(
    "rslora",
    config=RsloraConfig,
    paper="arXiv:2312.03732",
    trains=("a", "b"),
    to_lora="exact",
    stock_lora=StockLora(flags=frozenset({"use_rslora"}), reads=True),
    calibrate=eva_start,
    aliases=ALIASES,
    tiny={"r": 4, "alpha": 3.0},
)
class Rslora(LowRank):
    """LoRA scaled by alpha / sqrt(r), so that large ranks learn as fast as small ones."""
