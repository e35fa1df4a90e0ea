"""LoLDU beyond the contract: the recorded pivots, the starts of z, and the defects of its authors' code avoided."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from helpers import assert_close, assert_differs, shake, zoo_layers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import peftzoo
from peftzoo.core import lu
from peftzoo.errors import ModelError
from peftzoo.methods.loldu import LolduConfig

FILE = "adapter_model.safetensors"
STARTS = ("lu", "uniform", "normal", "constant", "s_uniform", "s_normal", "ones", "zeros")


def weight_of(out_features, in_features, dtype=torch.float64):
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0), dtype=dtype)


def layer_with(weight, **settings):
    """Return a frozen layer of this weight with a fresh adapter on it."""
    base = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    with torch.no_grad():
        base.weight.copy_(weight)
    return peftzoo.attach(base, LolduConfig(**settings))


def forwarded(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def delta(layer):
    return layer.adapter("default").delta_weight(layer.frozen_weight()).detach()


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (70, 70), (90, 40)], ids=str)
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_the_factors_are_those_of_partial_pivoting(shape, share):
    weight, r = weight_of(*shape), int(share * min(shape))
    permutation, lower, upper = torch.linalg.lu(weight)
    rows = lu.pivot_rows(weight, r)
    found = lu.lu_in_order(weight, rows)
    assert torch.equal(rows.long(), permutation.argmax(0)[:r])
    assert_close(found.lower, (permutation @ lower)[:, :r], 1e-10)
    assert_close(found.upper, upper[:r], 1e-10)
    assert torch.equal(found.pivots, found.upper.diagonal())


@pytest.mark.parametrize("r", [5, 40])
def test_any_order_of_rows_gives_its_own_factors(r):
    """Also one that no pivoting would choose, over several blocks of the algorithm."""
    weight, rows = weight_of(50, 40), torch.arange(7, 7 + r, dtype=torch.int32)
    found = lu.lu_in_order(weight, rows)
    assert found.lower.abs().max() > 1.5  # partial pivoting would have kept every entry within 1
    assert_close((found.lower @ found.upper)[rows], weight[rows], 1e-8)
    assert_close((found.lower @ found.upper)[:, :r], weight[:, :r], 1e-8)
    assert torch.equal(found.lower[rows], found.lower[rows].tril())
    assert torch.equal(found.upper, found.upper.triu())


def near_tie():
    """Return a weight whose first pivot is another row's once it is rounded to bfloat16."""
    weight = weight_of(16, 24, torch.float32).clamp(-2, 2)
    weight[3, 0], weight[9, 0] = 3.0, -3.003  # both are 3 in bfloat16, where the first of equals is taken
    return weight


