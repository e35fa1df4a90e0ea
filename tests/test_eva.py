"""The EVA start and `calibrate`: what is taken from data, from which rows, and what is left untouched."""

from __future__ import annotations

import copy
import random
import re
import warnings

import pytest
import torch
from helpers import assert_close, assert_differs, logits, make_batches, shake, tiny_config, zoo_layers
from pairs import run_pair
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import peftzoo
from peftzoo.core.calibrate import calibrate
from peftzoo.errors import DataError, ModelError
from peftzoo.low_rank import eva
from peftzoo.low_rank.pca import Components, make_pca
from peftzoo.methods.eva import EvaConfig

BOTH = pytest.mark.parametrize("pca", ["covariance", "incremental"])
TEXTS = [{"input_ids": tokens, "labels": tokens} for tokens in make_batches(6)]


def adapted(model, **settings):
    return get_peft_model(copy.deepcopy(model), EvaConfig(**({"r": 3, "alpha": 6.0} | settings)))


def calibrated(model, batches=TEXTS, **settings):
    model = adapted(model, **settings)
    calibrate(model, batches)
    return model


def starts(model):
    return {name: layer.adapter("default").a.detach() for name, layer in zoo_layers(model).items()}


def inputs(model, batches, select=lambda batch, x: x.flatten(0, -2)):
    """Return the rows that each linear layer sees, recorded without any code of ours; [n, in] float64 by name."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            hook = lambda _, args, name=name: seen.setdefault(name, []).append(select(batch, args[0]))  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows).double() for name, rows in seen.items()}


def directions(rows, n):
    """Return the leading principal directions and singular values of rows."""
    _, s, v = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return v[:n], s[:n]


def off(got, want):
    """Return the sine of the largest angle between the spaces of two sets of rows."""
    q, p = (torch.linalg.qr(rows.T.double()).Q for rows in (got, want))
    return torch.linalg.matrix_norm(q - p @ (p.T @ q), 2).item()


def plain_name(name):
    return name.removeprefix("base_model.model.")


def test_start_is_the_principal_directions_of_all_that_was_seen(llama, tokens):
    model = calibrated(llama, tau=1.0)  # only all of the data settles that
    seen = inputs(llama, TEXTS)
    for name, a in starts(model).items():
        v, _ = directions(seen[plain_name(name)], len(a))
        assert_close(a, v * torch.sign((v * a).sum(1, keepdim=True)), what=name)
        assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all(), "the largest entry is positive"
    assert_close(logits(model, tokens), logits(llama, tokens))
    assert_differs(logits(shake(model), tokens), logits(llama, tokens))


@BOTH
def test_ranks_go_where_variance_is(llama, pca):
    model = calibrated(llama, pca=pca, r=4)
    ranks = {name: len(a) for name, a in starts(model).items()}
    assert len(set(ranks.values())) > 2
    offered = {
        name: directions(rows, 8)[1].square() / (rows - rows.mean(0)).square().sum()
        for name, rows in inputs(llama, TEXTS).items()
        if name in map(plain_name, ranks)
    }
    worst_kept = min(offered[plain_name(name)][rank - 1] for name, rank in ranks.items() if rank)
    best_left = max(offered[plain_name(name)][rank] for name, rank in ranks.items() if rank < 8)
    assert worst_kept > 0.98 * best_left
    assert sum(ranks.values()) == 4 * 14
    config = model.peft_config["default"]
    assert config.rank_pattern == {plain_name(name): rank for name, rank in ranks.items()}


def test_the_two_ways_agree(llama):
    one, other = (calibrated(llama, pca=pca, rho=1.0, r=8, tau=0.999) for pca in ("covariance", "incremental"))
    for name, a in starts(one).items():
        q, p = a, starts(other)[name]
        shared = torch.linalg.svdvals(q.double() @ p.T.double()).square().mean()
        assert shared > 0.9, name


def test_rho_1_leaves_ranks_alone(llama):
    model = calibrated(llama, rho=1.0)
    assert {len(a) for a in starts(model).values()} == {3}
    assert model.peft_config["default"].rank_pattern is None
    assert model.peft_config["default"].alpha_pattern is None


# --- the references' defects, each of which reaches a user


@BOTH
def test_whitening_divides_once_however_many_layers_share_an_input(llama, pca):
    """§8.2: stock peft divides the slice in place, once for each of the layers."""
    # whatever the cosines, two batches are needed to have any
    plain, white = (starts(calibrated(llama, pca=pca, whiten=whiten, tau=0.0)) for whiten in (False, True))
    seen = inputs(llama, TEXTS[:2])
    for name, a in plain.items():
        assert_close(a.norm(dim=1), torch.ones(len(a)))
        rows = seen[plain_name(name)]
        sizes = ((rows - rows.mean(0)) @ a.double().T).norm(dim=0)
        assert_close(white[name].double() * sizes[:, None].sqrt(), a.double(), 1e-5 if pca == "covariance" else 0.05)
    query, key = (f"base_model.model.model.layers.0.self_attn.{which}_proj" for which in "qk")
    both = min(len(white[query]), len(white[key]))
    assert both
    assert torch.equal(white[query][:both], white[key][:both])


def test_whitening_of_directions_without_variance_stays_finite():
    layer = peftzoo.attach(nn.Linear(8, 8), EvaConfig(r=4, rho=1.0, whiten=True))
    calibrate(layer, [torch.eye(8)[:5] * torch.tensor([1.0, 1, 1, 0, 0])[:, None]])
    assert torch.isfinite(layer.adapter("default").a).all()
    assert layer.adapter("default").a.abs().max() < 2000


@pytest.mark.parametrize("name", ["eva", "rslora", "dora", "lora", "lora_fa", "lora_plus"])
@pytest.mark.parametrize("alpha", [6.0, None])
def test_scale_stays_when_the_rank_changes(llama, name, alpha):
    """§8.1: the authors keep alpha, so that a layer's scale depends on how many directions it was dealt."""
    config = peftzoo.get_method(name).make_config(r=3, alpha=alpha, start="eva")
    model = get_peft_model(copy.deepcopy(llama), config)
    calibrate(model, TEXTS)
    adapters = [layer.adapter("default") for layer in zoo_layers(model).values()]
    assert len({len(adapter.a) for adapter in adapters}) > 1
    for adapter in adapters:
        assert adapter.config.r == len(adapter.a)
        assert adapter.factors().scale == pytest.approx(config.scale)


