"""The examples as people run them, with real parts, judged from the tables."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import urllib.request
from typing import TYPE_CHECKING

import httpx
import pytest

from examples import fastapi_shop
from outbox_relay.operate import migrate
from outbox_relay.sandbox.ports import ReservedPort
from tests.fixtures.daemon import Daemon
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from outbox_relay.sandbox.kafka import Kafka
    from tests.fixtures.kafka import CreateTopic
    from tests.fixtures.postgres import Database

TIMEOUT_SECONDS = 120

SELECT_MESSAGES = "SELECT aggregate_type, aggregate_id, event_type, payload FROM outbox ORDER BY sequence_no"
SELECT_ORDERS = "SELECT id, customer, cents FROM orders ORDER BY id"


@pytest.fixture
def shop(database: Database) -> Database:
    """A database with an outbox and an inbox."""
    with database.connect(autocommit=True) as connection:
        migrate.apply(connection, schema="public", line="inbox")
    return database


@pytest.fixture
def environment(shop: Database, kafka: Kafka, topic: CreateTopic, topic_prefix: str) -> dict[str, str]:
    """What the example's programs and its relay are told."""
    return {
        "DATABASE_URL": shop.dsn,
        "KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
        "TOPIC": topic("order.events"),
        "OUTBOX_RELAY_DATABASE_URL": shop.dsn,
        "OUTBOX_RELAY_KAFKA__BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
        "OUTBOX_RELAY_TOPIC_TEMPLATE": topic_prefix + "{aggregate_type}.events",
    }


def python(*arguments: str, environment: Mapping[str, str]) -> str:
    """Run `python -m` to its end and give what it prints."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=True,
    ).stdout


def listener(module: str, environment: Mapping[str, str], *, group_id: str) -> Daemon:
    return Daemon({**environment, "GROUP_ID": group_id}, command=(sys.executable, "-m", module, "listen"))


def rows(database: Database, query: str) -> list[tuple[Any, ...]]:
    with database.connect() as connection:
        return connection.execute(query.encode()).fetchall()


def points(database: Database) -> dict[object, object]:
    return dict(rows(database, "SELECT customer, points FROM account"))


def assert_points_are_granted_once(
    module: str, database: Database, environment: Mapping[str, str], *, place_order: Callable[[str, int], object]
) -> None:
    """Order and publish; let two groups consume all of it, the second one for the second time."""
    place_order("ada", 1250)
    place_order("ben", 9999)
    place_order("ada", 1299)
    with Daemon(environment), listener(module, environment, group_id="first") as first:
        eventually(lambda: points(database) == {"ada": 12 + 12, "ben": 99}, message="no points were granted")
        first.terminate()
        assert first.wait() == 0
        with listener(module, environment, group_id="second") as second:
            place_order("zoe", 100)  # comes last: with it, all that came before has been delivered again
            eventually(lambda: "zoe" in points(database), message="the second group got nothing")
            second.terminate()
            assert second.wait() == 0
    assert points(database) == {"ada": 12 + 12, "ben": 99, "zoe": 1}
    assert rows(database, SELECT_MESSAGES) == [
        ("order", str(number), "order_placed", {"customer": customer, "cents": cents})
        for number, customer, cents in rows(database, SELECT_ORDERS)
    ]


def test_the_sqlalchemy_shop_announces_its_orders_and_grants_their_points_once(
    shop: Database, environment: dict[str, str]
) -> None:
    module = "examples.sqlalchemy_shop"

    def place_order(customer: str, cents: int) -> None:
        python(module, "order", customer, str(cents), environment=environment)

    python(module, "create-tables", environment=environment)
    assert_points_are_granted_once(module, shop, environment, place_order=place_order)


def test_the_django_shop_announces_its_orders_and_grants_their_points_once(
    shop: Database, environment: dict[str, str]
) -> None:
    module, port = "examples.django_shop", ReservedPort()
    server = (sys.executable, "-m", module, "runserver", "--noreload", f"127.0.0.1:{port.number}")

    def place_order(customer: str, cents: int) -> None:
        body = json.dumps({"customer": customer, "cents": cents}).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{port.number}/orders", body, TIMEOUT_SECONDS) as answer:
            assert answer.status == 201

    python(module, "create-tables", environment=environment)
    with Daemon(environment, command=server):
        eventually(lambda: is_listening(port.number), message="the web server did not start")
        assert_points_are_granted_once(module, shop, environment, place_order=place_order)


def is_listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


async def order_by_http(*requests: tuple[str, Mapping[str, object]]) -> list[tuple[int, str]]:
    """Send each order with its key to the FastAPI shop, one after the other; give their status and text."""
    transport = httpx.ASGITransport(fastapi_shop.app)
    async with fastapi_shop.lifespan(fastapi_shop.app), httpx.AsyncClient(transport=transport) as client:
        answers = [
            await client.post("http://shop/orders", json=order, headers={"Idempotency-Key": key})
            for key, order in requests
        ]
    return [(answer.status_code, answer.text) for answer in answers]


def test_the_fastapi_shop_makes_one_order_of_a_repeated_request(
    shop: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", shop.dsn)
    order = {"customer": "ada", "cents": 1250}
    first, again, other, new = asyncio.run(
        order_by_http(("7b0c", order), ("7b0c", order), ("7b0c", order | {"cents": 1}), ("8c1d", order))
    )
    assert first == again == (201, '{"customer":"ada","cents":1250,"id":1}')
    assert other[0] == 422
    assert new == (201, '{"customer":"ada","cents":1250,"id":2}')
    assert rows(shop, SELECT_ORDERS) == [(1, "ada", 1250), (2, "ada", 1250)]
    assert rows(shop, SELECT_MESSAGES) == [("order", str(number), "order_placed", order) for number in (1, 2)]


@pytest.mark.kafka
@pytest.mark.slow
def test_the_saga_runs_by_one_command_and_its_books_are_right() -> None:
    said = python("examples.saga", environment={})
    assert "9 processes run." in said
    assert "60 started" in said
    assert said.endswith("Money, stock and shipments are what the completed orders make of them.\n")


@pytest.mark.kafka
@pytest.mark.slow
def test_the_choreography_gets_every_order_invoiced_and_rewarded() -> None:
    said = python("examples.choreography", environment={})
    assert [line.split() for line in said.splitlines()[-3:]] == [
        ["orders", "invoiced", "20"],
        ["invoices", "20"],
        ["points", "240"],
    ]
