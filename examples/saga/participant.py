"""
How a service takes part in a saga: the rules that are the same for all, kept in one table.

A command may come twice, because it was repeated after a time-out: the inbox does not know it, but the order's row in
`step` does. A compensation may come before its action: it then leaves a row that makes the action refuse to happen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from examples.saga.messages import Order, reply_message
from outbox_relay.writer import Outbox

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from psycopg import Connection

    from examples.saga.machine import Command, Event
    from outbox_relay import writer
    from outbox_relay.consumer import Message

OUTBOX = Outbox()

STEP_SCHEMA = """
CREATE TABLE step (
    order_id uuid PRIMARY KEY,
    outcome  text NOT NULL CHECK (outcome IN ('done', 'refused', 'undone'))
);
"""

INSERT_STEP = """
INSERT INTO step (order_id, outcome)
VALUES (%s, %s)
ON CONFLICT (order_id) DO NOTHING
"""

SELECT_OUTCOME = """
SELECT outcome
FROM step
WHERE order_id = %s
"""

REFUSE_STEP = """
UPDATE step
SET outcome = 'refused'
WHERE order_id = %s
"""

UNDO_STEP = """
UPDATE step
SET outcome = 'undone'
WHERE order_id = %s AND outcome = 'done'
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Participant:
    """
    One service's step of the saga.

    Attributes:
        schema: Its own tables, created once.
        do: Does it and gives True; or gives False, and has changed nothing.
        undo: Takes back what *do* has done. It cannot refuse: an error rolls back, and the command is tried again.
    """

    schema: str
    action: Command
    done: Event
    refused: Event
    do: Callable[[Connection, Order], bool]
    compensation: Command
    undone: Event
    undo: Callable[[Connection, Order], None]

    def handle_commands(self, connection: Connection, messages: Sequence[Message]) -> None:
        """Carry out commands and write their replies, in one transaction with the inbox."""
        OUTBOX.write_many(connection, [self._carry_out(connection, message) for message in messages])

    def _carry_out(self, connection: Connection, message: Message) -> writer.Message:
        order = Order.of(message)
        carry_out = {self.action.name: self._act, self.compensation.name: self._compensate}[message.event_type]
        return reply_message(carry_out(connection, order), order)

    def _act(self, connection: Connection, order: Order) -> Event:
        is_first = connection.execute(INSERT_STEP, [order.order_id, "done"]).rowcount == 1
        if is_first and not self.do(connection, order):
            connection.execute(REFUSE_STEP, [order.order_id])
        [(outcome,)] = connection.execute(SELECT_OUTCOME, [order.order_id]).fetchall()
        return self.done if outcome == "done" else self.refused

    def _compensate(self, connection: Connection, order: Order) -> Event:
        connection.execute(INSERT_STEP, [order.order_id, "undone"])  # the tombstone, if the action has yet to come
        if connection.execute(UNDO_STEP, [order.order_id]).rowcount:
            self.undo(connection, order)
        return self.undone