def test_scale_follows_the_rank_if_asked(llama):
    model = calibrated(llama, adjust_scale=False)
    for layer in zoo_layers(model).values():
        assert layer.adapter("default").factors().scale == pytest.approx(6.0 / len(layer.adapter("default").a))


def test_equal_ratios_are_dealt_by_component_then_layer():
    """§8.3: the references' sort is not stable, and which of query, key and value gets a rank is a matter of luck."""
    ratios = {name: torch.tensor([0.5, 0.2, 0.2]) for name in "qkv"} | {"o": torch.tensor([0.2, 0.2, 0.1])}
    assert eva.redistribute(ratios, 3) == {"q": 1, "k": 1, "v": 1, "o": 0}
    # 0.2 is offered by o as its first and by q, k, v as their second and third component
    assert eva.redistribute(ratios, 4) == {"q": 1, "k": 1, "v": 1, "o": 1}
    assert eva.redistribute(ratios, 6) == {"q": 2, "k": 2, "v": 1, "o": 1}
    assert eva.redistribute(ratios, 9) == {"q": 3, "k": 2, "v": 2, "o": 2}
    assert eva.redistribute(ratios, 99) == dict.fromkeys("qkvo", 3)


@BOTH
def test_layers_with_one_input_get_ranks_in_their_order(llama, pca):
    ranks = {plain_name(name): len(a) for name, a in starts(calibrated(llama, pca=pca)).items()}
    for block in range(2):
        q, k, v = (ranks.get(f"model.layers.{block}.self_attn.{which}_proj", 0) for which in "qkv")
        assert q >= k >= v >= q - 1


