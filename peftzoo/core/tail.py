"""What is left of a weight beside its largest singular triplets: the trailing spaces, and products in them.

Trailing singular vectors are ill-conditioned: a second SVD may give quite other ones. The spaces they span are not, so
these bases come from QR factorisations, of the saved triplets and the weight, which give the same numbers each time.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftzoo.core.adapter import Factors, LinearAdapter
from peftzoo.core.config import ZooConfig
from peftzoo.core.rebuild import rebuild_on_load
from peftzoo.core.sharding import whole
from peftzoo.errors import ModelError

# relative error of the triplets. Measured on Gaussian and on trained matrices: 0.001 if the weight is rounded to
# bfloat16, at most 0.08 if it is packed to 4 bits or its entries move by 10 % of their deviation, 1.6 for another one
_TOLERANCE = 0.15


def signed_svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD of `weight` [out, in]: U [out, m], s [m] descending, V^T [m, in].

    The entry of largest magnitude of each right vector is positive, which settles the sign of a pair.
    """
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    signs = vt.gather(1, vt.abs().argmax(1, keepdim=True)).sign()
    return u * signs.T, s, vt * signs


def trailing_bases(weight: Tensor, u: Tensor, vt: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal bases of what the column and row spaces of `weight` have beside its leading triplets.

    Args:
        weight: [out, in].
        u: left singular vectors, [out, k].
        vt: right ones, [k, in].

    Returns:
        Columns [out, m - k] and rows [m - k, in], m = min(out, in).
    """
    if weight.shape[0] > weight.shape[1]:
        left, right = trailing_bases(weight.T, vt.T, u.T)
        return right.T.contiguous(), left.T.contiguous()
    w, u, v = (t.to(weight.dtype if weight.device.type == "mps" else torch.float64) for t in (weight, u, vt.T))
    # on a short side it is all that is orthogonal to the triplets; on the long one, W^T times that
    left = _complement(u)
    right = _complement(v) if len(w) == len(v) else torch.linalg.qr(torch.cat((v, w.T @ left), dim=1)).Q[:, len(vt) :]
    return left.to(weight.dtype).contiguous(), right.T.to(weight.dtype).contiguous()


def _complement(q: Tensor) -> Tensor:
    return torch.linalg.qr(q, mode="complete").Q[:, q.shape[1] :]


def product_norm(x: Tensor, y: Tensor) -> Tensor:
    """Return |X Y|_F for x [n, r] and y [r, n] without the product; its gradient at 0 is 0."""
    with torch.autocast(x.device.type, enabled=False):
        square = ((x.T @ x) * (y @ y.T)).sum()
    return torch.where(square > 0, square, 1.0).sqrt() * (square > 0)


class _Tail(NamedTuple):
    """P = left X + left_rest, Q = Y right + right_rest; the rests are what a file's products have beside the bases."""

    left: Tensor
    right: Tensor
    left_rest: Tensor
    right_rest: Tensor


class TailAdapter(LinearAdapter):
    """An adapter that keeps the first k singular triplets of its weight and trains a product P Q beside them.

    P = L X and Q = Y R with orthonormal L [out, m - k] and R [m - k, in], which are not saved: a file holds P and Q,
    and where X and Y train on they are measured from there, whatever the bases then are. While nothing trains, P and Q
    are all that is used.

    Attributes:
        x: coordinates of P, [m - k, r], trained.
        y: coordinates of Q, [r, m - k], trained.
        u: left singular vectors that are kept, [out, kept].
        s: their singular values, [kept].
        vt: right singular vectors, [kept, in].
        p: P as it was saved, [out, r].
        q: Q as it was saved, [r, in].
    """

    u: Tensor
    s: Tensor
    vt: Tensor
    p: Tensor
    q: Tensor

    def __init__(self, config: ZooConfig, in_features: int, out_features: int, k: int, whole_svd: bool) -> None:
        """Allocate; with `whole_svd` all triplets are kept, and X and Y belong to those after the k-th: no P, no Q."""
        super().__init__(config, in_features, out_features)
        m, r = min(in_features, out_features), config.r
        if k > m:
            raise ValueError(f"{config.method_name}: k={k} exceeds the {m} singular values of a layer")
        self.x, self.y = nn.Parameter(torch.empty(m - k, r)), nn.Parameter(torch.zeros(r, m - k))
        self.k, self.whole_svd, kept = k, whole_svd, m if whole_svd else k
        shapes = {"u": (out_features, kept), "s": (kept,), "vt": (kept, in_features)}
        if not whole_svd:
            shapes |= {"p": (out_features, r), "q": (r, in_features)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.empty(shape))
        self._tail: _Tail | None = None
        self.register_state_dict_pre_hook(_refresh)  # type: ignore[no-untyped-call]
        rebuild_on_load(self)

    def decompose(self, weight: Tensor) -> None:
        """Keep the triplets of `weight` [out, in], and P and Q as X and Y say."""
        for kept, found in zip((self.u, self.s, self.vt), signed_svd(weight), strict=True):
            kept.copy_(found[:, : kept.shape[1]] if kept is self.u else found[: kept.shape[0]])
        if not self.whole_svd:
            left, right = trailing_bases(weight, self.u, self.vt)
            self.p.copy_(left @ self.x)
            self.q.copy_(self.y @ right)
            self._tail = _Tail(left, right, torch.zeros_like(self.p), torch.zeros_like(self.q))

    @abstractmethod
    def low_rank(self, p: Tensor, q: Tensor) -> Factors:
        """Return the update in factors, from P [out, r] and Q [r, in]."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Return dW, [out, in], where the whole SVD is kept: then there are no factors."""

    def factors(self) -> Factors | None:
        """Return the update in factors; None where the whole SVD is kept."""
        return None if self.whole_svd else self.low_rank(*self.products())

    def delta_weight(self, weight: Tensor) -> Tensor:
        """Return dW, [out, in]."""
        return self.dense() if self.whole_svd else super().delta_weight(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return x dW^T, [..., in] -> [..., out], in the dtype of `x`."""
        return F.linear(x, self.dense().to(x.dtype)) if self.whole_svd else super().forward(x)

    def products(self) -> tuple[Tensor, Tensor]:
        """Return P [out, r] and Q [r, in].

        Raises:
            ModelError: X and Y are to train on, and the weight is another than the one they were trained on.
        """
        if self._tail is None and self.x.requires_grad:
            self._tail = self._tail_of_base()
        if self._tail is None:
            return self.p, self.q
        if self._tail.left.device != self.x.device or self._tail.left.dtype != self.x.dtype:
            self._tail = _Tail(*(tensor.to(self.x) for tensor in self._tail))
        left, right, left_rest, right_rest = self._tail
        return left @ whole(self.x) + left_rest, whole(self.y) @ right + right_rest

    @torch.no_grad()  # the rests are constants: what X and Y were when P and Q were saved
    def _tail_of_base(self) -> _Tail:
        weight, u, s, vt = whole(self.frozen_weight()), self.u, self.s, self.vt
        error = float(torch.hypot((weight @ vt.T - u * s).norm(), (u.T @ weight - s[:, None] * vt).norm()))
        error /= max(float(s.norm()), 1e-30)
        if not error <= _TOLERANCE:
            raise ModelError(
                f"{self.layer_name or 'layer'}: the singular triplets of the adapter are {error:.1%} away from its "
                f"weight's, more than {_TOLERANCE:.0%}; train on where it began, or load it for inference"
            )
        left, right = trailing_bases(weight, u, vt)
        return _Tail(left, right, self.p - left @ whole(self.x), self.q - whole(self.y) @ right)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}p" in state_dict:
            self._tail = None


def _refresh(module: nn.Module, *_: Any) -> None:
    # so that whatever saves an adapter finds P and Q as they are now
    adapter = cast(TailAdapter, module)
    if adapter._tail is not None:
        with torch.no_grad():
            for saved, now in zip((adapter.p, adapter.q), adapter.products(), strict=True):
                saved.copy_(now)
