"""Small string tasks, drawn at random: the half of the built-in model's pre-training that is not documentation."""

from __future__ import annotations

import json
import random
from collections.abc import Callable


def _word(rng: random.Random) -> str:
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randrange(1, 4)))


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10 ** rng.randrange(1, 5)))


def _items(rng: random.Random) -> list[str]:
    return [rng.choice((_word, _number))(rng) for _ in range(rng.randrange(2, 6))]


def _repeat(rng: random.Random) -> tuple[str, str]:
    text = " ".join(_items(rng))
    return text, text


def _reverse(rng: random.Random) -> tuple[str, str]:
    items = _items(rng)
    return " ".join(items), " ".join(reversed(items))


def _last(rng: random.Random) -> tuple[str, str]:
    items = _items(rng)
    return " ".join(items), items[-1]


def _count(rng: random.Random) -> tuple[str, str]:
    items = _items(rng)
    return " ".join(items), str(len(items))


def _join(rng: random.Random) -> tuple[str, str]:
    items, separator = _items(rng), rng.choice("+_:&")
    return f"{' '.join(items)} with {separator}", separator.join(items)


def _upper_case(rng: random.Random) -> tuple[str, str]:
    text = " ".join(_word(rng) for _ in range(rng.randrange(1, 4)))
    return text, text.upper()


def _spell(rng: random.Random) -> tuple[str, str]:
    word = _word(rng)
    return word, " ".join(word)


def _sort(rng: random.Random) -> tuple[str, str]:
    digits = [str(rng.randrange(10)) for _ in range(rng.randrange(2, 6))]
    return " ".join(digits), " ".join(sorted(digits))


def _lookup(rng: random.Random) -> tuple[str, str]:
    keys = rng.sample("abcdefghijkl", rng.randrange(2, 6))
    values = {key: rng.choice((_word, _number))(rng) for key in keys}
    wanted = rng.choice(keys)
    return f"{wanted} in {', '.join(f'{key}={value}' for key, value in values.items())}", values[wanted]


def _json(rng: random.Random) -> tuple[str, str]:
    name, size = _word(rng), _number(rng)
    return f"name={name}, size={size}", json.dumps({"name": name, "size": int(size)})


def _zero_pad(rng: random.Random) -> tuple[str, str]:
    number, width = _number(rng), rng.randrange(2, 7)
    return f"{number} to {width}", number.zfill(width)


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "repeat": _repeat,
    "reverse": _reverse,
    "last": _last,
    "count": _count,
    "join": _join,
    "upper-case": _upper_case,
    "spell": _spell,
    "sort": _sort,
    "lookup": _lookup,
    "json": _json,
    "zero-pad": _zero_pad,
}


def string_task(rng: random.Random) -> tuple[str, str]:
    """Draw one string task; returns prompt, closed by a newline, and answer: ``reverse: ba 7`` and ``7 ba``."""
    name = rng.choice(list(TASKS))
    argument, answer = TASKS[name](rng)
    return f"{name}: {argument}\n", answer
