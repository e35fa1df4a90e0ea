"""What an adapter may be called."""

from __future__ import annotations

import re

from torch import nn

from peftzoo.errors import ModelError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_TAKEN = frozenset(dir(nn.ModuleDict()))  # adapters are attributes of a ModuleDict


def check_adapter_name(name: str) -> None:
    """Refuse a name that could not become a folder's name or part of a tensor's.

    Raises:
        ModelError: it is too long, has other characters, or is taken by torch.
    """
    if not _NAME.fullmatch(name) or name in _TAKEN:
        raise ModelError(
            f"adapter name {name!r}: use up to 64 letters, digits, - and _, starting with a letter or digit, and no "
            "name of a method of torch's ModuleDict"
        )
