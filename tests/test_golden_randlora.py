"""RandLoRA against the numbers of its authors' and of peft's layers, whose random matrices are data here."""

from __future__ import annotations

import re

import peft
import pytest
import torch
from safetensors.torch import load_file
from test_golden import GOLDEN, both_dtypes, layer_of, near, prefixes, read, run
from torch import nn

from peftzoo.methods.randlora import RandloraConfig

CASES = prefixes("randlora")


class Given:
    """A matrix of a file in place of one of a seed."""

    def __init__(self, matrix):
        self.matrix = matrix

    def part(self, rows, columns, device, dtype):
        assert self.matrix.shape[0] >= rows
        assert self.matrix.shape[1] >= columns
        return self.matrix[:rows, :columns].to(device, dtype)


def adapter_of(case, prefix, **settings):
    """Return the case's layer and adapter, which reads the parts that it needs of the file's larger matrices."""
    r, n = case["r"].item(), case["n"].item()
    mode = "peft" if prefix.startswith("peft") else "authors"
    layer, adapter = layer_of(case, RandloraConfig(r=r, alpha=2 * r, scale_mode=mode, **settings))
    adapter.a = Given(case["A_shared"][:, 0])
    adapter.b = Given(case["B_shared"][:, :n].flatten(1).t())
    return layer, adapter


@both_dtypes
@pytest.mark.parametrize("chain", ["factored", "merged", "auto"])
@pytest.mark.parametrize("prefix", CASES)
def test_randlora(prefix, chain, dtype):
    case, bound = read("randlora", prefix, dtype)
    layer, adapter = adapter_of(case, prefix, chain=chain)
    assert adapter.lam.shape == (case["r"], case["n"])
    assert adapter.scale == pytest.approx(case["scaling"].item(), rel=1e-6)
    near(adapter.lam.detach(), case["init.lam"], bound)
    near(adapter.gamma.detach(), case["init.gamma"], bound)
    y, _ = run(layer, case)
    near(y, nn.functional.linear(case["x"], case["W"], case["bias"]), bound)
    near(adapter.lam.grad, case["step0_grad_lam"], bound)
    near(adapter.gamma.grad, case["step0_grad_gamma"], bound)

    adapter.zero_grad()
    with torch.no_grad():
        adapter.lam.copy_(case["lam"])
        adapter.gamma.copy_(case["gamma"])
    y, dx = run(layer, case)
    near(y, case["y"], bound)
    near(dx, case["grad_x"], bound)
    near(adapter.lam.grad, case["grad_lam"], bound)
    near(adapter.gamma.grad, case["grad_gamma"], bound)
    near(adapter.delta_weight(case["W"]).detach(), case["delta_W"], bound)


@both_dtypes
@pytest.mark.parametrize("chain", ["factored", "merged"])
@pytest.mark.parametrize("prefix", CASES)
def test_the_papers_sum_is_the_other_pairing(prefix, chain, dtype):
    case, bound = read("randlora", prefix, dtype)
    _, adapter = adapter_of(case, prefix, pairing="textbook", chain=chain)
    with torch.no_grad():
        adapter.lam.copy_(case["lam"])
        adapter.gamma.copy_(case["gamma"])
    want = case["delta_W_textbook_pairing"]
    near(adapter.delta_weight(case["W"]).detach(), want, bound)
    near(adapter(case["x"]).detach(), case["x"] @ want.T, bound)
    assert (want - case["delta_W"]).abs().max() > 0.1


def bases(kind, pattern):
    """Return (sizes in the name, A, B) of each pair of matrices of a file."""
    state = load_file(GOLDEN / "randlora.safetensors")
    names = sorted({key[:-2] for key in state if key.startswith(f"{kind}_basis_")})
    return [
        ([int(number) for number in re.fullmatch(pattern, name).groups()], state[f"{name}.A"], state[f"{name}.B"])
        for name in names
    ]


PEFTS = bases("peft", r"peft_basis_seed(\d+)_r(\d+)_max(\d+)_min(\d+)")
AUTHORS = bases("ref", r"ref_basis_seed(\d+)_r(\d+)_out(\d+)_in(\d+)")


@pytest.mark.parametrize(("sizes", "a", "b"), PEFTS)
def test_pefts_matrices_are_bfloat16_draws(sizes, a, b):
    """So no seed of ours gives them: a stock folder has to bring its own."""
    seed, r, most, least = sizes
    model = nn.ModuleDict({"one": nn.Linear(most, least), "two": nn.Linear(least, most)})
    config = peft.RandLoraConfig(r=r, projection_prng_key=seed, target_modules=["one", "two"])
    tuner = peft.get_peft_model(model, config).base_model
    assert a.shape[2] in (most, least)
    for matrix, stock in ((a, tuner.randlora_A["default"]), (b, tuner.randlora_B["default"])):
        near(stock.float(), matrix, 5e-5)
        assert torch.equal(matrix, matrix.bfloat16().float())


@pytest.mark.parametrize(("sizes", "a", "b"), AUTHORS)
def test_the_authors_matrices_are_divided_by_the_deviation_they_have(sizes, a, b):
    """Ours have deviation 1 by law, so that their entries do not hang on how many there are."""
    seed, r, _, _ = sizes
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return nn.init.kaiming_uniform_(torch.empty(shape), a=5**0.5, generator=generator)

    want_a = drawn(*a.shape)
    want_b = torch.cat([drawn(b.shape[0], 1, r) for _ in range(b.shape[1])], dim=1)
    for matrix, want in ((a, want_a), (b, want_b)):
        near(want / want.std(), matrix, 5e-5)
        assert matrix.std().item() == pytest.approx(1, abs=1e-5)
        assert not torch.equal(matrix, matrix.bfloat16().float())


def test_every_key_was_met():
    own = {"W", "bias", "x", "G", "A_shared", "B_shared", "lam", "gamma", "scaling", "n", "r", "y"}
    own |= {"grad_lam", "grad_gamma", "grad_x", "delta_W", "delta_W_textbook_pairing"}
    own |= {"step0_grad_lam", "step0_grad_gamma", "init.lam", "init.gamma"}
    assert len(CASES) == 5
    assert len(PEFTS) == len(AUTHORS) == 1
    met = {f"{prefix}{key}" for prefix in CASES for key in own}
    rest = load_file(GOLDEN / "randlora.safetensors").keys() - met
    assert met <= load_file(GOLDEN / "randlora.safetensors").keys()
    assert all(re.fullmatch(r"(peft|ref)_basis_.*\.[AB]", key) for key in rest)
