"""The payment service: moves money between its accounts, and never makes or destroys any."""

from __future__ import annotations

from typing import TYPE_CHECKING

from examples.saga.machine import CHARGE, REFUND, Event
from examples.saga.participant import Participant

if TYPE_CHECKING:
    from psycopg import Connection

    from examples.saga.messages import Order

SHOP = "shop"

SCHEMA = """
CREATE TABLE account (
    name  text PRIMARY KEY,
    cents bigint NOT NULL CHECK (cents >= 0)
);
"""

WITHDRAW = """
UPDATE account
SET cents = cents - %(cents)s
WHERE name = %(name)s AND cents >= %(cents)s
"""

DEPOSIT = """
UPDATE account
SET cents = cents + %(cents)s
WHERE name = %(name)s
"""


def charge(connection: Connection, order: Order) -> bool:
    """Let the customer pay, unless the money is not there."""
    return _transfer(connection, payer=order.customer, payee=SHOP, cents=order.cents)


def refund(connection: Connection, order: Order) -> None:
    """Give the money back."""
    if not _transfer(connection, payer=SHOP, payee=order.customer, cents=order.cents):
        raise LookupError(f"the shop lacks the {order.cents} cents of order {order.order_id}: put them in")


def _transfer(connection: Connection, *, payer: str, payee: str, cents: int) -> bool:
    if not connection.execute(WITHDRAW, {"name": payer, "cents": cents}).rowcount:
        return False
    if not connection.execute(DEPOSIT, {"name": payee, "cents": cents}).rowcount:
        raise LookupError(f"there is no account {payee!r}: open it")
    return True


PAYMENT = Participant(
    schema=SCHEMA,
    action=CHARGE,
    done=Event.CHARGED,
    refused=Event.CHARGE_REFUSED,
    do=charge,
    compensation=REFUND,
    undone=Event.REFUNDED,
    undo=refund,
)
