"""SALT beyond the contract: the trailing spaces, the three cores, and the defects of its authors' code avoided."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_close, assert_differs, make_llama, quantised, shake, zoo_layers
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

import peftzoo
from peftzoo.core import tail
from peftzoo.errors import ModelError
from peftzoo.methods.salt import SaltConfig

FILE = "adapter_model.safetensors"


def layer_with(out_features, in_features, dtype=torch.float32, **settings):
    """Return a frozen layer of this size, seeded, with an adapter away from its start."""
    torch.manual_seed(0)
    base = nn.Linear(in_features, out_features, dtype=dtype)
    return shake(peftzoo.attach(base, SaltConfig(**({"r": 3, "ratio": 0.3, "alpha": 6.0} | settings))))


def inputs(layer, rows=5):
    return torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(4)).to(layer.base_layer.weight)


def steps(model, batches, rate=1e-2):
    """Take plain gradient steps towards noise; return the outputs along the way."""
    outputs = []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for x, target in batches:
        y = model(x)
        outputs.append(y.detach())
        gradients = torch.autograd.grad((y - target).square().mean(), trained)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter -= rate * gradient
    return outputs


def saved_tokens(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)], ids=str)
@pytest.mark.parametrize("k", [1, 4, 11])
def test_trailing_bases_complete_the_triplets(shape, k):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    u, _, vt = tail.signed_svd(weight)
    left, right = tail.trailing_bases(weight, u[:, :k], vt[:k])
    assert_close(left @ left.T, u[:, k:] @ u[:, k:].T, 1e-12)
    assert_close(right.T @ right, vt[k:].T @ vt[k:], 1e-12)
    assert_close(left.T @ left, torch.eye(min(shape) - k, dtype=torch.float64), 1e-12)
    assert_close(right @ right.T, torch.eye(min(shape) - k, dtype=torch.float64), 1e-12)


def test_the_sign_of_a_singular_pair_is_settled():
    weight = torch.randn(9, 14, generator=torch.Generator().manual_seed(0))
    u, s, vt = tail.signed_svd(weight)
    assert_close(u * s @ vt, weight)
    assert (vt.gather(1, vt.abs().argmax(1, keepdim=True)) > 0).all()
    assert torch.equal(s, s.sort(descending=True).values)


@pytest.mark.parametrize(
    ("settings", "k"), [({"ratio": 0.1}, 1), ({"ratio": 0.3}, 3), ({"k": 5}, 5), ({"ratio": 1.0}, 12)]
)
def test_the_share_of_scaled_values_and_the_parameter_formula(settings, k):
    layer = peftzoo.attach(nn.Linear(20, 12), SaltConfig(r=3, **settings))
    sizes = {name: list(p.shape) for name, p in layer.adapter("default").named_parameters()}
    assert sizes == {"x": [12 - k, 3], "y": [3, 12 - k], "scale": [k], "shift": [k]}
    assert sum(p.numel() for p in layer.adapter("default").parameters()) == 2 * k + 2 * 3 * (12 - k)


def test_all_values_scaled_leaves_no_tail():
    layer = layer_with(12, 20, ratio=1.0)
    weight = layer.frozen_weight()
    delta = layer.adapter("default").delta_weight(weight)
    assert_differs(weight + delta, weight)
    u, s, vt = tail.signed_svd(weight)
    values = layer.adapter("default").scale * s + layer.adapter("default").shift
    assert_close(weight + 2 * (u * (values.relu() - s) @ vt), weight + delta)


def test_a_k_above_the_number_of_values_is_refused_and_not_clamped_in_part():
    """The authors' convolution clamps k, and gives a and b the size it was asked for."""
    with pytest.raises(ValueError, match="salt: k=13 exceeds the 12 singular values"):
        peftzoo.attach(nn.Linear(20, 12), SaltConfig(k=13))
    with pytest.raises(ModelError, match="0: salt: k=13 exceeds the 12"):
        peftzoo.attach(nn.Sequential(nn.Linear(20, 12)), SaltConfig(k=13))


