"""An adapter on a convolution: W [out, in, kh, kw] seen as [out, in * kh * kw], a linear layer on patches."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from peftzoo.core.adapter import LinearAdapter
from peftzoo_kernels import draw_seed, dropped


def conv_update(conv: nn.Conv2d, adapter: LinearAdapter, x: Tensor, dropout: float) -> Tensor:
    """Return what `adapter` adds to `conv(x)`, [n, in, h, w] -> [n, out, h', w']; it sees a part of the entries of x.

    A low-rank update is a convolution to r channels and one of a single pixel back, so no patch is ever copied out.
    """
    x = dropped(x, dropout, draw_seed(x.device)) if dropout else x
    shape = conv.weight.shape
    factors = adapter.factors()
    if factors is None:
        delta = adapter.delta_weight(adapter.frozen_weight())
        return conv._conv_forward(x, delta.view(shape).to(x.dtype), None)
    a, b = factors.dense(adapter.in_features)
    h = conv._conv_forward(x, a.reshape(-1, *shape[1:]).to(x.dtype), None)
    return factors.scale * F.conv2d(h, b[:, :, None, None].to(h.dtype))
