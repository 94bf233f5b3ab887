"""What PostgreSQL's errors become, each made by a real server, and what a connection of ours is like."""

from __future__ import annotations

from typing import TYPE_CHECKING, LiteralString

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay.database import connect, translated_errors
from outbox_relay.errors import (
    AnswerTooLarge,
    ConfigurationError,
    DatabaseConflict,
    DatabaseUnavailable,
    OutboxRelayError,
    SchemaMismatch,
)
from outbox_relay.sandbox.ports import ReservedPort
from tests.fixtures.proxy import TcpProxy
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from tests.fixtures.postgres import Database

RAISE: LiteralString = "DO $$ BEGIN RAISE EXCEPTION 'made up' USING ERRCODE = '{}'; END $$"


@pytest.fixture
def conn(database: Database) -> Iterator[Connection]:
    with connect(database.dsn, application_name="test") as connection:
        yield connection


def error_of(connection: Connection, *statements: LiteralString) -> OutboxRelayError:
    """What the last of *statements* raises."""
    for statement in statements[:-1]:
        connection.execute(statement)
    with pytest.raises(OutboxRelayError) as raised, translated_errors():
        connection.execute(statements[-1])
    assert isinstance(raised.value.__cause__, psycopg.Error)
    return raised.value


@pytest.mark.every_postgres
@pytest.mark.parametrize(
    ("statements", "expected", "text"),
    [
        (["SELECT FROM nowhere"], SchemaMismatch, "outbox-relay migrate apply"),
        (["SELECT missing FROM outbox"], SchemaMismatch, "outbox-relay migrate apply"),
        (["CREATE TABLE nowhere.t ()"], SchemaMismatch, "check OUTBOX_RELAY_SCHEMA"),
        (["SET ROLE outbox_writer", "SELECT FROM outbox"], SchemaMismatch, "GRANT outbox_relay TO <login role>"),
        (["SET statement_timeout = 20", "SELECT pg_sleep(20)"], DatabaseConflict, "statement timeout"),
        (["SELECT pg_terminate_backend(pg_backend_pid())"], DatabaseUnavailable, "terminating connection"),
        (["BEGIN READ ONLY", "DELETE FROM outbox"], DatabaseUnavailable, "read-only transaction"),
    ],
    ids=["table", "column", "schema", "privilege", "statement time-out", "terminated", "read only"],
)
def test_an_error_of_the_server_is_ours_and_says_what_to_do(
    conn: Connection, statements: list[LiteralString], expected: type[OutboxRelayError], text: str
) -> None:
    error = error_of(conn, *statements)
    assert type(error) is expected
    assert text in str(error)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("40001", DatabaseConflict),
        ("40P01", DatabaseConflict),
        ("55P03", DatabaseConflict),
        ("57014", DatabaseConflict),
        ("08006", DatabaseUnavailable),
        ("53100", DatabaseUnavailable),
        ("53200", DatabaseUnavailable),
        ("54000", AnswerTooLarge),
        ("53300", DatabaseUnavailable),
        ("57P01", DatabaseUnavailable),
        ("57P02", DatabaseUnavailable),
        ("57P03", DatabaseUnavailable),
        ("58030", DatabaseUnavailable),
        ("25006", DatabaseUnavailable),
        ("25P03", DatabaseUnavailable),
        ("XX000", DatabaseUnavailable),
        ("42P01", SchemaMismatch),
        ("42703", SchemaMismatch),
        ("3F000", SchemaMismatch),
        ("42501", SchemaMismatch),
    ],
)
def test_each_sqlstate_means_one_condition(
    conn: Connection, state: LiteralString, expected: type[OutboxRelayError]
) -> None:
    assert type(error_of(conn, RAISE.format(state))) is expected


@pytest.mark.parametrize("state", ["22012", "23505", "42601", "P0001"])
def test_a_fault_of_a_statement_is_nobody_elses_and_passes_through(conn: Connection, state: LiteralString) -> None:
    with pytest.raises(psycopg.Error) as raised, translated_errors():
        conn.execute(RAISE.format(state))
    assert raised.value.sqlstate == state


@pytest.mark.every_postgres
def test_a_deadlock_is_a_conflict(database: Database, conn: Connection) -> None:
    with database.connect() as other:
        other.execute("SELECT FROM outbox_shard WHERE shard = 1 FOR UPDATE")
        conn.execute("BEGIN")
        conn.execute("SET LOCAL deadlock_timeout = '10ms'")
        conn.execute("SELECT FROM outbox_shard WHERE shard = 2 FOR UPDATE")
        pid = other.info.backend_pid
        other.pgconn.send_query(b"SELECT FROM outbox_shard WHERE shard = 2 FOR UPDATE")
        with database.connect(autocommit=True) as observer:
            waiting = "SELECT FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'"
            eventually(lambda: observer.execute(waiting, [pid]).fetchall())
        error = error_of(conn, "SELECT FROM outbox_shard WHERE shard = 1 FOR UPDATE")
        assert type(error) is DatabaseConflict
        conn.rollback()
        while other.pgconn.get_result():
            pass


def test_a_session_that_is_idle_in_its_transaction_for_too_long_is_gone(database: Database, conn: Connection) -> None:
    pid = conn.info.backend_pid
    conn.execute("BEGIN")
    conn.execute("SET LOCAL idle_in_transaction_session_timeout = 20")
    with database.connect(autocommit=True) as observer:
        eventually(lambda: not observer.execute("SELECT FROM pg_stat_activity WHERE pid = %s", [pid]).fetchall())
    assert type(error_of(conn, "SELECT 1")) is DatabaseUnavailable


def test_a_cut_connection_is_unavailable(database: Database) -> None:
    with TcpProxy("127.0.0.1", database.server.port) as proxy:
        with connect(make_conninfo(database.dsn, port=proxy.port), application_name="test") as cut_off:
            proxy.cut()
            assert type(error_of(cut_off, "SELECT 1")) is DatabaseUnavailable
        assert proxy.fired["cut"] == 1


def test_a_server_that_is_not_there_is_unavailable() -> None:
    with pytest.raises(DatabaseUnavailable, match="refused"):
        connect(f"host=127.0.0.1 port={ReservedPort().number}", application_name="test")


def test_a_server_that_takes_no_writes_is_unavailable(database: Database) -> None:
    with database.connect(autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {database.name} SET default_transaction_read_only = on")
    with pytest.raises(DatabaseUnavailable, match="read-only"):
        connect(database.dsn, application_name="test")


def test_what_is_no_connection_string_is_a_configuration_error_and_is_not_repeated() -> None:
    with pytest.raises(ConfigurationError, match="OUTBOX_RELAY_DATABASE_URL") as raised:
        connect("postgres//user:hunter2@host", application_name="test")
    assert "hunter2" not in str(raised.value)
    assert raised.value.__cause__ is None


def test_a_connection_carries_its_name_unless_the_connection_string_has_one(
    database: Database, conn: Connection
) -> None:
    assert conn.info.get_parameters()["application_name"] == "test"
    named = make_conninfo(database.dsn, application_name="mine", keepalives_idle=99)
    with connect(named, application_name="test") as own:
        assert own.info.get_parameters()["application_name"] == "mine"
        assert own.info.get_parameters()["keepalives_idle"] == "99"


def test_a_peer_that_vanished_is_noticed_within_half_a_minute(conn: Connection) -> None:
    parameters = conn.info.get_parameters()
    names = "tcp_user_timeout", "keepalives_idle", "keepalives_interval", "keepalives_count"
    assert [parameters[name] for name in names] == ["30000", "10", "5", "4"]
