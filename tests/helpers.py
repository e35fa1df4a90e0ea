"""Steps that several suites take."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peftzoo.core import hooks
from peftzoo.core.calibrate import calibrate
from peftzoo.core.layer import ZooLinear
from peftzoo.errors import ModelError
from peftzoo_kernels import draw_seed, dropped


def make_llama(hidden_size=32, intermediate_size=48):
    """Return a two-block Llama, float32, seeded; its layers are not square."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def quantised(model, bits):
    """Return a copy of `model` whose block linears are bitsandbytes layers."""
    import bitsandbytes as bnb

    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            if bits == 4:
                packed = bnb.nn.Linear4bit(
                    module.in_features, module.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
                )
                packed.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            else:
                packed = bnb.nn.Linear8bitLt(
                    module.in_features, module.out_features, bias=False, has_fp16_weights=False
                )
                packed.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, packed.to("cpu"))
    return model


def make_batches(count, rows=8, length=12, vocabulary=96, seed=3):
    """Return `count` batches of tokens, each [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (rows, length), generator=generator) for _ in range(count)]


def tiny_config(method, **settings):
    """Return a config under which every part of the method is visible."""
    return method.make_config(**(dict(method.tiny) | settings))


def ready(model, adapter_name="default", batches=None):
    """Give an adapter whose start needs data the data it needs; return the model."""
    adapters = [layer.adapter(adapter_name) for layer in zoo_layers(model).values()]
    if any(adapter.config.needs_data for adapter in adapters):
        texts = [{"input_ids": tokens, "labels": tokens} for tokens in make_batches(4, seed=11)]
        calibrate(model, texts if batches is None else batches, adapter_name)
    return model


def adapted(method, model, **settings):
    """Return a copy of `model` with an adapter that is ready for use."""
    return ready(get_peft_model(copy.deepcopy(model), tiny_config(method, **settings)))


def refused(method, kind, model):
    """Whether `method` does not declare this kind of layer; then ours refuse it by name, and peft's as peft does."""
    if kind in method.layers:
        return False
    if not method.adopted:
        with pytest.raises(ModelError, match=f"{method.name} cannot adapt"):
            adapted(method, model)
    return True


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


def trained_names(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def trained(model):
    return {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}


def trained_values(model):
    """Return a copy of every trained tensor by name, whole where each process holds a shard."""
    parameters = trained(model).items()
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in parameters}


def take_steps(model, batches, rate, micro_batches=1):
    """Take an optimizer step on each batch, with all that a loop owes the adapters; return the losses.

    Args:
        model: any model with adapters, or what DDP or FSDP made of it.
        batches: tokens, [rows, length] each.
        rate: learning rate of AdamW.
        micro_batches: into how many parts a batch is cut.
    """
    parameters = list(trained(model).values())
    # of the size of a small gradient: what is zero but for rounding would otherwise move like everything else
    optimizer = torch.optim.AdamW(parameters, lr=rate, eps=1e-4)
    losses = []
    for batch in batches:
        losses.append(0.0)
        for part in batch.chunk(micro_batches):
            loss = model(input_ids=part, labels=part).loss / micro_batches
            loss.backward()
            losses[-1] += loss.item()
        penalty = hooks.penalty(model, micro_batches)
        for term in (hooks.regularizer(model), None if penalty is None else penalty / rate):
            if term is not None:
                gradients = torch.autograd.grad(term, parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        parameter.grad += gradient
        optimizer.step()
        optimizer.zero_grad()
        hooks.after_step(model)
    return losses


def assert_close(got, want, bound=1e-5, what="values"):
    """Every entry within `bound` of the largest one (of 1, where all are smaller)."""
    assert got.shape == want.shape
    error = (got - want).abs().max().item() / max(1.0, want.abs().max().item())
    assert error <= bound, f"{what} differ by {error:.2e}, more than {bound:.0e}"


def assert_differs(got, want):
    assert (got - want).abs().max() > 1e-2, "the adapter does nothing: this comparison would prove nothing"


def assert_all_close(got, want, bound=1e-5):
    """Two sets of tensors of the same names, each pair as in `assert_close`."""
    assert got.keys() == want.keys()
    assert want
    for name, value in want.items():
        assert_close(got[name], value, bound, name)


def assert_trained(now, before):
    """Every trained tensor has moved: else what follows would compare a start with itself."""
    still = [name for name, value in now.items() if torch.equal(value, before[name])]
    assert not still, f"these did not train: {still}"


class ConvNet(nn.Module):
    """Three convolutions (stride, padding, 1x1) and a linear layer; [rows, 2, 9, 9] -> [rows, 6]."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 9, (3, 2), padding=(1, 0), dilation=(1, 2), bias=False)
        self.mix = nn.Conv2d(9, 7, 1)
        self.last = nn.Linear(7, 6)

    def forward(self, x):
        x = self.first(x).relu()
        x = self.second(x).relu()
        return self.last(self.mix(x).relu().mean((2, 3)))


def make_conv_net():
    torch.manual_seed(0)
    return ConvNet().eval()


class SeededDropout(nn.Module):
    """Drops as our ops do, in the place of peft's own dropout."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return dropped(x, self.p, draw_seed(x.device))
