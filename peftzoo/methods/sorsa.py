"""SORSA: train the top singular triplets, kept near orthonormal (Cao 2024, arXiv:2409.00055).

With W = U diag(s) V^T cut at rank r, the paper trains U [out, r], s [r], V^T [r, in] on top of the frozen rest of W.
Here W stays whole and the starting triplets stay beside the trained ones as frozen anchors:

    dW = scale * (U diag(s) V^T - U0 diag(s0) V0^T),

the paper's update, exactly 0 at the start. Disabling, merging and a 4-bit W stay exact, and a file carries its own
start, not an SVD that may come out differently elsewhere, at the price of r (in + out + 1) frozen numbers per layer.

The penalty, gamma times the mean over all U and V of |Q^T Q - I|_F, gets an epsilon under its root, which is not
smooth at the start, and is always computed in float32; the authors' code computes it in bfloat16 under autocast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftzoo.core.adapter import Factors, LinearAdapter
from peftzoo.core.config import ZooConfig
from peftzoo.core.registry import register
from peftzoo.core.sharding import whole


@dataclass
class SorsaConfig(ZooConfig):
    """Settings of SORSA.

    Attributes:
        gamma: weight of the penalty, >= 0; 0 drops it.
        divide_by_accumulation: divide the penalty by the micro-batches of a step, as the authors' trainer does.
    """

    gamma: float = 4e-4
    divide_by_accumulation: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("gamma", self.gamma >= 0, "at least 0")


@register(
    "sorsa",
    config=SorsaConfig,
    paper="arXiv:2409.00055",
    trains=("u", "s", "vt"),
    to_lora="exact",
    tiny={"r": 4, "alpha": 6.0},
)
class Sorsa(LinearAdapter):
    """Trains the top r singular triplets, kept near orthonormal."""

    config: SorsaConfig
    u: Tensor
    s: Tensor
    vt: Tensor
    u0: Tensor
    s0: Tensor
    vt0: Tensor

    def __init__(self, config: SorsaConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        if (r := config.r) > min(in_features, out_features):
            raise ValueError(f"sorsa: r={r} exceeds the rank of a [{out_features}, {in_features}] weight")
        for name, shape in {"u": (out_features, r), "s": (r,), "vt": (r, in_features)}.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
            self.register_buffer(f"{name}0", torch.empty(shape))

    def init(self, weight: Tensor) -> None:
        """Set triplets and anchors from the SVD of `weight` ([out, in], float32)."""
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        r = self.config.r
        for name, start in {"u": u[:, :r], "s": s[:r], "vt": vt[:r]}.items():
            getattr(self, name).copy_(start)
            getattr(self, f"{name}0").copy_(start)

    def factors(self) -> Factors:
        """Return dW as US (V - V0)^T + (US - U0S0) V0^T, rank 2r."""
        # two products of differences: in bfloat16 the difference of two products would drown small steps in rounding
        us, us0 = self.u * self.s, self.u0 * self.s0
        a = torch.cat((self.vt - self.vt0, self.vt0))
        return Factors(a, torch.cat((us, us - us0), dim=1), scale=self.config.scale)

    def penalty(self, accumulation: int = 1) -> Tensor | None:
        """Return gamma / 2 * (|U^T U - I|_F + |V^T V - I|_F), a scalar."""
        if self.config.gamma == 0:
            return None
        weight = self.config.gamma / (2 * accumulation if self.config.divide_by_accumulation else 2)
        return weight * (_departure(whole(self.u).T) + _departure(whole(self.vt)))


def _departure(q: Tensor) -> Tensor:
    """Return sqrt(|q q^T - I|_F^2 + eps^2) for q [r, n], eps = 1e-6 sqrt(r), in at least float32."""
    with torch.autocast(q.device.type, enabled=False):
        q = q.to(torch.promote_types(torch.float32, q.dtype))
        gram = q @ q.T - torch.eye(q.shape[0], dtype=q.dtype, device=q.device)
        return (gram.square().sum() + 1e-12 * q.shape[0]).sqrt()
