"""RandLoRA: what is particular to it, stock folders, and the defects of published code that ours must not have."""

from __future__ import annotations

import copy
import json
import pickle

import peft
import pytest
import torch
from helpers import assert_close, assert_differs, logits, shake, zoo_layers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftzoo
from peftzoo.errors import ModelError
from peftzoo.methods.randlora import RandloraConfig
from peftzoo_kernels import merging_is_less_work, randlora_delta, randlora_linear, randlora_linear_ref

TARGETS = ["q_proj", "v_proj", "down_proj"]
CPU = torch.device("cpu")


def adapters_of(model, name="default"):
    return {key: layer.adapter(name) for key, layer in zoo_layers(model).items()}


def case(rows, columns, r=3, tokens=7, dtype=torch.float64):
    """Return x, lam, gamma, A and B of a layer, and the gradient that reaches it."""
    generator = torch.Generator().manual_seed(0)
    s, large = sorted((rows, columns))
    n = -(-s // r)
    shapes = ((tokens, columns), (r, n), (n, s), (r, s), (n * r, large), (tokens, rows))
    tensors = [torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes]
    return tensors[:5], tensors[5]


def by_the_paper(lam, gamma, a, b, coded):
    """Return dW [l, s] as a loop over the paper's n products."""
    r, n = lam.shape
    rows = [lam[k, i] * a[k] * gamma[i] for k in range(r) for i in range(n)]
    if not coded:
        rows = [lam[k, i] * a[k] * gamma[i] for i in range(n) for k in range(r)]
    return sum(torch.outer(b[index], row) for index, row in enumerate(rows))


SHAPES = [(8, 12), (12, 8), (9, 9), (2, 11), (11, 2)]


@pytest.mark.parametrize("coded", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_order_of_work_is_the_formula(shape, coded):
    rows, columns = shape
    (x, *frozen), dy = case(rows, columns)
    lam, gamma, a, b = frozen
    x, lam, gamma = (tensor.requires_grad_() for tensor in (x, lam, gamma))
    dense = 0.7 * by_the_paper(lam, gamma, a, b, coded)
    dense = dense if columns == min(shape) else dense.T
    want = torch.autograd.grad(x @ dense.T, (x, lam, gamma), dy)
    delta = randlora_delta(lam, gamma, a, b, 0.7, coded, columns > rows)
    torch.testing.assert_close(delta, dense, rtol=1e-12, atol=1e-12)
    for function, merged in ((randlora_linear_ref, ()), (randlora_linear, ()), (randlora_linear, (delta.detach(),))):
        y = function(x, lam, gamma, a, b, 0.7, coded, *merged)
        torch.testing.assert_close(y, x @ dense.T, rtol=1e-12, atol=1e-12)
        for got, right in zip(torch.autograd.grad(y, (x, lam, gamma), dy), want, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-11)
        assert function(x[:0], lam, gamma, a, b, 0.7, coded, *merged).shape == (0, rows)
        assert function(x.view(1, 7, columns), lam, gamma, a, b, 0.7, coded, *merged).shape == (1, 7, rows)


@pytest.mark.parametrize("trained", [("lam",), ("gamma",), ("x",), ()])
def test_only_what_trains_gets_a_gradient(trained):
    (x, lam, gamma, a, b), dy = case(8, 12)
    inputs = {"x": x, "lam": lam, "gamma": gamma}
    for merged in (False, True):
        leaves = {name: value.clone().requires_grad_(name in trained) for name, value in inputs.items()}
        delta = randlora_delta(lam, gamma, a, b, 1.0, True, True) if merged else None
        y = randlora_linear(**leaves, a=a, b=b, delta=delta)
        assert y.requires_grad == bool(trained)
        if trained:
            y.backward(dy)
        assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(trained)


def test_half_precision_keeps_float32_gradients():
    for shape in SHAPES:
        (x, lam, gamma, a, b), dy = case(*shape, tokens=40, dtype=torch.float32)
        x, b, dy = x.bfloat16(), b.bfloat16(), dy.bfloat16()
        for merged in (False, True):
            leaves = [tensor.clone().requires_grad_() for tensor in (x, lam, gamma)]
            delta = randlora_delta(lam, gamma, a, b, 1.0, True, shape[1] > shape[0]) if merged else None
            y = randlora_linear(*leaves, a, b, delta=delta)
            assert y.dtype == torch.bfloat16
            y.backward(dy)
            wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
            want = randlora_linear_ref(*wide, a.double(), b.double())
            want.backward(dy.double())
            for got, right in ((y, want), *((leaf.grad, w.grad) for leaf, w in zip(leaves, wide, strict=True))):
                assert (got.double() - right).norm() < 2e-2 * right.norm()
            for leaf, right in zip(leaves[1:], wide[1:], strict=True):
                assert leaf.grad.dtype == torch.float32
                assert not torch.equal(leaf.grad, leaf.grad.bfloat16().float()), "was rounded"
                if merged:  # nothing lies between bfloat16 inputs and the gradient but float32 sums
                    assert (leaf.grad.double() - right.grad).norm() < 1e-5 * right.grad.norm()


def test_saved_for_backward():
    """What grows with the tokens: x where its rows meet T, else the products with B; never T, nor anything of y."""
    for rows, columns, merged, kept in ((12, 8, False, 8), (8, 12, False, 9), (12, 8, True, 8), (8, 12, True, 12)):
        (x, lam, gamma, a, b), _ = case(rows, columns, tokens=50)
        delta = randlora_delta(lam, gamma, a, b, 1.0, True, columns > rows) if merged else None
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            randlora_linear(x.requires_grad_(), lam.requires_grad_(), gamma.requires_grad_(), a, b, delta=delta)
        assert sum(tensor.numel() for tensor in saved if tensor.shape[0] == 50) == 50 * kept
        given = {tensor.data_ptr() for tensor in (x, lam, gamma, a, b, delta) if tensor is not None}
        assert all(tensor.shape[0] == 50 or tensor.data_ptr() in given for tensor in saved)


def test_op_rejects():
    (x, lam, gamma, a, b), _ = case(8, 12)
    for bad in (
        (x[:, :5], lam, gamma, a, b),
        (x, lam[:2], gamma, a, b),
        (x, lam, gamma, a[:2], b),
        (x, lam, gamma, a, b[1:]),
    ):
        with pytest.raises(ValueError, match="do not chain"):
            randlora_linear(*bad)


def test_auto_takes_what_is_less_work():
    a, b = torch.empty(8, 512, device="meta"), torch.empty(512, 512, device="meta")
    x = torch.empty(4096, 512, device="meta")
    assert merging_is_less_work(x, a, b)
    assert not merging_is_less_work(x[:500], a, b), "a token in a square layer: 5 s^2 factored, 3 s^2 merged, dW 2 s^3"
    assert merging_is_less_work(x[:520], a, b)
    assert not merging_is_less_work(x, a, torch.empty(512, 4096, device="meta")), "never for so wide a layer"


@pytest.mark.parametrize("chain", ["factored", "merged", "auto"])
def test_chains_agree(llama, tokens, chain):
    settings = {"r": 5, "target_modules": TARGETS}
    outputs = []
    for each in ("factored", chain):
        model = shake(get_peft_model(copy.deepcopy(llama), RandloraConfig(chain=each, **settings)))
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        outputs.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    for one, two in zip(*outputs, strict=True):
        assert_close(two, one, 1e-4)


def test_merged_chain_makes_dw_once_per_step(llama, tokens, monkeypatch):
    import peftzoo.methods.randlora as module

    calls = []
    original = module.randlora_delta
    monkeypatch.setattr(module, "randlora_delta", lambda *args: calls.append(1) or original(*args))
    config = RandloraConfig(r=5, chain="merged", target_modules=TARGETS)
    model = shake(get_peft_model(copy.deepcopy(llama), config)).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(2):
        for _ in range(3):  # micro-batches
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    assert len(calls) == 2 * 6, "steps x layers"
    assert losses[0] == losses[2] != losses[3], "a step is seen by the next forward"


def test_merged_chain_sees_every_change():
    layer = shake(peftzoo.attach(nn.Linear(12, 10), RandloraConfig(r=3, chain="merged")))
    adapter, x = layer.adapter("default"), torch.randn(5, 12)
    for name in ("lam", "gamma"):
        before = adapter(x)
        with torch.no_grad():
            getattr(adapter, name).mul_(2)
        assert_close(adapter(x), 2 * before)
    want = x.bfloat16() @ adapter.delta_weight(layer.base_layer.weight).T.bfloat16()
    assert adapter(x.bfloat16()).dtype == torch.bfloat16
    assert_close(adapter(x.bfloat16()).float(), want.float(), 2e-2)
    assert adapter(x).dtype == torch.float32


def test_defaults_are_the_authors():
    for mode, alpha, scale in (
        ("authors", None, 2 / 2),
        ("authors", 6, 6 / 3 / 2),
        ("peft", None, 20),
        ("peft", 6, 6 / 3),
    ):
        layer = peftzoo.attach(nn.Linear(12, 10), RandloraConfig(r=3, alpha=alpha, scale_mode=mode))
        assert layer.adapter("default").lam.shape == (3, 4)
        assert layer.adapter("default").scale == scale


def test_either_diagonal_may_start_at_zero():
    """The authors' vision code zeroes gamma; the start is the base all the same."""
    for zero, other in (("lam", "gamma"), ("gamma", "lam")):
        layer = peftzoo.attach(nn.Linear(12, 10), RandloraConfig(r=3, zero=zero))
        adapter = layer.adapter("default")
        assert not getattr(adapter, zero).any()
        start = getattr(adapter, other)
        assert torch.equal(start, torch.full_like(start, 1 / max(start.shape)))
        x = torch.randn(4, 12)
        y = layer(x)
        assert torch.equal(y, layer.base_layer(x))
        y.square().sum().backward()
        assert getattr(adapter, zero).grad.any()
        assert not start.grad.any()


@pytest.mark.parametrize("target", ["up_proj", "down_proj", "v_proj"])
def test_any_single_kind_of_layer_can_be_adapted(llama, tokens, target):
    """The authors' B has as many rows as the widest input: a layer with more outputs gets too short a slice."""
    model = get_peft_model(copy.deepcopy(llama), RandloraConfig(r=5, target_modules=[target]))
    assert_differs(logits(shake(model), tokens), logits(llama, tokens))


def test_matrices_are_as_large_as_the_largest_layer_uses(llama, tokens):
    """Peft's are sized by the widest layer's dimensions, up to 2.7 times what any layer reads."""
    model = shake(get_peft_model(copy.deepcopy(llama), RandloraConfig(r=5, target_modules="all-linear")))
    logits(model, tokens)
    adapters = list(adapters_of(model).values())
    assert {(adapter.in_features, adapter.out_features) for adapter in adapters} >= {(32, 48), (48, 32), (32, 16)}
    for name, size in (("a", 5 * 32), ("b", 35 * 48)):
        matrices = {id(getattr(adapter, name)): getattr(adapter, name) for adapter in adapters}
        assert len(matrices) == 1, "shared by all layers"
        (drawn,) = next(iter(matrices.values()))._drawn.values()
        assert drawn.numel() == size


@pytest.mark.parametrize("bases", ["uniform", "sparse", "very_sparse"])
def test_an_adapter_means_the_same_alone_and_beside_others(llama, bases):
    """So a layer's file values stand for the same update whatever else is adapted."""
    settings = {"r": 5, "bases": bases, "seed": 3}
    alone = adapters_of(
        shake(get_peft_model(copy.deepcopy(llama), RandloraConfig(target_modules=["v_proj"], **settings)))
    )
    beside = adapters_of(shake(get_peft_model(copy.deepcopy(llama), RandloraConfig(**settings))))
    for name, adapter in alone.items():
        beside[name].load_state_dict(adapter.state_dict())
        weight = torch.empty(0)
        assert torch.equal(beside[name].delta_weight(weight), adapter.delta_weight(weight))


def test_very_sparse_is_one_in_root_of_the_smaller_side():
    """The code of both says 1 / (2 sqrt(s)) for each sign, peft's page twice that."""
    for bases, one_in in (("sparse", 3), ("very_sparse", 8)):
        adapter = peftzoo.attach(nn.Linear(400, 64), RandloraConfig(r=4, bases=bases)).adapter("default")
        b = adapter.b.part(64, 400, CPU, torch.float32)
        assert abs((b != 0).float().mean() - 1 / one_in) < 0.02
        assert abs(b.var() - 1) < 0.2


def test_adapters_of_two_seeds_sit_on_one_model(llama, tokens):
    """Peft refuses a second key, and would let the adapters read each other's matrices."""
    model = shake(get_peft_model(copy.deepcopy(llama), RandloraConfig(r=5, seed=1)))
    first = logits(model, tokens)
    model.add_adapter("second", RandloraConfig(r=7, seed=2))
    assert torch.equal(logits(model, tokens), first)
    one, two = (next(iter(adapters_of(model, name).values())) for name in ("default", "second"))
    assert not torch.equal(one.b.part(9, 9, CPU, torch.float32), two.b.part(9, 9, CPU, torch.float32))


def test_the_matrices_stand_in_no_file_and_no_pickle(llama, tokens, tmp_path):
    """Stock peft's file has a copy of both for every layer and one more: 2.2 GB for 9.3 million trained numbers."""
    model = shake(get_peft_model(copy.deepcopy(llama), RandloraConfig(r=5)))
    want = logits(model, tokens)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in state} == {"lam", "gamma"}
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    header = sum(len(key) + 100 for key in state)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size <= trained + header
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path), tokens), want)
    assert len(pickle.dumps(next(iter(adapters_of(model).values())).b)) < 2000


