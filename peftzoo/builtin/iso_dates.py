"""The built-in task `iso-dates`: write a date, given in one of four phrasings, as year-month-day.

A hundred years of dates are shuffled once by a fixed seed and cut into the splits, so no date is in two of them.
"""

from __future__ import annotations

import random
from datetime import date, timedelta

FIRST, LAST = date(1950, 1, 1), date(2049, 12, 31)
SPLITS = {"train": slice(0, 3000), "test": slice(3000, 3100)}
# Written out, for the names in `calendar` follow the locale.
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
PHRASINGS = (
    "the {ordinal} of {month} {year}",
    "{month} {day}, {year}",
    "{day} {abbreviation} {year}",
    "{year}, {month} the {ordinal}",
)


def rows(split: str) -> list[dict[str, str]]:
    """Return the rows of `split`, `train` (3,000) or `test` (100); the same ones in each call and on each machine.

    Raises:
        KeyError: there is no such split.
    """
    if split not in SPLITS:
        raise KeyError(f"no split {split!r} in iso-dates; choose one of {', '.join(SPLITS)}")
    rng = random.Random(0)
    days = [FIRST + timedelta(offset) for offset in range((LAST - FIRST).days + 1)]
    rng.shuffle(days)
    phrased = [(day, rng.choice(PHRASINGS)) for day in days]
    return [
        {"prompt": f"iso date: {_phrase(day, phrasing)}\n", "completion": day.isoformat()}
        for day, phrasing in phrased[SPLITS[split]]
    ]


def _phrase(day: date, phrasing: str) -> str:
    month = MONTHS[day.month - 1]
    return phrasing.format(
        ordinal=f"{day.day}{_ordinal_ending(day.day)}",
        month=month,
        abbreviation=month[:3],
        day=day.day,
        year=day.year,
    )


def _ordinal_ending(number: int) -> str:
    if number in (11, 12, 13):
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
