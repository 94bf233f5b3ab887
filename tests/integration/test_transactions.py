"""A function is run as one whole transaction, as often as it takes."""

from __future__ import annotations

import asyncio
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

import psycopg
import pytest
from psycopg import AsyncConnection, Connection, IsolationLevel, errors, sql
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from outbox_relay.errors import ConnectionReplaced, TransactionError
from outbox_relay.transactions import Repetition, Retry, transact, transact_async

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg.rows import TupleRow

    from tests.fixtures.postgres import Database


@pytest.fixture
def notes(database: Database) -> Iterator[Connection[TupleRow]]:
    """A connection to a database with an empty table of notes."""
    with database.connect(autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE note (text text CONSTRAINT note_text_key UNIQUE DEFERRABLE INITIALLY DEFERRED)"
        )
        yield connection


def texts(notes: Connection[TupleRow]) -> list[str]:
    return [text for (text,) in notes.execute("SELECT text FROM note ORDER BY text")]


def write(connection: Connection[TupleRow], text: str = "written") -> str:
    connection.execute("INSERT INTO note VALUES (%s)", [text])
    return text


def failing_first(sqlstate: str, *, times: int) -> Callable[[Connection[TupleRow]], str]:
    """Work that writes, and fails with *sqlstate* in its first runs."""
    runs = count(1)

    def work(connection: Connection[TupleRow]) -> str:
        run = next(runs)
        write(connection, f"run {run}")
        if run <= times:
            raised = sql.SQL("DO $$ BEGIN RAISE 'made up' USING ERRCODE = {}; END $$").format(sqlstate)
            connection.execute(raised)
        return f"run {run}"

    return work


def no_pause(_seconds: float) -> None:
    """Stand in for sleep."""


@pytest.mark.parametrize("autocommit", [False, True])
def test_work_is_committed_and_its_result_given(
    database: Database,
    notes: Connection[TupleRow],
    autocommit: bool,  # noqa: FBT001 -- a parameter of the test
) -> None:
    with database.connect(autocommit=autocommit) as connection:
        assert transact(connection, write) == "written"
        assert connection.info.transaction_status is psycopg.pq.TransactionStatus.IDLE
        assert texts(notes) == ["written"]


@pytest.mark.every_postgres
def test_connection_comes_from_a_pool_and_goes_back_to_it(database: Database, notes: Connection[TupleRow]) -> None:
    with ConnectionPool(database.dsn, min_size=1, max_size=1, timeout=5) as pool:
        assert [transact(pool, partial(write, text=text)) for text in "abc"] == ["a", "b", "c"]
    assert texts(notes) == ["a", "b", "c"]


def test_connection_that_is_opened_for_it_is_closed(database: Database, notes: Connection[TupleRow]) -> None:
    opened = database.connect()
    transact(lambda: opened, write)
    assert (opened.closed, texts(notes)) == (True, ["written"])


def test_error_of_work_passes_and_nothing_is_written(database: Database, notes: Connection[TupleRow]) -> None:
    def fail(connection: Connection[TupleRow]) -> None:
        write(connection)
        raise KeyError("order 4711")

    with database.connect() as connection, pytest.raises(KeyError, match="order 4711"):
        transact(connection, fail)
    assert texts(notes) == []


@pytest.mark.parametrize("sqlstate", ["40001", "40P01"])
def test_whole_work_is_repeated_when_the_server_rolled_it_back(
    database: Database, notes: Connection[TupleRow], sqlstate: str
) -> None:
    seen: list[Repetition] = []
    pauses: list[float] = []
    with database.connect() as connection:
        result = transact(
            connection,
            failing_first(sqlstate, times=2),
            retry=Retry(base_seconds=1.0, cap_seconds=1.5),
            on_retry=seen.append,
            sleep=pauses.append,
            fraction=lambda: 1.0,
        )
    assert (result, texts(notes), pauses) == ("run 3", ["run 3"], [1.0, 1.5])
    assert [(event.failures, event.error.sqlstate, event.pause_seconds) for event in seen] == [
        (1, sqlstate, 1.0),
        (2, sqlstate, 1.5),
    ]


def test_last_attempt_gives_its_error(database: Database, notes: Connection[TupleRow]) -> None:
    with database.connect() as connection, pytest.raises(errors.SerializationFailure, match="made up"):
        transact(connection, failing_first("40001", times=3), retry=Retry(attempts=3), sleep=no_pause)
    assert texts(notes) == []


@pytest.mark.parametrize("sqlstate", ["23505", "55P03", "57014"])
def test_other_errors_are_not_repeated(database: Database, notes: Connection[TupleRow], sqlstate: str) -> None:
    with database.connect() as connection, pytest.raises(psycopg.Error) as raised:
        transact(connection, failing_first(sqlstate, times=1), sleep=no_pause)
    assert (raised.value.sqlstate, texts(notes)) == (sqlstate, [])


def test_refusal_at_commit_is_raised(database: Database, notes: Connection[TupleRow]) -> None:
    notes.execute("INSERT INTO note VALUES ('written')")
    with database.connect() as connection, pytest.raises(errors.UniqueViolation):
        transact(connection, write)
    assert texts(notes) == ["written"]


