"""What must be true in the end, whatever happened meanwhile: judged from the rows of the four databases alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import psycopg
from psycopg.rows import class_row

from examples.saga.machine import State
from examples.saga.messages import Order
from examples.saga.payment import SHOP

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from uuid import UUID

K = TypeVar("K")

SELECT_ORDERS = "SELECT order_id, customer, item, quantity, cents, address FROM orders ORDER BY order_id"
SELECT_STATES = "SELECT order_id, state FROM saga"
SELECT_ACCOUNTS = "SELECT name, cents FROM account"
SELECT_STOCK = "SELECT item, available, reserved FROM stock"
SELECT_SHIPMENTS = "SELECT order_id, address FROM shipment"


@dataclass(frozen=True, slots=True)
class Stock:
    """How many there are of an item."""

    available: int
    reserved: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    """What the four databases say, all read while nothing moves."""

    orders: Sequence[Order]
    states: Mapping[UUID, State]
    accounts: Mapping[str, int]
    stock: Mapping[str, Stock]
    shipments: Mapping[UUID, str]


def read_books(databases: Mapping[str, str]) -> Books:
    """Read the databases of the services, given by the services' names."""
    with (
        psycopg.connect(databases["orders"]) as orders,
        psycopg.connect(databases["payment"]) as payment,
        psycopg.connect(databases["inventory"]) as inventory,
        psycopg.connect(databases["shipping"]) as shipping,
        orders.cursor(row_factory=class_row(Order)) as order_rows,
    ):
        return Books(
            orders=order_rows.execute(SELECT_ORDERS).fetchall(),
            states={order_id: State(state) for order_id, state in orders.execute(SELECT_STATES)},
            accounts=dict(payment.execute(SELECT_ACCOUNTS).fetchall()),
            stock={item: Stock(*numbers) for item, *numbers in inventory.execute(SELECT_STOCK)},
            shipments=dict(shipping.execute(SELECT_SHIPMENTS).fetchall()),
        )


def violations(before: Books, after: Books) -> list[str]:
    """
    Say what is wrong with the books, in a sentence each; nothing when every saga has ended as it must.

    They are compared with what the completed orders, and no others, would have made of the books before.
    """
    completed = [order for order in after.orders if after.states.get(order.order_id) is State.COMPLETED]
    return [
        *_not_ended(after),
        *_differences("cents of", _accounts(before, completed), after.accounts),
        *_differences("stock of", _stock(before, completed), after.stock),
        *_differences("shipment of", {order.order_id: order.address for order in completed}, after.shipments),
    ]


def _not_ended(books: Books) -> Iterator[str]:
    for order in books.orders:
        state = books.states.get(order.order_id)
        if state not in (State.COMPLETED, State.COMPENSATED):
            yield f"order {order.order_id} is {state}"


def _accounts(before: Books, completed: Sequence[Order]) -> Mapping[str, int]:
    cents = Counter(before.accounts)
    for order in completed:
        cents[order.customer] -= order.cents
        cents[SHOP] += order.cents
    return cents


def _stock(before: Books, completed: Sequence[Order]) -> Mapping[str, Stock]:
    sold = Counter[str]()
    for order in completed:
        sold[order.item] += order.quantity
    return {
        item: Stock(stock.available - sold[item], stock.reserved + sold[item]) for item, stock in before.stock.items()
    }


def _differences(what: str, expected: Mapping[K, object], found: Mapping[K, object]) -> Iterator[str]:
    for name in expected.keys() | found.keys():
        if expected.get(name) != found.get(name):
            yield f"{what} {name}: {found.get(name)} instead of {expected.get(name)}"
