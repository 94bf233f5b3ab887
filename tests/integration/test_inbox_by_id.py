"""What only the inbox by id does: blocks, results, pruning."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING

import psycopg
import pytest
from psycopg import errors
from psycopg.conninfo import make_conninfo

from outbox_relay.consumer import Inbox
from outbox_relay.errors import NoTransaction, TransactionError
from outbox_relay.sql import statement
from tests.fixtures.messages import a_message
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg import AsyncConnection, Connection

    from outbox_relay.consumer import Message
    from tests.fixtures.postgres import Database

    Connect = Callable[[], Connection]

pytestmark = pytest.mark.every_postgres

INBOX = Inbox("billing")
FIRST, SECOND = a_message(1), a_message(2)
DAY = timedelta(days=1)


@pytest.fixture
def connect(inbox_database: Database, consumer_login: str) -> Iterator[Connect]:
    with ExitStack() as opened:
        yield lambda: opened.enter_context(inbox_database.connect(user=consumer_login))


@pytest.fixture
def connection(connect: Connect) -> Connection:
    return connect()


@pytest.fixture
def admin(inbox_database: Database) -> Iterator[Connection]:
    with inbox_database.connect(autocommit=True) as connection:
        yield connection


def recorded(connection: Connection) -> list[str]:
    return [consumer for (consumer,) in connection.execute("SELECT consumer FROM inbox_message ORDER BY consumer")]


class HandlerFailed(Exception):
    """What a handler of these tests raises."""


class Handler:
    """Counts its calls and gives what it was made with."""

    def __init__(self, result: object) -> None:
        self.result = result
        self.calls = 0

    def __call__(self, _session: object, _message: Message) -> object:
        self.calls += 1
        return self.result


def test_a_block_gives_what_accept_gives(connection: Connection) -> None:
    with (
        connection.transaction(),
        INBOX.once(connection, FIRST) as is_first,
        INBOX.once(connection, FIRST) as is_first_again,
    ):
        assert (is_first, is_first_again) == (True, False)
    with connection.transaction(), INBOX.once(connection, FIRST) as is_first:
        assert not is_first


def test_a_block_that_fails_leaves_nothing_and_the_transaction_goes_on(connection: Connection) -> None:
    INBOX.accept(connection, SECOND)
    with pytest.raises(HandlerFailed), INBOX.once(connection, FIRST):
        raise HandlerFailed
    with pytest.raises(errors.DivisionByZero), INBOX.once(connection, FIRST):
        connection.execute("SELECT 1 / 0")
    connection.commit()
    assert [INBOX.accept(connection, message) for message in (FIRST, SECOND)] == [True, False]


@pytest.mark.parametrize("autocommit", [False, True])
def test_a_block_outside_of_a_transaction_is_refused_for_it_would_not_commit(
    connection: Connection,
    autocommit: bool,  # noqa: FBT001 -- a parameter of the test
) -> None:
    connection.autocommit = autocommit
    with pytest.raises(NoTransaction, match=r"with connection\.transaction"), INBOX.once(connection, FIRST):
        pass


@pytest.mark.parametrize(
    ("result", "as_json"),
    [(None, None), (7, 7), ("text", "text"), ({"b": [1.5, "ä"]}, {"b": [1.5, "ä"]}), ((1, 2), [1, 2])],
    ids=str,
)
def test_later_deliveries_get_the_result_of_the_first(connection: Connection, result: object, as_json: object) -> None:
    handler = Handler(result)
    assert [INBOX.process(connection, FIRST, handler) for _ in range(3)] == [as_json] * 3
    assert handler.calls == 1


def test_a_message_that_was_accepted_without_a_result_has_none(connection: Connection) -> None:
    INBOX.accept(connection, FIRST)
    assert INBOX.process(connection, FIRST, Handler("never")) is None


def test_a_handler_whose_error_is_caught_leaves_nothing_in_a_transaction_that_goes_on(connection: Connection) -> None:
    def fail(inner: Connection, _message: Message) -> None:
        Inbox("shipping").accept(inner, SECOND)
        raise HandlerFailed

    with pytest.raises(HandlerFailed):
        INBOX.process(connection, FIRST, fail)
    Inbox("storage").accept(connection, FIRST)
    connection.commit()
    assert recorded(connection) == ["storage"]


def test_a_twin_waits_for_the_result(connect: Connect, admin: Connection) -> None:
    first, second, handler = connect(), connect(), Handler("second")
    INBOX.process(first, FIRST, Handler("first"))
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(INBOX.process, second, FIRST, handler)
        waiting = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s"
        eventually(lambda: admin.execute(waiting, [second.info.backend_pid]).fetchone() == (True,))
        first.commit()
        assert (result.result(timeout=30), handler.calls) == ("first", 0)


@pytest.mark.parametrize("result", [object(), float("nan")], ids=["an object", "not a number"])
def test_a_result_that_is_no_json_is_refused(connection: Connection, result: object) -> None:
    with pytest.raises((TypeError, ValueError), match="JSON"):
        INBOX.process(connection, FIRST, Handler(result))


def record_days_ago(admin: Connection, *days: int, consumer: str = "billing") -> None:
    admin.execute(
        "INSERT INTO inbox_message (consumer, message_id, created_at, received_at)"
        " SELECT %s, gen_random_uuid(), now(), now() - day * interval '1 day' FROM unnest(%s::integer[]) AS day",
        [consumer, list(days)],
    )


def days_left(admin: Connection, consumer: str = "billing") -> list[int]:
    query = "SELECT extract(day FROM now() - received_at)::integer FROM inbox_message WHERE consumer = %s ORDER BY 1"
    return [day for (day,) in admin.execute(query, [consumer])]


def test_pruning_removes_the_oldest_first_and_no_more_than_the_limit(admin: Connection, connection: Connection) -> None:
    record_days_ago(admin, 3, 9, 1, 7, 5)
    assert INBOX.prune(connection, older_than=2 * DAY, limit=3) == 3
    connection.commit()
    assert days_left(admin) == [1, 3]
    assert [INBOX.prune(connection, older_than=2 * DAY) for _ in range(2)] == [1, 0]


def test_pruning_leaves_other_consumers_alone(admin: Connection, connection: Connection) -> None:
    record_days_ago(admin, 3, consumer="shipping")
    assert INBOX.prune(connection, older_than=DAY) == 0


def test_two_pruners_do_not_wait_for_each_other(admin: Connection, connect: Connect) -> None:
    record_days_ago(admin, *range(2, 8))
    one, two = connect(), connect()
    two.execute("SET lock_timeout = '5s'")
    assert [INBOX.prune(pruner, older_than=DAY, limit=2) for pruner in (one, two)] == [2, 2]
    one.commit()
    two.commit()
    assert days_left(admin) == [2, 3]


def test_pruning_everything_takes_batch_after_batch(admin: Connection, connection: Connection) -> None:
    record_days_ago(admin, *range(8))
    assert INBOX.prune_all(connection, older_than=2 * DAY, limit=2) == 6
    assert days_left(admin) == [0, 1]


def test_each_batch_of_pruning_is_committed_by_itself(admin: Connection, connection: Connection) -> None:
    record_days_ago(admin, *range(2, 8))
    admin.execute("""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$;
        CREATE TRIGGER refuse BEFORE DELETE ON inbox_message FOR EACH ROW
        WHEN (old.received_at > now() - interval '3.5 days') EXECUTE FUNCTION refuse();
    """)
    with pytest.raises(errors.RaiseException):
        INBOX.prune_all(connection, older_than=DAY, limit=2)
    assert days_left(admin) == [2, 3]


def test_pruning_everything_is_refused_within_a_transaction(connection: Connection) -> None:
    INBOX.accept(connection, FIRST)
    with pytest.raises(TransactionError):
        INBOX.prune_all(connection, older_than=DAY)


def test_a_batch_of_pruning_reads_no_more_than_itself(admin: Connection) -> None:
    admin.execute(
        "INSERT INTO inbox_message (consumer, message_id, created_at, received_at)"
        " SELECT 'billing', gen_random_uuid(), now(), now() - number * interval '1 minute'"
        " FROM generate_series(1, 20000) AS number"
    )
    admin.execute("VACUUM ANALYZE inbox_message")
    explain = b"EXPLAIN " + statement("inbox_prune", schema=None)
    lines = admin.execute(explain, {"consumer": "billing", "older_than": DAY, "limit": 100}).fetchall()
    plan = "\n".join(line for (line,) in lines)
    assert "Index Scan using inbox_message_received_at_idx" in plan
    assert "Tid Scan on inbox_message" in plan
    assert "Seq Scan on inbox_message" not in plan
    assert "Sort" not in plan


def test_asyncio_does_the_same(inbox_database: Database, consumer_login: str, admin: Connection) -> None:
    record_days_ago(admin, *range(6))

    async def handler(_connection: AsyncConnection, message: Message) -> list[int]:
        return [message.sequence_no]

    async def consume() -> list[object]:
        dsn = make_conninfo(inbox_database.dsn, user=consumer_login)
        async with await psycopg.AsyncConnection.connect(dsn) as connection:
            with pytest.raises(NoTransaction):
                async with INBOX.once_async(connection, FIRST):
                    pass
            await connection.execute("SELECT")
            with pytest.raises(HandlerFailed):
                async with INBOX.once_async(connection, FIRST):
                    raise HandlerFailed
            async with INBOX.once_async(connection, FIRST) as is_first:
                pass
            results = [await INBOX.process_async(connection, SECOND, handler) for _ in range(2)]
            with pytest.raises(TransactionError):
                await INBOX.prune_all_async(connection, older_than=DAY)
            pruned = await INBOX.prune_async(connection, older_than=4 * DAY)
            await connection.commit()
            return [is_first, *results, pruned, await INBOX.prune_all_async(connection, older_than=DAY, limit=2)]

    assert asyncio.run(consume()) == [True, [2], [2], 2, 3]
