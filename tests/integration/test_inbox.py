"""What the two inboxes have in common, each used by a login that has a consumer's grants and nothing else."""

from __future__ import annotations

import asyncio
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import errors
from psycopg.conninfo import make_conninfo

from outbox_relay.consumer import Batch, Inbox, Message, SequenceInbox
from outbox_relay.errors import NoTransaction, SchemaMismatch
from outbox_relay.operate import migrate
from tests.fixtures.messages import a_message
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg import Connection

    from tests.fixtures.postgres import Database

    Connect = Callable[[], Connection]

pytestmark = [
    pytest.mark.every_postgres,
    pytest.mark.parametrize("inbox", [Inbox("billing"), SequenceInbox("billing")], ids=["by id", "by number"]),
]
AnyInbox = Inbox | SequenceInbox

FIRST, SECOND, THIRD = (a_message(number, key=str(number)) for number in (1, 2, 3))


@pytest.fixture
def connect(inbox_database: Database, consumer_login: str) -> Iterator[Connect]:
    with ExitStack() as opened:
        yield lambda: opened.enter_context(inbox_database.connect(user=consumer_login))


@pytest.fixture
def observer(inbox_database: Database) -> Iterator[Connection]:
    with inbox_database.connect(autocommit=True) as connection:
        yield connection


def await_lock(observer: Connection, waiting: Connection) -> None:
    query = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s"
    eventually(lambda: observer.execute(query, [waiting.info.backend_pid]).fetchone() == (True,))


def test_only_the_first_delivery_is_accepted(connect: Connect, inbox: AnyInbox) -> None:
    connection = connect()
    assert [inbox.accept(connection, message) for message in (FIRST, SECOND, FIRST)] == [True, True, False]
    connection.commit()
    assert [inbox.accept(connect(), message) for message in (FIRST, THIRD)] == [False, True]


def test_a_batch_is_told_apart_in_the_order_of_delivery(connect: Connect, inbox: AnyInbox) -> None:
    connection = connect()
    inbox.accept(connection, SECOND)
    again = replace(FIRST, offset=9)
    assert inbox.accept_many(connection, [THIRD, SECOND, FIRST, again]) == Batch([THIRD, FIRST], [SECOND, again], [])


def test_a_cursor_serves_as_well_as_its_connection(connect: Connect, inbox: AnyInbox) -> None:
    with connect() as connection, connection.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        assert [inbox.accept(cursor, FIRST), inbox.accept(connection, FIRST)] == [True, False]


def test_in_a_pipeline_a_first_delivery_is_not_taken_for_a_duplicate(connect: Connect, inbox: AnyInbox) -> None:
    connection = connect()
    with connection.pipeline():
        assert [inbox.accept(connection, message) for message in (FIRST, FIRST)] == [True, False]


