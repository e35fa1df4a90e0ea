"""Rows, where each came from, and how bad ones are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftzoo.errors import DataError

SHOWN = 10  # bad rows named one by one; the rest are counted


@dataclass(frozen=True)
class Rows:
    """Rows and where each came from.

    Attributes:
        values: one mapping from column to value per row.
        where: names row i for a message, such as ``chats.jsonl:12``.
    """

    values: Sequence[Mapping[str, Any]]
    where: Callable[[int], str]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.values)


def refuse(problems: list[str], rule: str) -> None:
    """Raise a DataError that lists ``problems``, one a line, under the ``rule`` they break; none raise nothing."""
    if problems:
        rest = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise DataError("\n  ".join([f"{rule}; these do not:", *problems[:SHOWN], *rest]))
