"""The suite every op of `OPS` gets, without a line of its own."""

from __future__ import annotations

import os
from itertools import chain, combinations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from peftzoo_kernels import OPS

# TRITON_INTERPRET=0 makes these tests, and those of the kernels, tests of a GPU
DEVICE = "cuda" if os.environ["TRITON_INTERPRET"] == "0" and torch.cuda.is_available() else "cpu"
BACKENDS = ("eager", "cublas")  # triton: test_triton.py

SHAPES = [  # (m, in, out, r)
    (1, 16, 16, 1),
    (17, 32, 33, 2),
    (33, 65, 70, 5),
    (64, 96, 136, 16),
    (65, 100, 16, 17),
    (40, 192, 136, 64),
    (20, 260, 300, 256),
    (0, 32, 16, 4),
    (8, 32, 16, 0),
]
# relative RMS against the float64 reference; the bound comes from the dtype (performance.md 3.7)
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def subsets(names):
    return [frozenset(c) for c in chain.from_iterable(combinations(names, k) for k in range(len(names) + 1))]


def make(op, shape, without=frozenset(), seed=0):
    inputs = op.inputs(*shape, torch.Generator().manual_seed(seed))
    empty = {name: None for name in without if name.startswith("weight")}
    inputs = {name: value.to(DEVICE) if torch.is_tensor(value) else value for name, value in inputs.items()}
    return {name: value for name, value in inputs.items() if name not in without} | empty


def cast(inputs, dtype):
    return {
        name: value.detach().to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def run(function, inputs, trained, dy):
    """Return the output and every gradient by name."""
    inputs = dict(inputs)
    for name in trained:
        inputs[name] = inputs[name].detach().clone().requires_grad_()
    y = function(**inputs)
    if trained:
        y.backward(dy.to(y.dtype))
    return {"y": y.detach()} | {f"d_{name}": inputs[name].grad for name in trained}


def relative_error(got, want):
    """Return |got - want| / |want|, 0 for an empty tensor."""
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def gradient_of(op, inputs, seed=1):
    """Return a random gradient of the op's output, float64."""
    shape = op.reference(**cast(inputs, torch.float64)).shape
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator, device=DEVICE)


def assert_near(got, want, bound):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].shape == want[name].shape, name
        error = relative_error(got[name], want[name])
        assert error <= bound, f"{name}: relative error {error:.3e} exceeds {bound:.0e}"


def compare(op, shape, dtype, without=frozenset()):
    """Return what the op and the float64 reference say, four draws side by side: one alone can cancel by chance."""
    got, want = [], []
    for seed in range(4):
        # the reference sees the values that the dtype can hold, so that only the op's own rounding is measured
        inputs = cast(make(op, shape, without, seed), dtype)
        trained = ["x", *(name for name in op.trained if name in inputs)]
        dy = gradient_of(op, inputs, seed).to(dtype)
        got.append(run(op.function, inputs, trained, dy))
        want.append(run(op.reference, cast(inputs, torch.float64), trained, dy.double()))
    return tuple({name: torch.stack([draw[name] for draw in draws]) for name in draws[0]} for draws in (got, want))


@pytest.fixture(params=OPS, ids=lambda op: op.name)
def op(request):
    return request.param


