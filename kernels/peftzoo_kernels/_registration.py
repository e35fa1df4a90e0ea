"""One op from one implementation: a plain autograd Function for eager calls, a registered op for `torch.compile`.

A registered op (`torch.library.custom_op`) is what compile, `opcheck` and fake tensors understand, but a call of one
costs about 0.3 ms in Python on a small CPU, more than a small layer's arithmetic. So eager calls take the Function.
Both run the same `forward`, save through the same `setup_context` and end in the same `backward`.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor


def differentiable(
    name: str,
    forward: Callable[..., tuple[Tensor, Tensor]],
    forward_fake: Callable[..., tuple[Tensor, Tensor]],
    setup_context: Callable[[Any, tuple[Any, ...], tuple[Tensor, Tensor]], None],
    backward: Callable[..., list[Tensor]],
    backward_fake: Callable[..., list[Tensor]],
    gradients: Callable[[Any, Tensor, Callable[..., list[Tensor]]], tuple[Tensor | None, ...]],
) -> Callable[..., Tensor]:
    """Return the differentiable function `name` of an op's parts.

    Args:
        name: op name; registered as `peftzoo::name` and `peftzoo::name_backward`.
        forward: annotated function returning the output and the intermediate that the backward wants.
        forward_fake: the same for fake tensors: shapes and dtypes only.
        setup_context: saves for the backward, deciding by `ctx.needs_input_grad` what is worth its memory.
        backward: annotated function returning the list of the gradients that are needed, in order.
        backward_fake: the same for fake tensors.
        gradients: `(ctx, dy, backward)` -> one gradient or None for each input of `forward`.
    """
    inputs_count = len(signature(forward).parameters)
    op = torch.library.custom_op(f"peftzoo::{name}", forward, mutates_args=())
    op.register_fake(forward_fake)
    backward_op = torch.library.custom_op(f"peftzoo::{name}_backward", backward, mutates_args=())
    backward_op.register_fake(backward_fake)

    def registered_backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * inputs_count
        return gradients(ctx, dy.contiguous(), backward_op)

    def setup_registered(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    op.register_autograd(registered_backward, setup_context=setup_registered)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
            output = forward(*inputs)
            ctx.mark_non_differentiable(output[1])
            setup_registered(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
            if torch.is_grad_enabled():  # create_graph=True: a silently constant gradient would be worse
                raise RuntimeError(f"{name} has no second derivative; PEFTZOO_BACKEND=eager has one")
            if dy is None:
                return (None,) * inputs_count
            # a backward inside an autocast block would round the float32 gradients
            with torch.autocast(dy.device.type, enabled=False):
                return gradients(ctx, dy.contiguous(), backward)

    Eager.__name__ = Eager.__qualname__ = name

    def call(*inputs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return op(*inputs)[0]
        output: tuple[Tensor, Tensor] = Eager.apply(*inputs)  # type: ignore[no-untyped-call]
        return output[0]

    return call
