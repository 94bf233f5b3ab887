"""How a setting is called wherever a person reads it, and which one was probably meant."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

PREFIX = "OUTBOX_RELAY_"
REDACTED = "********"


def env_name(name: str) -> str:
    """Return the environment variable of the setting *name*, e.g. `lanes` or `kafka.linger.ms`."""
    field, dot, librdkafka_name = name.partition(".")
    return f"{PREFIX}{field}{'__' if dot else ''}{librdkafka_name.replace('.', '_')}".upper()


def did_you_mean(name: str, *, known: Iterable[str], prefix: str = "") -> str:
    """Return `; did you mean ...?` for the closest of *known*, shown after *prefix*, or nothing when none is close."""
    matches = get_close_matches(name, known, n=1)
    return f"; did you mean {prefix}{matches[0]}?" if matches else ""
