"""docs/consuming.md: each snippet does what the text says, with the real libraries."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from psycopg import errors

from outbox_relay.consumer import Batch, Inbox, SequenceInbox
from tests.fixtures.messages import BEGINNING, a_message

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from tests.fixtures.postgres import Database

PAGE = (Path(__file__).parents[2] / "docs" / "consuming.md").read_text(encoding="utf-8")
PSYCOPG, SQLALCHEMY, ASYNC_SQLALCHEMY, DJANGO, BATCHES, ONCE, PRUNING, METRICS = re.findall(
    r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL
)
PARTITIONING, DROPPING = re.findall(r"^```sql\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)

RECORDS = """
import confluent_kafka

def a_record(number):
    headers = {
        "id": f"00000000-0000-0000-0000-{number:012}", "event_type": "order_placed", "aggregate_type": "order",
        "sequence_no": str(number), "source": "shop",
    }
    return confluent_kafka.Message(
        topic="order.events", partition=0, offset=number, key=b"1", value=b"{}", timestamp=(1, 1_795_000_000_000),
        headers=[(name, text.encode()) for name, text in headers.items()],
    )

RECORDS = [a_record(1), a_record(2), a_record(1)]
"""

USE_PSYCOPG = """
import psycopg
with psycopg.connect(DATABASE_URL, autocommit=True) as connection:
    for record in RECORDS:
        consume(connection, record)
"""

USE_SQLALCHEMY = """
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
engine = create_engine(DATABASE_URL.replace("postgresql:", "postgresql+psycopg:"))
for record in RECORDS:
    with Session(engine) as session:
        consume(session, record)
engine.dispose()
"""

USE_ASYNC_SQLALCHEMY = """
import asyncio
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

async def use():
    engine = create_async_engine(DATABASE_URL.replace("postgresql:", "postgresql+psycopg:"))
    for record in RECORDS:
        async with AsyncSession(engine) as session:
            await consume(session, record)
    await engine.dispose()

asyncio.run(use())
"""

SET_UP_DJANGO = """
from urllib.parse import urlsplit
import django
from django.conf import settings
url = urlsplit(DATABASE_URL)
settings.configure(DATABASES={"default": {
    "ENGINE": "django.db.backends.postgresql", "NAME": url.path[1:], "USER": url.username,
    "HOST": url.hostname, "PORT": url.port,
}})
django.setup()
"""

USE_DJANGO = """
for record in RECORDS:
    consume(record)
connection.close()
"""

USE_BATCHES = """
import psycopg
with psycopg.connect(DATABASE_URL) as connection:
    assert consume_batch(connection, RECORDS) == (2, 1, 0)
"""

USE_ONCE = """
import psycopg
from outbox_relay.consumer import message_from
first, second, again = map(message_from, RECORDS)
with psycopg.connect(DATABASE_URL) as connection:
    consume_block(connection, first)
    consume_block(connection, again)
    assert [consume_with_result(connection, second) for _ in range(2)] == [{"charged": "1"}] * 2
"""

USE_METRICS = """
import psycopg
from prometheus_client import REGISTRY
with psycopg.connect(DATABASE_URL) as connection:
    consume_and_count(connection, RECORDS)
    connection.commit()
    prune_and_count(connection)
name, labels = "outbox_consumer_messages_total", {"consumer": "billing"}
assert REGISTRY.get_sample_value(name, labels | {"outcome": "processed"}) == 2
assert REGISTRY.get_sample_value(name, labels | {"outcome": "duplicate"}) == 1
assert REGISTRY.get_sample_value("outbox_consumer_pruned_messages_total", labels) == 0
"""


@pytest.fixture
def url(inbox_database: Database, consumer_login: str) -> str:
    with inbox_database.connect(autocommit=True) as owner:
        owner.execute("CREATE TABLE account (id text PRIMARY KEY, balance bigint NOT NULL)")
        owner.execute("INSERT INTO account VALUES ('1', 0)")
        owner.execute(f'GRANT SELECT, UPDATE ON account TO "{consumer_login}"')
        info = owner.info
        return f"postgresql://{consumer_login}@{info.host}:{info.port}/{info.dbname}"


def run(url: str, *parts: str) -> str:
    script = "\n".join((f"DATABASE_URL = {url!r}", *parts))
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.parametrize(
    "parts",
    [
        (RECORDS, PSYCOPG, USE_PSYCOPG),
        (RECORDS, SQLALCHEMY, USE_SQLALCHEMY),
        (RECORDS, ASYNC_SQLALCHEMY, USE_ASYNC_SQLALCHEMY),
        (SET_UP_DJANGO, RECORDS, DJANGO, USE_DJANGO),
        (RECORDS, BATCHES, USE_BATCHES),
        (RECORDS, ONCE, USE_ONCE),
        (RECORDS, METRICS, USE_METRICS),
    ],
    ids=["psycopg", "sqlalchemy", "sqlalchemy-asyncio", "django", "batches", "once", "metrics"],
)
def test_of_two_messages_and_a_redelivery_a_snippet_makes_two_effects(
    inbox_database: Database, url: str, parts: tuple[str, ...]
) -> None:
    run(url, *parts)
    with inbox_database.connect() as connection:
        assert connection.execute("SELECT balance FROM account").fetchall() == [(2,)]


FAIL_SQLALCHEMY = """
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
engine = create_engine(DATABASE_URL.replace("postgresql:", "postgresql+psycopg:"))
try:
    with Session(engine) as session, session.begin():
        assert inbox.accept(session.connection().connection.driver_connection, message_from(RECORDS[0]))
        1 / 0
