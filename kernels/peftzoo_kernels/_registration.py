"""One op from one implementation: a plain autograd Function for eager calls, a registered op for `torch.compile`.

A registered op (`torch.library.custom_op`) is what compile, `opcheck` and fake tensors understand, but a call of one
costs about 0.3 ms in Python on a small CPU, more than a small layer's arithmetic. So eager calls take the Function.
Both run the same `forward`, save through the same `setup_context` and end in the same `backward`.

An input may be a list of tensors, which may be empty; a None within would cut all of the list off autograd. "Needed"
means below which inputs want a gradient: one bool each, for a list of tensors a list of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def differentiable(
    name: str,
    forward: Callable[..., list[Tensor]],
    forward_fake: Callable[..., list[Tensor]],
    setup_context: Callable[[Any, tuple[Any, ...], list[Tensor], Sequence[Any]], None],
    backward: Callable[..., list[Tensor]],
    backward_fake: Callable[..., list[Tensor]],
    gradients: Callable[[Any, list[Tensor | None], Callable[..., list[Tensor]]], tuple[Any, ...]],
    outputs: Callable[..., int] = lambda *_: 1,
) -> Callable[..., list[Tensor]]:
    """Return the differentiable function `name` of an op's parts; it returns the outputs that have a gradient.

    Args:
        name: op name; registered as `peftzoo::name` and `peftzoo::name_backward`.
        forward: annotated function returning the outputs, then the intermediates that the backward wants.
        forward_fake: the same for fake tensors: shapes and dtypes only.
        setup_context: `(ctx, inputs, forward's list, needed)` -> saves for the backward what is worth its memory.
        backward: annotated function returning the list of the gradients that are needed, in order.
        backward_fake: the same for fake tensors.
        gradients: `(ctx, gradients of the outputs, backward)` -> the gradient of each input of `forward`, or None; for
            a list of tensors a list, or None.
        outputs: how many of forward's tensors are outputs, from its inputs.
    """
    op = torch.library.custom_op(f"peftzoo::{name}", forward, mutates_args=())
    op.register_fake(forward_fake)
    backward_op = torch.library.custom_op(f"peftzoo::{name}_backward", backward, mutates_args=())
    backward_op.register_fake(backward_fake)

    def pull_back(ctx: Any, dys: Sequence[Tensor | None], function: Callable[..., list[Tensor]]) -> tuple[Any, ...]:
        given = [None if dy is None else dy.contiguous() for dy in dys[: ctx.outputs]]
        some = next((dy for dy in given if dy is not None), None)
        if some is None:
            found: Sequence[Any] = [None] * len(ctx.layout)
        elif not torch.is_autocast_enabled(device := some.device.type):
            found = gradients(ctx, given, function)
        else:
            with torch.autocast(device, enabled=False):  # it would round the float32 gradients
                found = gradients(ctx, given, function)
        return tuple(
            [[None] * n if n is not None and one is None else one for n, one in zip(ctx.layout, found, strict=True)]
        )

    def setup(
        ctx: Any,
        inputs: tuple[Any, ...],
        output: list[Tensor],
        layout: tuple[int | None, ...],
        needed: Sequence[Any],
    ) -> None:
        ctx.set_materialize_grads(False)
        ctx.outputs, ctx.layout = outputs(*inputs), layout
        setup_context(ctx, inputs, output, needed)

    def setup_registered(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        layout = _layout(inputs)
        setup(ctx, inputs, output, layout, _nested(layout, ctx.needs_input_grad))

    def registered_backward(ctx: Any, dys: Sequence[Tensor | None]) -> tuple[Any, ...]:
        return pull_back(ctx, dys, backward_op)

    op.register_autograd(registered_backward, setup_context=setup_registered)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, inputs: tuple[Any, ...], layout: tuple[int | None, ...], *_: Any) -> tuple[Tensor, ...]:
            output = forward(*inputs)
            setup(ctx, inputs, output, layout, _nested(layout, ctx.needs_input_grad[2:]))
            if len(output) > ctx.outputs:
                ctx.mark_non_differentiable(*output[ctx.outputs :])
            return tuple(output)

        @staticmethod
        def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
            if torch.is_grad_enabled():  # create_graph=True: a silently constant gradient would be worse
                raise RuntimeError(f"{name} has no second derivative; PEFTZOO_BACKEND=eager has one")
            found = pull_back(ctx, dys, backward)
            return None, None, *_flat(ctx.layout, found)

    Eager.__name__ = Eager.__qualname__ = name

    def call(*inputs: Any) -> list[Tensor]:
        if torch.compiler.is_compiling():
            return op(*inputs)[: outputs(*inputs)]
        layout = _layout(inputs)
        # autograd sees tensors only where they stand by themselves
        output: tuple[Tensor, ...] = Eager.apply(inputs, layout, *_flat(layout, inputs))  # type: ignore[no-untyped-call]
        return list(output[: outputs(*inputs)])

    return call


def _layout(inputs: Sequence[Any]) -> tuple[int | None, ...]:
    """Return the length of each input that is a list of tensors, None for any other."""
    return tuple(
        [
            len(value) if type(value) is list and not (value and type(value[0]) in (bool, int, float)) else None
            for value in inputs
        ]
    )


def _flat(layout: tuple[int | None, ...], values: Sequence[Any]) -> list[Any]:
    """Return `values` with the lists of tensors laid out."""
    flat: list[Any] = []
    for length, value in zip(layout, values, strict=True):
        flat += [value] if length is None else value
    return flat


def _nested(layout: tuple[int | None, ...], flat: Sequence[Any]) -> tuple[Any, ...]:
    """Return what `_flat` laid out; what is over at the end is not ours."""
    values, place = [], 0
    for length in layout:
        values.append(flat[place] if length is None else list(flat[place : place + length]))
        place += 1 if length is None else length
    return tuple(values)