@pytest.mark.parametrize(
    "bad", [{"ratio": 0.0}, {"ratio": 1.5}, {"k": 0}, {"core_relu": "half"}, {"regularization": -1.0}], ids=str
)
def test_bad_settings_are_refused(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"salt: {name}="):
        SaltConfig(**bad)


def test_layers_of_one_size_do_not_share_one_draw():
    """The authors reset torch's generator in every layer, so layers of one size get one X."""
    model = peftzoo.attach(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)), SaltConfig(r=3))
    one, two = (layer.adapter("default").x for layer in zoo_layers(model).values())
    assert_differs(one, two)
    for x in (one, two):
        assert x.abs().max() <= 2**0.5  # sqrt(6 / r)
        assert x.abs().max() > 0.9 * 2**0.5


@pytest.mark.parametrize("core_relu", ["top", "none", "full"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)], ids=str)
def test_every_core_keeps_the_law(core_relu, shape):
    layer = layer_with(*shape, dtype=torch.float64, core_relu=core_relu)
    adapter, weight, x = layer.adapter("default"), layer.frozen_weight().clone(), inputs(layer)
    delta = adapter.delta_weight(weight)
    assert_differs(delta, torch.zeros_like(delta))
    assert_close(adapter(x), x @ delta.T, 1e-12)
    want = layer(x)
    layer.merge()
    assert_close(layer(x), want, 1e-12)
    layer.unmerge()
    assert torch.equal(layer.frozen_weight(), weight)
    assert_close(layer(x), want, 1e-12)


def test_only_the_whole_relu_cuts_the_low_rank_part():
    """The authors' ReLU falls on the whole core and zeroes every negative entry of X Y; ours on the scaled values."""
    cores = {}
    for core_relu in ("top", "full"):
        layer = layer_with(12, 20, dtype=torch.float64, core_relu=core_relu, alpha=None)
        adapter, weight = layer.adapter("default"), layer.frozen_weight()
        u, _, vt = tail.signed_svd(weight)
        if core_relu == "top":
            left = adapter._tail.left
            adapter._tail = adapter._tail._replace(left=u[:, adapter.k :], right=vt[adapter.k :])
            assert_close(left @ left.T, u[:, adapter.k :] @ u[:, adapter.k :].T, 1e-12)
        cores[core_relu] = (u.T @ (weight + adapter.delta_weight(weight)) @ vt.T).detach()
    assert (cores["top"] < -1e-3).sum() > 10
    assert cores["full"].min() > -1e-9
    assert_close(cores["top"].relu(), cores["full"], 1e-12)


def test_top_cuts_a_scaled_value_below_zero():
    layer = layer_with(12, 20, alpha=None, k=3)
    adapter, weight = layer.adapter("default"), layer.frozen_weight()
    with torch.no_grad():
        adapter.scale[1] = -2.0
    for core_relu, value in (("top", 0.0), ("none", float(-2.0 * adapter.s[1] + adapter.shift[1]))):
        adapter.config.core_relu = core_relu
        merged = weight + adapter.delta_weight(weight)
        assert_close(adapter.u[:, 1] @ merged @ adapter.vt[1], torch.tensor(value))


def test_a_rank_deficient_weight_has_finite_gradients():
    for core_relu in ("top", "none", "full"):
        base = nn.Linear(16, 16)
        with torch.no_grad():
            base.weight.copy_(torch.outer(torch.arange(16.0), torch.ones(16)))
        layer = shake(peftzoo.attach(base, SaltConfig(r=2, k=4, core_relu=core_relu, regularization=1.0)))
        (layer(inputs(layer)).square().sum() + peftzoo.regularizer(layer)).backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_dense_core_is_refused_on_a_packed_base(bits):
    model = quantised(make_llama(64, 128), bits)
    message = "q_proj: salt: core_relu=full needs a weight that is not packed; use top or none"
    with pytest.raises(ModelError, match=message):
        get_peft_model(model, SaltConfig(core_relu="full"))
    with pytest.raises(ModelError, match=f"bnb-{bits}bit: salt: core_relu=full"):
        peftzoo.attach(model.model.layers[0].self_attn.q_proj, SaltConfig(core_relu="full"))
    get_peft_model(model, SaltConfig(core_relu="none"))


