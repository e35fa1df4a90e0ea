"""Principal components of rows that come in parts: against the singular value decomposition of all of them at once."""

from __future__ import annotations

import torch
from test_eva import directions, off
from torch import nn

import peftzoo
from peftzoo.core.calibrate import calibrate
from peftzoo.low_rank.pca import CovariancePca, IncrementalPca, make_pca
from peftzoo.methods.eva import EvaConfig


def test_components_of_very_different_size_are_found():
    """A model's inputs have directions a thousand times as large as others; squared in float32 these would drown."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
    sizes = torch.cat((torch.tensor([3000.0, 40.0, 20.0, 10.0, 5.0, 2.5]), torch.full((58,), 0.01)))
    rows = torch.randn(400, 64, generator=generator) * sizes @ basis.T + 500.0
    want, s = directions(rows.double(), 6)
    for pca in (CovariancePca(6, 64), IncrementalPca(6, 64)):
        pca.update(rows)
        got = pca.solve()
        assert (got.singular_values / s - 1).abs().max() < (1e-9 if pca.exact else 1e-3)
        assert ((got.directions * want).sum(1).abs() > 0.999).all()


def test_covariance_of_parts_is_that_of_the_whole():
    rows = torch.randn(300, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 5
    pca = CovariancePca(4, 10)
    for part in rows.split([1, 0, 99, 150, 50]):
        pca.update(part)
    want, s = directions(rows, 4)
    got = pca.solve()
    assert (got.singular_values - s).abs().max() < 1e-9
    assert off(got.directions, want) < 1e-9
    assert (got.ratios - s.square() / (rows - rows.mean(0)).square().sum()).abs().max() < 1e-12


def test_which_pca_is_taken():
    made = [
        type(make_pca(kind, 4, size, 0, "x")) for kind, size in (("auto", 1024), ("auto", 1025), ("covariance", 5000))
    ]
    assert made == [CovariancePca, IncrementalPca, CovariancePca]
    assert type(make_pca("incremental", 4, 12, 0, "x")) is IncrementalPca


def test_rows_that_are_all_the_same_have_no_variance():
    layer = peftzoo.attach(nn.Linear(12, 4), EvaConfig(r=3))
    calibrate(layer, [torch.ones(20, 12)])
    assert torch.isfinite(layer.adapter("default").a).all()


def test_the_update_forgets_nothing_with_every_direction_kept():
    """Ross et al.: with n = in the incremental update is the whole decomposition, means included."""
    rows = torch.randn(90, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * torch.arange(1, 8) + 3
    pca = IncrementalPca(7, 7)
    for part in rows.split([20, 30, 40]):
        pca.update(part)
    want, s = directions(rows, 7)
    got = pca.solve()
    assert (got.singular_values - s).abs().max() < 1e-9
    assert ((got.directions * want).sum(1).abs() - 1).abs().max() < 1e-9
    assert abs(got.ratios.sum() - 1) < 1e-12


def test_fewer_rows_than_components_change_nothing():
    pca = IncrementalPca(4, 7)
    rows = torch.randn(20, 7, generator=torch.Generator().manual_seed(1))
    pca.update(rows[:3])
    assert pca.solve() is None
    pca.update(rows)
    before = pca.solve()
    pca.update(rows[:3])
    assert pca.solve() is before
    assert pca.count == 20