class Lopsided(nn.Module):
    """Layers whose inputs vary in one direction, in two and in all 12 alike."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.all = (nn.Linear(12, 5) for _ in range(3))
        self.register_buffer("sizes", torch.tensor([1.0, 0.9] + [0.0] * 10))

    def forward(self, x):
        return self.one(x * self.sizes * (self.sizes == 1)) + self.two(x * self.sizes) + self.all(x)


def noise(count=4, rows=40, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, width, generator=generator) for _ in range(count)]


# a budget of 3, and 2 components of each layer to spend it on
LOPSIDED = EvaConfig(r=1, alpha=3.0, rho=1.6, target_modules=["one", "two", "all"])


def test_a_layer_may_lose_its_adapter(tmp_path):
    """§8.4: the authors' script stops at a layer of rank 0."""
    base = Lopsided()
    model = get_peft_model(copy.deepcopy(base), LOPSIDED)
    assert calibrate(model, noise()) == {"one": 1, "two": 2, "all": 0}
    assert type(model.base_model.model.all) is nn.Linear
    (x,) = noise(1, seed=5)
    with torch.no_grad():
        assert_close(model(x), base(x))
        want = shake(model)(x)
        assert_differs(want, base(x))
        peftzoo.save_adapter(model, tmp_path / "stock")
        model.save_pretrained(tmp_path / "zoo")
        assert not [key for key in load_file(tmp_path / "stock" / "adapter_model.safetensors") if ".all." in key]
        load, stock, zoo = PeftModel.from_pretrained, tmp_path / "stock", tmp_path / "zoo"
        loaders = {
            "stock peft": lambda: load(copy.deepcopy(base), stock),
            "stock folder": lambda: peftzoo.load_adapter(copy.deepcopy(base), stock),
            "as eva": lambda: peftzoo.load_adapter(copy.deepcopy(base), stock, method="eva"),
            "zoo": lambda: load(copy.deepcopy(base), zoo),
            "zoo, lazily": lambda: load(copy.deepcopy(base), zoo, low_cpu_mem_usage=True),
        }
        for name, loader in loaders.items():
            loaded = loader()
            assert_close(loaded.eval()(x), want, what=name)
            assert not hasattr(loaded.base_model.model.all, "base_layer"), name
        assert_close(model.merge_and_unload()(x), want)


def test_a_layer_that_loses_one_adapter_keeps_the_other():
    model = get_peft_model(Lopsided(), peftzoo.LoraConfig(r=2, target_modules=["all"]), "lora")
    model.add_adapter("eva", LOPSIDED)
    calibrate(model, noise(), "eva")
    model.set_adapter("eva")
    (x,) = noise(1)
    assert list(model.base_model.model.all.peftzoo_adapter) == ["lora"]
    with torch.no_grad():
        start = model(x)
        assert_differs(shake(model)(x), start)
        model.set_adapter("lora")
        assert_close(model(x), start)


@BOTH
def test_ranks_end_at_the_number_of_inputs(pca):
    """§8.6: in the references r * rho above the inputs of a layer is an error in the middle of the run."""
    layer = peftzoo.attach(nn.Sequential(nn.Linear(6, 20)), EvaConfig(r=8, target_modules=["0"], pca=pca))
    assert calibrate(layer, noise(width=6, rows=10)) == {"0": 6}, "and no more rows are asked for"
    assert layer(torch.ones(2, 6)).shape == (2, 20)


def test_hooks_of_others_stay(llama, tokens):
    """§8.7: the authors clear every forward hook of a layer."""
    model = adapted(llama)
    calls = []
    for layer in zoo_layers(model).values():
        layer.register_forward_hook(lambda *_: calls.append("own"))
        layer.register_forward_pre_hook(lambda *_: calls.append("before"))
        layer.base_layer.register_forward_hook(lambda *_: calls.append("base"))
    before = {m: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()}
    calibrate(model, TEXTS)
    for module in model.modules():
        assert (dict(module._forward_hooks), dict(module._forward_pre_hooks)) == before.get(module, ({}, {}))
    calls.clear()
    logits(model, tokens)
    assert set(calls) == {"own", "before", "base"}


def test_one_pca_for_layers_with_one_input(llama, monkeypatch):
    """§8.10: and found without turning every number into one of Python's."""
    made = []
    monkeypatch.setattr(eva, "make_pca", lambda *args: made.append(args[-1]) or make_pca(*args))
    calibrated(llama)
    assert [name.rpartition(".")[2] for name in made] == ["q_proj", "o_proj", "gate_proj", "down_proj"] * 2


def test_inputs_that_are_equal_by_chance_of_shape_are_not_shared(monkeypatch):
    made = []
    monkeypatch.setattr(eva, "make_pca", lambda *args: made.append(args[-1]) or make_pca(*args))
    model = peftzoo.attach(Lopsided(), LOPSIDED)
    calibrate(model, noise())
    assert made == ["one", "two", "all"]


