"""Steps that several suites take."""

from __future__ import annotations

import torch

from peftzoo.core.layer import ZooLinear


def tiny_config(method, **settings):
    """Return a config under which every part of the method is visible."""
    return method.make_config(**(dict(method.tiny) | settings))


def shake(model, seed=7):
    """Move every trainable tensor away from its start, or each comparison would be of nothing with nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += (0.3 * noise).to(parameter.dtype).to(parameter.device)
    return model


def zoo_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, ZooLinear)}


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


def assert_close(got, want, bound=1e-5, what="values"):
    """Every entry within `bound` of the largest one (of 1, where all are smaller)."""
    assert got.shape == want.shape
    error = (got - want).abs().max().item() / max(1.0, want.abs().max().item())
    assert error <= bound, f"{what} differ by {error:.2e}, more than {bound:.0e}"


def assert_differs(got, want):
    assert (got - want).abs().max() > 1e-2, "the adapter does nothing: this comparison would prove nothing"
