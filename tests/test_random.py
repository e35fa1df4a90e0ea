"""Random numbers: the published generator, the same in Triton, well spread, and the same for ever."""

from __future__ import annotations

import sys

import numpy as np
import torch
from helpers import zoo_layers
from peft import get_peft_model
from processes import start

from peftzoo import LoraConfig
from peftzoo.core.random import permutation, stream_key, uniform
from peftzoo_kernels import philox, philox_words

PHILOX32 = (32, (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85))
PHILOX64 = (64, (0xD2E7470EE14C6C93, 0xCA5A826395121157), (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B))
KNOWN = [  # philox4x32-10, published with the generator: counter, key -> words
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def by_the_paper(counter, key, bits, multipliers, weyl, rounds=10):
    """Return philox4 of Python integers, of any width: slow, and with nothing of ours in it."""
    (c0, c1, c2, c3), (k0, k1), mask = counter, key, 2**bits - 1
    for _ in range(rounds):
        one, two = multipliers[0] * c0, multipliers[1] * c2
        c0, c1, c2, c3 = (two >> bits) ^ c1 ^ k0, two & mask, (one >> bits) ^ c3 ^ k1, one & mask
        k0, k1 = (k0 + weyl[0]) & mask, (k1 + weyl[1]) & mask
    return [c0, c1, c2, c3]


def test_philox_is_the_published_one():
    for counter, key, words in KNOWN:
        assert by_the_paper(counter, key, *PHILOX32) == words
    # numpy has the wide sister; its first counter is 1
    theirs = np.random.Philox(key=2**100 + 12345, counter=2**65 + 7).random_raw(4).tolist()
    assert by_the_paper([8, 2, 0, 0], [12345, 2**36], *PHILOX64) == theirs
    assert philox(0, torch.zeros(1, dtype=torch.int64))[0].tolist() == KNOWN[0][2]
    counters = [0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 3, 2**63 - 1]
    for key in (0, 1, 2**32 - 1, 2**32, 2**64 - 1, 0x9E3779B97F4A7C15):
        for rounds in (7, 10):
            want = [
                by_the_paper([c & 0xFFFFFFFF, c >> 32, 0, 0], [key & 0xFFFFFFFF, key >> 32], *PHILOX32, rounds)
                for c in counters
            ]
            assert philox(key, torch.tensor(counters), rounds).tolist() == want


def test_philox_is_tritons(tmp_path):
    """Kernels draw with `tl.randint4x`; saved seeds must mean the same numbers there."""
    script = tmp_path / "draw.py"
    script.write_text(
        "import torch, triton, triton.language as tl\n"
        "from peftzoo_kernels import philox, philox_words\n"
        "@triton.jit\n"
        "def draw(out, seed, n: tl.constexpr, rounds: tl.constexpr):\n"
        "    i = tl.arange(0, n)\n"
        "    a, b, c, d = tl.randint4x(seed, i, rounds)\n"
        "    tl.store(out + 4 * i, a)\n"
        "    tl.store(out + 4 * i + 1, b)\n"
        "    tl.store(out + 4 * i + 2, c)\n"
        "    tl.store(out + 4 * i + 3, d)\n"
        "for key in (0, 1, 2**32 + 5, 2**62 + 77):\n"
        "    for rounds in (7, 10):\n"
        "        out = torch.zeros(256, dtype=torch.int32)\n"
        "        draw[(1,)](out, key, 64, rounds)\n"
        "        got = out.long() & 0xFFFFFFFF\n"
        "        assert torch.equal(got, philox(key, torch.arange(64), rounds).flatten()), (key, rounds)\n"
        "    assert torch.equal(got, philox_words(key, 256))\n"
        "print('equal')\n"
    )
    done = start(sys.executable, script, TRITON_INTERPRET="1")
    assert done.stdout == "equal\n", done.stderr


def test_words_do_not_depend_on_how_many_are_drawn():
    many = philox_words(99, 1003)
    assert torch.equal(philox_words(99, 5), many[:5])
    assert philox_words(99, 0).shape == (0,)
    assert many.min() >= 0
    assert many.max() < 2**32


def test_uniform():
    draws = uniform(stream_key(0, "layer", "a"), (100, 400), -0.5, 1.5)
    assert draws.dtype == torch.float32
    assert -0.5 <= draws.min() < -0.499
    assert 1.499 < draws.max() <= 1.5
    # of 40,000 independent draws; six standard errors
    assert abs(draws.double().mean() - 0.5) < 6 * (2 / 12**0.5) / 200
    assert abs(draws.double().var() - 4 / 12) < 6 * (4 / 180**0.5) / 200
    assert abs(torch.corrcoef(torch.stack((draws[:, :-1].flatten(), draws[:, 1:].flatten())))[0, 1]) < 6 / 200


def test_permutation():
    for n in (1, 2, 7, 1000):
        assert permutation(stream_key(3, "x", "columns"), n).sort().values.tolist() == list(range(n))
    order = permutation(stream_key(3, "x", "columns"), 1000)
    assert (order == torch.arange(1000)).sum() < 10


def test_streams_differ_by_seed_layer_and_tensor():
    names = [(0, "a", "b"), (1, "a", "b"), (0, "b", "a"), (0, "a", "c"), (0, "ab", ""), (0, "", "ab"), (10, "", "a")]
    keys = [stream_key(*name) for name in names]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**64 for key in keys)
    firsts = {tuple(philox_words(key, 4).tolist()) for key in keys}
    assert len(firsts) == len(keys)


def test_random_draws_leave_torch_alone(base):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    get_peft_model(base, LoraConfig())
    assert torch.equal(torch.rand(3), want)


def test_saved_seeds_keep_their_meaning(base):
    """Pinned: a file that stores a seed in place of a tensor must find the same numbers for ever."""
    assert stream_key(0, "model.layers.0.self_attn.q_proj", "a") == 2836417195818201916
    draws = uniform(stream_key(7, "x", "a"), (3,), -1.0, 1.0)
    assert draws.tolist() == [-0.9046676158905029, 0.857398271560669, -0.5978554487228394]
    assert permutation(stream_key(7, "x", "columns"), 8).tolist() == [3, 5, 7, 1, 6, 4, 0, 2]
    model = get_peft_model(base, LoraConfig(r=2))
    layer = zoo_layers(model)["base_model.model.model.layers.0.self_attn.q_proj"]
    assert torch.equal(
        layer.adapter("default").a,
        uniform(stream_key(0, "model.layers.0.self_attn.q_proj", "a"), (2, 32), -(32**-0.5), 32**-0.5),
    )