WAYS = (("covariance", 0.99), ("covariance", 1.0), ("incremental", 0.95))
SHARES = """\
from helpers import make_llama
from peftzoo.core.calibrate import Start, _of_first
from peftzoo.core.processes import of_first
from test_eva import TEXTS, WAYS, adapted, calibrate, starts
for pca, tau in WAYS:
    model = adapted(make_llama(), pca=pca, tau=tau)
    ranks = calibrate(model, [{k: v.chunk(2)[rank] for k, v in batch.items()} for batch in TEXTS])
    torch.save((ranks, starts(model)), f"{folder}/{pca}-{tau}-{rank}.pt")
own = {"x": Start(5 + rank, 1.0 + rank, {"a": torch.full((2,), float(rank))})}
got = _of_first(own)["x"]
assert (got.rank, got.alpha, got.tensors["a"].tolist()) == (5, 1.0, [0.0, 0.0])
assert of_first(rank) == 0
"""


def test_two_processes_find_what_one_finds(llama, tmp_path):
    """§8.9: each sees its half of every batch; both end with the same bits."""
    run_pair(SHARES, tmp_path)
    for pca, tau in WAYS:
        (ranks, one), (others, other) = (torch.load(tmp_path / f"{pca}-{tau}-{rank}.pt") for rank in range(2))
        alone = adapted(llama, pca=pca, tau=tau)
        assert ranks == others == calibrate(alone, TEXTS)
        for name, a in starts(alone).items():
            assert torch.equal(one[name], other[name])
            assert off(one[name], a) < 1e-4, name


# --- which rows


@BOTH
def test_padding_and_tokens_without_label_do_not_count(llama, pca):
    generator = torch.Generator().manual_seed(5)
    batches = []
    for tokens in make_batches(3):
        kept = torch.ones_like(tokens)
        kept[:, 9:] = 0
        labels = tokens.masked_fill(torch.rand(tokens.shape, generator=generator) < 0.3, -100)
        batches.append({"input_ids": tokens, "attention_mask": kept, "labels": labels})
    for label_mask in (True, False):

        def counts(batch, x, label_mask=label_mask):
            return x[(batch["attention_mask"] == 1) & ((batch["labels"] != -100) | (not label_mask))]

        model = calibrated(llama, batches, pca=pca, label_mask=label_mask, tau=1.0, max_batches=3, r=6)
        seen = inputs(llama, batches, counts)
        for name, a in starts(model).items():
            rows = seen[plain_name(name)]
            gained = ((rows - rows.mean(0)) @ a.double().T).square().sum()
            best = directions(rows, len(a))[1].square().sum()
            assert gained > (0.999999 if pca == "covariance" else 0.98) * best, name
    other = calibrated(llama, batches, pca=pca, label_mask=True, tau=1.0, max_batches=3, r=6)
    assert any(
        off(a, starts(other)[name][: len(a)]) > 1e-2 for name, a in starts(model).items() if name in starts(other)
    )


def test_order_of_the_batches_does_not_matter_to_the_covariance(llama):
    one, other = (starts(calibrated(llama, batches, tau=1.0)) for batches in (TEXTS, TEXTS[::-1]))
    for name, a in one.items():
        assert_close(other[name], a, 1e-4)


def test_few_batches_are_gone_through_again(llama):
    again = calibrated(llama, [*TEXTS[:2] * 20], pca="incremental")
    assert {n: len(a) for n, a in starts(again).items()} == {
        n: len(a) for n, a in starts(calibrated(llama, iter(TEXTS[:2]), pca="incremental")).items()
    }


def test_a_covariance_ends_with_the_data(llama):
    """To see the same rows again would change nothing."""
    forwards = []
    model = adapted(llama, tau=1.0)
    model.register_forward_hook(lambda *_: forwards.append(1))
    calibrate(model, TEXTS)
    assert len(forwards) == 1 + len(TEXTS), "one to see who shares an input"


def test_no_batch_is_refused(llama):
    for nothing in ([], iter(())):
        with pytest.raises(DataError, match="no batch"):
            calibrate(adapted(llama), nothing)


@BOTH
def test_layers_that_do_not_settle_are_named(llama, pca):
    endless = ({"input_ids": tokens} for tokens in make_batches(99, rows=2))
    model = adapted(llama, pca=pca, tau=1.0, max_batches=3)
    with pytest.warns(UserWarning, match=r"max_batches=3 .* tau=1\.0 .*layers\.0\.self_attn\.q_proj.* more") as caught:
        calibrate(model, endless)
    assert len(caught) == 1
    assert {len(a) for a in starts(model).values()} > {3}, "taken as they are"


