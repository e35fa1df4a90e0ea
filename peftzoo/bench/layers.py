"""What is measured as one layer: a case with its tensors, every implementation of it, and the numbers they must give.

| op | what |
|---|---|
| `lora` | one linear layer with LoRA |
| `dora` | one linear layer with DoRA; every run counts as an optimizer step, so the norm of the rows is paid in each |
| `out_scale` | `low_rank_linear` with a trained factor for every output |
| `group` | layers on one input, such as q, k and v, with LoRA |
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftzoo.bench import epilogue, peers
from peftzoo.core.attach import attach
from peftzoo.core.cache import count_step
from peftzoo.core.layer import ZooLinear
from peftzoo.core.registry import get_method
from peftzoo_kernels import BACKENDS, LowRankLayer, draw_seed, dropped, grouped_low_rank_linear, low_rank_linear

OPS = ("lora", "dora", "out_scale", "group")
FLOOR, PEFT, OURS = "floor", "peft", "zoo"
INPUTS = 3  # sets of x and dy that take turns, so that no run finds its input in cache
SCALE = 2.0  # alpha / r
DROP_SEED = 5  # of torch's generator, where a dropout has to come out twice
# x, p -> drop(x), as a forward draws it from torch's generator: torch's own, and ours from a seed
DROPS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "torch": F.dropout,
    "seeded": lambda x, p: dropped(x, p, draw_seed(x.device)),
}


@dataclass(frozen=True)
class Case:
    """One op at one size; its tensors are drawn when they are first asked for.

    Attributes:
        op: one of `OPS`.
        m: rows of the input.
        k: input features.
        ns: output features of each layer; several for `group` alone.
        r: rank.
        p: dropout.
        dtype: of the weights and the input; factors are float32, or float64 if that is.
        device: where it runs.
    """

    op: str
    m: int
    k: int
    ns: tuple[int, ...]
    r: int
    p: float
    dtype: torch.dtype
    device: torch.device

    @property
    def shape(self) -> str:
        """The size as `--shape` takes it."""
        return f"{self.m},{self.k},{'+'.join(map(str, self.ns))}"

    def _draws(self, seed: int, dtype: torch.dtype) -> Callable[..., Tensor]:
        """Return a function that draws tensors of a shape, each entry of about 1 / `divisor`."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def draw(*shape: int, divisor: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device, dtype=dtype) / divisor

        return draw

    @cached_property
    def xs(self) -> list[Tensor]:
        """The inputs, [m, k] each."""
        draw = self._draws(0, self.dtype)
        return [draw(self.m, self.k).requires_grad_() for _ in range(INPUTS)]

    @cached_property
    def dys(self) -> list[list[Tensor]]:
        """For each input the gradient of every output, [m, n]."""
        draw = self._draws(1, self.dtype)
        return [[draw(self.m, n) for n in self.ns] for _ in range(INPUTS)]

    @cached_property
    def weights(self) -> list[Tensor]:
        """The frozen weights, [n, k]."""
        draw = self._draws(2, self.dtype)
        return [draw(n, self.k, divisor=self.k**0.5) for n in self.ns]

    @cached_property
    def factors(self) -> dict[str, Tensor]:
        """The trained values by name: a_i [r, k] and b_i [n, r] of each layer, and m [n] where there is one."""
        draw = self._draws(3, torch.promote_types(torch.float32, self.dtype))
        found = {}
        for i, n in enumerate(self.ns):
            found[f"a_{i}"] = draw(self.r, self.k, divisor=self.k**0.5)
            found[f"b_{i}"] = draw(n, self.r, divisor=self.r**0.5)
        if self.op in ("dora", "out_scale"):
            found["m"] = 1 + 0.1 * draw(self.ns[0])
        return found

    def flop(self, direction: str) -> int:
        """Return the useful floating point operations: frozen products without dW, and every product with a factor."""
        frozen = 2 * self.m * self.k * sum(self.ns)
        update = 2 * self.m * self.r * sum(self.k + n for n in self.ns)
        return _directed({"forward": frozen + update, "backward": frozen + 2 * update}, direction)

    def bytes(self, direction: str) -> int:
        """Return the least bytes that move: each tensor that is needed once, nothing in between."""
        size, wide = self.dtype.itemsize, torch.promote_types(torch.float32, self.dtype).itemsize
        x, y, w = self.m * self.k, self.m * sum(self.ns), self.k * sum(self.ns)
        factors = wide * sum(value.numel() for value in self.factors.values())
        # the backward reads dy, W, x and the factors, and writes dx and their gradients
        return _directed(
            {"forward": size * (x + w + y) + factors, "backward": size * (y + w + 2 * x) + 2 * factors}, direction
        )