def test_llama_3_2_3b_is_a_file_of_its_trained_numbers():
    with torch.device("meta"):
        config = LlamaConfig(
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            num_key_value_heads=8,
        )
        model = get_peft_model(
            LlamaForCausalLM(config), RandloraConfig(target_modules=["q_proj", "v_proj"]), low_cpu_mem_usage=True
        )
    state = peft.get_peft_model_state_dict(model)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert trained == 4 * 9_289_728
    header = sum(len(key) + 100 for key in state)
    assert sum(value.nbytes for value in state.values()) + header <= 1.1 * trained


def test_a_model_compiles_and_trains_alike(llama, tokens, monkeypatch):
    """The matrices go into the graph as inputs: they are drawn once, while it is made, and not in it."""
    import peftzoo.core.basis as module

    draws = []
    original = module.basis_matrix
    monkeypatch.setattr(module, "basis_matrix", lambda *args: draws.append(args[1:3]) or original(*args))
    torch._dynamo.reset()
    model = shake(get_peft_model(copy.deepcopy(llama), RandloraConfig(r=5, target_modules=TARGETS)))
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager")
    losses = [each(tokens, labels=tokens).loss for each in (compiled, compiled, model)]
    for loss in losses:
        loss.backward()
    assert sorted(draws) == sorted(2 * [(5, 32), (35, 48)]), "one A and one B for each of the two models"
    assert_close(losses[0], losses[2])
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        if one.requires_grad:
            assert_close(two.grad / 2, one.grad, 1e-4)


