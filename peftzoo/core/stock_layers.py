"""peft's own LoRA layers with our forward: subclasses that a layer is turned into and back, by its class alone."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from peft.tuners import lora
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from peftzoo.core.adapter import Factors
from peftzoo.core.base_layer import PLAIN, LayerKind, is_watched, layer_kind, plain_weight
from peftzoo.core.cache import StepCache
from peftzoo.core.shared_input import Product, SharedInput, fused_output
from peftzoo_kernels import PackedWeight, Weight, dense, row_norms

WATCHED = "its base layer has hooks, or a forward of its own"


# at run time no base at all: a layer cannot be turned into a class that lists those of its own in another order
if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer as _Layer
else:
    _Layer = object


class FusedStock(_Layer):
    """The forward of a fused layer.

    It takes the op where that computes what the stock forward would: one adapter at work, LoRA or DoRA, on a base
    layer that is a frozen product and nothing else. That is asked at each call; where it is not so, the stock forward
    runs.
    """

    stock: ClassVar[type[nn.Module]]
    shared_input: SharedInput | None = None
    _kind: LayerKind
    _norm: StepCache[Tensor]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the stock forward returns, [..., in] -> [..., out]."""
        product = None if args or kwargs else self.product(x)
        y = None if product is None else fused_output(self, x, product)
        return super().forward(x, *args, **kwargs) if y is None else y

    def product(self, x: Tensor) -> Product | None:
        """Return what the op is to compute of `x`; None where the stock forward has to."""
        if self.disable_adapters or self.merged_adapters or not self.cast_input_dtype_enabled or not _is_plain(x):
            return None
        there = self._modules["lora_A"]._modules
        names = [name for name in self.active_adapters if name in there]
        if len(names) != 1 or adapter_obstacle(self, names[0]):
            return None
        base, name = self._modules["base_layer"], names[0]
        weight = plain_weight(base, self._kind, x.dtype)
        if weight is None:
            return None
        (a, b, drop), bias, scale = _parts(self, name), base.bias, self.scaling[name]
        a, b, is_dora = a.weight, b.weight, name in self.lora_variant
        sources = [base.weight, a, b] if bias is None else [base.weight, a, b, bias]
        dropout = drop.p if isinstance(drop, nn.Dropout) and drop.training and (self.training or not is_dora) else 0.0
        if is_dora:
            m = self.lora_magnitude_vector[name].weight
            sources.append(m)
            factors = partial(self._dora, weight, a, b, m, scale)
        else:
            factors = partial(Factors, a, b, None, scale)
        if not torch.compiler.is_compiling() and any(one.is_inference() for one in sources):  # changes do not show
            return None
        return Product(weight, bias, dropout, factors, lambda: sources, (scale,))

    def _dora(self, weight: Weight, a: Tensor, b: Tensor, m: Tensor, scale: float) -> Factors:
        update = Factors(a, b, None, scale)
        stored = cast(Tensor, self.base_layer.weight)
        norm = self._norm.get(lambda: row_norms(_plain(weight), a, b, scale), stored, a, b, settings=scale)
        return update._replace(out_scale=m / norm, drops_all=True)

    def unmerge(self) -> None:
        """Take the merged adapters out again, which may leave the weight rounded in a way that does not show."""
        super().unmerge()
        self._norm.drop()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._norm.drop()
        super()._load_from_state_dict(*args, **kwargs)


class FusedLinear(FusedStock, lora.Linear):
    """peft's `lora.Linear`, on an `nn.Linear` or a `Conv1D`, with the fused forward."""

    stock = lora.Linear


def fused_class(layer: nn.Module) -> type[FusedStock] | None:
    """Return the class that `layer`, of a stock class, can be turned into, or None if there is none."""
    if type(layer) is lora.Linear:
        return FusedLinear
    if type(layer).__name__ != "Linear4bit":  # peft defines it only where there is bitsandbytes
        return None
    from peftzoo.core.stock_4bit import FusedLinear4bit

    return FusedLinear4bit if type(layer) is FusedLinear4bit.stock else None


def turn(layer: nn.Module) -> None:
    """Give a stock layer, for which there is no `obstacle`, the fused forward."""
    kind, fused = layer_kind(cast(nn.Module, layer.base_layer)), fused_class(layer)
    if kind is None or fused is None:
        raise TypeError(f"{type(layer).__name__} has no fused forward")
    layer._kind, layer._norm = kind, StepCache()  # type: ignore[assignment]
    layer.__class__ = fused


def turn_back(layer: FusedStock) -> None:
    """Make of a fused layer the stock layer that it was, with nothing beside it."""
    layer.__class__ = layer.stock  # type: ignore[assignment]
    for name in ("_kind", "_norm", "shared_input"):
        layer.__dict__.pop(name, None)


def obstacle(layer: lora.LoraLayer) -> str | None:
    """Return why a layer, of a stock class, would never take the fused forward; None if it would."""
    base = layer.base_layer
    if fused_class(layer) is None:
        return f"{type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__} has no fused forward"
    if (kind := layer_kind(base)) is None or not (kind.forward or kind.name == "bnb-4bit"):
        return f"base layer of type {type(base).__name__}"
    if "forward" in layer.__dict__:
        return "a forward of its own"
    if is_watched(base):
        return WATCHED
    if kind.forward is not None and (type(base).forward is not kind.forward or type(base.weight) not in PLAIN):
        return f"base layer of type {type(base).__name__}, weight of type {type(base.weight).__name__}"
    reasons = [adapter_obstacle(layer, name) for name in layer.lora_A]
    return None if None in reasons else next(iter(reasons), "no adapter")


def adapter_obstacle(layer: lora.LoraLayer, name: str) -> str | None:
    """Return why the adapter `name` of a layer cannot be computed by the op; None if it can."""
    variant = type(layer.lora_variant.get(name, None))
    if variant not in (type(None), DoraLinearVariant):
        return f"variant {variant.__name__}"
    a, b, drop = _parts(layer, name)
    if layer.lora_bias[name] or a.bias is not None or b.bias is not None:
        return "lora_bias"
    if is_watched(a) or is_watched(b) or is_watched(drop):
        return "hooks on parts of the adapter"
    if variant is DoraLinearVariant and is_watched(layer.lora_magnitude_vector[name]):
        return "hooks on parts of the adapter"
    if (
        type(a) is not nn.Linear
        or type(b) is not nn.Linear
        or type(a.weight) not in PLAIN
        or type(b.weight) not in PLAIN
    ):
        return "factors that are not plain linear layers"
    dropout_is_known = type(drop) is nn.Identity or (type(drop) is nn.Dropout and not drop.inplace)
    if not dropout_is_known or (type(drop) is nn.Dropout and drop.p >= 1 - 2**-16):
        return f"dropout {drop}"
    return None


def _plain(weight: Weight) -> Tensor:
    return dense(weight, torch.float32) if isinstance(weight, PackedWeight) else weight


def _parts(layer: Any, name: str) -> list[Any]:
    """Return the down factor, the up factor and the dropout of an adapter; found without nn.Module's slow look-up."""
    return [layer._modules[part]._modules[name] for part in ("lora_A", "lora_B", "lora_dropout")]


def _is_plain(x: Tensor) -> bool:
    """Whether `x` is a tensor that the op takes; under torch.func it takes none."""
    if torch.compiler.is_compiling():
        return True
    return type(x) in PLAIN and not x.is_nested and not torch._C._are_functorch_transforms_active()
