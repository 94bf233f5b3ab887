"""Waiting for a condition with a deadline: a fixed sleep is either too short or too long."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

LOOK_INTERVAL_SECONDS = 0.02


def eventually(
    condition: Callable[[], T], *, timeout: float = 30.0, message: str = "the condition did not come true"
) -> T:
    """
    The first true value of *condition*, which is looked at every 20 ms.

    Raises:
        TimeoutError: It stayed false for *timeout* seconds; says *message* and the last value.
    """
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{message} within {timeout:g} s (last seen: {value!r})")
        time.sleep(LOOK_INTERVAL_SECONDS)
    return value