def test_batches_with_fewer_rows_than_components_are_passed_over():
    batches = noise()
    few = [batches[0][:3], batches[0], batches[1][:5], *batches[1:]]
    layers = [peftzoo.attach(nn.Linear(12, 4), EvaConfig(r=3, pca="incremental")) for _ in range(2)]
    for layer, given in zip(layers, (few, batches), strict=True):
        calibrate(layer, given)
    one, other = (layer.adapter("default").a for layer in layers)
    assert_close(one, other)


@BOTH
def test_too_few_rows_in_all_batches_are_an_error(pca):
    layer = peftzoo.attach(nn.Linear(12, 4), EvaConfig(r=3, pca=pca))
    batches = [batch[:5] for batch in noise(1 if pca == "covariance" else 4)]
    with pytest.raises(DataError, match=r"5 rows in .* takes 6 \(r times rho\).*larger batches"):
        calibrate(layer, batches)
    with pytest.raises(ModelError, match=r"calibrate"):
        layer(batches[0])


def test_inputs_that_are_not_finite_are_an_error():
    layer = peftzoo.attach(nn.Sequential(nn.Linear(12, 4)), EvaConfig(r=3, target_modules=["0"]))
    with pytest.raises(ModelError, match="inputs of 0 are not finite"):
        calibrate(layer, [torch.full((20, 12), torch.inf)])


# --- what is left as it was


@BOTH
def test_nothing_else_changes(llama, pca):
    model = adapted(llama, pca=pca)
    model.train()
    model.base_model.model.model.layers[1].eval()
    modes = {module: module.training for module in model.modules()}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "peftzoo_adapter" not in name}
    needs = {name: p.requires_grad for name, p in model.named_parameters()}
    random.seed(3)
    state, other = torch.get_rng_state(), random.getstate()
    rows = [{"input_ids": tokens} for tokens in torch.cat(make_batches(6))]
    calibrate(model, torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True))  # which draws from the global one
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == other
    assert all(module.training == modes[module] for module in model.modules() if module in modes)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == needs[name]
        if name in before:
            assert torch.equal(parameter, before[name]), name


def test_nothing_is_dropped():
    layer = nn.Linear(12, 5)
    model = peftzoo.attach(nn.Sequential(nn.Dropout(0.5), layer), EvaConfig(r=3, rho=1.0, target_modules=["1"]))
    calibrate(model.train(), noise(1))
    assert off(model[1].adapter("default").a.detach(), directions(noise(1)[0].double(), 3)[0]) < 1e-5


def test_a_failure_leaves_the_model_as_it_was(llama, tokens):
    model = adapted(llama)
    model.train()

    def broken():
        yield TEXTS[0]
        yield TEXTS[1]
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        calibrate(model, broken())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ModelError, match=r"peftzoo\.calibrate"):
        logits(model, tokens)
    calibrate(model, TEXTS)
    assert torch.isfinite(logits(model, tokens)).all()


@BOTH
def test_two_runs_give_the_same_bits(llama, pca):
    torch.manual_seed(1)
    one = starts(calibrated(llama, pca=pca))
    torch.manual_seed(2)
    other = starts(calibrated(llama, pca=pca))
    assert all(torch.equal(a, other[name]) for name, a in one.items())


def test_other_adapters_are_off_and_stay_as_they_were(llama, tokens):
    """The inputs are those of the base, whatever else sits on it."""
    model = get_peft_model(copy.deepcopy(llama), tiny_config(peftzoo.get_method("lora")))
    want = logits(shake(model), tokens)
    model.add_adapter("eva", EvaConfig(r=3, alpha=6.0))
    calibrate(model, TEXTS, "eva")
    assert_close(logits(model, tokens), want)
    alone = starts(calibrated(llama))
    for name, layer in zoo_layers(model).items():
        if "eva" in layer.peftzoo_adapter:
            assert_close(layer.adapter("eva").a, alone[name])


# --- refusals


def test_a_forward_before_calibration_is_refused(llama, tokens):
    model = adapted(llama)
    with pytest.raises(ModelError, match=r"peftzoo\.calibrate\(model, batches\)"):
        logits(model, tokens)
    with pytest.raises(ModelError, match=r"peftzoo\.calibrate"):
        model.merge_and_unload()


