"""What each setting of a method means, read from where it is written: the docstrings of its config classes."""

from __future__ import annotations

import dataclasses
import inspect
import re

_ENTRY = re.compile(r"^    (\w+): (.*)$")


def setting_help(config: type) -> dict[str, str]:
    """Return {setting: meaning} from the "Attributes:" of a config class and its parents, or from peft's metadata."""
    # some of peft's were meant as one text over two lines, and became a tuple by a comma too many
    meanings = {f.name: "".join(f.metadata["help"]) for f in dataclasses.fields(config) if "help" in f.metadata}
    for parent in reversed(config.__mro__):
        meanings |= _attributes(inspect.cleandoc(parent.__doc__ or ""))
    return meanings


def _attributes(docstring: str) -> dict[str, str]:
    """Return the entries of a Google-style "Attributes:" section, each on one line."""
    _, _, section = docstring.partition("\nAttributes:\n")
    found: dict[str, str] = {}
    name = None
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        if entry := _ENTRY.match(line):
            name = entry[1]
            found[name] = entry[2]
        elif name and line.strip():
            found[name] += f" {line.strip()}"
        else:
            name = None
    return found