def test_the_regularizer_is_summed_and_safe_at_the_start():
    """The norms are not squared, so their gradient at the start is 0 by definition and not by division."""
    module = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 9))
    model = peftzoo.attach(module, SaltConfig(r=3, regularization=0.5))
    term = peftzoo.regularizer(model)
    assert term == 0
    term.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())
    shake(model)
    parts = []
    for layer in zoo_layers(model).values():
        a = layer.adapter("default")
        moved = (a.scale * a.s + a.shift - a.s).norm() + (a.x @ a.y).norm()
        parts.append(0.5 * moved)
    assert_close(peftzoo.regularizer(model), parts[0] + parts[1])
    assert peftzoo.penalty(model) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(peftzoo.regularizer(model), parts[0] + parts[1])


def test_without_weight_there_is_no_regularizer():
    assert peftzoo.regularizer(layer_with(12, 20)) is None


@pytest.fixture
def folder(llama, tmp_path):
    model = shake(get_peft_model(copy.deepcopy(llama), SaltConfig(r=3, ratio=0.2)))
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_inference_decomposes_nothing(folder, llama, tokens, monkeypatch):
    """The authors take the SVD anew in the first forward after loading, whatever its trailing vectors then are."""
    path, model = folder
    for name in ("signed_svd", "trailing_bases"):
        monkeypatch.setattr(tail, name, lambda *_: pytest.fail("a loaded adapter was decomposed again"))
    for low in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(llama), path, low_cpu_mem_usage=low).eval()
        assert_close(saved_tokens(loaded, tokens), saved_tokens(model, tokens))


def test_other_trailing_bases_change_nothing(folder, llama, tokens, monkeypatch, tmp_path_factory):
    """What X and Y mean does not hang on the bases: with others the adapter is the same, trains on, and is saved."""
    path, model = folder

    def rotated(weight, u, vt, plain=tail.trailing_bases):
        left, right = plain(weight, u, vt)
        n = left.shape[1]
        generator = torch.Generator().manual_seed(5)
        turn, other = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for _ in range(2))
        return left @ turn, other @ right

    monkeypatch.setattr(tail, "trailing_bases", rotated)
    loaded = peftzoo.load_adapter(copy.deepcopy(llama), path, is_trainable=True)
    want = saved_tokens(model, tokens)
    assert_close(saved_tokens(loaded, tokens), want)
    monkeypatch.undo()
    loss = loaded(tokens, labels=tokens).loss
    loss.backward()
    with torch.no_grad():
        for parameter in loaded.parameters():
            if parameter.requires_grad:
                parameter -= 0.1 * parameter.grad
    moved = saved_tokens(loaded, tokens)
    assert loaded(tokens, labels=tokens).loss < loss
    assert_differs(moved, want)
    again = tmp_path_factory.mktemp("again")
    loaded.save_pretrained(again)
    assert_close(saved_tokens(peftzoo.load_adapter(copy.deepcopy(llama), again), tokens), moved)
    assert_close(saved_tokens(peftzoo.load_adapter(copy.deepcopy(llama), again, is_trainable=True), tokens), moved)
    # into an adapter that has bases already
    set_peft_model_state_dict(model, load_file(again / FILE))
    assert_close(saved_tokens(model, tokens), moved)


def test_training_goes_on_where_it_was(tmp_path):
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(6, 20, generator=generator), torch.randn(6, 9, generator=generator)) for _ in range(8)]
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 9))
    model = get_peft_model(copy.deepcopy(base), SaltConfig(r=3, ratio=0.3, target_modules=["0", "2"]))
    steps(model, batches[:4])
    model.save_pretrained(tmp_path)
    loaded = peftzoo.load_adapter(copy.deepcopy(base), tmp_path, is_trainable=True)
    for got, want in zip(steps(loaded, batches[4:]), steps(model, batches[4:]), strict=True):
        assert_close(got, want, 1e-6)
    for (name, got), (_, want) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert_close(got, want, 1e-6, name)


