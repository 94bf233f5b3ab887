"""The inventory service: sets items aside for an order."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from examples.saga.machine import RELEASE, RESERVE, Event
from examples.saga.participant import Participant

if TYPE_CHECKING:
    from psycopg import Connection

    from examples.saga.messages import Order

SCHEMA = """
CREATE TABLE stock (
    item      text PRIMARY KEY,
    available integer NOT NULL CHECK (available >= 0),
    reserved  integer NOT NULL DEFAULT 0 CHECK (reserved >= 0)
);
"""

SET_ASIDE = """
UPDATE stock
SET available = available - %(quantity)s,
    reserved = reserved + %(quantity)s
WHERE item = %(item)s AND available >= %(quantity)s
"""

PUT_BACK = """
UPDATE stock
SET available = available + %(quantity)s,
    reserved = reserved - %(quantity)s
WHERE item = %(item)s
"""


def reserve(connection: Connection, order: Order) -> bool:
    """Set the items aside, unless there are too few."""
    return connection.execute(SET_ASIDE, asdict(order)).rowcount == 1


def release(connection: Connection, order: Order) -> None:
    """Put the items back."""
    connection.execute(PUT_BACK, asdict(order))


INVENTORY = Participant(
    schema=SCHEMA,
    action=RESERVE,
    done=Event.RESERVED,
    refused=Event.RESERVE_REFUSED,
    do=reserve,
    compensation=RELEASE,
    undone=Event.RELEASED,
    undo=release,
)