def _directed(amounts: dict[str, int], direction: str) -> int:
    return amounts[direction] if direction in amounts else sum(amounts.values())


@dataclass(frozen=True)
class Candidate:
    """One implementation of a case.

    Attributes:
        name: of the implementation.
        forward: x [m, k] -> every output [m, n].
        trained: its own copies of the case's factors, or [] where it has none.
        backend: what PEFTZOO_BACKEND is while it runs; None leaves it.
        drops: which of `DROPS` the forward draws first of all; None where that cannot be repeated.
        drops_all: dropout acts on the whole scaled product, as in peft's DoRA.
    """

    name: str
    forward: Callable[[Tensor], list[Tensor]]
    trained: dict[str, Tensor] = field(default_factory=dict)
    backend: str | None = None
    drops: str | None = None
    drops_all: bool = False

    def run(self, case: Case, turn: int, mark: Callable[[], None]) -> None:
        """Go forward and backward once; marks the start, the middle and the end."""
        count_step()
        with using_backend(self.backend):
            mark()
            ys = self.forward(case.xs[turn % INPUTS])
            mark()
            self.gradients(ys, case, turn)
            mark()

    def gradients(self, ys: Sequence[Tensor], case: Case, turn: int) -> dict[str, Tensor | None]:
        """Return the gradient of x and of every trained value by name; None for one that the outputs do not reach."""
        wanted = {"x": case.xs[turn % INPUTS]} | self.trained
        found = torch.autograd.grad(ys, list(wanted.values()), case.dys[turn % INPUTS], allow_unused=True)
        return dict(zip(wanted, found, strict=True))


@contextmanager
def using_backend(name: str | None) -> Iterator[None]:
    """Let PEFTZOO_BACKEND be `name` inside the block."""
    before = os.environ.get("PEFTZOO_BACKEND")
    if name is not None:
        os.environ["PEFTZOO_BACKEND"] = name
    try:
        yield
    finally:
        if name is not None:
            if before is None:
                del os.environ["PEFTZOO_BACKEND"]
            else:
                os.environ["PEFTZOO_BACKEND"] = before


