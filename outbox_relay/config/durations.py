"""Durations as people write them."""

from __future__ import annotations

import re

MOST_SECONDS = 100 * 365 * 86_400.0  # with more, PostgreSQL's dates come to their end
_DURATION = re.compile(r"(\d+(?:\.\d+)?) ?([smhd]?)")
_SECONDS_OF_UNIT = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400}


def duration_seconds(text: str) -> float:
    """
    Give the seconds of *text*: a number, alone or with `s`, `m`, `h` or `d`, such as `36h`.

    Raises:
        ValueError: It is none.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no duration: write seconds, or a number with s, m, h or d, such as 7d")
    number, unit = match.groups()
    return float(number) * _SECONDS_OF_UNIT[unit]
