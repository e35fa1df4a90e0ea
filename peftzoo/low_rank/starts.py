"""Where A [r, in] and B [out, r] of a low-rank update start.

default: A uniform in +-1/sqrt(in), B = 0 (Hu et al. 2021, arXiv:2106.09685, as in the authors' code).
gaussian: A normal of deviation 1/r, B = 0, as in peft.
pissa: B A is the rank-r part of W / scale: with the r largest singular triplets U diag(S) V^T of W,
    A = sqrt(S / scale) V^T and B = U sqrt(S / scale) (Meng et al. 2024, arXiv:2404.02948).
olora: from W = Q R, A the first r rows of R and B the first r columns of Q (Büyükakyüz 2024, arXiv:2406.01775).
eva: A the leading directions of the layer's inputs (Paischer et al. 2024, arXiv:2410.07170), B = 0. They come from
    data, through `calibrate`; until then A is as in default.

pissa and olora do not start at 0: the adapter keeps a copy of where they did and adds the difference alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from peftzoo.core.random import normal, stream_key, uniform

StartName = Literal["default", "gaussian", "pissa", "olora", "eva"]
# those that begin as a part of the weight, of which the adapter has to keep a copy
ANCHORED = frozenset({"pissa", "olora"})


def start_factors(
    start: StartName, weight: Tensor, r: int, scale: float, seed: int, layer: str
) -> tuple[Tensor, Tensor]:
    """Return A [r, in] and B [out, r] as training begins.

    Args:
        start: which start.
        weight: the frozen weight, [out, in], float32 or float64.
        r: rank; for an anchored start at most min(in, out).
        scale: factor of the update, > 0.
        seed: seed of the draw.
        layer: dotted name of the layer, which keys the draw with the seed.
    """
    if start == "pissa":
        return _principal(weight, r, scale)
    if start == "olora":
        q, upper = torch.linalg.qr(weight)
        return upper[:r], q[:, :r]
    shape, key = (r, weight.shape[1]), stream_key(seed, layer, "a")
    bound = weight.shape[1] ** -0.5
    a = normal(key, shape) / r if start == "gaussian" else uniform(key, shape, -bound, bound)
    return a, weight.new_zeros(weight.shape[0], r)


def _principal(weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:r] / scale).sqrt()
    return root[:, None] * vt[:r], u[:, :r] * root