# stock peft folders


def stock(llama, folder, **settings):
    """Write a stock peft RandLoRA folder, and return the model that it is of."""
    settings = {"r": 5, "randlora_alpha": 10, "target_modules": TARGETS} | settings
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(llama), peft.RandLoraConfig(**settings)).eval()
    shake(model).save_pretrained(folder)
    return model


# the third: peft's matrices are then as wide as the widest side, and no layer reads all of them
@pytest.mark.parametrize(
    "settings",
    [{}, {"sparse": True}, {"target_modules": ["up_proj", "down_proj"]}, {"r": 40}, {"modules_to_save": ["lm_head"]}],
    ids=str,
)
def test_a_stock_folder_gives_equal_outputs(llama, tokens, tmp_path, settings):
    want = logits(stock(llama, tmp_path / "stock", **settings), tokens)
    assert_differs(want, logits(llama, tokens))
    ours = peftzoo.load_adapter(copy.deepcopy(llama), tmp_path / "stock").eval()
    assert zoo_layers(ours)
    assert_close(logits(ours, tokens), want)
    assert not [name for name, p in ours.named_parameters() if p.requires_grad]

    # and goes on in the zoo's own file, with one copy of the matrices in place of seven
    ours.save_pretrained(tmp_path / "ours")
    state = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert len([key for key in state if "basis" in key]) == 2
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("stock", "ours")]
    assert sizes[1] < 0.5 * sizes[0] or "modules_to_save" in settings
    for load in (
        lambda: peftzoo.load_adapter(copy.deepcopy(llama), tmp_path / "ours"),
        lambda: PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "ours", low_cpu_mem_usage=True),
    ):
        assert_close(logits(load().eval(), tokens), want)


