"""The one peft type of the zoo.

peft finds configs and tuners in dictionaries keyed by an enum of strings that outsiders cannot extend. A `str` that
answers `.value` and `.name` as an enum member does is enough: the keys hash and compare as their strings, and
transformers' `load_adapter` reads `.value`.
"""

from __future__ import annotations


class PeftTypeName(str):
    """A peft type outside peft's enum."""

    __slots__ = ()

    @property
    def value(self) -> str:
        """The name, as of an enum member."""
        return str(self)

    name = value


ZOO_TYPE = PeftTypeName("PEFTZOO")
# transformers derives the prefix from the type, so it must be the type's name in lower case
ZOO_PREFIX = "peftzoo_"
