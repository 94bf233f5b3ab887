"""A lost connection: what is known is acted upon, what is not known is said."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
from contextlib import suppress
from itertools import count
from typing import TYPE_CHECKING

import psycopg
import pytest
from psycopg import AsyncConnection, Connection
from psycopg.conninfo import make_conninfo
from psycopg_pool import ConnectionPool

from outbox_relay.errors import CommitOutcomeUnknown
from outbox_relay.transactions import Retry, transact, transact_async
from tests.fixtures.proxy import TcpProxy
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg.rows import TupleRow

    from tests.fixtures.postgres import Database

NO_PATIENCE = Retry(outcome_seconds=0.2)


@pytest.fixture
def proxy(database: Database) -> Iterator[TcpProxy]:
    with database.connect(autocommit=True) as connection:
        connection.execute("CREATE TABLE note (text text)")
    with TcpProxy("127.0.0.1", database.server.port) as running:
        yield running


@pytest.fixture
def through_proxy(database: Database, proxy: TcpProxy) -> str:
    return make_conninfo(database.dsn, port=proxy.port, connect_timeout=3)


def texts(database: Database) -> list[str]:
    with database.connect() as connection:
        return [text for (text,) in connection.execute("SELECT text FROM note ORDER BY text")]


def counted_work() -> Callable[[Connection[TupleRow]], str]:
    runs = count(1)

    def work(connection: Connection[TupleRow]) -> str:
        text = f"run {next(runs)}"
        connection.execute("INSERT INTO note VALUES (%s)", [text])
        return text

    return work


@pytest.mark.every_postgres
def test_committed_transaction_is_not_repeated_when_the_reply_is_lost(
    database: Database, proxy: TcpProxy, through_proxy: str
) -> None:
    proxy.swallow_reply_to(b"COMMIT")
    assert transact(lambda: psycopg.connect(through_proxy), counted_work()) == "run 1"
    assert (texts(database), proxy.fired) == (["run 1"], {"swallowed": 1})


@pytest.mark.every_postgres
def test_transaction_whose_commit_never_arrived_is_repeated(
    database: Database, proxy: TcpProxy, through_proxy: str
) -> None:
    proxy.cut_before(b"COMMIT")
    assert transact(lambda: psycopg.connect(through_proxy), counted_work()) == "run 2"
    assert (texts(database), proxy.fired) == (["run 2"], {"cut_before": 1})


def test_pool_of_one_replaces_the_lost_connection(database: Database, proxy: TcpProxy, through_proxy: str) -> None:
    with ConnectionPool(through_proxy, min_size=1, max_size=1, timeout=5) as pool:
        proxy.swallow_reply_to(b"COMMIT")
        assert transact(pool, counted_work()) == "run 1"
    assert (texts(database), proxy.fired["swallowed"]) == (["run 1"], 1)


@pytest.mark.parametrize(("fault", "expected"), [("swallow_reply_to", "run 1"), ("cut_before", "run 2")])
def test_asynchronous_transaction_is_settled_likewise(
    database: Database, proxy: TcpProxy, through_proxy: str, fault: str, expected: str
) -> None:
    runs = count(1)

    async def work(connection: AsyncConnection[TupleRow]) -> str:
        text = f"run {next(runs)}"
        await connection.execute("INSERT INTO note VALUES (%s)", [text])
        return text

    getattr(proxy, fault)(b"COMMIT")
    assert asyncio.run(transact_async(lambda: AsyncConnection.connect(through_proxy), work)) == expected
    assert (texts(database), proxy.fired.total()) == ([expected], 1)


def test_connection_lost_before_commit_is_replaced(database: Database, proxy: TcpProxy, through_proxy: str) -> None:
    proxy.swallow_reply_to(b"INSERT")
    assert transact(lambda: psycopg.connect(through_proxy), counted_work()) == "run 2"
    assert (texts(database), proxy.fired) == (["run 2"], {"swallowed": 1})


def test_bare_connection_lost_before_commit_gives_its_own_error(
    database: Database, proxy: TcpProxy, through_proxy: str
) -> None:
    proxy.swallow_reply_to(b"INSERT")
    with psycopg.connect(through_proxy) as connection, pytest.raises(psycopg.OperationalError):
        transact(connection, counted_work())
    assert texts(database) == []


def test_bare_connection_lost_at_commit_leaves_it_unknown_and_says_how_to_ask(
    database: Database, proxy: TcpProxy, through_proxy: str
) -> None:
    proxy.swallow_reply_to(b"COMMIT")
    with psycopg.connect(through_proxy) as connection, pytest.raises(CommitOutcomeUnknown) as raised:
        transact(connection, counted_work())
    [question] = re.findall(r"SELECT .*", str(raised.value))
    with database.connect() as other:
        assert other.execute(question.encode()).fetchone() == ("committed",)


def test_reading_that_was_lost_at_commit_is_repeated(proxy: TcpProxy, through_proxy: str) -> None:
    runs = count(1)
    proxy.swallow_reply_to(b"COMMIT")
    assert transact(lambda: psycopg.connect(through_proxy), lambda _: next(runs)) == 2
    assert proxy.fired == {"swallowed": 1}


def test_outcome_is_unknown_when_the_server_cannot_be_asked_in_time(
    database: Database, proxy: TcpProxy, through_proxy: str
) -> None:
    connections = iter([psycopg.connect(through_proxy)])
    proxy.swallow_reply_to(b"COMMIT")

    def connect_once() -> Connection[TupleRow]:
        for connection in connections:
            return connection
        raise psycopg.OperationalError("no route to host")

    with pytest.raises(CommitOutcomeUnknown, match="do not repeat it"):
        transact(connect_once, counted_work(), retry=NO_PATIENCE)
    assert texts(database) == ["run 1"]


def first_and_then(
    first: Connection[TupleRow], connect: Callable[[], Connection[TupleRow]]
) -> Callable[[], Connection[TupleRow]]:
    """A source that gives *first*, and afterwards what *connect* opens."""
    waiting = [first]
    return lambda: waiting.pop() if waiting else connect()


def vanish_once_verified(vanishing: Connection[TupleRow], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the client off once its transaction is verified, unnoticed by the server: COMMIT goes nowhere."""
    fetchone = psycopg.Cursor.fetchone

    def fetch_and_vanish(cursor: psycopg.Cursor[TupleRow]) -> TupleRow | None:
        row = fetchone(cursor)
        if cursor.connection is vanishing and [column.name for column in cursor.description or ()][:1] == ["mark"]:
            os.dup(vanishing.fileno())  # keeps the server's end open
            ours, theirs = socket.socketpair()
            os.dup2(ours.fileno(), vanishing.fileno())
            ours.close()
            theirs.close()
        return row

    monkeypatch.setattr(psycopg.Cursor, "fetchone", fetch_and_vanish)


