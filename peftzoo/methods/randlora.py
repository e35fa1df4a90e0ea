"""RandLoRA: full rank from scaled random bases (Albert et al. 2025, ICLR 2025, arXiv:2502.00987).

With s = min(in, out), l = max(in, out) and n = ceil(s / r), the paper's update is a sum of n products of rank r,

    dW = scale * sum_i B_i diag(lam_i) A diag(gamma_i)      B_i [l, r], A [r, s] frozen; lam_i [r], gamma_i [s] trained

transposed where in > out; all layers share A and the B_i. Published code pairs the columns of the B_i with rows of the
rest in another order, as good and the default here; `pairing: textbook` is the sum. lam starts at 0, gamma at 1 / s.
A and B, of deviation 1, follow from the seed, entry by entry and whatever their size: they are drawn once, as large as
the largest layer needs, and stand in no file. Those that come with a stock peft folder are kept, and saved, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from peftzoo.core.adapter import LinearAdapter
from peftzoo.core.basis import SeededConfig, frozen_matrix, share_matrices
from peftzoo.core.cache import StepCache
from peftzoo.core.randlora_folder import read_randlora_folder
from peftzoo.core.registry import register
from peftzoo_kernels import compute_dtype, merging_is_less_work, randlora_delta, randlora_linear


@dataclass
class RandloraConfig(SeededConfig):
    """Settings of RandLoRA; the number of trained numbers falls with `r`.

    Attributes:
        scale_mode: "authors", alpha / (r sqrt(n)), alpha = 2 r by default; or "peft", alpha / r, 20 r by default.
        bases: entries "uniform"; "sparse", one in 3 not 0; "very_sparse", one in sqrt(s); "stored", from a file.
        pairing: "coded" or "textbook".
        zero: which diagonals start at 0, "lam" or "gamma".
        chain: "factored", through A and B; "merged", through a dW made once a step; "auto", whichever is less work.
    """

    r: int = 32
    scale_mode: Literal["authors", "peft"] = "authors"
    bases: Literal["uniform", "sparse", "very_sparse", "stored"] = "uniform"
    pairing: Literal["coded", "textbook"] = "coded"
    zero: Literal["lam", "gamma"] = "lam"
    chain: Literal["auto", "factored", "merged"] = "auto"


@register(
    "randlora",
    config=RandloraConfig,
    paper="arXiv:2502.00987",
    lr_factor=1.0,
    trains=("lam", "gamma"),
    to_lora="approximate",
    reads={"RANDLORA": read_randlora_folder},
    tiny={"r": 5, "alpha": 4.0},
)
class Randlora(LinearAdapter):
    """Trains diagonals between random matrices that all layers share: an update of full rank."""

    config: RandloraConfig

    def __init__(self, config: RandloraConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.small, self.large = sorted((in_features, out_features))
        r, n, authors = config.r, -(-self.small // config.r), config.scale_mode == "authors"
        self.lam, self.gamma = nn.Parameter(torch.empty(r, n)), nn.Parameter(torch.empty(n, self.small))
        self.scale = (config.alpha or r * (2 if authors else 20)) / r / (n**0.5 if authors else 1)
        self.a = frozen_matrix(self, "basis_a", config.bases, (r, self.small))
        self.b = frozen_matrix(self, "basis_b", config.bases, (n * r, self.large))
        self._cache: StepCache[Tensor] = StepCache()
        self._cache.drop_on_load(self)

    def init(self, weight: Tensor) -> None:
        """Zero one of the diagonals; `weight` is not looked at."""
        self.lam.fill_(0.0 if self.config.zero == "lam" else 1 / max(self.lam.shape))
        self.gamma.fill_(0.0 if self.config.zero == "gamma" else 1 / max(self.gamma.shape))

    @classmethod
    def share(cls, adapters: Sequence[Randlora]) -> None:
        """Let all layers read one A and one B, as large as the largest needs."""
        share_matrices(adapters, "a", "b")

    def _terms(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, float, bool]:
        a = self.a.part(self.config.r, self.small, self.lam.device, self.lam.dtype)
        b = self.b.part(self.lam.numel(), self.large, self.lam.device, dtype)
        return self.lam, self.gamma, a, b, self.scale, self.config.pairing == "coded"

    def delta_weight(self, weight: Tensor) -> Tensor:
        """Return dW [out, in]."""
        return randlora_delta(*self._terms(self.lam.dtype), self.in_features > self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return x dW^T, [..., in] -> [..., out]."""
        terms, delta = self._terms(compute_dtype(x)), None
        if {"auto": merging_is_less_work(x, *terms[2:4]), "merged": True, "factored": False}[self.config.chain]:
            delta = self._cache.get(lambda: randlora_delta(*terms, self.in_features > self.out_features), *terms[:4])
        return randlora_linear(x, *terms, delta)
