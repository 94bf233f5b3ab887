"""
A small shop, the demo's application: each order is stored and announced in one transaction.

The writers make it hard on purpose: their transactions overlap, stay open for random times, share customers without a
lock, and one in eight is rolled back after it has written everything.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import TYPE_CHECKING

import psycopg

from outbox_relay.sandbox.history import Outcome, Write, digest, expected_headers

if TYPE_CHECKING:
    from random import Random
    from threading import Event

AGGREGATE_TYPE = "customer"
EVENT_TYPE = "order_placed"
CUSTOMERS = 50
ROLLBACK_SHARE = 1 / 8
LONGEST_HOLD_SECONDS = 0.02

CREATE_ORDERS = """
CREATE TABLE orders (
    id          uuid PRIMARY KEY,
    customer_id text NOT NULL,
    cents       integer NOT NULL,
    placed_at   timestamptz NOT NULL DEFAULT now()
)
"""

INSERT_ORDER = """
INSERT INTO orders (id, customer_id, cents)
VALUES (%(order_id)s, %(customer_id)s, %(cents)s)
"""

INSERT_MESSAGE = """
INSERT INTO outbox (message_id, aggregate_type, aggregate_id, event_type, payload)
VALUES (%(message_id)s, %(aggregate_type)s, %(customer_id)s, %(event_type)s, %(payload)s)
"""


def create_orders(dsn: str) -> None:
    """Create the shop's own table."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(CREATE_ORDERS)


def write_orders(dsn: str, *, per_second: float, stop: Event, random: Random) -> list[Write]:
    """
    Be one writer: place orders at about *per_second* until *stop* is set, and return what became of each.

    Raises:
        psycopg.Error: The database refused; what was written until then is not reported.
    """
    writes = []
    due = time.monotonic()
    with psycopg.connect(dsn, autocommit=True, application_name="outbox-relay demo shop") as connection:
        while not stop.wait(max(0.0, due - time.monotonic())):
            writes.append(_place_order(connection, random=random))
            due += random.expovariate(per_second)
    return writes


def _place_order(connection: psycopg.Connection, *, random: Random) -> Write:
    """Insert the order and its message, dawdle, and commit or roll back."""
    order = _new_order(random)
    is_rolled_back = random.random() < ROLLBACK_SHARE
    with connection.transaction(force_rollback=is_rolled_back):
        connection.execute(INSERT_ORDER, order)
        connection.execute(INSERT_MESSAGE, order)
        time.sleep(random.uniform(0, LONGEST_HOLD_SECONDS))
    return Write(
        message_id=order["message_id"],
        key=order["customer_id"],
        digest=digest(order["payload"].encode()),
        outcome=Outcome.ROLLED_BACK if is_rolled_back else Outcome.COMMITTED,
        ended_at=time.monotonic(),
        headers=expected_headers(order["message_id"], aggregate_type=AGGREGATE_TYPE, event_type=EVENT_TYPE),
    )


def _new_order(random: Random) -> dict[str, str]:
    """Draw an order; its payload is JSON as jsonb prints it, shorter keys first, so that bytes can be compared."""
    order_id, message_id = (str(uuid.UUID(int=random.getrandbits(128))) for _ in range(2))
    customer_id = f"c{random.randrange(CUSTOMERS)}"
    cents = random.randrange(100, 100_000)
    return {
        "order_id": order_id,
        "customer_id": customer_id,
        "cents": str(cents),
        "message_id": message_id,
        "aggregate_type": AGGREGATE_TYPE,
        "event_type": EVENT_TYPE,
        "payload": json.dumps({"cents": cents, "order_id": order_id, "customer_id": customer_id}),
    }