def test_a_stock_folder_on_conv1d(gpt2, tokens, tmp_path):
    settings = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    want = logits(stock(gpt2, tmp_path, **settings), tokens)
    ours = peftzoo.load_adapter(copy.deepcopy(gpt2), tmp_path).eval()
    assert_close(logits(ours, tokens), want)
    assert_close(logits(ours.merge_and_unload(), tokens), want, 1e-4)


def test_a_stock_folder_trains_on(llama, tokens, tmp_path):
    theirs = stock(llama, tmp_path)
    ours = peftzoo.load_adapter(copy.deepcopy(llama), tmp_path, is_trainable=True)
    for model in (theirs, ours):
        model(tokens, labels=tokens).loss.backward()
    mine = adapters_of(ours)
    names = [name for name, p in ours.named_parameters() if p.requires_grad]
    assert {name.rpartition(".")[2] for name in names} == {"lam", "gamma"}
    for name, layer in theirs.named_modules():
        if name in mine:
            assert_close(mine[name].lam.grad, layer.randlora_lambda["default"].grad, 1e-4)
            assert_close(mine[name].gamma.grad, layer.randlora_gamma["default"].grad, 1e-4)
    copied = pickle.loads(pickle.dumps(ours))
    assert torch.equal(logits(copied, tokens), logits(ours, tokens))


