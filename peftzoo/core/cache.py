"""StepCache: a value derived from trained tensors, computed once per optimizer step.

Micro-batches and the recomputation under gradient checkpointing reuse it; nothing but a change of the tensors makes
it anew. The in-place version of a tensor shows most changes. Under FSDP it does not, because the tensors that a
forward sees are gathered copies, so every step of any torch optimizer and every loaded state dict count as a change
as well. What writes through `.data` outside of torch's optimizers has to call `peftzoo.after_step`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

Value = TypeVar("Value")

_steps = 0


def count_step(*_: Any) -> None:
    """Let every kept value be made anew when it is next asked for."""
    global _steps
    _steps += 1


register_optimizer_step_post_hook(count_step)


def state_of(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    """Return what is another whenever `tensors` change; whoever compares it later holds them until then."""
    return (_steps, *((id(t), t._version, t.device, t.dtype, t.data_ptr()) for t in tensors))


class StepCache(Generic[Value]):
    """Keeps one value while the tensors it was derived from stay as they are; a copy of it starts empty."""

    _value: Value | None
    _state: tuple[Any, ...]
    _tensors: tuple[Tensor, ...]

    def __init__(self) -> None:
        self.drop()

    def get(self, compute: Callable[[], Value], *tensors: Tensor, settings: Any = None) -> Value:
        """Return what `compute` gave, without gradients, for `tensors` and `settings` as they are now."""
        if torch.compiler.is_compiling():  # a graph cannot ask what changed: there the value is a part of it
            with torch.no_grad():
                return compute()
        state = (settings, *state_of(tensors))
        if self._value is None or state != self._state:
            with torch.no_grad():
                self._value = compute()
            self._state, self._tensors = state, tensors  # held, so that no id is given to another tensor
        return self._value

    def drop(self) -> None:
        """Forget the value."""
        self._value, self._state, self._tensors = None, (), ()

    def drop_on_load(self, module: nn.Module) -> None:
        """Forget the value whenever a state dict is loaded into `module`."""
        module.register_load_state_dict_post_hook(_drop_caches)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.drop()


def _drop_caches(module: nn.Module, _: Any) -> None:
    # found on the module, not closed over: a deep copy of the module keeps its hooks and has caches of its own
    for value in vars(module).values():
        if isinstance(value, StepCache):
            value.drop()