def test_what_cannot_be_calibrated_is_refused(llama, tmp_path):
    with pytest.raises(ModelError, match="starts without data"):
        calibrate(get_peft_model(copy.deepcopy(llama), peftzoo.LoraConfig()), TEXTS)
    with pytest.raises(ModelError, match="no zoo adapter 'other'"):
        calibrate(adapted(llama), TEXTS, "other")
    model = calibrated(llama)
    with pytest.raises(ModelError, match="already has its start"):
        calibrate(model, TEXTS)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path, is_trainable=True)
    assert loaded.peft_config["default"].needs_data
    with pytest.raises(ModelError, match="already has its start"):
        calibrate(loaded, TEXTS)
    both = get_peft_model(copy.deepcopy(llama), peftzoo.LoraConfig())
    both.add_adapter("eva", EvaConfig())
    both.merge_adapter()
    with pytest.raises(ModelError, match="default is merged"):
        calibrate(both, TEXTS, "eva")


@pytest.mark.parametrize(
    ("setting", "value"), [("rho", 0.9), ("rho", float("inf")), ("tau", 1.1), ("pca", "svd"), ("max_batches", 0)]
)
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(ValueError, match=rf"eva: {setting}={re.escape(repr(value))} must be"):
        EvaConfig(**{setting: value})


def test_a_direction_that_flips_its_sign_has_settled():
    """The references compare with the sign, and take one that flips for one that turned by 180 degrees."""
    adapter = peftzoo.attach(nn.Linear(4, 2), EvaConfig(r=2, rho=1.0, pca="incremental")).adapter("default")
    one, still = eva._Input([""], {"": adapter}), torch.ones(2, dtype=torch.float64)
    before = Components(torch.eye(4)[:2], still, still)
    assert one._still(
        before, Components(torch.diag(torch.tensor([1.0, -1]))[:, :2] @ torch.eye(4)[:2], still, still)
    ).all()
    assert one._still(before, Components(torch.eye(4)[1:3], still, still)).tolist() == [False, False]


def test_equal_directions_may_turn_among_themselves():
    """One by one they would do so for as long as data come."""
    turned = torch.linalg.qr(noise(1, rows=12)[0]).Q[:6]
    layer = peftzoo.attach(nn.Linear(12, 4), EvaConfig(r=6, rho=1.0, max_batches=8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(layer, (batch @ turned for batch in noise(99, rows=30, width=6)))
    assert off(layer.adapter("default").a.detach(), turned) < 1e-5


def test_directions_without_variance_need_not_settle():
    turned = torch.linalg.qr(noise(1, rows=12)[0]).Q[:2]  # what is 0 but for rounding is another direction each time
    batches = [batch[:, :2] @ turned for batch in noise(3)]
    layer = peftzoo.attach(nn.Linear(12, 4), EvaConfig(r=6, rho=1.0, pca="incremental", max_batches=10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(layer, batches)


def test_ranks_of_single_layers_count_in_the_budget(llama):
    model = calibrated(llama, rank_pattern={"down_proj": 6, "layers.0.mlp.up_proj": 0})
    ranks = {plain_name(name): len(a) for name, a in starts(model).items()}
    assert sum(ranks.values()) == 3 * (14 - 3) + 2 * 6
    assert "model.layers.0.mlp.up_proj" not in ranks


def test_layers_with_one_input_offer_as_many_components(llama, monkeypatch):
    made = {}
    monkeypatch.setattr(eva, "make_pca", lambda *args: made.update({args[-1]: args[1]}) or make_pca(*args))
    calibrated(llama, rank_pattern={"k_proj": 6})
    assert made["model.layers.0.self_attn.q_proj"] == 12, "what key may need"
    assert made["model.layers.0.self_attn.o_proj"] == 6


def test_progress_is_told(llama, monkeypatch):
    monkeypatch.setattr("peftzoo.core.calibrate.SECONDS_BETWEEN_LINES", 0.0)
    lines = []
    model = adapted(llama, pca="incremental", tau=1.0, max_batches=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(model, TEXTS, progress=lines.append)
    assert [line[:21] for line in lines[:3]] == [f"calibrating: batch {n}, "[:21] for n in (1, 2, 3)]
    assert re.search(r"calibrating: batch 3, \d+ of 14 layers settled", lines[2])
    assert lines[3].startswith("eva: after max_batches=3")
