"""The primary dies and its standby is promoted: nothing is lost that PostgreSQL itself has kept."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from confluent_kafka import Consumer
from psycopg.conninfo import make_conninfo

from outbox_relay.consumer import SequenceInbox, message_from
from outbox_relay.sandbox.postgres import PostgresServer
from tests.fixtures.load import Load, Plan, commit_messages
from tests.fixtures.pipeline import Pipeline, flaws
from tests.fixtures.postgres import RELAY_LOGIN, temporary_directory
from tests.fixtures.proxy import TcpProxy
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from outbox_relay.consumer import Message
    from outbox_relay.sandbox.kafka import Kafka
    from tests.fixtures.postgres import Database

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

PAGE = Path(__file__).parents[2] / "docs" / "postgresql.md"
LOGGED_AHEAD = 32  # numbers that a sequence draws between two records in the write-ahead log

SELECT_STATE = "SELECT sync_state FROM pg_stat_replication WHERE state = 'streaming'"
SELECT_REPLAYED = "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn"


@contextmanager
def standby(database: Database, *, primary_port: int | None = None) -> Iterator[Database]:
    """The same database on a standby that streams from the server of *database*."""
    with (
        temporary_directory() as directory,
        PostgresServer.create_standby(database.server, directory, primary_port=primary_port) as server,
    ):
        yield replace(database, server=server)


def make_synchronous(database: Database) -> None:
    """Let every commit wait for the standby."""
    with database.connect(autocommit=True) as admin:
        admin.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        admin.execute("SELECT pg_reload_conf()")
        eventually(lambda: admin.execute(SELECT_STATE).fetchall() == [("sync",)], message="the standby does not stream")


def promote(database: Database) -> None:
    with database.connect(autocommit=True) as admin:
        assert admin.execute("SELECT pg_promote()").fetchall() == [(True,)]


def either(*databases: Database) -> str:
    """As an application names its servers: whichever of them takes writes."""
    ports = ",".join(str(database.server.port) for database in databases)
    return make_conninfo(
        databases[0].dsn,
        host=",".join("127.0.0.1" for _ in databases),
        port=ports,
        target_session_attrs="read-write",
    )


@pytest.mark.every_postgres
def test_with_synchronous_replication_a_failover_loses_nothing_and_keeps_the_order(
    own_database: Database, kafka: Kafka, topic_prefix: str, seed: int
) -> None:
    with standby(own_database) as promoted:
        make_synchronous(own_database)
        before, after = (Pipeline(each, kafka, prefix=topic_prefix, seed=seed) for each in (own_database, promoted))
        after.create_topics()
        whichever = either(own_database, promoted)
        with before.relays(2, database_url=make_conninfo(whichever, user=RELAY_LOGIN)) as relays:
            with Load(whichever, plan=Plan(writers=6, bulk_rows=100), seed=seed) as load:
                load.await_more(3_000)
                own_database.server.kill()
                promote(promoted)
                load.await_more(3_000)
            after.await_settled()
            for relay in relays:
                relay.wait_for_event("database_recovered")
        verdict = after.judge(load.writes)
    assert flaws(verdict).keys() <= {"duplicated", "recovered", "unknown"}


@pytest.mark.parametrize(
    ("source", "leaps", "consumed"),
    [
        ("shop", False, "REPLICATED UNREPLICATED"),
        ("shop", True, "REPLICATED UNREPLICATED LATE"),
        ("shop after the failover", False, "REPLICATED UNREPLICATED REPLICATED LATE"),
    ],
    ids=["nothing done", "leap", "new source"],
)
def test_after_an_asynchronous_failover_a_leap_lets_consumers_by_number_take_each_message_once(
    own_database: Database,
    inbox_database: Database,
    *,
    kafka: Kafka,
    topic_prefix: str,
    seed: int,
    source: str,
    leaps: bool,
    consumed: str,
) -> None:
    with (
        TcpProxy("127.0.0.1", own_database.server.port) as network,
        standby(own_database, primary_port=network.port) as promoted,
    ):
        before, after = (Pipeline(each, kafka, prefix=topic_prefix, seed=seed) for each in (own_database, promoted))
        after.create_topics()
        with own_database.connect() as writer:
            replicated = commit_messages(writer, "order-1")
            await_replay(own_database, promoted)
            network.blackhole()
            unreplicated = commit_messages(writer, *["order-1"] * (3 * LOGGED_AHEAD))
        with before.relay(source="shop"):
            before.await_settled()
        own_database.server.kill()
        promote(promoted)
        with promoted.connect() as writer:
            if leaps:
                writer.execute(documented_leap())
            late = commit_messages(writer, "order-1")
        with after.relay(source=source):
            after.await_settled()
        delivered = [*replicated, *unreplicated, *replicated, *late]
        messages = consume(after, count=len(delivered))

    assert [str(message.message_id) for message in messages] == [write.message_id for write in delivered]
    with inbox_database.connect() as connection:
        fresh = SequenceInbox("shipping").accept_many(connection, messages).fresh
    expected = {"REPLICATED": replicated, "UNREPLICATED": unreplicated, "LATE": late}
    assert [str(message.message_id) for message in fresh] == [
        write.message_id for name in consumed.split() for write in expected[name]
    ]


def documented_leap() -> bytes:
    """The statement that the documentation gives for this case."""
    section = PAGE.read_text().partition("## After a failover\n")[2]
    return section.partition("```sql\n")[2].partition("```")[0].encode()


def await_replay(primary: Database, standby: Database) -> None:
    """Wait until *standby* has all that *primary* has written."""
    with primary.connect() as admin:
        [(written,)] = admin.execute("SELECT pg_current_wal_lsn()::text").fetchall()
    with standby.connect(autocommit=True) as reader:
        eventually(
            lambda: reader.execute(SELECT_REPLAYED, [written]).fetchall() == [(True,)],
            message="the standby does not follow",
        )


def consume(pipeline: Pipeline, *, count: int) -> list[Message]:
    """The *count* messages of the one key that was written, in the order of their partition."""
    consumer = Consumer(
        {
            "bootstrap.servers": pipeline.kafka.bootstrap_servers,
            "group.id": pipeline.topic("reader"),
            "auto.offset.reset": "earliest",
        }
    )
    consumer.subscribe([pipeline.topic("order")])
    try:
        records = consumer.consume(count, timeout=30)
    finally:
        consumer.close()
    assert len(records) == count
    return [message_from(record) for record in records]
