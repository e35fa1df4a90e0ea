"""Seeded random bases: the numbers, which are for ever; the ops on them; the matrices that layers share."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from peftzoo.core.adapter import LinearAdapter
from peftzoo.core.basis import BasisSum, GivenMatrix, RandomMatrix
from peftzoo.core.random import stream_key
from peftzoo.errors import ModelError
from peftzoo_kernels import basis, basis_coef_grad, basis_expand, basis_lanes, basis_matrix

KEYS = (0, 12345, 2**63 - 1, 2**63, 2**64 - 1)
SIZES = ((1, 1), (5, 64), (3, 13), (0, 9), (40, 70_001), (2, 300_001))  # (bases, entries); the last two in chunks
CPU = torch.device("cpu")
PINNED = [
    [-7540, 28245, 31998, 7168, -8923, -25012, 19859, 2908],
    [-2094, 26390, 22625, -22857, 8057, 5603, -30874, -32196],
]


def by_the_definition(key, count, length):
    """Return u from the definition, one counter at a time, with the published Philox of `philox`."""
    rows = []
    for number in range(count):
        row = []
        for counter in range((length + 7) // 8):
            words = basis.philox(key, torch.tensor([counter + (number << 32)]), 7)[0].tolist()
            halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
            row += [((half - 2**16 if half >= 2**15 else half) + 0.5) / 2**15 for half in halves]
        rows.append(row[:length])
    return torch.tensor(rows, dtype=torch.float64)


def values(lanes, length):
    return ((lanes.transpose(1, 2).flatten(1).double() + 0.5) / 2**15)[:, :length]


@pytest.mark.parametrize("key", KEYS)
def test_lanes_are_the_definition(key):
    want = by_the_definition(key, 4, 21)
    assert torch.equal(basis.basis_ref(key, 4, 21), want)
    assert torch.equal(values(basis_lanes(key, 4, 21), 21), want)
    # any part of it, anywhere
    assert torch.equal(values(basis_lanes(key, 2, 5, first=2, start=16), 5), want[2:, 16:])
    assert torch.equal(values(basis_lanes(key - 2**64 if key >= 2**63 else key, 4, 21), 21), want)


def test_saved_seeds_keep_their_meaning():
    """Pinned: files store no basis, only that they mean definition 1."""
    lanes = basis_lanes(stream_key(0, "model.layers.0.self_attn.q_proj", "nola a"), 2, 8, first=3)
    assert lanes.transpose(1, 2).flatten(1).tolist() == PINNED


def test_fewer_and_shorter_are_the_beginning_of_more_and_longer():
    many = values(basis_lanes(7, 50, 1003), 1003)
    assert torch.equal(values(basis_lanes(7, 11, 96), 96), many[:11, :96])


def test_law():
    u = values(basis_lanes(99, 100, 4000), 4000)
    assert u.abs().max() < 1
    assert len(u.flatten().unique()) > 60_000
    # of 400,000 independent draws; six standard errors
    assert abs(u.mean()) < 6 * (1 / 3) ** 0.5 / 400_000**0.5
    assert abs(u.var() - 1 / 3) < 6 * (4 / 45) ** 0.5 / 400_000**0.5
    for one, two in ((u[:, :-1], u[:, 1:]), (u[:, :-8], u[:, 8:]), (u[:-1], u[1:])):
        assert abs(torch.corrcoef(torch.stack((one.flatten(), two.flatten())))[0, 1]) < 6 / 390_000**0.5


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_expand_and_gradient_are_the_sums(size):
    count, length = size
    u = basis.basis_ref(2**64 - 5, count, length)
    generator = torch.Generator().manual_seed(0)
    coef = torch.randn(count, dtype=torch.float64, generator=generator)
    grad = torch.randn(length, dtype=torch.float64, generator=generator)
    for lanes in (None, basis_lanes(2**64 - 5, count, length)):
        torch.testing.assert_close(basis_expand(coef, 2**64 - 5, length, lanes), coef @ u, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(
            basis_coef_grad(grad, 2**64 - 5, count, lanes), u @ grad, rtol=1e-10, atol=1e-10 * length**0.5
        )
        narrow = basis_expand(coef.float(), 2**64 - 5, length, lanes)
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow, (coef @ u).float(), rtol=1e-4, atol=1e-5)


def test_half_precision_is_rounded_once():
    coef = torch.randn(30, generator=torch.Generator().manual_seed(0)).bfloat16()
    want = coef.double() @ basis.basis_ref(3, 30, 500)
    assert torch.equal(basis_expand(coef, 3, 500), want.float().bfloat16())


def test_expand_differentiates_and_passes_opcheck():
    coef = torch.randn(6, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    lanes = basis_lanes(2**63, 6, 37)
    assert torch.autograd.gradcheck(lambda c: basis_expand(c, 2**63, 37), coef)
    assert torch.autograd.gradcheck(lambda c: basis_expand(c, 2**63, 37, lanes), coef)
    for kept in (None, lanes):
        single = coef.detach().float().requires_grad_()
        torch.library.opcheck(torch.ops.peftzoo.basis_expand.default, (single, 5, 37, kept))
        torch.library.opcheck(torch.ops.peftzoo.basis_coef_grad.default, (torch.ones(37), 5, 6, kept))


@pytest.mark.parametrize("sparsity", [None, 3.0, 55.4])
def test_matrix_has_unit_variance(sparsity):
    matrix = basis_matrix(11, 500, 4001, sparsity, CPU, torch.float32)
    spread = 4 / 5 if sparsity is None else sparsity - 1  # variance of the squares
    assert abs(matrix.double().var() - 1) < 6 * (spread / matrix.numel()) ** 0.5
    assert abs(matrix.double().mean()) < 6 / matrix.numel() ** 0.5
    if sparsity is None:
        u = basis.basis_ref(11, 2, 4001)
        torch.testing.assert_close(matrix[:2].double(), u * 3**0.5, rtol=1e-6, atol=1e-6)
    else:
        assert len(matrix.unique()) == 3
        assert abs((matrix != 0).double().mean() - 1 / sparsity) < 6 * (1 / sparsity / matrix.numel()) ** 0.5


def test_a_sum_reads_kept_bases_and_drawn_ones_alike():
    drawn = BasisSum((3, "layer", "a"), (6, 11), 0.5, 2.0)
    kept = BasisSum((3, "layer", "a"), (6, 11), 0.5, 2.0, resident=True)
    coef, grad = torch.randn(9), torch.randn(6, 11)
    assert torch.equal(drawn.expand(coef), kept.expand(coef))
    assert torch.equal(drawn.gradient(grad, 9), kept.gradient(grad, 9))
    assert drawn._lanes is None
    assert kept._lanes.dtype == torch.int16
    assert copy.deepcopy(kept)._lanes is None
    assert len(pickle.dumps(kept)) < 1000
    u = basis.basis_ref(drawn.key, 9, 66).float()
    start = basis.basis_ref(stream_key(3, "layer", "a offset"), 1, 66).float()
    torch.testing.assert_close(drawn.expand(coef).flatten(), 2 * start[0] + 0.5 * coef @ u)


def test_a_matrix_has_the_same_entries_at_every_size():
    """So an adapter means the same alone, beside others, and after the largest layer is gone."""
    large, small = RandomMatrix((0, "", "b"), (70, 50)), RandomMatrix((0, "", "b"), (5, 7))
    part = small.part(5, 7, CPU, torch.float32)
    assert torch.equal(part, large.part(5, 7, CPU, torch.float32))
    assert small.part(5, 7, CPU, torch.float32) is part, "a cache may go by its identity"
    small.reserve(60, 3)
    assert torch.equal(small.part(5, 7, CPU, torch.float32), part)
    assert small.part(60, 7, CPU, torch.float32).untyped_storage().nbytes() == 60 * 7 * 4
    half = small.part(5, 7, CPU, torch.bfloat16)
    assert torch.equal(half, part.bfloat16())
    assert len(pickle.dumps(large)) < 1000
    assert torch.equal(copy.deepcopy(large).part(5, 7, CPU, torch.float32), part)
    assert not torch.equal(RandomMatrix((1, "", "b"), (5, 7)).part(5, 7, CPU, torch.float32), part)


class Bare(LinearAdapter):
    def __init__(self):
        super().__init__(None, 3, 3)
        self.p = nn.Parameter(torch.zeros(1))

    def init(self, weight):
        pass


def test_a_given_matrix_follows_its_buffer():
    owner = Bare()
    matrix = GivenMatrix(owner, "basis_a", (2, 3))
    with pytest.raises(ModelError, match="no file brought basis_a"):
        matrix.part(2, 3, CPU, torch.float32)
    matrix.reserve(4, 3)
    assert owner.state_dict()["basis_a"].shape == (4, 3)
    with pytest.raises(ModelError, match="no file brought basis_a"):
        matrix.part(2, 3, CPU, torch.float32)
    first = torch.arange(12.0).view(4, 3)
    owner.load_state_dict({"p": torch.zeros(1), "basis_a": first})
    part = matrix.part(2, 3, CPU, torch.float32)
    assert torch.equal(part, first[:2])
    assert matrix.part(2, 3, CPU, torch.float32) is part
    owner.load_state_dict({"p": torch.zeros(1), "basis_a": -first}, assign=True)
    assert torch.equal(matrix.part(2, 3, CPU, torch.bfloat16), -first[:2].bfloat16())
    owner.basis_a.mul_(2)
    assert torch.equal(matrix.part(2, 3, CPU, torch.bfloat16), -2 * first[:2].bfloat16())
    copied = copy.deepcopy({"owner": owner, "matrix": matrix})
    assert copied["matrix"].owner is copied["owner"]
