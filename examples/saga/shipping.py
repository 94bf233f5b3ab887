"""The shipping service: plans a shipment to wherever it can go."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from examples.saga.machine import CANCEL, SHIP, Event
from examples.saga.participant import Participant

if TYPE_CHECKING:
    from psycopg import Connection

    from examples.saga.messages import Order

UNREACHABLE = "Atlantis"

SCHEMA = """
CREATE TABLE shipment (
    order_id uuid PRIMARY KEY,
    address  text NOT NULL
);
"""

INSERT_SHIPMENT = """
INSERT INTO shipment (order_id, address)
VALUES (%(order_id)s, %(address)s)
"""

DELETE_SHIPMENT = """
DELETE FROM shipment
WHERE order_id = %s
"""


def ship(connection: Connection, order: Order) -> bool:
    """Plan the shipment, unless nobody can get there."""
    if order.address == UNREACHABLE:
        return False
    connection.execute(INSERT_SHIPMENT, asdict(order))
    return True


def cancel(connection: Connection, order: Order) -> None:
    """Take the shipment off the plan."""
    connection.execute(DELETE_SHIPMENT, [order.order_id])


SHIPPING = Participant(
    schema=SCHEMA,
    action=SHIP,
    done=Event.SHIPPED,
    refused=Event.SHIP_REFUSED,
    do=ship,
    compensation=CANCEL,
    undone=Event.CANCELLED,
    undo=cancel,
)
