"""Principal components of rows that come batch by batch, from one process or from several at once.

Both ways centre the rows and give the n directions [n, in] of largest variance, their singular values (of all rows
seen, centred) and their shares of the whole variance.

| | keeps | one batch of T rows costs | |
|---|---|---|---|
| `CovariancePca` | in^2 numbers, float64 | T in^2 | exact; the order of the rows does not matter |
| `IncrementalPca` | in (q + 2) numbers | 10 T in q | forgets what lies outside n directions; order matters |

`IncrementalPca` is Ross et al. 2008 as the authors of EVA use it: after the first batch the rows that count are

    Z = [diag(s) V;  X - mean(X);  sqrt(N T / (N + T)) (mean - mean(X))],

and V, s become the leading right singular vectors and values of Z. These are found by subspace iteration on q >= n
directions, which touches rows only in the product Z^T (Z Q): processes exchange [in, q] numbers, never rows, and Z is
never made. The start is seeded; with q = in nothing is approximated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from peftzoo.core.processes import summed
from peftzoo.core.random import stream_key, uniform

POWER_ITERATIONS = 4


class Components(NamedTuple):
    """The leading principal components of what was seen.

    Attributes:
        directions: unit vectors, [n, in]; the largest entry of each is positive.
        singular_values: of the centred rows, [n] float64, descending.
        ratios: shares of the whole variance, [n] float64.
    """

    directions: Tensor
    singular_values: Tensor
    ratios: Tensor


class Pca(ABC):
    """Principal components of the rows of all processes.

    Attributes:
        n: how many components, at most in_features.
        in_features: length of a row.
        exact: nothing but the rows seen determines the result.
        most: most rows that counted at once, over all processes; at least n are needed.
        components: what is known, None as long as nothing is.
    """

    exact: ClassVar[bool]

    def __init__(self, n: int, in_features: int) -> None:
        self.n, self.in_features = n, in_features
        self.most = 0
        self.components: Components | None = None

    @abstractmethod
    def update(self, rows: Tensor) -> None:
        """Take in the rows [t, in] of this process, float32 or float64; t may be 0."""

    def solve(self) -> Components | None:
        """Return the components of all rows so far; every process has to call it."""
        return self.components


class CovariancePca(Pca):
    """Sums up the covariance in float64, and decomposes it when asked."""

    exact = True

    def __init__(self, n: int, in_features: int) -> None:
        super().__init__(n, in_features)
        self._count = 0
        # of the rows of this process: their mean [in], and the sum of squares about it [in, in]
        self._mean = torch.zeros(in_features, dtype=torch.float64)
        self._scatter = torch.zeros(in_features, in_features, dtype=torch.float64)

    def update(self, rows: Tensor) -> None:
        """Take in the rows [t, in] of this process."""
        rows = wide(rows)
        self._mean, self._scatter = self._mean.to(rows.device), self._scatter.to(rows.device)
        if not len(rows):
            return
        total, mean = self._count + len(rows), rows.mean(0)
        gap = mean - self._mean
        rows = rows - mean
        self._scatter += rows.T @ rows
        self._scatter.addr_(gap, gap, alpha=self._count * len(rows) / total)
        self._mean += gap * (len(rows) / total)
        self._count = total

    def solve(self) -> Components | None:
        """Return the components of all rows so far, or None if they are fewer than n."""
        mean = self._mean
        sums = summed(torch.cat((mean.new_tensor([self._count]), mean * self._count)))
        self.most = int(sums[0])
        if self.most < self.n:
            return None
        gap = mean - sums[1:] / sums[0]
        scatter = summed(torch.addr(self._scatter, gap, gap, alpha=self._count))
        values, vectors = torch.linalg.eigh(scatter)
        values, vectors = values.flip(0)[: self.n].clamp_min(0), vectors.flip(1)[:, : self.n]
        self.components = _components(vectors, values, scatter.trace())
        return self.components


class IncrementalPca(Pca):
    """Keeps n components and brings them up to date with every batch.

    Args:
        n: how many components, at most in_features.
        in_features: length of a row.
        key: of the random start, 64 bits.
        sketch: directions q to iterate on, n <= q <= in_features; 2n + 8 by default. The authors' 2n
            leaves errors of 1e-2 where n is 2.
    """

    exact = False

    def __init__(self, n: int, in_features: int, key: int = 0, sketch: int | None = None) -> None:
        super().__init__(n, in_features)
        self.sketch = min(2 * n + 8 if sketch is None else sketch, in_features)
        self._key = key
        self.count = 0
        self.mean = torch.zeros(in_features, dtype=torch.float64)
        self.var = torch.zeros(in_features, dtype=torch.float64)
        self._basis: Tensor | None = None  # [in, q], orthonormal

    def update(self, rows: Tensor) -> None:
        """Take in the rows [t, in] of this process; fewer than n over all processes are passed over."""
        first = self.components is None
        if first:
            self.mean, self.var = self.mean.to(_home(rows)), self.var.to(_home(rows))
        sums = summed(torch.cat((self.mean.new_tensor([len(rows)]), wide(rows).sum(0))))
        new = int(sums[0])
        self.most = max(self.most, new)
        if new < self.n:
            return
        total, mean = self.count + new, sums[1:] / sums[0]
        rows = rows - mean.to(rows)
        gap = self.mean - mean if not first else torch.zeros_like(mean)
        between = self.count * new / total
        self.var = (self.var * self.count + summed(wide(rows).square().sum(0)) + between * gap.square()) / total
        self.mean = self.mean - gap * (new / total) if not first else mean
        self.count = total

        known = rows.new_zeros(0, self.in_features)
        if self.components is not None:
            weighted = self.components.singular_values.to(rows)[:, None] * self.components.directions.to(rows)
            known = torch.cat((weighted, (between**0.5 * gap).to(rows)[None]))
        self._basis = self._iterate(rows, known)
        # the products are squared in float64: components apart by a factor of 1000 are apart by 10^6 there
        inner, own = wide(rows @ self._basis), wide(known @ self._basis)
        values, turn = torch.linalg.eigh(summed(inner.T @ inner) + own.T @ own)
        values, turn = values.flip(0)[: self.n].clamp_min(0), turn.flip(1)[:, : self.n]
        self.components = _components(wide(self._basis) @ turn, values, self.var.sum() * total)

    def _iterate(self, rows: Tensor, known: Tensor) -> Tensor:
        """Return an orthonormal basis [in, q] of about the leading directions of [rows of all processes; known]."""
        if self.sketch == self.in_features:
            return torch.eye(self.in_features, dtype=rows.dtype, device=rows.device)
        basis = self._basis
        if basis is None:
            basis = uniform(self._key, (self.in_features, self.sketch), -1.0, 1.0).to(rows)
        for _ in range(POWER_ITERATIONS):
            product = summed(rows.T @ (rows @ basis)) + known.T @ (known @ basis)
            basis = torch.linalg.qr(product).Q
        return basis


def make_pca(kind: str, n: int, in_features: int, seed: int, layer: str) -> Pca:
    """Return a PCA: `kind` is covariance, incremental, or auto."""
    if kind == "covariance" or (kind == "auto" and in_features <= COVARIANCE_UP_TO):
        return CovariancePca(n, in_features)
    return IncrementalPca(n, in_features, stream_key(seed, layer, "pca"))


# inputs of a layer up to which `auto` takes the covariance: 8 MB each, and a fraction of a second to decompose. The
# 11,008 inputs of one layer of LLaMA-2-7B would take 1 GB and minutes.
COVARIANCE_UP_TO = 1024


def wide(tensor: Tensor) -> Tensor:
    """Return `tensor` in float64, on the CPU where its device knows no float64."""
    return tensor.to(_home(tensor), torch.float64)


def _home(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.device.type == "mps" else tensor.device


def _components(vectors: Tensor, values: Tensor, variance: Tensor) -> Components:
    """Return components from their columns [in, n], squared singular values [n] and the sum of all of these."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    directions = (vectors * torch.where(largest < 0, -1.0, 1.0)).T.contiguous()
    # rows that are all the same have no variance to share out
    return Components(directions, values.sqrt(), values / variance.clamp_min(torch.finfo(values.dtype).tiny))