def test_a_state_dict_goes_back_into_a_live_adapter():
    """As a loop does that returns to its best step: P and Q of the state count, not those of the last step."""
    layer = layer_with(12, 20)
    x, state = inputs(layer), copy.deepcopy(layer.state_dict())
    want = layer(x)
    assert_differs(shake(layer, seed=9)(x), want)
    layer.load_state_dict(state)
    assert_close(layer(x), want)
    # what holds the trained tensors alone, as a checkpoint may
    other = layer_with(12, 20)
    shake(other, seed=9)
    trained = {name: value for name, value in state.items() if name.rsplit(".")[-1] in ("x", "y", "scale", "shift")}
    other.load_state_dict(trained, strict=False)
    assert_close(other(x), want)


def test_p_and_q_are_current_whenever_they_are_saved(folder, llama):
    path, model = folder
    for step in (1, 2):
        shake(model, seed=step)
        model.save_pretrained(path)
        state = load_file(path / FILE)
        name, layer = next(iter(zoo_layers(model).items()))
        adapter = layer.adapter("default")
        assert_close(state[f"{name}.peftzoo_adapter.p"], adapter._tail.left @ adapter.x)
        assert_close(state[f"{name}.peftzoo_adapter.q"], adapter.y @ adapter._tail.right)
    first = (path / FILE).read_bytes()
    model.save_pretrained(path)
    assert (path / FILE).read_bytes() == first


@pytest.mark.parametrize("is_trainable", [False, True])
def test_the_same_base_in_half_precision_keeps_the_adapter(folder, llama, is_trainable):
    path, model = folder
    loaded = peftzoo.load_adapter(copy.deepcopy(llama).bfloat16(), path, is_trainable=is_trainable)
    for got, want in zip(zoo_layers(loaded).values(), zoo_layers(model).values(), strict=True):
        weight = want.frozen_weight()
        assert_close(got.adapter("default").delta_weight(weight), want.adapter("default").delta_weight(weight))


def test_training_on_from_another_base_is_refused(folder, llama):
    path, _ = folder
    config = peftzoo.core.config.ZooConfig.from_pretrained(path)
    config.base_fingerprint = {}  # the check that core makes of the model as a whole does not see it
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.copy_(other.model.layers[1].mlp.up_proj.weight.flip(0))
    PeftModel.from_pretrained(copy.deepcopy(other), path, config=config)
    config.inference_mode = False
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj: the singular triplets of the adapter are 1\d\d"):
        PeftModel.from_pretrained(other, path, config=config, is_trainable=True)


def test_casting_takes_the_bases_along():
    """The authors' U, S and V are neither buffers nor parameters: `to` leaves them behind."""
    layer = layer_with(12, 20)
    adapter, x = layer.adapter("default"), inputs(layer)
    want = layer(x)
    layer.double()
    assert {tensor.dtype for tensor in (*adapter.state_dict().values(), *adapter.factors()[:2])} == {torch.float64}
    assert_close(layer(x.double()).float(), want)


def test_the_whole_core_is_saved_with_its_vectors(llama, tokens, tmp_path):
    """Entry by entry the ReLU depends on the very singular vectors, signs and all: the file holds them."""
    model = shake(get_peft_model(copy.deepcopy(llama), SaltConfig(r=3, k=2, core_relu="full")))
    model.save_pretrained(tmp_path)
    want = saved_tokens(model, tokens)
    for is_trainable in (False, True):
        loaded = peftzoo.load_adapter(copy.deepcopy(llama), tmp_path, is_trainable=is_trainable)
        assert torch.equal(saved_tokens(loaded, tokens), want)
    names = {name.rsplit(".", 1)[-1] for name in load_file(tmp_path / FILE)}
    assert names == {"x", "y", "scale", "shift", "u", "s", "vt"}
    with pytest.raises(ModelError, match="not low-rank"):
        peftzoo.core.lora_folder.write_lora_folder(model, tmp_path)


def test_a_loaded_adapter_compiles_to_one_graph(folder, llama):
    path, _ = folder
    torch._dynamo.reset()
    loaded = peftzoo.load_adapter(copy.deepcopy(llama), path, is_trainable=True)
    layer = next(iter(zoo_layers(loaded).values()))
    x = inputs(layer)
    assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