def test_isolation_level_is_for_this_transaction_only(database: Database) -> None:
    def level(connection: Connection[TupleRow]) -> object:
        return connection.execute("SHOW transaction_isolation").fetchone()

    with database.connect() as connection:
        levels = [
            transact(connection, level, isolation_level=wanted)
            for wanted in (None, IsolationLevel.SERIALIZABLE, IsolationLevel.REPEATABLE_READ, None)
        ]
    assert levels == [("read committed",), ("serializable",), ("repeatable read",), ("read committed",)]


def test_error_that_was_caught_inside_is_no_success(database: Database, notes: Connection[TupleRow]) -> None:
    def swallow(connection: Connection[TupleRow]) -> str:
        write(connection)
        try:
            connection.execute("SELECT 1 / 0")
        except errors.DivisionByZero:
            return "fine"
        return "unreachable"

    with database.connect() as connection, pytest.raises(TransactionError, match="its error was caught"):
        transact(connection, swallow)
    assert texts(notes) == []


def test_commit_of_the_driver_is_refused_inside(database: Database, notes: Connection[TupleRow]) -> None:
    def commit_early(connection: Connection[TupleRow]) -> None:
        write(connection)
        connection.commit()

    with database.connect() as connection, pytest.raises(psycopg.ProgrammingError, match=r"commit\(\) forbidden"):
        transact(connection, commit_early)
    assert texts(notes) == []


def test_commit_as_a_statement_is_noticed(database: Database, notes: Connection[TupleRow]) -> None:
    def commit_early(connection: Connection[TupleRow]) -> None:
        write(connection, "before")
        connection.execute("COMMIT")
        write(connection, "after")

    with database.connect() as connection, pytest.raises(ConnectionReplaced, match="ran outside it"):
        transact(connection, commit_early)
    assert texts(notes) == ["before"]  # what was committed is, but nobody is told that all went well


def test_nested_work_is_part_of_the_outer_transaction(database: Database, notes: Connection[TupleRow]) -> None:
    def outer(connection: Connection[TupleRow]) -> None:
        transact(connection, lambda inner: write(inner, "inner"))
        raise KeyError("outer failed")

    with database.connect() as connection, pytest.raises(KeyError):
        transact(connection, outer)
    assert texts(notes) == []


def test_failure_of_nested_work_undoes_only_its_own_statements(database: Database, notes: Connection[TupleRow]) -> None:
    def outer(connection: Connection[TupleRow]) -> None:
        write(connection, "outer")
        with pytest.raises(errors.DivisionByZero):
            transact(connection, lambda inner: (write(inner, "inner"), inner.execute("SELECT 1 / 0")))

    with database.connect() as connection:
        transact(connection, outer)
    assert texts(notes) == ["outer"]


def test_nested_work_is_not_repeated_by_itself(database: Database, notes: Connection[TupleRow]) -> None:
    outer_runs = count(1)
    work = failing_first("40001", times=1)

    def outer(connection: Connection[TupleRow]) -> tuple[int, str]:
        return next(outer_runs), transact(connection, work)

    with database.connect() as connection:
        assert transact(connection, outer, sleep=no_pause) == (2, "run 2")
    assert texts(notes) == ["run 2"]


def test_nested_work_cannot_change_the_isolation_level(database: Database) -> None:
    def outer(connection: Connection[TupleRow]) -> None:
        transact(connection, lambda _: None, isolation_level=IsolationLevel.SERIALIZABLE)

    with database.connect() as connection:
        transact(connection, outer, isolation_level=IsolationLevel.SERIALIZABLE)
        with pytest.raises(errors.ActiveSqlTransaction):
            transact(connection, outer)


def test_rows_as_dictionaries_do_not_matter(database: Database) -> None:
    with psycopg.connect(database.dsn, row_factory=psycopg.rows.dict_row) as connection:
        row = transact(connection, lambda inner: inner.execute("SELECT 1 AS one").fetchone())
    assert row == {"one": 1}


def test_asynchronous_work_is_repeated_as_a_whole(database: Database, notes: Connection[TupleRow]) -> None:
    runs = count(1)

    async def work(connection: AsyncConnection[TupleRow]) -> str:
        run = next(runs)
        await connection.execute("INSERT INTO note VALUES (%s)", [f"run {run}"])
        if run == 1:
            raise errors.SerializationFailure
        return f"run {run}"

    async def main() -> list[str]:
        async with AsyncConnectionPool(database.dsn, min_size=1, max_size=1, open=False) as pool:
            pooled = await transact_async(pool, lambda connection: transact_async(connection, work))
        opened = await transact_async(lambda: AsyncConnection.connect(database.dsn), work)
        async with await AsyncConnection.connect(database.dsn) as connection:
            return [pooled, opened, await transact_async(connection, work)]

    assert asyncio.run(main()) == ["run 2", "run 3", "run 4"]
    assert texts(notes) == ["run 2", "run 3", "run 4"]


def test_in_a_pipeline_of_the_caller_it_is_committed_when_the_result_is_given(
    database: Database, notes: Connection[TupleRow]
) -> None:
    with database.connect() as connection, connection.pipeline():
        assert transact(connection, write) == "written"
        assert texts(notes) == ["written"]


def test_in_a_pipeline_of_the_caller_a_refusal_at_commit_is_raised(
    database: Database, notes: Connection[TupleRow]
) -> None:
    notes.execute("INSERT INTO note VALUES ('written')")
    with database.connect() as connection, connection.pipeline():
        with pytest.raises(errors.UniqueViolation):
            transact(connection, write)
        assert transact(connection, lambda inner: write(inner, "after")) == "after"
    assert texts(notes) == ["after", "written"]
