"""The result of one check: what was found, how bad it is, and what mends it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["OK", "WARN", "FAIL"]


@dataclass(frozen=True, slots=True)
class Check:
    """
    One check of the doctor.

    Attributes:
        status: FAIL: messages are or will be held up, parked or out of order. WARN: it works, and somebody
            should know.
        remedy: To be pasted: statements into psql if it ends in a semicolon, else a command into a shell. What only a
            person can do begins with `#`. Empty if there is nothing to do.
    """

    name: str
    status: Verdict
    finding: str
    remedy: str = ""


def duration(seconds: float) -> str:
    """Give *seconds* as people say it."""
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.1f} s"
