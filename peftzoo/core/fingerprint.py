"""A few sampled numbers by which an adapter recognises the base it was made on.

Samples, not a hash, so that the same base in another dtype is still the same base.
"""

from __future__ import annotations

import math

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peftzoo.core.in_place import InPlace

_TENSORS = 32
_SAMPLES = 4
# bfloat16 keeps 8 bits: a base stored in it may differ by 2**-8 of a value from the float32 one
_TOLERANCE = 2.0**-7

# where peft keeps what it wraps
_WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)
_INNER = ("base_layer.", "original_module.")

Fingerprint = dict[str, list[float]]


def fingerprint(model: nn.Module) -> Fingerprint | None:
    """Return {parameter name: values at evenly spaced places}; None for a model without data (meta device).

    Matrices are taken where there are any; adapters and packed (integer) weights are left out.
    """
    weights = {name: parameter for name, parameter in _base_parameters(model).items() if parameter.is_floating_point()}
    if not weights or any(parameter.is_meta for parameter in weights.values()):
        return None
    names = sorted(name for name, parameter in weights.items() if parameter.dim() >= 2 and parameter.numel())
    names = names or sorted(name for name, parameter in weights.items() if parameter.numel())
    count = min(_TENSORS, len(names))
    return {name: _sample(weights[name]) for name in (names[i * len(names) // count] for i in range(count))}


def difference(model: nn.Module, expected: Fingerprint) -> str | None:
    """Return what about `model` is not as `expected`, or None if it is the same base.

    A parameter that is packed in `model` (a quantised base) is not compared.
    """
    found = _base_parameters(model)
    for name, values in expected.items():
        if name not in found:
            return f"it has no parameter {name}"
        parameter = found[name]
        if parameter.is_meta or not parameter.is_floating_point():
            continue
        sample = _sample(parameter)
        same = all(math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=1e-6) for a, b in zip(sample, values, strict=False))
        if len(sample) != len(values) or not same:
            return f"{name} samples to {_show(sample)}, the adapter was made on {_show(values)}"
    return None


def _base_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the base's own parameters as they are without any adapter, zoo or not, under the names they then have."""
    found = {}
    wrappers = {name: module for name, module in model.named_modules() if isinstance(module, _WRAPPERS)}
    for wrapper in wrappers.values():
        if isinstance(wrapper, InPlace):
            wrapper.release()
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        above = [place for place in (".".join(parts[:depth]) for depth in range(len(parts))) if place in wrappers]
        if not all(name.removeprefix(f"{place}." if place else "").startswith(_INNER) for place in above):
            continue  # belongs to an adapter, not to what it wraps
        plain = ".".join(part for part in parts if f"{part}." not in _INNER)
        kept = getattr(wrappers[above[-1]], "_weight_before_merge", None) if above else None
        found[plain] = kept if kept is not None and parts[-1] == "weight" else parameter
    return found


def _sample(parameter: torch.Tensor) -> list[float]:
    flat = parameter.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, _SAMPLES, dtype=torch.float64).long().to(flat.device)
    return [float(f"{value:.6g}") for value in flat[places].float().tolist()]


def _show(values: list[float]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values) + "]"
