"""How a refusal must look: one line, exit code 4, and everything left as it was."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from peftzoo.errors import ModelError


@contextmanager
def refused(model, match):
    """Inside, a ModelError of one line that says `match` must come, and `model` must be left as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ModelError, match=match) as caught:
        yield
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
