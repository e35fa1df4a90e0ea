"""NOLA against the numbers of its authors' code, whose bases are data here."""

from __future__ import annotations

import pytest
import torch
from test_golden import both_dtypes, layer_of, near, prefixes, read, run

from peftzoo.core.basis import BasisSum
from peftzoo.methods.nola import NolaConfig

CASES = prefixes("nola")
LLM = [prefix for prefix in CASES if not prefix.startswith("vit")]
VIT = [prefix for prefix in CASES if prefix.startswith("vit")]


class GivenSum(BasisSum):
    """A sum of the bases [k, rows, columns] of a file, which stand in for those of a seed."""

    def __init__(self, bases, start):
        super().__init__((0, "", ""), tuple(start.shape), 1.0)
        self.bases, self.start = bases, start

    def expand(self, coef):
        return self.start + torch.einsum("k,kij->ij", coef, self.bases)

    def gradient(self, grad, count):
        return torch.einsum("ij,kij->k", grad, self.bases)


def adapter_of(case, a, b, a0=None, b0=None, **settings):
    """Return the case's layer and adapter, which mixes the bases a [k, r, in] and b [k, out, r]."""
    r = a.shape[1]
    layer, adapter = layer_of(case, NolaConfig(r=r, k=a.shape[0], alpha=case["scale"].item() * r, **settings))
    a0 = torch.zeros_like(a[0]) if a0 is None else a0
    b0 = torch.zeros_like(b[0]) if b0 is None else b0
    adapter.sums = GivenSum(a, a0), GivenSum(b, b0)
    return layer, adapter


@both_dtypes
@pytest.mark.parametrize("prefix", LLM)
def test_nola(prefix, dtype):
    case, bound = read("nola", prefix, dtype)
    layer, adapter = adapter_of(case, *(case[key] for key in ("basis_A", "basis_B", "A0", "B0")))

    start = {key.removeprefix("step0."): value for key, value in case.items() if key.startswith("step0.")}
    assert not adapter.alpha.any()
    assert not adapter.beta.any()
    y, _ = run(layer, case)
    near(y, start["y"], bound)
    near(adapter.alpha.grad, start["grad_alpha_coef"], bound)
    near(adapter.beta.grad, start["grad_beta_coef"], bound)
    assert adapter.beta.grad.any(), "beta moves first"

    adapter.zero_grad()
    with torch.no_grad():
        adapter.alpha.copy_(case["alpha_coef"])
        adapter.beta.copy_(case["beta_coef"])
    y, dx = run(layer, case)
    near(y, case["y"], bound)
    near(dx, case["grad_x"], bound)
    near(adapter.alpha.grad, case["grad_alpha_coef"], bound)
    near(adapter.beta.grad, case["grad_beta_coef"], bound)
    factors = adapter.factors()
    near(factors.a.detach(), case["A_eff"], bound)
    near(factors.b.detach(), case["B_eff"], bound)


@pytest.mark.parametrize("prefix", LLM)
def test_the_authors_bases_are_uniform_over_root_k(prefix):
    """What their two seeds stand for: torch's CPU stream, which another device or version may not have."""
    case, _ = read("nola", prefix, torch.float32)
    for factor in "AB":
        basis = case[f"basis_{factor}"]
        generator = torch.Generator().manual_seed(case[f"seed_{factor}"].item())
        drawn = torch.empty(basis.shape).uniform_(-1, 1, generator=generator) / basis.shape[0] ** 0.5
        near(drawn, basis, 1e-6)


def test_the_bases_have_the_authors_laws():
    """As many draws as show the scale: of A0, and of a base of A and of B in both forms."""
    for form, in_a, in_b, in_a0 in (("llm", 1 / 3, 1 / 3, 1 / 40), ("vit", 1 / (30 * 40), 1 / (30 * 50), 0)):
        case = {"W": torch.zeros(50, 40), "bias": torch.zeros(50)}
        _, adapter = layer_of(case, NolaConfig(r=30, k=3, form=form))
        a, b = adapter.sums
        zero, one = torch.zeros(3), torch.tensor([0.0, 1.0, 0.0])
        start = a.expand(zero)
        for matrix, bound in ((start, in_a0), (a.expand(one) - start, in_a), (b.expand(one), in_b)):
            assert matrix.abs().max() <= bound**0.5 * 1.0001
            assert abs(matrix.square().mean() - bound / 3) <= 0.1 * bound / 3
        assert not b.expand(zero).any()


@both_dtypes
@pytest.mark.parametrize("prefix", VIT)
def test_nola_of_the_vision_code(prefix, dtype):
    """Their bases are [k, in, r] and [k, r, out]."""
    case, bound = read("nola", prefix, dtype)
    layer, adapter = adapter_of(case, case["basis_A"].mT, case["basis_B"].mT, form="vit")
    near(adapter.alpha.detach(), case["init.alpha"], bound)
    near(adapter.beta.detach(), case["init.beta"], bound)
    near(adapter(case["x"]).detach(), case["init.adapter_out_step0"], bound)
    with torch.no_grad():
        adapter.alpha.copy_(case["alpha"])
        adapter.beta.copy_(case["beta"])
    y, dx = run(layer, case)
    near(y, case["y"], bound)
    near(dx, case["grad_x"], bound)
    near(adapter.alpha.grad, case["grad_alpha"], bound)
    near(adapter.beta.grad, case["grad_beta"], bound)


def test_every_key_was_met():
    frozen = {"W", "bias", "x", "G", "scale", "basis_A", "basis_B", "y", "grad_x"}
    llm = {"seed_A", "seed_B", "A0", "B0", "A_eff", "B_eff"} | {
        f"{kind}{name}_coef" for kind in ("", "grad_", "step0.grad_") for name in ("alpha", "beta")
    }
    vit = {f"{kind}{name}" for kind in ("", "grad_", "init.") for name in ("alpha", "beta")}
    assert len(LLM) == 2
    assert len(VIT) == 1
    for prefix in CASES:
        case, _ = read("nola", prefix, torch.float32)
        extra = llm | {"step0.y"} if prefix in LLM else vit | {"init.adapter_out_step0"}
        assert set(case) == frozen | extra