def test_the_pivot_order_comes_from_the_file_and_not_from_the_base(tmp_path):
    """Where two pivots nearly tie another dtype or machine chooses otherwise, and z would mean something else."""
    weight = near_tie()
    half = weight.bfloat16().float()
    assert lu.pivot_rows(weight, 6)[0] == 9
    assert lu.pivot_rows(half, 6)[0] == 3
    model = nn.Sequential(nn.Linear(24, 16, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    trained = shake(get_peft_model(copy.deepcopy(model), LolduConfig(r=6, target_modules=["0"])))
    trained.save_pretrained(tmp_path)
    loaded = peftzoo.load_adapter(copy.deepcopy(model).bfloat16(), tmp_path)
    (got,), (want,) = zoo_layers(loaded).values(), zoo_layers(trained).values()
    assert torch.equal(got.adapter("default").rows, lu.pivot_rows(weight, 6))
    assert_close(delta(got), delta(want), 2e-2)


def rank_deficient(dtype=torch.float32):
    weight = weight_of(12, 3, dtype) @ weight_of(16, 3, dtype).T
    weight[:, 1] = 0
    return weight


@pytest.mark.parametrize("make", [rank_deficient, lambda: torch.zeros(12, 16), lambda: torch.eye(12, 16) * 1e-3])
def test_a_zero_pivot_gives_no_nan(make):
    """The authors divide by it: rows of NaN."""
    weight = make()
    zeros = 12 - int(torch.linalg.matrix_rank(weight))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer = layer_with(weight, r=12)
    said = [str(one.message) for one in caught if "pivots" in str(one.message)]
    assert bool(said) == bool(zeros), said
    adapter, x = layer.adapter("default"), torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    assert (adapter.z0 == 1).sum() >= zeros
    assert_close(layer(x), x @ weight.T + layer.bias)
    shake(layer)
    assert delta(layer).isfinite().all()
    if weight.any():
        assert_differs(delta(layer), torch.zeros_like(weight))
    layer(x).square().sum().backward()
    assert adapter.z.grad.isfinite().all()
    again = layer_with(weight, r=12)
    again.load_state_dict(layer.state_dict())
    assert_close(delta(again), delta(layer))


@pytest.mark.parametrize("init_method", STARTS)
def test_every_start_of_z_begins_at_the_base(init_method):
    """Four of the authors' eight begin elsewhere: their residual takes away the pivots, whatever z is."""
    weight = weight_of(12, 20)
    layer = layer_with(weight, r=10, init_method=init_method, alpha=3.0)
    x = torch.randn(5, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert_close(layer(x), x @ weight.T + layer.bias, 1e-12)
    assert not delta(layer).any()
    shake(layer)
    adapter, made = layer.adapter("default"), lu.lu_in_order(weight, lu.pivot_rows(weight, 10))
    change = torch.diag((adapter.z - adapter.z0) / made.pivots)
    assert_close(delta(layer), 0.3 * made.lower @ change @ made.upper, 1e-10)


def test_the_starts_of_z():
    weight = weight_of(200, 200)
    pivots = lu.lu_in_order(weight, lu.pivot_rows(weight, 200)).pivots
    mean, deviation = pivots.mean(), pivots.std()
    z = {name: layer_with(weight, r=200, init_method=name).adapter("default").z.detach() for name in STARTS}
    assert_close(z["lu"], pivots)
    assert z["uniform"].abs().max() <= mean.abs() / 2
    assert z["uniform"].abs().max() > 0.9 * mean.abs() / 2
    assert z["normal"].mean() == pytest.approx(mean.item(), abs=0.25 * deviation.item())
    assert z["normal"].std() == pytest.approx(deviation.item(), rel=0.2)
    assert (z["constant"] == mean).all()
    assert 0.9 < z["s_uniform"].abs().max() <= 1
    assert z["s_normal"].std() == pytest.approx(1, rel=0.2)
    assert abs(z["s_normal"].mean()) < 0.25
    assert (z["ones"] == 1).all()
    assert (z["zeros"] == 0).all()


def test_one_pivot_alone_has_no_deviation():
    assert layer_with(weight_of(6, 8), r=1, init_method="normal").adapter("default").z.isfinite().all()


def test_an_unknown_start_is_refused():
    with pytest.raises(ValueError, match="loldu: init_method='LU' must be one of"):
        LolduConfig(init_method="LU")


def test_a_small_layer_trains_all_it_has_at_the_scale_of_the_rank_asked_for():
    layer = layer_with(weight_of(12, 20), r=768, alpha=1.0)
    adapter = layer.adapter("default")
    assert adapter.z.numel() == 12
    assert adapter.factors().scale == 1 / 768
    assert LolduConfig().r == 768


@pytest.mark.parametrize("train_scale", [False, True])
def test_the_scale_is_trained_only_where_asked(train_scale):
    """The authors' scale is a parameter that their own recipe leaves out."""
    layer = layer_with(weight_of(12, 20), r=6, alpha=3.0, train_scale=train_scale)
    trained = [name.rsplit(".", 1)[-1] for name, p in layer.named_parameters() if p.requires_grad]
    assert trained == (["z", "s"] if train_scale else ["z"])
    assert torch.equal(delta(layer), torch.zeros_like(delta(layer)))
    if train_scale:  # it acts on all of s P L diag(z) U, of which the residual has taken away the start
        adapter = layer.adapter("default")
        lower, upper, _ = adapter.lu()
        with torch.no_grad():
            adapter.s.fill_(0.7)
        assert_close(delta(layer), 0.2 * lower @ upper, 1e-10)


def test_z_holds_nothing_but_itself():
    """The authors' z is a strided view that keeps all of U alive and drags it into every file."""
    layer = layer_with(weight_of(64, 64, torch.float32), r=16)
    adapter = layer.adapter("default")
    for tensor in adapter.state_dict().values():
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    buffer = io.BytesIO()
    torch.save(adapter.state_dict(), buffer)
    assert len(buffer.getvalue()) < 64 * 64


@pytest.fixture
def folder(llama, tmp_path):
    model = shake(get_peft_model(copy.deepcopy(llama), LolduConfig(r=24, alpha=24.0)))
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_a_file_holds_four_numbers_a_pivot(folder):
    """The authors keep a dense permutation per layer: 42 GB for the linear layers of LLaMA2-7B."""
    path, model = folder
    state = load_file(path / FILE)
    assert {name.rsplit(".", 1)[-1] for name in state} == {"z", "z0", "rows", "sketch"}
    pivots = sum(layer.adapter("default").steps for layer in zoo_layers(model).values())
    assert sum(value.numel() * value.element_size() for value in state.values()) == 4 * 4 * pivots
    before = (path / FILE).read_bytes()
    model.save_pretrained(path)
    assert (path / FILE).read_bytes() == before


def test_a_loaded_adapter_is_the_same_to_the_bit(folder, llama, tokens):
    path, model = folder
    for is_trainable in (False, True):
        loaded = peftzoo.load_adapter(copy.deepcopy(llama), path, is_trainable=is_trainable)
        assert torch.equal(forwarded(loaded, tokens), forwarded(model, tokens))


def test_training_goes_on_where_it_was(folder, llama, tokens):
    path, model = folder
    loaded = peftzoo.load_adapter(copy.deepcopy(llama), path, is_trainable=True)
    for _ in range(4):
        losses = []
        for one in (model, loaded):
            trained = [parameter for parameter in one.parameters() if parameter.requires_grad]
            losses.append(one(tokens, labels=tokens).loss)
            for parameter, gradient in zip(trained, torch.autograd.grad(losses[-1], trained), strict=True):
                parameter.data -= 1e-3 * gradient
        assert torch.equal(*losses)


def test_the_same_base_in_half_precision_keeps_the_adapter(folder, llama):
    path, model = folder
    loaded = peftzoo.load_adapter(copy.deepcopy(llama).bfloat16(), path)
    for got, want in zip(zoo_layers(loaded).values(), zoo_layers(model).values(), strict=True):
        assert (delta(got) - delta(want)).norm() < 3e-2 * delta(want).norm()


def without_fingerprint(path):
    config = peftzoo.core.config.ZooConfig.from_pretrained(path)
    config.base_fingerprint = {}  # the check that core makes of the model as a whole sees nothing then
    return config


@pytest.mark.parametrize(
    "change",
    [lambda w: w.flip(0), lambda w: w + 0.1 * w.std() * torch.randn_like(w), lambda w: w.flip(1)],
    ids=["other rows", "noise", "other columns"],
)
def test_another_base_is_refused_when_it_is_loaded(folder, llama, change):
    path, _ = folder
    other = copy.deepcopy(llama)
    weight = other.model.layers[1].mlp.up_proj.weight
    torch.manual_seed(0)
    with torch.no_grad():
        weight.copy_(change(weight))
    with pytest.raises(ModelError, match=r"model.layers.1.mlp.up_proj: its LU factors are"):
        PeftModel.from_pretrained(other, path, config=without_fingerprint(path))
    PeftModel.from_pretrained(copy.deepcopy(llama), path, config=without_fingerprint(path))


def test_the_state_of_another_base_is_refused_by_a_live_adapter():
    """It has factors of its own, which are not those that the state's z belongs to."""
    layer, twin = layer_with(weight_of(12, 20), r=6), shake(layer_with(weight_of(12, 20), r=6))
    layer.adapter("default").load_state_dict(twin.adapter("default").state_dict())
    assert_close(delta(layer), delta(twin), 1e-12)
    other = layer_with(weight_of(12, 20).flip(0), r=6)
    with pytest.raises(ModelError, match="its LU factors are"):
        layer.adapter("default").load_state_dict(other.adapter("default").state_dict())


def test_a_change_far_from_the_pivots_is_seen(llama, tmp_path):
    """The pivots depend on the first r columns of the pivot rows alone; the sketch on every row and column."""
    model = shake(get_peft_model(copy.deepcopy(llama), LolduConfig(r=4, target_modules=["up_proj"])))
    model.save_pretrained(tmp_path)
    other = copy.deepcopy(llama)
    weight, rows = other.model.layers[0].mlp.up_proj.weight, zoo_layers(model).popitem()[1].adapter("default").rows
    with torch.no_grad():
        weight[:, 10:] *= -1
    assert rows.numel() == 4
    with pytest.raises(ModelError, match="its LU factors are"):
        PeftModel.from_pretrained(other, tmp_path, config=without_fingerprint(tmp_path))


@pytest.mark.parametrize("damage", ["order", "repeated", "out of range", "negative", "sketch"])
def test_a_damaged_record_is_refused(folder, llama, damage):
    path, _ = folder
    state = load_file(path / FILE)
    name = next(name for name in state if name.endswith("q_proj.peftzoo_adapter.rows"))
    rows = state[name]
    if damage == "order":
        state[name] = rows.flip(0).contiguous()
    elif damage == "sketch":
        state[name.replace("rows", "sketch")] *= 1.2
    else:
        rows[1] = {"repeated": rows[0].item(), "out of range": 1000, "negative": -5}[damage]
    save_file(state, path / FILE, {"format": "pt"})
    with pytest.raises(ModelError, match=r"q_proj: its LU factors are .* away from those the adapter was made on"):
        peftzoo.load_adapter(copy.deepcopy(llama), path)


def test_a_merged_base_is_not_decomposed(folder, llama, tokens):
    """Factors that are made anew while another adapter is merged come from the weight below it."""
    path, model = folder
    two = get_peft_model(copy.deepcopy(llama), LolduConfig(r=8))
    shake(two)
    two.merge_adapter()
    two.load_adapter(str(path), "second")
    two.unmerge_adapter()
    two.set_adapter("second")
    assert_close(forwarded(two, tokens), forwarded(model, tokens))


def test_merging_and_switching_off_return_the_weight_itself():
    """The authors' disable and remove give W without its starting part, not W."""
    weight = weight_of(12, 20)
    layer = shake(layer_with(weight, r=6))
    x = torch.randn(5, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    want = layer(x)
    layer.merge()
    assert_close(layer(x), want, 1e-12)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight)
    layer.enable_adapters(False)
    assert_close(layer(x), x @ weight.T + layer.bias, 1e-12)


def test_a_convolution_keeps_its_start():
    """The authors decompose the kernel with four dimensions, which fails, and ignore init_method there."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=1).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    want = conv(x)
    layer = peftzoo.attach(conv, LolduConfig(r=5, init_method="ones"))
    assert (layer.adapter("default").z == 1).all()
    assert_close(layer(x), want, 1e-12)
    assert_differs(shake(layer)(x), want)


def test_a_loaded_adapter_compiles_to_one_graph(folder, llama):
    path, _ = folder
    torch._dynamo.reset()
    loaded = peftzoo.load_adapter(copy.deepcopy(llama), path, is_trainable=True)
    layer = next(iter(zoo_layers(loaded).values()))
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(2))
    assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
