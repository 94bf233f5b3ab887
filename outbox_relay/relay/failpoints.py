"""Failpoints: named places in the loop at which a relay under test dies, freezes, fails or dawdles."""

from __future__ import annotations

import re
import signal
import threading
import time
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import TYPE_CHECKING, Final, Literal, ParamSpec, cast, get_args

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

Point = Literal[
    "before_claim",
    "after_claim",
    "after_read",
    "after_produce",
    "after_report",
    "before_settle",
    "before_record",
    "after_commit",
]
Action = Literal["kill", "stop", "raise", "sleep"]

_ENTRY = re.compile(
    r"(?P<point>\w+)=(?P<action>[a-z]+)(:(?P<seconds>\d+(\.\d+)?))?"
    r"(@((?P<visit>[1-9]\d*)|(?P<percent>\d+(\.\d+)?)%(:(?P<seed>\d+))?))?"
)
_Arguments = ParamSpec("_Arguments")


@dataclass(frozen=True, slots=True)
class Failpoint:
    """
    What is to happen at a point, and when.

    Attributes:
        seconds: For how long a sleep lasts.
        visit: The one time, counted over all lanes of the process, that it happens; 0 for any.
        chance: How likely it happens then.
        seed: Of the chance.
    """

    action: Action
    seconds: float = 0.0
    visit: int = 0
    chance: float = 1.0
    seed: int = 0


def parse_failpoints(text: str) -> dict[Point, Failpoint]:
    """
    Read `POINT=ACTION,...`: kill, stop, raise or sleep:SECONDS, then @N for the N-th time only, or @P% or @P%:SEED.

    Raises:
        ValueError: Something is none of that; it says what, and what would be.
    """
    failpoints: dict[Point, Failpoint] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        point, failpoint = _parse(entry)
        if point in failpoints:
            raise ValueError(f"{point!r} is given twice: leave one")
        failpoints[point] = failpoint
    return failpoints


def _parse(entry: str) -> tuple[Point, Failpoint]:
    found = _ENTRY.fullmatch(entry)
    if found is None:
        raise ValueError(f"{entry!r} is no failpoint: write POINT=ACTION, POINT=ACTION@N or POINT=ACTION@P%:SEED")
    point, action, seconds = found["point"], found["action"], found["seconds"]
    if point not in get_args(Point):
        raise ValueError(f"there is no failpoint {point!r}: use one of {', '.join(get_args(Point))}")
    if float(found["percent"] or 0) > 100:  # noqa: PLR2004 -- per cent
        raise ValueError(f"{entry!r} is likelier than certain: write @100% at most")
    if action not in get_args(Action) or (action == "sleep") != (seconds is not None):
        raise ValueError(f"{entry!r} does nothing known: use kill, stop, raise or sleep:SECONDS")
    return cast("Point", point), Failpoint(
        cast("Action", action),
        seconds=float(seconds or 0),
        visit=int(found["visit"] or 0),
        chance=float(found["percent"] or 100) / 100,
        seed=int(found["seed"] or 0),
    )


@dataclass(frozen=True, slots=True)
class _Armed:
    failpoint: Failpoint
    random: Random
    visits: Iterator[int] = field(default_factory=lambda: count(1))

    def is_due(self) -> bool:
        visit = next(self.visits)  # atomic, so that lanes need no lock
        return self.failpoint.visit in {0, visit} and self.random.random() < self.failpoint.chance


class Failpoints:
    """Those of one process. *tell* is called with point and action before anything happens."""

    def __init__(self, failpoints: Mapping[Point, Failpoint], *, tell: Callable[[Point, Action], None]) -> None:
        self._armed = {point: _Armed(each, Random(each.seed)) for point, each in failpoints.items()}  # noqa: S311 -- repeatable
        self._tell = tell

    def reach(self, point: Point) -> None:
        """Do what is armed at *point*, if anything."""
        armed = self._armed.get(point)
        if armed is not None and armed.is_due():
            self._tell(point, armed.failpoint.action)
            _do(armed.failpoint, point=point)

    def after(self, call: Callable[_Arguments, None], *, point: Point) -> Callable[_Arguments, None]:
        """Give *call* with *point* behind it: *call* itself if nothing is armed there, so that it costs nothing."""
        if point not in self._armed:
            return call

        def call_and_reach(*arguments: _Arguments.args, **named: _Arguments.kwargs) -> None:
            call(*arguments, **named)
            self.reach(point)

        return call_and_reach


DISARMED: Final = Failpoints({}, tell=lambda _point, _action: None)


def _do(failpoint: Failpoint, *, point: Point) -> None:
    """Let it happen, before the calling thread goes on: hence signals to the thread, which stop the whole process."""
    match failpoint.action:
        case "kill":
            signal.pthread_kill(threading.get_ident(), signal.SIGKILL)
        case "stop":
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        case "raise":
            raise RuntimeError(f"failpoint {point}")
        case "sleep":
            time.sleep(failpoint.seconds)
