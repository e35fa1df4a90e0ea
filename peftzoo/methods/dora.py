"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353).

    W' = diag(m / |W + D|) (W + D),    D = scale * B A,    m in R^out,

where |.| is the norm of each row of [out, in] (the paper's columns). A and B start as LoRA's, m as |W|, so W' = W at
the start. As in section 4.3 of the paper, no gradient passes through the norm.

The norms are taken once per optimizer step, without making W + D, and in float32, also under autocast
(`peftzoo_kernels.row_norms`). A row of W that is 0 stays 0; peft divides 0 by 0 there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from peftzoo.core.adapter import Factors
from peftzoo.core.cache import StepCache
from peftzoo.core.registry import register
from peftzoo.core.stock_lora import StockLora
from peftzoo.low_rank.adapter import ALIASES, LowRank, LowRankConfig
from peftzoo.low_rank.eva import eva_start
from peftzoo_kernels import row_norms


@dataclass
class DoraConfig(LowRankConfig):
    """Settings of DoRA: those of the family, and what dropout acts on.

    Attributes:
        dropout_mode: "lora", the input of B A alone, as in LoRA; or "peft", that of the whole scaled product, which
            takes the frozen product twice.
    """

    dropout_mode: Literal["lora", "peft"] = "lora"


@register(
    "dora",
    config=DoraConfig,
    paper="arXiv:2402.09353",
    trains=("a", "b", "m"),
    to_lora="approximate",
    stock_lora=StockLora(frozenset({"use_dora"}), extra={"lora_magnitude_vector": "m"}, reads=True),
    calibrate=eva_start,
    aliases=ALIASES,
    tiny={"r": 4, "alpha": 6.0},
)
class Dora(LowRank):
    """LoRA for the direction of each row of the weight, and a trained magnitude for its length."""

    config: DoraConfig

    def __init__(self, config: DoraConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.m = nn.Parameter(torch.empty(out_features))
        self._norm: StepCache[Tensor] = StepCache()
        self._norm.drop_on_load(self)

    def init(self, weight: Tensor) -> None:
        """Set A, B, and m to the norms of the rows of `weight` ([out, in], float32)."""
        super().init(weight)
        update = super().factors()
        self.m.copy_(row_norms(weight, update.a, update.b, update.scale))

    def factors(self) -> Factors:
        """Return A [r, in], B [out, r] and m / |W + D| [out]."""
        update = super().factors()
        a, b, scale = update.a, update.b, update.scale
        norm = self._norm.get(lambda: row_norms(self.frozen_weight(), a, b, scale), self.a, self.b)
        return update._replace(out_scale=self.m / norm, drops_all=self.config.dropout_mode == "peft")