# autograd rounds eager's 16-bit gradients: they are the yardstick of the next test and held to no bound
@pytest.mark.parametrize(
    ("backend", "dtype"), [(b, d) for b in BACKENDS for d in BOUND if b != "eager" or d.itemsize > 2]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(op, shape, dtype, backend, monkeypatch):
    monkeypatch.setenv("PEFTZOO_BACKEND", backend)
    for without in op.optional:
        assert_near(*compare(op, shape, dtype, without), BOUND[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_less_exact_than_eager(op, dtype, monkeypatch):
    errors = {}
    for backend in BACKENDS:
        monkeypatch.setenv("PEFTZOO_BACKEND", backend)
        got, want = compare(op, (200, 192, 136, 16), dtype)
        errors[backend] = {name: relative_error(got[name], want[name]) for name in want}
    for name, error in errors["cublas"].items():
        assert error <= 1.1 * errors["eager"][name], f"{name}: {error:.2e}, eager {errors['eager'][name]:.2e}"


def test_every_trained_subset(op):
    inputs = make(op, (33, 65, 70, 5))
    dy = gradient_of(op, inputs)
    for trained in subsets(("x", *op.trained)):
        got, want = run(op.function, inputs, trained, dy), run(op.reference, inputs, trained, dy)
        assert_near(got, want, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_factors_keep_float32_gradients(op, dtype):
    """Adapters are float32 masters: their gradients must not pass through the activations' dtype."""
    inputs = make(op, (33, 65, 70, 5))
    half = cast(inputs, dtype)
    mixed = {name: value.float() if name in op.trained else value for name, value in half.items()}
    dy = gradient_of(op, inputs).to(dtype)
    got = run(op.function, mixed, op.trained, dy)
    for name in op.trained:
        assert got[f"d_{name}"].dtype == torch.float32
        assert not torch.equal(got[f"d_{name}"], got[f"d_{name}"].to(dtype).float()), f"d_{name} was rounded"
    assert_near(got, run(op.reference, cast(mixed, torch.float64), op.trained, dy.double()), BOUND[torch.bfloat16])


def test_half_factors_get_gradients_of_their_dtype(op):
    inputs = cast(make(op, (33, 65, 70, 5)), torch.bfloat16)
    got = run(op.function, inputs, op.trained, gradient_of(op, inputs))
    assert all(got[f"d_{name}"].dtype == torch.bfloat16 for name in op.trained)


def test_leading_dimensions_and_strides(op):
    inputs = cast(make(op, (24, 33, 70, 5)), torch.float64)
    want = op.reference(**inputs)
    shaped = inputs | {"x": inputs["x"].view(2, 3, 4, 33)}
    torch.testing.assert_close(op.function(**shaped), want.view(2, 3, 4, -1), rtol=1e-12, atol=1e-12)
    strided = {
        name: value.t().contiguous().t() if torch.is_tensor(value) and value.dim() == 2 else value
        for name, value in inputs.items()
    }
    torch.testing.assert_close(op.function(**strided), want, rtol=1e-12, atol=1e-12)


def test_inputs_are_left_alone(op):
    inputs = make(op, (24, 33, 70, 5))
    before = {name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)}
    run(op.function, inputs, ("x", *op.trained), gradient_of(op, inputs))
    for name, value in before.items():
        assert torch.equal(inputs[name], value), name


def test_autocast_decides_the_dtype(op):
    inputs = cast(make(op, (24, 33, 70, 5)), torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = op.function(**inputs)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), op.reference(**inputs), rtol=3e-2, atol=3e-2)


def test_backward_within_autocast_keeps_float32_gradients(op):
    inputs = cast(make(op, (64, 33, 70, 5)), torch.float32)
    dy = gradient_of(op, inputs)
    want = run(op.function, inputs, op.trained, dy)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = run(op.function, inputs, op.trained, dy)
    for name in op.trained:
        assert not torch.equal(got[f"d_{name}"], got[f"d_{name}"].bfloat16().float()), f"d_{name} was rounded"
    assert_near(got, want, 2e-2)


def test_autocast_keeps_no_copy_of_the_weight(op):
    inputs = cast(make(op, (8, 33, 70, 5)), torch.float32)
    inputs["x"].requires_grad_()
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t)
    with hooks, torch.autocast(DEVICE, dtype=torch.bfloat16):
        op.function(**inputs)
    assert inputs["weight"].data_ptr() in kept


def test_autocast_leaves_float64_alone(op):
    inputs = make(op, (8, 33, 70, 5))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert op.function(**inputs).dtype == torch.float64


def test_gradcheck(op):
    for without in op.optional:
        inputs = make(op, (4, 6, 5, 3), without)
        names = ["x", *(name for name in op.trained if name in inputs)]
        tensors = [inputs[name].clone().requires_grad_() for name in names]

        def call(*values, inputs=inputs, names=names):
            return op.function(**(inputs | dict(zip(names, values, strict=True))))

        assert torch.autograd.gradcheck(call, tensors)


def test_second_derivative_is_refused(op):
    inputs = make(op, (4, 6, 5, 3))
    inputs["x"].requires_grad_()
    inputs[op.trained[0]].requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(op.function(**inputs).sum(), inputs["x"], create_graph=True)


def test_a_trained_base_weight_gets_its_gradient(op):
    inputs = make(op, (4, 6, 5, 3))
    dy = gradient_of(op, inputs)
    trained = ("x", "weight", "bias", *op.trained)
    assert_near(run(op.function, inputs, trained, dy), run(op.reference, inputs, trained, dy), 1e-12)


class Recorder(TorchDispatchMode):
    """Notes the calls of our registered ops, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "peftzoo":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def test_registered_op_passes_opcheck(op, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for without in op.optional:
        inputs = cast(make(op, (6, 8, 5, 3), without), torch.float32)
        trained = [name for name in ("x", *op.trained) if name in inputs]
        for name in trained:
            inputs[name].requires_grad_()
        with Recorder() as recorder:
            op.function(**inputs)
        ((registered, args),) = recorder.calls
        pointers = {inputs[name].data_ptr() for name in trained}
        args = tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        for tensor in tree_leaves(args):
            if torch.is_tensor(tensor) and tensor.data_ptr() in pointers:
                tensor.requires_grad_()
        torch.library.opcheck(registered, args)


@pytest.mark.parametrize("trained", [("x", 0), ("x",), (0,)], ids=["all", "x", "factor"])
def test_compiles_to_one_graph_with_dynamic_rows(op, trained):
    torch._dynamo.reset()
    names = tuple(op.trained[0] if name == 0 else name for name in trained)
    compiled = torch.compile(lambda inputs: op.function(**inputs), fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (5, 9, 14):
        inputs = cast(make(op, (m, 8, 6, 3)), torch.float32)
        dy = gradient_of(op, inputs)
        got = run(lambda **kw: compiled(kw), inputs, names, dy)
        assert_near(got, run(op.reference, inputs, names, dy), 1e-5)


def saved_elements(function, inputs, m):
    """Return how many elements of tensors with m rows the backward of `function` keeps."""
    kept = {}

    def pack(tensor):
        if tensor.dim() == 2 and tensor.shape[0] == m:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(**inputs)
    return sum(kept.values())


def test_saved_for_backward(op):
    """Which factors train decides what is kept: the table of performance.md 2.1."""
    m, k, n, r = 48, 32, 40, 3
    for trained in subsets(("x", *op.trained)):
        inputs = make(op, (m, k, n, r))
        for name in trained:
            inputs[name].requires_grad_()
        kept = saved_elements(op.function, inputs, m)
        assert kept == op.saved(m, k, n, r, trained), f"trained {sorted(trained)}"


def test_op_rejects(op):
    inputs = make(op, (4, 6, 5, 3))
    with pytest.raises(ValueError, match="do not chain"):
        op.function(**(inputs | {op.trained[0]: torch.ones(4, 4)}))
    with pytest.raises(ValueError, match=r"\[out, in\]"):
        op.function(**(inputs | {"weight": torch.ones(5, 7)}))
    with pytest.raises(ValueError, match="needs a weight"):
        op.function(**(inputs | {"weight": None}))


def test_unknown_backend_is_refused(op, monkeypatch):
    monkeypatch.setenv("PEFTZOO_BACKEND", "cuda")
    with pytest.raises(ValueError, match="choose auto, eager, cublas, triton"):
        op.function(**make(op, (4, 6, 5, 3)))


def test_gather_needs_integer_columns():
    op = next(op for op in OPS if op.name == "gather_matmul")
    with pytest.raises(TypeError, match="int32 or int64"):
        op.function(**(make(op, (4, 6, 5, 3)) | {"columns": torch.ones(3)}))


def test_low_rank_needs_a_diagonal_of_its_rank():
    op = next(op for op in OPS if op.name == "low_rank_linear")
    with pytest.raises(ValueError, match=r"s \[2\] is not \[r\]"):
        op.function(**(make(op, (4, 6, 5, 3)) | {"s": torch.ones(2)}))
