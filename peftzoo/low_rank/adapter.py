"""LowRank: the update scale * B A of two thin factors, which the LoRA family shares.

A start that is a part of W itself (pissa, olora) keeps its frozen copy A0, B0 and adds

    dW = scale * (B A - B0 A0) = scale * (B (A - A0) + (B - B0) A0),

exactly 0 at the start. The base weight stays whole, where peft takes scale * B0 A0 out of it: disabling, merging and
a 4-bit W stay exact, and a file carries its own start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftzoo.core.adapter import Factors, LinearAdapter
from peftzoo.low_rank.eva import EvaSettings
from peftzoo.low_rank.starts import ANCHORED, StartName, start_factors

# peft's spelling of the settings that the family shares with it
ALIASES = {"lora_alpha": "alpha", "lora_dropout": "dropout"}


@dataclass
class LowRankConfig(EvaSettings):
    """Settings of a method of the LoRA family.

    Attributes:
        start: where A and B begin: "default", "gaussian", "pissa", "olora" or "eva", which takes the settings from
            `rho` on and calls for `calibrate`.
    """

    start: StartName = "default"

    @property
    def needs_data(self) -> bool:
        """Whether `calibrate` has to give the start."""
        return self.start == "eva"


class LowRank(LinearAdapter):
    """Adds scale * B A; a method of the family changes what trains, or what is around it.

    Attributes:
        a: down factor, [r, in].
        b: up factor, [out, r], trained.
        a0: where `a` began, if that was a part of W and `a` trains; frozen.
        b0: where `b` began, if that was a part of W; frozen.
    """

    config: LowRankConfig
    a: Tensor
    b: Tensor
    a0: Tensor
    b0: Tensor
    trains_a: ClassVar[bool] = True

    def __init__(self, config: LowRankConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        r = config.r
        self.anchored = config.start in ANCHORED
        if self.anchored and r > min(in_features, out_features):
            raise ValueError(
                f"{config.method_name}: r={r} exceeds the rank of a [{out_features}, {in_features}] weight, from "
                f"which start={config.start} takes its factors"
            )
        down, up = torch.empty(r, in_features), torch.empty(out_features, r)
        if self.trains_a:
            self.register_parameter("a", nn.Parameter(down))
        else:
            self.register_buffer("a", down)
        self.register_parameter("b", nn.Parameter(up))
        if self.anchored:
            if self.trains_a:
                self.register_buffer("a0", torch.empty_like(down))
            self.register_buffer("b0", torch.empty_like(up))

    def init(self, weight: Tensor) -> None:
        """Set A and B, and what is kept of them, from `weight` ([out, in], float32)."""
        config = self.config
        a, b = start_factors(config.start, weight, config.r, config.scale, config.seed, self.layer_name)
        for name, start in {"a": a, "b": b, "a0": a, "b0": b}.items():
            if name in self._parameters or name in self._buffers:
                getattr(self, name).copy_(start)

    def factors(self) -> Factors:
        """Return A [r, in] and B [out, r]; from an anchored start their differences, of rank 2r."""
        a, b = self.a, self.b
        if self.anchored:
            # products of differences: in bfloat16 the difference of two products would drown small steps in rounding
            if self.trains_a:
                a, b = torch.cat((a - self.a0, self.a0)), torch.cat((b, b - self.b0), dim=1)
            else:
                b = b - self.b0
        return Factors(a, b, scale=self.config.scale)