except ZeroDivisionError:
    pass
engine.dispose()
"""

FAIL_DJANGO = """
try:
    with transaction.atomic():
        assert inbox.accept(connection.connection, message_from(RECORDS[0]))
        1 / 0
except ZeroDivisionError:
    pass
connection.close()
"""


@pytest.mark.parametrize(
    "parts",
    [(RECORDS, SQLALCHEMY, FAIL_SQLALCHEMY), (SET_UP_DJANGO, RECORDS, DJANGO, FAIL_DJANGO)],
    ids=["sqlalchemy", "django"],
)
def test_the_record_is_rolled_back_with_the_transaction_of_the_library(
    inbox_database: Database, url: str, parts: tuple[str, ...]
) -> None:
    run(url, *parts)
    with inbox_database.connect() as connection:
        assert connection.execute("SELECT FROM inbox_message").fetchall() == []


def test_the_snippet_for_cron_prunes_what_is_old(inbox_database: Database, url: str) -> None:
    with inbox_database.connect(autocommit=True) as owner:
        owner.execute(
            "INSERT INTO inbox_message (consumer, message_id, created_at, received_at)"
            " SELECT 'billing', gen_random_uuid(), now(), now() - day * interval '1 day'"
            " FROM generate_series(10, 20) AS day"
        )
        assert run(url, PRUNING) == "7\n"
        assert owner.execute("SELECT count(*) FROM inbox_message").fetchone() == (4,)


@pytest.fixture
def partitioned(inbox_database: Database, consumer_login: str) -> Iterator[Connection]:
    """A consumer's connection to an inbox that was partitioned after the first message."""
    with inbox_database.connect(user=consumer_login) as connection:
        Inbox("billing").accept(connection, a_message(1))
    with inbox_database.connect(autocommit=True) as owner:
        owner.execute(PARTITIONING.encode())
    with inbox_database.connect(user=consumer_login) as connection:
        yield connection


IN_2026 = a_message(1)
IN_2027 = replace(a_message(2), created_at=datetime(2027, 1, 15, tzinfo=UTC))


@pytest.mark.every_postgres
def test_a_partitioned_inbox_knows_what_came_before_and_after_it_was_partitioned(partitioned: Connection) -> None:
    inbox = Inbox("billing")
    assert [inbox.accept(partitioned, message) for message in (IN_2026, IN_2027, IN_2027)] == [False, True, False]
    found = partitioned.execute("SELECT tableoid::regclass::text, message_id FROM inbox_message ORDER BY 1").fetchall()
    assert found == [
        ("inbox_message_2027_01", IN_2027.message_id),
        ("inbox_message_first", IN_2026.message_id),
    ]


@pytest.mark.every_postgres
def test_results_and_unordered_messages_work_with_partitions(partitioned: Connection) -> None:
    late = replace(IN_2027, is_unordered=True)
    assert SequenceInbox("shipping").accept_many(partitioned, [late, late]) == Batch([late], [late], [])
    inbox = Inbox("billing")
    assert inbox.process(partitioned, IN_2027, lambda _connection, _message: 7) == 7
    assert inbox.process(partitioned, IN_2027, lambda _connection, _message: 8) == 7


@pytest.mark.every_postgres
def test_pruning_tells_rows_at_the_same_place_of_two_partitions_apart(
    inbox_database: Database, partitioned: Connection
) -> None:
    with inbox_database.connect(autocommit=True) as owner:
        owner.execute(
            "INSERT INTO inbox_message (consumer, message_id, created_at, received_at)"
            " VALUES ('billing', gen_random_uuid(), %s, now() - interval '1 year')",
            [IN_2027.created_at],
        )
    places = "SELECT message_id, ctid::text FROM inbox_message"
    assert {place for _, place in partitioned.execute(places)} == {"(0,1)"}
    assert Inbox("billing").prune(partitioned, older_than=timedelta(days=1)) == 1
    assert partitioned.execute(places).fetchall() == [(IN_2026.message_id, "(0,1)")]


@pytest.mark.every_postgres
def test_what_belongs_into_a_dropped_partition_fails_loudly(inbox_database: Database, partitioned: Connection) -> None:
    Inbox("billing").accept(partitioned, IN_2027)
    partitioned.commit()
    with inbox_database.connect(autocommit=True) as owner:
        for command in DROPPING.split(";\n"):
            owner.execute(command.encode())
    assert not Inbox("billing").accept(partitioned, IN_2027)
    with pytest.raises(errors.CheckViolation, match="no partition"):
        Inbox("billing").accept(partitioned, IN_2026)


@pytest.mark.parametrize(("is_partitioned", "is_accepted_again"), [(True, True), (False, False)])
def test_a_second_record_with_another_time_is_known_only_without_partitions(
    request: pytest.FixtureRequest, inbox_database: Database, *, is_partitioned: bool, is_accepted_again: bool
) -> None:
    if is_partitioned:
        request.getfixturevalue("partitioned")
    with inbox_database.connect() as connection:
        Inbox("billing").accept(connection, IN_2026)
        stamped_by_the_broker = replace(IN_2026, created_at=BEGINNING + timedelta(hours=1))
        assert Inbox("billing").accept(connection, stamped_by_the_broker) is is_accepted_again
