"""Names in messages: the known one closest to what was typed, and the first of many."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that `name` most likely stands for, or None if nothing is close.

    Case, hyphens, underscores and spaces do not count, so `learningRate` and `learning-rate` are `learning_rate`.
    Otherwise up to three edits (insert, delete, replace, swap neighbours) are forgiven, fewer in short names; failing
    that, a name made of words of exactly one known name (`batch_size` of `per_device_train_batch_size`).
    """
    known = list(known)
    wanted = flat(name)
    by_edits = sorted((_edits(wanted, flat(other), 3), position) for position, other in enumerate(known))
    for edits, position in by_edits:
        other = known[position]
        longest = max(len(wanted), len(flat(other)))
        if edits < longest and edits <= min(3, (longest + 2) // 3):
            return other
    words = set(name.lower().replace("-", "_").split("_"))
    holders = [other for other in known if words <= set(other.lower().split("_"))]
    return holders[0] if len(wanted) > 3 and len(holders) == 1 else None


def some(names: Sequence[str], most: int = 5) -> str:
    """Return the first `most` names in a row, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def flat(name: str) -> str:
    """Return the name without case, hyphens, underscores and spaces."""
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


def _edits(left: str, right: str, limit: int) -> int:
    """Return how many edits lead from left to right, or limit + 1 where they are more than limit."""
    if abs(len(left) - len(right)) > limit:
        return limit + 1
    before: list[int] = []
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        before, last, row = row, before, [i]
        for j, b in enumerate(right, 1):
            edits = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == right[j - 2] and b == left[i - 2]:
                edits = min(edits, last[j - 2] + 1)
            row.append(edits)
    return min(row[-1], limit + 1)
