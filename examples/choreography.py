"""
A smaller flow without an orchestrator: an order is placed, invoiced, rewarded with points, and marked as invoiced.

    shop --order_placed--> billing --invoice_issued--> loyalty
      ^                                    |
      +------------------------------------+

Each service reacts to what another one tells, in a transaction of its own database, and tells what it has done. None of
them knows the whole, and none can tell whether an order has gone all the way: where that matters, or where a failure
has to be taken back, see `examples.saga`.

`python -m examples.choreography` runs all of it on this machine.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import TYPE_CHECKING

import psycopg

from examples.parts import create_database, relay, service, start_parts, start_processes
from outbox_relay.consumer import Inbox
from outbox_relay.consumer.kafka import Consumer
from outbox_relay.sandbox.waiting import eventually
from outbox_relay.writer import Message, Outbox

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from examples.parts import Process
    from outbox_relay import consumer

OUTBOX = Outbox()
TOPIC_TEMPLATE = "{aggregate_type}.events"  # the relay's default
PARTITIONS = 3
ORDERS = 20
CENTS = 1_250


@dataclass(frozen=True, slots=True)
class Service:
    """A service, its own tables, and how it reacts to one message of the topic that it listens to."""

    schema: str
    listens_to: str
    react: Callable[[psycopg.Connection, consumer.Message], None]


def place_order(connection: psycopg.Connection, order_id: int, *, customer: str, cents: int) -> None:
    """Take an order, and tell whoever wants to know."""
    connection.execute("INSERT INTO orders (id, customer, cents) VALUES (%s, %s, %s)", [order_id, customer, cents])
    order = {"order_id": order_id, "customer": customer, "cents": cents}
    OUTBOX.write(
        connection,
        Message(aggregate_type="order", aggregate_id=str(order_id), event_type="order_placed", payload=order),
    )


def issue_invoice(connection: psycopg.Connection, message: consumer.Message) -> None:
    """Billing: an order that was placed gets an invoice."""
    order = json.loads(message.payload or b"")
    insert = "INSERT INTO invoice (order_id, cents) VALUES (%(order_id)s, %(cents)s) RETURNING number"
    [(number,)] = connection.execute(insert, order).fetchall()
    OUTBOX.write(
        connection,
        Message(
            aggregate_type="invoice",
            aggregate_id=str(number),
            event_type="invoice_issued",
            payload={**order, "invoice": number},
        ),
    )


def grant_points(connection: psycopg.Connection, message: consumer.Message) -> None:
    """Loyalty: a customer gets a point for every whole euro on an invoice."""
    invoice = json.loads(message.payload or b"")
    connection.execute(
        "INSERT INTO account (customer, points) VALUES (%(customer)s, %(points)s) "
        "ON CONFLICT (customer) DO UPDATE SET points = account.points + excluded.points",
        {"customer": invoice["customer"], "points": invoice["cents"] // 100},
    )


def mark_invoiced(connection: psycopg.Connection, message: consumer.Message) -> None:
    """Shop: the order shows the number of its invoice."""
    invoice = json.loads(message.payload or b"")
    connection.execute("UPDATE orders SET invoice = %(invoice)s WHERE id = %(order_id)s", invoice)


SERVICES: Mapping[str, Service] = {
    "shop": Service(
        "CREATE TABLE orders (id integer PRIMARY KEY, customer text NOT NULL, cents bigint NOT NULL, invoice integer)",
        "invoice.events",
        mark_invoiced,
    ),
    "billing": Service(
        "CREATE TABLE invoice (number integer GENERATED ALWAYS AS IDENTITY, order_id integer UNIQUE, cents bigint)",
        "order.events",
        issue_invoice,
    ),
    "loyalty": Service(
        "CREATE TABLE account (customer text PRIMARY KEY, points bigint NOT NULL)",
        "invoice.events",
        grant_points,
    ),
}


def run_service(name: str) -> None:
    """Be one of SERVICES until SIGTERM."""
    logging.basicConfig(level=logging.INFO)
    this, stop = SERVICES[name], Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())

    def react_to_all(connection: psycopg.Connection, messages: Sequence[consumer.Message]) -> None:
        for message in messages:
            this.react(connection, message)

    Consumer(
        {"bootstrap.servers": os.environ["KAFKA_BOOTSTRAP_SERVERS"], "group.id": name},
        [this.listens_to],
        connect=partial(psycopg.connect, os.environ["DATABASE_URL"]),
        inbox=Inbox(name),
        handle=react_to_all,
    ).run(stop)


def run_all(say: Callable[[str], None]) -> dict[str, int]:
    """Run the services and their relays, place orders, and count what has come of them in the three databases."""
    with start_parts(say) as parts:
        for topic in ("order.events", "invoice.events"):
            parts.kafka.create_topic(topic, partitions=PARTITIONS)
        databases = {name: create_database(parts.server, name, schema=each.schema) for name, each in SERVICES.items()}
        processes = _processes(databases, bootstrap_servers=parts.kafka.bootstrap_servers)
        with start_processes(processes, directory=parts.directory, say=say):
            with psycopg.connect(databases["shop"]) as connection:
                for number in range(1, ORDERS + 1):
                    place_order(connection, number, customer="ada", cents=CENTS)
                    connection.commit()
            say(f"{ORDERS} orders are placed; now each service reacts to what it hears.")
            expected = {"orders invoiced": ORDERS, "invoices": ORDERS, "points": ORDERS * (CENTS // 100)}
            eventually(lambda: _counts(databases) == expected, message="not everything has happened")
        return _counts(databases)


def _processes(databases: Mapping[str, str], *, bootstrap_servers: str) -> dict[str, Process]:
    services = {
        name: service("examples.choreography", name, database=database, bootstrap_servers=bootstrap_servers)
        for name, database in databases.items()
    }
    relays = {
        f"{name} relay": relay(databases[name], bootstrap_servers=bootstrap_servers, topic_template=TOPIC_TEMPLATE)
        for name in ("shop", "billing")  # loyalty tells nobody anything
    }
    return services | relays


def _counts(databases: Mapping[str, str]) -> dict[str, int]:
    return {
        "orders invoiced": _number(databases["shop"], "SELECT count(invoice) FROM orders"),
        "invoices": _number(databases["billing"], "SELECT count(*) FROM invoice"),
        "points": _number(databases["loyalty"], "SELECT coalesce(sum(points), 0)::integer FROM account"),
    }


def _number(database: str, query: str) -> int:
    with psycopg.connect(database) as connection:
        [(number,)] = connection.execute(query.encode()).fetchall()
    return int(number)


if __name__ == "__main__":
    if sys.argv[1:]:
        run_service(sys.argv[1])
    else:
        for name, number in run_all(print).items():
            print(f"{name:16}{number:6,}")