def test_session_that_waits_for_a_lost_commit_is_ended_and_the_work_repeated(
    database: Database,
    proxy: TcpProxy,  # noqa: ARG001 -- made the table
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vanishing = database.connect()
    vanish_once_verified(vanishing, monkeypatch)
    process_id = vanishing.info.backend_pid
    assert transact(first_and_then(vanishing, database.connect), counted_work()) == "run 2"
    with database.connect() as connection:
        left = connection.execute("SELECT FROM pg_stat_activity WHERE pid = %s", [process_id]).fetchall()
    assert (left, texts(database)) == ([], ["run 2"])


@pytest.mark.every_postgres
def test_xid_that_a_crashed_server_gave_away_again_is_not_taken_for_ours(own_database: Database) -> None:
    """Without a look at the crash, the server would say of our lost transaction that it is committed."""
    with own_database.connect(autocommit=True) as connection:
        connection.execute("CREATE TABLE note (text text)")
        wal_writer = wal_writer_of(connection)
    assert wal_writer
    os.kill(wal_writer, signal.SIGSTOP)  # nothing of ours reaches the disk by chance
    with TcpProxy("127.0.0.1", own_database.server.port) as proxy:
        first = psycopg.connect(make_conninfo(own_database.dsn, port=proxy.port))
        proxy.cut_before(b"COMMIT")
        xids: list[int] = []

        def crash_and_reuse_the_xid() -> Connection[TupleRow]:
            os.kill(wal_writer, signal.SIGKILL)  # the server ends all its processes, and recovers
            recovered = eventually(connect_once_recovered)
            assert recovered
            with recovered as other:
                while xids[-1] < xids[0] or len(xids) == 1:
                    xids.append(current_xid(other))
            return own_database.connect()

        def connect_once_recovered() -> Connection[TupleRow] | None:
            with suppress(psycopg.OperationalError):
                connection = own_database.connect(autocommit=True)
                if wal_writer_of(connection) != wal_writer:
                    return connection
                connection.close()
            return None

        def work(connection: Connection[TupleRow]) -> None:
            connection.execute("INSERT INTO note VALUES ('ours')")
            xids.append(current_xid(connection))

        with pytest.raises(CommitOutcomeUnknown):
            transact(first_and_then(first, crash_and_reuse_the_xid), work)
    with own_database.connect() as connection:
        status = connection.execute("SELECT pg_xact_status(%s::text::xid8)", [xids[0]]).fetchone()
    assert (status, xids[-1], texts(own_database)) == (("committed",), xids[0], [])


def wal_writer_of(connection: Connection[TupleRow]) -> int | None:
    found = connection.execute("SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'").fetchone()
    return found[0] if found else None


def current_xid(connection: Connection[TupleRow]) -> int:
    [(xid,)] = connection.execute("SELECT pg_current_xact_id()::text")
    return int(xid)


def test_orderly_restart_keeps_the_answer(own_database: Database) -> None:
    with own_database.connect(autocommit=True) as connection:
        connection.execute("CREATE TABLE note (text text)")
    with TcpProxy("127.0.0.1", own_database.server.port) as proxy:
        first = psycopg.connect(make_conninfo(own_database.dsn, port=proxy.port))
        proxy.swallow_reply_to(b"COMMIT")

        def restart() -> Connection[TupleRow]:
            own_database.server.restart("fast")
            return own_database.connect()

        assert transact(first_and_then(first, restart), counted_work()) == "run 1"
    assert texts(own_database) == ["run 1"]


def test_backend_that_is_terminated_in_the_middle_is_replaced(
    database: Database,
    proxy: TcpProxy,  # noqa: ARG001 -- made the table
) -> None:
    work = counted_work()

    def terminated_once(connection: Connection[TupleRow]) -> str:
        text = work(connection)
        if text == "run 1":
            with database.connect(autocommit=True) as other:
                other.execute("SELECT pg_terminate_backend(%s)", [connection.info.backend_pid])
        return text

    assert transact(database.connect, terminated_once) == "run 2"
    assert texts(database) == ["run 2"]
