"""
The orders service: takes orders, and leads each one's saga through its states.

The state is changed and the next command written in one transaction, under the lock of the saga's row. So a crash
leaves either both or neither, and commands to a service leave in the order in which they were decided.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING
from uuid import UUID

from psycopg.rows import class_row

from examples.saga.machine import Event, State, Transition, decide, start
from examples.saga.messages import Order, command_message
from outbox_relay.writer import Outbox

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg import Connection

    from outbox_relay.consumer import Message

OUTBOX = Outbox()

SCHEMA = """
CREATE TABLE orders (
    order_id  uuid PRIMARY KEY,
    customer  text NOT NULL,
    item      text NOT NULL,
    quantity  integer NOT NULL,
    cents     bigint NOT NULL,
    address   text NOT NULL,
    placed_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE saga (
    order_id     uuid PRIMARY KEY REFERENCES orders,
    state        text NOT NULL,
    entered_at   timestamptz NOT NULL,  -- when the state was, however often its command was repeated since
    step_timeout interval,              -- NULL, as the deadline, when the saga has ended
    deadline     timestamptz
);

CREATE INDEX saga_deadline_idx ON saga (deadline) WHERE deadline IS NOT NULL;

CREATE TABLE saga_history (
    order_id uuid NOT NULL REFERENCES saga,
    number   bigint GENERATED ALWAYS AS IDENTITY,
    at       timestamptz NOT NULL DEFAULT now(),
    event    text NOT NULL,
    state    text NOT NULL,  -- after the event: the same as before when nobody waited for it
    PRIMARY KEY (order_id, number)
);

-- A saga whose command was repeated four times without an answer needs somebody to look at it.
CREATE VIEW saga_status AS
SELECT
    order_id,
    state,
    entered_at,
    deadline IS NOT NULL AS is_running,
    coalesce(now() > entered_at + 5 * step_timeout, false) AS is_stuck
FROM saga;

CREATE VIEW saga_overview AS
SELECT
    count(*) AS started,
    count(*) FILTER (WHERE state = 'completed') AS completed,
    count(*) FILTER (WHERE state = 'compensated') AS compensated,
    count(*) FILTER (WHERE is_running) AS running,
    count(*) FILTER (WHERE is_stuck) AS stuck
FROM saga_status;
"""

INSERT_ORDER = """
INSERT INTO orders (order_id, customer, item, quantity, cents, address)
VALUES (%(order_id)s, %(customer)s, %(item)s, %(quantity)s, %(cents)s, %(address)s)
ON CONFLICT (order_id) DO NOTHING
"""

SELECT_ORDER = """
SELECT order_id, customer, item, quantity, cents, address
FROM orders
WHERE order_id = %s
"""

INSERT_SAGA = """
INSERT INTO saga (order_id, state, entered_at, step_timeout, deadline)
VALUES (%(order_id)s, %(state)s, now(), %(timeout)s, now() + %(timeout)s)
"""

LOCK_SAGA = """
SELECT state
FROM saga
WHERE order_id = %s
FOR UPDATE
"""

UPDATE_SAGA = """
UPDATE saga
SET state = %(state)s,
    entered_at = CASE WHEN state = %(state)s THEN entered_at ELSE now() END,
    step_timeout = %(timeout)s,
    deadline = now() + %(timeout)s
WHERE order_id = %(order_id)s
"""

INSERT_HISTORY = """
INSERT INTO saga_history (order_id, event, state)
VALUES (%s, %s, %s)
"""

LOCK_OVERDUE = """
SELECT order_id
FROM saga
WHERE deadline < now()
ORDER BY deadline
LIMIT 100
FOR UPDATE SKIP LOCKED
"""


def place(connection: Connection, order: Order) -> None:
    """Take *order* and begin its saga; an order that was taken before is left as it is, so this may be repeated."""
    if connection.execute(INSERT_ORDER, asdict(order)).rowcount:
        _enter(connection, order, start(), statement=INSERT_SAGA)


def handle_replies(connection: Connection, messages: Sequence[Message]) -> None:
    """Let the services' answers move the sagas on."""
    for message in messages:
        advance(connection, UUID(message.key), Event(message.event_type))


def expire(connection: Connection) -> int:
    """Let the oldest overdue sagas time out and give their number; several timers may do so at once."""
    overdue = connection.execute(LOCK_OVERDUE).fetchall()
    for (order_id,) in overdue:
        advance(connection, order_id, Event.TIMED_OUT)
    return len(overdue)


def advance(connection: Connection, order_id: UUID, event: Event) -> None:
    """Move a saga on by one event, or note that nobody waited for it."""
    [(locked,)] = connection.execute(LOCK_SAGA, [order_id]).fetchall()
    state = State(locked)
    transition = decide(state, event)
    if transition:
        state = transition.state
        _enter(connection, _order(connection, order_id), transition, statement=UPDATE_SAGA)
    connection.execute(INSERT_HISTORY, [order_id, event, state])


def _enter(connection: Connection, order: Order, transition: Transition, *, statement: str) -> None:
    """Store the new state, and write its command into the outbox of the same transaction."""
    parameters = {"order_id": order.order_id, "state": transition.state, "timeout": transition.timeout}
    connection.execute(statement, parameters)
    if transition.command:
        OUTBOX.write(connection, command_message(transition.command, order))


def _order(connection: Connection, order_id: UUID) -> Order:
    with connection.cursor(row_factory=class_row(Order)) as cursor:
        return cursor.execute(SELECT_ORDER, [order_id]).fetchall()[0]
