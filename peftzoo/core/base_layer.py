"""The kinds of frozen layers an adapter can sit on, and how each stores and uses a weight [out, in]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from peftzoo.core.adapter import LinearAdapter
from peftzoo.core.conv import conv_update
from peftzoo_kernels import PackedWeight, Weight


@dataclass(frozen=True)
class LayerKind:
    """One kind of frozen layer.

    Attributes:
        name: its name in capability declarations and messages.
        matches: whether a module is of this kind.
        transposed: the weight is stored [in, out].
        forward: the forward of a layer that is x W^T + bias and nothing else; None where it is more, or W is packed.
        update: what an adapter adds to the output of a layer of this kind, from the layer, the adapter, x and the
            share of x that is dropped.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    transposed: bool = False
    forward: Callable[..., Tensor] | None = None
    update: Callable[[Any, LinearAdapter, Tensor, float], Tensor] = lambda _, adapter, x, p: adapter.with_dropout(x, p)

    def __reduce__(self) -> tuple[Callable[[str], LayerKind], tuple[str]]:
        return _kind_of_name, (self.name,)  # pickled by name: the predicates are functions of this file

    def sizes(self, module: nn.Module) -> tuple[int, int]:
        """Return in_features and out_features of a layer of this kind."""
        if self.transposed:
            rows, columns = cast(Tensor, module.weight).shape
            return rows, columns
        if isinstance(module, nn.Conv2d):
            return module.weight[0].numel(), module.out_channels
        return cast(int, module.in_features), cast(int, module.out_features)

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a weight as it is stored as [out, in]; a view."""
        return weight.t() if self.transposed else weight.flatten(1)

    def stored(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """Return a matrix [out, in] as this kind stores it, in `shape`."""
        return matrix.t() if self.transposed else matrix.reshape(shape)


def _kind_of_name(name: str) -> LayerKind:
    return next(kind for kind in KINDS if kind.name == name)


def _quantized_by(name: str) -> Callable[[nn.Module], bool]:
    def matches(module: nn.Module) -> bool:
        backend = resolve_quantization_backend(module)
        return backend is not None and backend.backend_name == name

    return matches


def _plain_linear(module: nn.Module) -> bool:
    # attention modules of torch read the weight of this subclass without ever calling it: an adapter would do nothing
    return (
        isinstance(module, nn.Linear)
        and not isinstance(module, NonDynamicallyQuantizableLinear)
        and resolve_quantization_backend(module) is None
    )


def _plain_conv2d(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1


PLAIN = (Tensor, nn.Parameter)  # types of tensors that an op may read

KINDS = (
    LayerKind("linear", _plain_linear, forward=nn.Linear.forward),
    LayerKind("conv1d", lambda module: isinstance(module, Conv1D), transposed=True, forward=Conv1D.forward),
    LayerKind("conv2d", _plain_conv2d, update=conv_update),
    LayerKind("bnb-4bit", _quantized_by("bnb 4bit")),
    LayerKind("bnb-8bit", _quantized_by("bnb 8bit")),
)


def layer_kind(module: nn.Module) -> LayerKind | None:
    """Return the kind of `module`, or None if no adapter can sit on it."""
    return next((kind for kind in KINDS if kind.matches(module)), None)


def is_watched(module: nn.Module) -> bool:
    """Whether hooks or a replaced forward would miss a call of `module` that is not made."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return "forward" in module.__dict__


def plain_weight(module: nn.Module, kind: LayerKind, dtype: torch.dtype) -> Weight | None:
    """Return W [out, in] if calling `module` on inputs of `dtype` is x W^T + bias and nothing else.

    Then a fused op may do it. None where the module's forward was replaced or has hooks of its own, where the dtypes
    differ, and where W is packed in a way that no op unpacks: then the module itself has to be called.
    """
    if is_watched(module):
        return None
    if kind.name == "bnb-4bit":
        return _nf4_weight(module, dtype)
    if kind.forward is None or type(module).forward is not kind.forward:
        return None
    weight = cast(Tensor, module.weight)
    if type(weight) not in PLAIN:  # sharded by DTensor, quantised by torchao: what it is multiplied by is its business
        return None
    if weight.dtype != dtype and not torch.is_autocast_enabled(weight.device.type):
        return None
    return kind.matrix(weight)


def _nf4_weight(module: Any, dtype: torch.dtype) -> PackedWeight | None:
    """Return the 4-bit weight of a bitsandbytes layer for training; without gradients its own forward is as good."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or type(module).forward is not Linear4bit.forward:
        return None
    state = module.weight.quant_state or module.quant_state
    # the layer settles on the dtype of its product at the first call, and a CPU may have packed it again for itself
    if state is None or not module.compute_type_is_set or getattr(state, "packing_format_for_cpu", False):
        return None
    if module.compute_dtype not in (None, dtype) or torch.is_autocast_enabled(module.weight.device.type):
        return None
    return PackedWeight(module.weight, lambda packed, to: dequantize_4bit(packed, state).to(to), state.shape)
