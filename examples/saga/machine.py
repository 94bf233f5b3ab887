"""
The saga of an order as a state machine: pure, so that every history of it can be tested.

    charging --> reserving --> shipping --> completed
       |             |             |
       v             v             v
    compensated <-- refunding <-- releasing <-- cancelling

A step that is refused has changed nothing, so the steps before it are taken back. A step that is not answered in time
may have happened or may happen yet, so it is taken back as well. Taking back is never refused: it is repeated until it
is confirmed. Whatever comes when nobody waits for it any more changes nothing, because what takes it back is on its
way already.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

STEP_TIMEOUT: Final = timedelta(seconds=5)


class State(StrEnum):
    """What the saga waits for, or how it has ended."""

    CHARGING = "charging"
    RESERVING = "reserving"
    SHIPPING = "shipping"
    COMPLETED = "completed"
    CANCELLING = "cancelling"
    RELEASING = "releasing"
    REFUNDING = "refunding"
    COMPENSATED = "compensated"


class Event(StrEnum):
    """What a service answers, or the passing of the deadline."""

    CHARGED = "charged"
    CHARGE_REFUSED = "charge_refused"
    REFUNDED = "refunded"
    RESERVED = "reserved"
    RESERVE_REFUSED = "reserve_refused"
    RELEASED = "released"
    SHIPPED = "shipped"
    SHIP_REFUSED = "ship_refused"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"


@dataclass(frozen=True, slots=True)
class Command:
    """What a service is told to do for an order."""

    service: str
    name: str


CHARGE: Final = Command("payment", "charge")
REFUND: Final = Command("payment", "refund")
RESERVE: Final = Command("inventory", "reserve")
RELEASE: Final = Command("inventory", "release")
SHIP: Final = Command("shipping", "ship")
CANCEL: Final = Command("shipping", "cancel")

COMMANDS: Final[Mapping[State, Command]] = {
    State.CHARGING: CHARGE,
    State.RESERVING: RESERVE,
    State.SHIPPING: SHIP,
    State.CANCELLING: CANCEL,
    State.RELEASING: RELEASE,
    State.REFUNDING: REFUND,
}
"""Sent when a state is entered; a state without one is an end."""

NEXT_STATES: Final[Mapping[tuple[State, Event], State]] = {
    (State.CHARGING, Event.CHARGED): State.RESERVING,
    (State.CHARGING, Event.CHARGE_REFUSED): State.COMPENSATED,
    (State.CHARGING, Event.TIMED_OUT): State.REFUNDING,
    (State.RESERVING, Event.RESERVED): State.SHIPPING,
    (State.RESERVING, Event.RESERVE_REFUSED): State.REFUNDING,
    (State.RESERVING, Event.TIMED_OUT): State.RELEASING,
    (State.SHIPPING, Event.SHIPPED): State.COMPLETED,
    (State.SHIPPING, Event.SHIP_REFUSED): State.RELEASING,
    (State.SHIPPING, Event.TIMED_OUT): State.CANCELLING,
    (State.CANCELLING, Event.CANCELLED): State.RELEASING,
    (State.CANCELLING, Event.TIMED_OUT): State.CANCELLING,
    (State.RELEASING, Event.RELEASED): State.REFUNDING,
    (State.RELEASING, Event.TIMED_OUT): State.RELEASING,
    (State.REFUNDING, Event.REFUNDED): State.COMPENSATED,
    (State.REFUNDING, Event.TIMED_OUT): State.REFUNDING,
}


@dataclass(frozen=True, slots=True)
class Transition:
    """The state to enter, the command to send, and how long to wait for its answer; both None at the end."""

    state: State
    command: Command | None
    timeout: timedelta | None


def start() -> Transition:
    """Give how a saga begins."""
    return _entering(State.CHARGING)


def decide(state: State, event: Event) -> Transition | None:
    """Give what *event* leads to, None when nobody waits for it in *state*: it is late, or a repetition."""
    following = NEXT_STATES.get((state, event))
    return _entering(following) if following else None


def _entering(state: State) -> Transition:
    command = COMMANDS.get(state)
    return Transition(state, command, STEP_TIMEOUT if command else None)
