"""What the suites share: small models, and a fixture that walks over every registered method."""

from __future__ import annotations

import os

# before any import
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may touch the network
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run without a GPU; with 0 the tests of kernels use one
os.environ["OMP_NUM_THREADS"] = (
    "1"  # models this small only lose time to threads, and rounding depends on their number
)

import copy

import pytest
import torch
from helpers import make_conv_net, make_llama
from transformers import GPT2Config, GPT2LMHeadModel

import peftzoo
from peftzoo.core import shared_input


@pytest.fixture(scope="session")
def llama():
    """A two-block Llama whose layers are not square; float32, seeded."""
    return make_llama()


@pytest.fixture(scope="session")
def wide_llama():
    """The same with rows of whole 64s: bitsandbytes 0.50 on a CPU packs shorter ones wrongly (24 % error, not 9 %)."""
    return make_llama(64, 128)


@pytest.fixture(scope="session")
def gpt2():
    """A one-block GPT-2: its linear layers are Conv1D, weight [in, out]."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96, n_positions=64)).eval()


@pytest.fixture(scope="session")
def conv_net():
    """Three convolutions and a linear layer; float32, seeded."""
    return make_conv_net()


@pytest.fixture
def base(llama):
    return copy.deepcopy(llama)


@pytest.fixture(scope="session")
def tokens():
    return torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[name for name in peftzoo.list_methods() if peftzoo.get_method(name).keeps_base])
def method(request):
    """Every method, adopted ones too, but for KaSA: it changes the base for good, so the laws below do not hold."""
    return peftzoo.get_method(request.param)


@pytest.fixture(params=[name for name in peftzoo.list_methods() if not peftzoo.get_method(name).adopted])
def zoo_method(request):
    """Every method of our own: those with an adapter class and the zoo's file format."""
    return peftzoo.get_method(request.param)


@pytest.fixture
def calls(monkeypatch):
    """The number of layers in each call that `peftzoo.fuse` makes of the op for groups."""
    found = []
    op = shared_input.grouped_low_rank_linear

    def counted(x, layers, dropout):
        assert shared_input._kept_here.outputs is None, "outputs of before are kept while others are made"
        found.append(len(layers))
        return op(x, layers, dropout)

    monkeypatch.setattr(shared_input, "grouped_low_rank_linear", counted)
    yield found
    assert shared_input._kept_here.outputs is None, "an output was left lying"