def names(op: str, p: float, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Return the implementations of an op that there are, the floor first."""
    half = dtype.itemsize == 2
    stock = [PEFT, *(["peft-half"] if half else []), "peft-compiled"]
    fusion = ["lorafusion-like"] if device.type == "cuda" and dtype != torch.float64 else []
    others = {"lora": [*([] if p else ["unsloth-like"]), "axolotl-like", *fusion]}.get(op, [])
    backends = [name for name in BACKENDS if name != "triton" or device.type == "cuda"]
    ours = [OURS, *(f"{OURS}-{name}" for name in backends)]
    apart = [f"{OURS}-apart"] if op == "group" else []
    return [FLOOR, *(stock if op != "out_scale" else []), *others, *apart, *ours]


def chosen(there: Sequence[str], only: Sequence[str], slow: set[str]) -> list[str]:
    """Return those that were asked for or, if none were, all but the slow ones; the floor always."""
    return [name for name in there if name == FLOOR or (name in only if only else name not in slow)]


def candidate(name: str, case: Case) -> Candidate:
    """Return the implementation `name` of a case."""
    if name == FLOOR:
        return Candidate(FLOOR, lambda x: [F.linear(x, weight) for weight in case.weights])
    if name.startswith(PEFT):
        return _peft(name, case)
    if name.startswith(OURS):
        return _ours(name, case)
    trained = _copies(case)
    a, b, (weight,) = trained["a_0"], trained["b_0"], case.weights
    if name == "unsloth-like":
        return Candidate(name, lambda x: [peers.unsloth_like(x, weight, a, b, SCALE)], trained)
    function = peers.axolotl_like if name == "axolotl-like" else epilogue.lorafusion_like
    return Candidate(name, lambda x: [function(x, weight, a, b, SCALE, case.p)], trained, drops="torch")


def _copies(case: Case) -> dict[str, Tensor]:
    return {name: value.clone().requires_grad_() for name, value in case.factors.items()}


def _filled(trained: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """Write the case's values over what a layer started with."""
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(case.factors[name])
    return trained


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _peft(name: str, case: Case) -> Candidate:
    """Return peft's layers: as they come, under autocast where the input is half precision; cast to it; compiled."""
    config = peft.LoraConfig(
        r=case.r, lora_alpha=SCALE * case.r, lora_dropout=case.p, use_dora=case.op == "dora",
        target_modules=[str(i) for i in range(len(case.ns))],
    )  # fmt: skip
    layers: Any = peft.inject_adapter_in_model(config, nn.Sequential(*map(_linear, case.weights)))
    half = case.dtype.itemsize == 2
    trained: dict[str, Tensor] = {}
    for i, layer in enumerate(layers):
        trained |= {f"a_{i}": layer.lora_A["default"].weight, f"b_{i}": layer.lora_B["default"].weight}
    if case.op == "dora":
        trained["m"] = layers[0].lora_magnitude_vector["default"].weight
    for value in trained.values():  # `get_peft_model` would make them float32
        value.data = value.data.to(case.factors["a_0"].dtype if name == PEFT else case.dtype)
    _filled(trained, case)
    calls = list(layers)
    if name == "peft-compiled":
        torch.compiler.reset()  # after eight shapes of one code it would go on without compiling, and not say so
        calls = [torch.compile(layer, mode="max-autotune-no-cudagraphs", dynamic=False) for layer in layers]

    def forward(x: Tensor) -> list[Tensor]:
        with torch.autocast(case.device.type, case.dtype) if half and name == PEFT else nullcontext():
            return [call(x) for call in calls]

    drops = None if name == "peft-compiled" else "torch"  # a compiled layer draws otherwise
    return Candidate(name, forward, trained, drops=drops, drops_all=case.op == "dora")


def _ours(name: str, case: Case) -> Candidate:
    """Return our layer for `lora` and `dora`, our op for the others; `zoo` with the backend a user gets."""
    kind = name.removeprefix(OURS).removeprefix("-") or None
    backend = kind if kind in BACKENDS else None
    if case.op == "group":
        trained = _copies(case)
        layers = [
            LowRankLayer(weight, trained[f"a_{i}"], trained[f"b_{i}"], scale=SCALE)
            for i, weight in enumerate(case.weights)
        ]

        def together(x: Tensor) -> list[Tensor]:
            return grouped_low_rank_linear(x, layers)

        def apart(x: Tensor) -> list[Tensor]:
            return [low_rank_linear(x, *layer) for layer in layers]

        return Candidate(name, apart if kind == "apart" else together, trained, backend)
    if case.op == "out_scale":
        trained = _copies(case)
        a, b, m = trained["a_0"], trained["b_0"], trained["m"]
        (weight,) = case.weights
        return Candidate(
            name, lambda x: [low_rank_linear(x, weight, a, b, out_scale=m, scale=SCALE)], trained, backend
        )
    config = get_method(case.op).make_config(r=case.r, alpha=SCALE * case.r, dropout=case.p)
    layer: Any = attach(_linear(case.weights[0]), config)
    assert isinstance(layer, ZooLinear)
    own: Any = layer.adapter("default")
    trained = {"a_0": own.a, "b_0": own.b} | ({"m": own.m} if case.op == "dora" else {})
    return Candidate(name, lambda x: [layer(x)], _filled(trained, case), backend, drops="seeded")


@lru_cache(maxsize=2)
def reference(
    case: Case, drops: str | None = None, drops_all: bool = False, updated: bool = True
) -> dict[str, Tensor]:
    """Return every output and gradient for the first input, by name, in float64 and straight from the definition.

    Args:
        case: what is computed.
        drops: which of `DROPS` is drawn from `DROP_SEED` on; None for no dropout.
        drops_all: as in `Candidate`.
        updated: False for the frozen layers alone.
    """
    keep = None
    if case.p and drops is not None:
        torch.manual_seed(DROP_SEED)
        keep = DROPS[drops](torch.ones_like(case.xs[0]), case.p).double()
    x = case.xs[0].detach().double().requires_grad_()
    trained = {name: value.double().requires_grad_() for name, value in case.factors.items() if updated}
    ys = []
    for i, weight in enumerate(case.weights):
        if not updated:
            ys.append(F.linear(x, weight.double()))
            continue
        w, a, b = weight.double(), trained[f"a_{i}"], trained[f"b_{i}"]
        seen = x if keep is None else x * keep
        y = (whole := F.linear(seen if drops_all else x, w)) + SCALE * F.linear(F.linear(seen, a), b)
        if "m" in trained:
            norm = 1.0
            if case.op == "dora":
                norm = torch.linalg.vector_norm(w + SCALE * b.detach() @ a.detach(), dim=1)
            y = trained["m"] / norm * y
        ys.append(y + F.linear(x, w) - whole if drops_all else y)
    wanted = {"x": x} | trained
    gradients = torch.autograd.grad(ys, list(wanted.values()), [dy.double() for dy in case.dys[0]])
    named = {f"y_{i}": y.detach() for i, y in enumerate(ys)}
    return named | {f"d_{name}": value for name, value in zip(wanted, gradients, strict=True)}
