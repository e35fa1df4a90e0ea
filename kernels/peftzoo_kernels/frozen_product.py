from __future__ import annotations

import torch
from torch import Tensor

from peftzoo_kernels.expand import expand


def frozen_product(
    x: Tensor,
    weight: Tensor | None,
    u: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    out_scale: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    v = expand(u, b, bias if out_scale is None else None)
    if weight is not None:
        v.addmm_(x, weight.t())
    if out_scale is None:
        return v, None
    y = torch.mul(v, out_scale, out=torch.empty_like(v) if keep else v)
    if bias is not None:
        y += bias.to(y.dtype)
    return y, v if keep else None
