"""The saga's services on real databases, joined by a network that keeps no order and repeats what it likes."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import uuid
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, cast

import psycopg
import pytest
from psycopg import sql

from examples.saga import orders
from examples.saga.demo import ACCOUNTS, open_books, overview, random_order
from examples.saga.deployment import create_databases
from examples.saga.machine import Event, State
from examples.saga.messages import REPLIES, Order
from examples.saga.participant import INSERT_STEP, UNDO_STEP, Participant
from examples.saga.payment import PAYMENT
from examples.saga.service import PARTICIPANTS
from examples.saga.verdict import read_books, violations
from outbox_relay.consumer import Message

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg.rows import TupleRow

    from outbox_relay.sandbox.postgres import PostgresServer

PAGE = (Path(__file__).parents[2] / "docs" / "sagas.md").read_text(encoding="utf-8")
[STUCK] = re.findall(r"^```sql\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)

ORDERS = 60
TIME_OUT_SHARE = 0.1
REPEAT_SHARE = 0.3

TAKE_SENT = """
DELETE FROM outbox
RETURNING aggregate_type, aggregate_id, event_type, payload::text, message_id, sequence_no
"""


class Network:
    """Takes what the services write into their outboxes and hands it over as it likes, past every inbox."""

    def __init__(self, connections: dict[str, psycopg.Connection[TupleRow]], *, random: Random) -> None:
        self.connections = connections
        self.under_way: list[Message] = []
        self._random = random

    def collect(self) -> None:
        for name, connection in self.connections.items():
            sent = connection.execute(TAKE_SENT).fetchall()
            connection.commit()
            self.under_way += [delivered(*row, source=name) for row in sent]

    def deliver_any(self) -> None:
        """One message, chosen at random; some of them stay under way and come again."""
        message = self._random.choice(self.under_way)
        if self._random.random() > REPEAT_SHARE:
            self.under_way.remove(message)
        self.deliver(message)

    def deliver(self, message: Message) -> None:
        name = "orders" if message.aggregate_type == REPLIES else message.aggregate_type.removesuffix("-command")
        handle = orders.handle_replies if name == "orders" else PARTICIPANTS[name].handle_commands
        with self.connections[name].transaction():
            handle(self.connections[name], [message])
        self.collect()

    def deliver_all(self) -> None:
        while self.under_way:
            self.deliver_any()

    def time_out(self, order_id: uuid.UUID) -> None:
        with self.connections["orders"].transaction():
            orders.advance(self.connections["orders"], order_id, Event.TIMED_OUT)
        self.collect()

    def running(self) -> list[uuid.UUID]:
        query = "SELECT order_id FROM saga_status WHERE is_running ORDER BY order_id"
        found = self.connections["orders"].execute(query).fetchall()
        self.connections["orders"].commit()
        return [order_id for (order_id,) in found]


def delivered(  # noqa: PLR0917 -- the columns of TAKE_SENT
    aggregate_type: str,
    key: str,
    event_type: str,
    payload: str,
    message_id: uuid.UUID,
    sequence_no: int,
    *,
    source: str,
) -> Message:
    return Message(
        message_id=message_id,
        source=source,
        sequence_no=sequence_no,
        aggregate_type=aggregate_type,
        event_type=event_type,
        key=key,
        payload=payload.encode(),
        headers={},
        created_at=datetime.now(UTC),
        topic=aggregate_type,
        partition=0,
        offset=sequence_no,
    )


@pytest.fixture
def databases(postgres: PostgresServer) -> Iterator[dict[str, str]]:
    prefix = f"saga_{uuid.uuid4().hex[:8]}_"
    created = create_databases(postgres.dsn(), prefix=prefix)
    open_books(created)
    yield created
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        for name in created:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(prefix + name)))


@pytest.fixture
def network(databases: dict[str, str]) -> Iterator[Network]:
    with ExitStack() as stack:
        connections = {name: stack.enter_context(psycopg.connect(dsn)) for name, dsn in databases.items()}
        yield Network(connections, random=Random(7))  # noqa: S311 -- repeatable


def place(network: Network, order: Order) -> None:
    with network.connections["orders"].transaction():
        orders.place(network.connections["orders"], order)
    network.collect()


def an_order() -> Order:
    return Order(order_id=uuid.uuid4(), customer="ada", item="book", quantity=1, cents=1_200, address="Quito")


def state_of(network: Network, order: Order) -> State:
    [(state,)] = (
        network.connections["orders"].execute("SELECT state FROM saga WHERE order_id = %s", [order.order_id]).fetchall()
    )
    return State(state)


def history_of(network: Network, order: Order) -> list[tuple[str, str]]:
    query = "SELECT event, state FROM saga_history WHERE order_id = %s ORDER BY number"
    return network.connections["orders"].execute(query, [order.order_id]).fetchall()


def balance(network: Network, name: str) -> int:
    [(cents,)] = network.connections["payment"].execute("SELECT cents FROM account WHERE name = %s", [name]).fetchall()
    return int(cents)


def chaos(network: Network, databases: dict[str, str], *, random: Random) -> list[str]:
    """Place orders and let them end among time-outs and reordered, repeated messages; give what is wrong then."""
    before = read_books(databases)
    placed = [random_order(random) for _ in range(ORDERS)]
    for order in placed:
        place(network, order)
    while running := network.running():
        if not network.under_way or random.random() < TIME_OUT_SHARE:
            network.time_out(random.choice(running))
        else:
            network.deliver_any()
    network.deliver_all()
    return violations(before, read_books(databases))


def test_no_order_of_messages_and_no_repetition_breaks_the_books(network: Network, databases: dict[str, str]) -> None:
    assert chaos(network, databases, random=Random(3)) == []  # noqa: S311 -- repeatable
    counts = overview(databases["orders"])
    assert (counts["started"], counts["running"], counts["stuck"]) == (ORDERS, 0, 0)
    assert min(counts["completed"], counts["compensated"]) > 5


class WithoutTombstone(Participant):
    def _compensate(self, connection: psycopg.Connection, order: Order) -> Event:
        if connection.execute(UNDO_STEP, [order.order_id]).rowcount:
            self.undo(connection, order)
        return self.undone


class WithoutNaturalKey(Participant):
    def _act(self, connection: psycopg.Connection, order: Order) -> Event:
        connection.execute(INSERT_STEP, [order.order_id, "done"])
        return self.done if self.do(connection, order) else self.refused


@pytest.mark.parametrize("careless", [WithoutTombstone, WithoutNaturalKey])
def test_a_service_without_one_of_its_safeguards_breaks_the_books(
    network: Network, databases: dict[str, str], careless: type[Participant], monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {field.name: getattr(PAYMENT, field.name) for field in dataclasses.fields(PAYMENT)}
    monkeypatch.setitem(cast("dict[str, Participant]", PARTICIPANTS), "payment", careless(**fields))
    assert chaos(network, databases, random=Random(3)) != []  # noqa: S311 -- repeatable


def test_a_charge_that_comes_after_its_refund_is_refused(network: Network) -> None:
    order = an_order()
    place(network, order)
    network.time_out(order.order_id)
    charge, refund = network.under_way
    network.under_way.clear()
    network.deliver(refund)
    network.deliver(charge)
    network.deliver_all()
    assert balance(network, "ada") == ACCOUNTS["ada"]
    assert dict(history_of(network, order)).keys() == {"timed_out", "refunded", "charge_refused"}
    assert state_of(network, order) is State.COMPENSATED


def test_a_charge_that_succeeds_after_the_saga_gave_up_is_refunded(network: Network) -> None:
    order = an_order()
    place(network, order)
    network.time_out(order.order_id)
    charge, refund = network.under_way
    network.under_way.clear()
    network.deliver(charge)
    assert balance(network, "shop") == order.cents
    network.deliver(refund)
    assert balance(network, "shop") == 0
    network.deliver_all()
    assert state_of(network, order) is State.COMPENSATED


def test_an_order_that_is_placed_twice_is_one_order(network: Network) -> None:
    order = an_order()
    place(network, order)
    place(network, order)
    assert [message.event_type for message in network.under_way] == ["charge"]


def test_a_refund_that_the_shop_cannot_pay_is_an_error_and_not_a_refusal(network: Network) -> None:
    order = an_order()
    place(network, order)
    network.deliver_any()
    network.time_out(order.order_id)
    with network.connections["payment"].transaction():
        network.connections["payment"].execute("UPDATE account SET cents = 0 WHERE name = 'shop'")
    [refund] = [message for message in network.under_way if message.event_type == "refund"]
    with pytest.raises(LookupError, match=r"the shop lacks the \d+ cents of order"):
        network.deliver(refund)


def test_the_timer_lets_only_overdue_sagas_time_out_and_leaves_those_of_another_timer(
    network: Network, databases: dict[str, str]
) -> None:
    overdue, taken, young = placed = [an_order() for _ in range(3)]
    for order in placed:
        place(network, order)
    connection = network.connections["orders"]
    connection.execute("UPDATE saga SET deadline = now() - interval '1 s' WHERE order_id != %s", [young.order_id])
    connection.commit()
    with psycopg.connect(databases["orders"]) as other_timer:
        other_timer.execute("SELECT FROM saga WHERE order_id = %s FOR UPDATE", [taken.order_id])
        assert orders.expire(connection) == 1
        connection.commit()
    assert [state_of(network, order) for order in placed] == [State.REFUNDING, State.CHARGING, State.CHARGING]
    assert history_of(network, overdue) == [("timed_out", "refunding")]


def test_a_saga_that_is_not_answered_again_and_again_is_shown_as_stuck(
    network: Network, databases: dict[str, str]
) -> None:
    order, other = an_order(), an_order()
    place(network, order)
    place(network, other)
    network.time_out(order.order_id)
    assert overview(databases["orders"])["stuck"] == 0
    with network.connections["orders"].transaction():
        network.connections["orders"].execute(
            "UPDATE saga SET entered_at = entered_at - 6 * step_timeout WHERE order_id = %s", [order.order_id]
        )
    network.time_out(order.order_id)
    stuck = network.connections["orders"].execute(STUCK.encode()).fetchall()
    assert [(row[0], row[1], row[4]) for row in stuck] == [(order.order_id, "refunding", "timed_out")] * 2
    environment = os.environ | {"DATABASE_URL": databases["orders"]}
    command = [sys.executable, "-m", "examples.saga", "overview"]
    said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert said.split() == ["started", "2", "completed", "0", "compensated", "0", "running", "2", "stuck", "1"]
    network.deliver_all()
    assert overview(databases["orders"]) == {"started": 2, "completed": 1, "compensated": 1, "running": 0, "stuck": 0}
