"""All of the saga on this machine: customers place orders, a service is killed, and the books are compared."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import TYPE_CHECKING
from uuid import UUID

import psycopg
from psycopg.rows import dict_row

from examples.parts import start_parts, start_processes
from examples.saga import orders
from examples.saga.deployment import create_databases, create_topics, processes
from examples.saga.messages import Order
from examples.saga.payment import SHOP
from examples.saga.shipping import UNREACHABLE
from examples.saga.verdict import read_books, violations
from outbox_relay.sandbox.waiting import eventually
from outbox_relay.transactions import transact

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ORDERS = 30
PATIENCE_SECONDS = 60.0

ACCOUNTS = {SHOP: 0, "ada": 1_000_000, "ben": 1_000_000, "cem": 1_000_000, "dora": 15_000}
ITEMS = {"book": 10_000, "chair": 10_000, "lamp": 10_000, "unicorn": 5}
ADDRESSES = ["Berlin", "Lagos", "Quito", "Hanoi", "Turku", UNREACHABLE]


def run_demo(say: Callable[[str], None]) -> bool:
    """Run it all for about ten seconds, leave nothing behind, and tell whether the books are right."""
    with start_parts(say) as parts:
        databases = create_databases(parts.server)
        create_topics(parts.kafka)
        open_books(databases)
        before = read_books(databases)
        say(f"PostgreSQL has four databases; the sagas are in {databases['orders']!r}.")
        plan = processes(databases, bootstrap_servers=parts.kafka.bootstrap_servers)
        with start_processes(plan, directory=parts.directory, say=say) as running:
            say(f"{len(running)} processes run. Customers place orders, and some cannot be fulfilled.")
            random = Random()  # noqa: S311 -- a demo
            _place_orders(databases["orders"], random)
            _await_ends(databases["orders"])
            running["payment"].kill()
            say("The payment service is killed with kill -9; customers go on.")
            _place_orders(databases["orders"], random)
            running["payment"].start()
            say("It is back.")
            _await_ends(databases["orders"])
        say(", ".join(f"{number} {name}" for name, number in overview(databases["orders"]).items()))
        wrong = violations(before, read_books(databases))
        say("\n".join(wrong) or "Money, stock and shipments are what the completed orders make of them.")
        return not wrong


def open_books(databases: Mapping[str, str]) -> None:
    """Put money into the accounts, and items on the shelves."""
    with psycopg.connect(databases["payment"]) as connection, connection.cursor() as cursor:
        cursor.executemany("INSERT INTO account (name, cents) VALUES (%s, %s)", ACCOUNTS.items())
    with psycopg.connect(databases["inventory"]) as connection, connection.cursor() as cursor:
        cursor.executemany("INSERT INTO stock (item, available) VALUES (%s, %s)", ITEMS.items())


def random_order(random: Random) -> Order:
    """Draw an order: one customer is short of money, one item is rare, and one address out of reach."""
    return Order(
        order_id=UUID(int=random.getrandbits(128), version=4),
        customer=random.choice([name for name in ACCOUNTS if name != SHOP]),
        item=random.choice(list(ITEMS)),
        quantity=random.randint(1, 3),
        cents=random.randint(1_000, 5_000),
        address=random.choice(ADDRESSES),
    )


def place(database: str, order: Order) -> None:
    """Place *order* as a customer does."""
    transact(partial(psycopg.connect, database), lambda connection: orders.place(connection, order))


def overview(database: str) -> dict[str, int]:
    """Count the sagas: started, completed, compensated, running, and those of the running that are stuck."""
    with psycopg.connect(database, row_factory=dict_row) as connection:
        return connection.execute("SELECT * FROM saga_overview").fetchall()[0]


def _place_orders(database: str, random: Random) -> None:
    for _ in range(ORDERS):
        place(database, random_order(random))


def _await_ends(database: str) -> None:
    eventually(
        lambda: overview(database)["running"] == 0,
        timeout=PATIENCE_SECONDS,
        message="some sagas have not ended",
    )
