"""NOLA: LoRA factors as trained mixtures of random bases (Koohpayegani et al. 2023, ICLR 2024, arXiv:2310.02556).

    A = A0 + 1/sqrt(k) sum_b alpha_b A_b,   B = 1/sqrt(k) sum_b beta_b B_b,   dW = scale * B A

with A_b [r, in] and B_b [out, r] uniform in (-1, 1) and never stored: they follow from the seed and the names of layer
and factor, and so does A0, LoRA's uniform start of A. Only alpha and beta, [k] each, are trained and saved, in float32
on any base. Both start at 0, so dW = 0 and beta moves first, as LoRA's B does. A and B are summed once per optimizer
step, not per forward; each backward contracts their gradients with the bases, drawn anew. Fewer bases are the first of
more: coefficients times sqrt(k' / k), cut or padded with zeros, mean the same at k'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from peftzoo.core.adapter import Factors, LinearAdapter
from peftzoo.core.basis import BasisSum, SeededConfig
from peftzoo.core.cache import StepCache
from peftzoo.core.registry import register


@dataclass
class NolaConfig(SeededConfig):
    """Settings of NOLA.

    Attributes:
        k: bases per factor, >= 1.
        a0: "kaiming", LoRA's start of A; or "none", then alpha starts at 1 / sqrt(in) in place of 0.
        bases: "regenerate", or "resident": 2 k r (in + out) bytes of memory a layer, and faster on a CPU.
        share_bases: layers of one shape have the same bases.
        form: "llm"; or the authors' "vit": no A0, 1/sqrt(r in), 1/sqrt(r out) for 1/sqrt(k), starts at 1/k, not at 0.
    """

    k: int = 512
    a0: Literal["kaiming", "none"] = "kaiming"
    bases: Literal["regenerate", "resident"] = "regenerate"
    share_bases: bool = False
    form: Literal["llm", "vit"] = "llm"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("k", isinstance(self.k, int) and self.k >= 1, "an integer >= 1")


@register(
    "nola",
    config=NolaConfig,
    paper="arXiv:2310.02556",
    lr_factor=4.0,
    trains=("alpha", "beta"),
    to_lora="exact",
    tiny={"r": 3, "alpha": 4.0, "k": 40},
)
class Nola(LinearAdapter):
    """Trains coefficients that mix seeded random bases into the two factors of a LoRA."""

    config: NolaConfig

    def __init__(self, config: NolaConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.alpha, self.beta = nn.Parameter(torch.empty(config.k)), nn.Parameter(torch.empty(config.k))
        self._cache: StepCache[tuple[Tensor, Tensor]] = StepCache()
        self._cache.drop_on_load(self)

    def init(self, weight: Tensor) -> None:
        """Set the coefficients; `weight` is not looked at."""
        start = 1 / self.config.k if self.config.form == "vit" else 0.0
        self.alpha.fill_(start if start or self.config.a0 == "kaiming" else self.in_features**-0.5)
        self.beta.fill_(start)

    @cached_property
    def sums(self) -> tuple[BasisSum, BasisSum]:
        """A and B as mixtures of their bases."""
        c, n, m, made = self.config, self.in_features, self.out_features, []
        offset = n**-0.5 if c.form == "llm" and c.a0 == "kaiming" else 0.0
        for factor, shape, start in (("a", (c.r, n), offset), ("b", (m, c.r), 0.0)):
            scale = (shape[0] * shape[1] if c.form == "vit" else c.k) ** -0.5
            owner = f"{list(shape)}" if c.share_bases else self.layer_name
            made.append(BasisSum((c.seed, owner, f"nola {factor}"), shape, scale, start, c.bases == "resident"))
        return made[0], made[1]

    @classmethod
    def share(cls, adapters: Sequence[Nola]) -> None:
        """Let layers with the same bases keep them once."""
        known = {mixture.key: mixture for adapter in adapters for mixture in adapter.sums}
        for adapter in adapters:
            adapter.sums = known[adapter.sums[0].key], known[adapter.sums[1].key]

    def factors(self) -> Factors:
        """Return A [r, in] and B [out, r]."""
        (a, b), scale = self.sums, self.config.scale
        known = self._cache.get(lambda: (a.expand(self.alpha), b.expand(self.beta)), self.alpha, self.beta)
        return Factors(a.attach(self.alpha, known[0]), b.attach(self.beta, known[1]), scale=scale)
