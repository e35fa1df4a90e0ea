"""EVA: explained variance adaptation (Paischer et al. 2024, arXiv:2410.07170).

    dW = scale * B A,    A [r_l, in],  B [out, r_l],  sum of r_l = sum of r

LoRA whose A starts as the leading principal components of each layer's inputs on the training data, B = 0, and whose
ranks are dealt out by the variance that the components explain: how is told in `peftzoo.low_rank.eva`, which every
method of the LoRA family can take as its start. From there on EVA is LoRA, and its folders are.

The start takes data: the trainer gives its own, others call `peftzoo.calibrate(model, batches)`.
"""

from __future__ import annotations

from dataclasses import dataclass

from peftzoo.core.registry import register
from peftzoo.core.stock_lora import StockLora
from peftzoo.low_rank.adapter import ALIASES, LowRank, LowRankConfig
from peftzoo.low_rank.eva import eva_start
from peftzoo.low_rank.starts import StartName


@dataclass
class EvaConfig(LowRankConfig):
    """Settings of EVA: those of the family, `start` being eva unless it is given."""

    start: StartName = "eva"


@register(
    "eva",
    config=EvaConfig,
    paper="arXiv:2410.07170",
    trains=("a", "b"),
    layers=("linear", "conv1d", "conv2d", "bnb-4bit", "bnb-8bit"),
    to_lora="exact",
    stock_lora=StockLora(),
    calibrate=eva_start,
    aliases=ALIASES,
    tiny={"r": 4, "alpha": 6.0},
)
class Eva(LowRank):
    """LoRA that starts along the directions in which a layer's inputs vary, with ranks dealt out by variance."""