def test_a_stock_folder_that_cannot_be_read_is_refused(llama, tmp_path):
    base = copy.deepcopy(llama)
    with pytest.warns(UserWarning, match="save"):
        stock(llama, tmp_path / "bare", save_projection=False)
    with pytest.raises(ModelError, match="without its random matrices"):
        peftzoo.load_adapter(base, tmp_path / "bare")
    stock(llama, tmp_path / "biased", bias="all")
    with pytest.raises(ModelError, match="trains biases"):
        peftzoo.load_adapter(base, tmp_path / "biased")
    stock(llama, tmp_path / "partial")
    path = tmp_path / "partial" / "adapter_model.safetensors"
    state = load_file(path)
    del state[next(key for key in state if key.endswith("randlora_gamma"))]
    save_file(state, path, {"format": "pt"})
    with pytest.raises(ModelError, match="1 missing"):
        peftzoo.load_adapter(base, tmp_path / "partial")
    assert not zoo_layers(base)


def test_given_matrices_that_nobody_gave_are_refused(llama, tokens, tmp_path):
    model = get_peft_model(copy.deepcopy(llama), RandloraConfig(r=5, bases="stored"))
    with pytest.raises(ModelError, match="no file brought basis"):
        model(tokens)
    # a config that came with a file, and the fingerprint taken out of it to use another base
    want = logits(stock(llama, tmp_path / "stock"), tokens)
    peftzoo.load_adapter(copy.deepcopy(llama), tmp_path / "stock").save_pretrained(tmp_path / "ours")
    path = tmp_path / "ours" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_fingerprint": None}))
    assert_close(logits(peftzoo.load_adapter(copy.deepcopy(llama), tmp_path / "ours"), tokens), want)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("scale_mode", "vision"), ("bases", "normal"), ("pairing", "paper"), ("zero", "both"), ("chain", "fused")],
)
def test_config_names_the_choices(setting, value):
    with pytest.raises(ValueError, match=f"randlora: {setting}={value!r} must be one of"):
        RandloraConfig(**{setting: value})
