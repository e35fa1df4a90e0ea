"""Strict YAML: every key knows its file and line, and nothing is read as something else than it looks like.

Numbers and booleans follow YAML 1.2 (`1e-4` is a number; `off`, `yes` and `12:30` are text). Duplicate keys, anchors,
aliases and tags are refused: a recipe needs none, and each has cost somebody a run or a machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

MAX_DEPTH = 20
MAX_VALUES = 10_000
MAX_DIGITS = 100

_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float"))
_CORE = [
    (_NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    (_INT, r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        _FLOAT,
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
]
_UNUSABLE = re.compile("[\0\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Section(dict[str, Any]):
    """A map of a recipe that remembers where each of its keys stands.

    Attributes:
        places: key -> where it was written, such as ``recipes/x.yaml:7`` or ``command line``.
    """

    def __init__(self) -> None:
        """Make an empty section."""
        super().__init__()
        self.places: dict[str, str] = {}

    def put(self, key: str, value: object, place: str) -> None:
        """Set a key and where that was said."""
        self[key] = value
        self.places[key] = place


class NotYaml(Exception):
    """The text cannot be read at all.

    Attributes:
        line: where, from 1.
        reason: what is wrong there.
    """

    def __init__(self, line: int, reason: str) -> None:
        """Keep where and what."""
        super().__init__(f"line {line}: {reason}")
        self.line = line
        self.reason = reason


def parse(text: str, place: Callable[[int], str]) -> tuple[Any, list[str]]:
    """Return the value of a YAML document, its maps as `Section`, and one line for each key that stands there twice.

    Args:
        text: one YAML document.
        place: line number from 1 -> how a message names it.

    Raises:
        NotYaml: the text is no YAML, or uses what a recipe may not.
    """
    try:
        node = _Loader(text).get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise NotYaml(line, f"character #x{error.character:04x} is not allowed") from None
    except yaml.MarkedYAMLError as error:
        hint = "; indent with spaces" if error.problem and "'\\t'" in error.problem else ""
        mark = error.problem_mark or error.context_mark
        raise NotYaml(mark.line + 1 if mark else 1, f"not YAML: {error.problem or error.context}{hint}") from None
    except (ValueError, OverflowError) as error:  # an escape such as "\UFFFFFFFF", which PyYAML does not check
        raise NotYaml(1, f"not YAML: {error}") from None
    twice: list[str] = []
    return (None if node is None else _value(node, place, twice)), twice


def dump(value: dict[str, Any]) -> str:
    """Return the YAML text of plain values; `parse` gives them back, and so does a reader of YAML 1.1."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=119)


class _Loader(yaml.SafeLoader):
    """Composes nodes, refusing what is costly or surprising before anything is built from it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.values = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self.depth += 1
        self.values += 1
        for refused, what in (
            (isinstance(event, yaml.AliasEvent) or event.anchor, "anchors and aliases (& and *)"),
            (getattr(event, "tag", None), "tags (such as !!python)"),
            (self.depth > MAX_DEPTH, f"more than {MAX_DEPTH} levels"),
            (self.values > MAX_VALUES, f"more than {MAX_VALUES} values"),
        ):
            if refused:
                raise yaml.MarkedYAMLError(problem=f"a recipe may not use {what}", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or YAML 1.2 would read as something else."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_Loader.yaml_implicit_resolvers = {}  # none of YAML 1.1
for _tag, _pattern, _first in _CORE:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _first)


def _value(node: yaml.Node, place: Callable[[int], str], twice: list[str]) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, place, twice) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return _section(node, place, twice)
    return _scalar(node)


def _section(node: yaml.MappingNode, place: Callable[[int], str], twice: list[str]) -> Section:
    section = Section()
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise NotYaml(line, "a key must be text")
        key = _text(key_node)
        if key in section:
            twice.append(f"{place(line)}: {key} stands here twice, first at {section.places[key]}")
        else:
            section.put(key, _value(value_node, place, twice), place(line))
    return section


def _scalar(node: yaml.Node) -> Any:
    text = _text(node)
    if node.tag == _NULL:
        return None
    if node.tag == _BOOL:
        return text.lower() == "true"
    if node.tag == _INT:
        if len(text) > MAX_DIGITS:
            raise NotYaml(node.start_mark.line + 1, f"a number of {len(text)} digits")
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if node.tag == _FLOAT:
        return float(re.sub(r"\.(?=[inIN])", "", text))
    return text


def _text(node: yaml.Node) -> str:
    text = str(node.value)
    if _UNUSABLE.search(text):
        raise NotYaml(node.start_mark.line + 1, "text may not hold control characters, line separators or surrogates")
    return text