def test_a_batch_is_one_round_trip_and_an_empty_one_none(
    connect: Connect, inbox: AnyInbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    executed: list[object] = []
    execute = psycopg.Cursor.execute

    def counted(cursor: psycopg.Cursor[Any], query: Any, *arguments: Any, **options: Any) -> psycopg.Cursor[Any]:  # noqa: ANN401
        executed.append(query)
        return execute(cursor, query, *arguments, **options)

    monkeypatch.setattr(psycopg.Cursor, "execute", counted)
    connection = connect()
    assert inbox.accept_many(connection, []) == Batch()
    assert len(executed) == 0
    inbox.accept_many(connection, [FIRST, SECOND, THIRD])
    assert len(executed) == 1


def test_consumers_share_the_tables_and_do_not_see_each_other(connect: Connect, inbox: AnyInbox) -> None:
    connection = connect()
    inbox.accept(connection, FIRST)
    assert type(inbox)("shipping").accept(connection, FIRST)


def test_what_is_rolled_back_was_not_consumed(connect: Connect, inbox: AnyInbox) -> None:
    connection = connect()
    inbox.accept(connection, FIRST)
    connection.rollback()
    assert inbox.accept(connection, FIRST)


@pytest.mark.parametrize(("first_commits", "second_accepts"), [(True, False), (False, True)])
def test_a_twin_waits_and_is_new_only_if_the_first_one_rolls_back(
    connect: Connect, observer: Connection, inbox: AnyInbox, *, first_commits: bool, second_accepts: bool
) -> None:
    first, second = connect(), connect()
    assert inbox.accept(first, FIRST)
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(inbox.accept, second, FIRST)
        await_lock(observer, second)
        if first_commits:
            first.commit()
        else:
            first.rollback()
        assert accepted.result(timeout=30) is second_accepts


def test_a_twin_with_an_older_snapshot_fails_with_40001(connect: Connect, inbox: AnyInbox) -> None:
    first, second = connect(), connect()
    second.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    second.execute("SELECT 1")
    inbox.accept(first, FIRST)
    first.commit()
    with pytest.raises(errors.SerializationFailure):
        inbox.accept(second, FIRST)


def test_overlapping_batches_in_any_order_never_deadlock(connect: Connect, inbox: AnyInbox) -> None:
    rounds, size = 15, 300
    together = threading.Barrier(2)

    def consume(seed: int) -> list[Message]:
        connection, shuffle = connect(), random.Random(seed).shuffle  # noqa: S311 -- a shuffle that can be repeated
        fresh = []
        for number in range(rounds):
            first_key = number * size
            messages = [a_message(key + 1, key=str(key)) for key in range(first_key, first_key + size)]
            shuffle(messages)
            together.wait(timeout=30)
            fresh += inbox.accept_many(connection, messages).fresh
            connection.commit()
        return fresh

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(consume, (1, 2))
    assert sorted(message.sequence_no for message in one + two) == list(range(1, rounds * size + 1))


def test_a_connection_that_commits_each_statement_is_refused(connect: Connect, inbox: AnyInbox) -> None:
    connection = connect()
    connection.autocommit = True
    with pytest.raises(NoTransaction):
        inbox.accept(connection, FIRST)
    with connection.transaction():
        assert inbox.accept(connection, FIRST)


def test_the_tables_may_be_in_any_schema(inbox_database: Database, inbox: AnyInbox) -> None:
    schema = 'Billing "1"'
    elsewhere = type(inbox)("billing", schema=schema)
    with inbox_database.connect() as connection:
        migrate.apply(connection, schema=schema, line="inbox")
        assert [elsewhere.accept(connection, FIRST), elsewhere.accept(connection, FIRST)] == [True, False]
        assert inbox.accept(connection, FIRST)


def test_missing_tables_are_told_with_their_remedy(connect: Connect, inbox: AnyInbox) -> None:
    with pytest.raises(SchemaMismatch, match=r"apply the migrations .* --inbox"):
        type(inbox)("billing", schema="nowhere").accept(connect(), FIRST)


def test_a_missing_grant_is_told_with_its_remedy(
    inbox_database: Database, consumer_login: str, inbox: AnyInbox
) -> None:
    with inbox_database.connect(autocommit=True) as admin:
        admin.execute(f'REVOKE inbox_consumer FROM "{consumer_login}"')
    with inbox_database.connect(user=consumer_login) as connection, pytest.raises(SchemaMismatch, match="grant"):
        inbox.accept(connection, FIRST)


def test_asyncio_gives_the_same_answers(inbox_database: Database, consumer_login: str, inbox: AnyInbox) -> None:
    async def consume() -> tuple[bool, Batch]:
        dsn = make_conninfo(inbox_database.dsn, user=consumer_login)
        async with await psycopg.AsyncConnection.connect(dsn) as connection:
            return (
                await inbox.accept_async(connection, FIRST),
                await inbox.accept_many_async(connection, [FIRST, SECOND]),
            )

    assert asyncio.run(consume()) == (True, Batch([SECOND], [FIRST], []))
