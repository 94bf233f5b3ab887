"""
Connections to PostgreSQL, their settings, and the one place where the driver's errors become this project's.

A session gets settings from its role, its database, the environment of the client and whoever used it before in a
pooler. `connect` undoes them and sets our own: for the session of a direct connection once, and where a pooler stands
between, which may give each transaction another session, at the beginning of each, see `begin`.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import TupleRow

from outbox_relay.errors import (
    AnswerTooLarge,
    ConfigurationError,
    DatabaseConflict,
    DatabaseUnavailable,
    OutboxRelayError,
    SchemaMismatch,
    TextNotUtf8,
)
from outbox_relay.sql import statement

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


_CLIENT_DEFAULTS: dict[str, str | int] = {
    # A relay needs the primary; libpq tries every host given. Not "read-write", which a role's default alone may deny.
    "target_session_attrs": "primary",
    "connect_timeout": 10,
    # A peer that vanished is noticed within 30 s; Linux would take two hours.
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,
}

_READ_ONLY = "default_transaction_read_only"  # for the transactions that begin later, and not for one that is open
_BEGIN = b"BEGIN ISOLATION LEVEL READ COMMITTED;\n"

# What a SQLSTATE, or its first two characters, means for the caller.
_UNANSWERABLE = {"54000": AnswerTooLarge, "22021": TextNotUtf8, "22P05": TextNotUtf8}
# The last two: what was prepared is not what it was, because somebody has changed a table or the session.
_CONFLICT = {"40001", "40P01", "55P03", "57014", "0A000", "26000"}
_UNAVAILABLE = {"08", "53", "57", "58", "25006", "25P03", "XX"}
_REMEDY_OF_MISMATCH = {
    "42P01": "apply the migrations: outbox-relay migrate apply",
    "42703": "apply the migrations: outbox-relay migrate apply",
    "3F000": "check OUTBOX_RELAY_SCHEMA, then: outbox-relay migrate apply",
    "42501": "grant the group role of the job to your login role, e.g. GRANT outbox_relay TO <login role>",
}


class _Connection(psycopg.Connection[TupleRow]):
    """A connection that knows which settings each of its transactions has to begin with."""

    settings_to_begin_with = b""


def connect(conninfo: str, *, application_name: str) -> psycopg.Connection:
    """
    Open a connection to the primary, in autocommit mode, whose settings are our own; the caller closes it.

    An empty *conninfo* leaves everything to libpq's PG* variables. Parameters in *conninfo* win over our defaults, but
    text comes in UTF-8, and what `options` sets is undone as what a role sets is.
    Behind a pooler the driver prepares nothing, see `_is_pooled`.

    Raises:
        DatabaseUnavailable: No server takes the connection now. libpq gives no SQLSTATE here, so a wrong password is
            among them; its words are in the message.
        ConfigurationError: *conninfo* is no connection string.
    """
    try:
        given = conninfo_to_dict(conninfo)
    except psycopg.ProgrammingError:  # its words quote the string, and with it perhaps a password
        raise ConfigurationError(
            "OUTBOX_RELAY_DATABASE_URL is no connection string: write postgresql://user@host/database",
        ) from None
    settings = _CLIENT_DEFAULTS | {"application_name": application_name} | given | {"client_encoding": "UTF8"}
    with translated_errors():
        connection = _Connection.connect("", autocommit=True, **settings)  # type: ignore[arg-type]
        try:
            foreign = _foreign_settings(connection)
            if _is_pooled(connection):
                connection.prepare_threshold = None
                connection.settings_to_begin_with = _local_settings(foreign)
            else:
                connection.execute(_undo(foreign, is_local=False) + statement("session_own", schema=None))
        except BaseException:
            connection.close()
            raise
    return connection


def _is_pooled(connection: psycopg.Connection) -> bool:
    """
    Tell whether a pooler stands between: it invents the key for cancelling, so the session in it is not the one here.

    One that pools transactions gives each of them another session, in which the name of a prepared statement is unknown
    or, worse, another client's statement. PgBouncer renames them from 1.21 on if it is allowed to; nobody can tell.
    """
    [(pid,)] = connection.execute("SELECT pg_backend_pid()").fetchall()
    return bool(pid != connection.info.backend_pid)


def begin(connection: psycopg.Connection, settings: bytes) -> psycopg.Cursor:
    """
    Begin a read committed transaction with our own settings and then *settings*; all in one message, without a reply.

    *connection* is in autocommit mode. Whatever *settings* return last is the result of the cursor's last set.
    """
    return connection.execute(_BEGIN + own_settings(connection) + settings)


@contextmanager
def transaction(connection: psycopg.Connection, settings: bytes = b"") -> Iterator[None]:
    """Open a transaction as `begin` does, and end it with the block; the driver's errors become ours."""
    with translated_errors():
        begin(connection, settings)
        try:
            yield
        except BaseException:
            with suppress(psycopg.Error):  # the connection is lost, and with it the transaction
                connection.rollback()
            raise
        connection.commit()


def own_settings(connection: psycopg.Connection) -> bytes:
    """Return the statements that a transaction on *connection* begins with, so that its settings are ours."""
    return connection.settings_to_begin_with if isinstance(connection, _Connection) else _local_settings()


def _foreign_settings(connection: psycopg.Connection) -> tuple[tuple[str, str], ...]:
    """Return the settings that come from elsewhere than the server's configuration, each with what undoes it."""
    cursor = connection.execute(statement("session_foreign", schema=None))
    while cursor.description is None:  # those of BEGIN and SET
        cursor.nextset()
    return tuple((str(name), str(value)) for name, value in cursor)


@cache
def _local_settings(foreign: tuple[tuple[str, str], ...] = ()) -> bytes:
    own = statement("session_own", schema=None).replace(b"SET ", b"SET LOCAL ")
    return _undo(foreign, is_local=True) + own + b";\n"


def _undo(foreign: Iterable[tuple[str, str]], *, is_local: bool) -> bytes:
    """Return the statements that undo settings; only `set_config` takes a list as pg_settings has it."""
    calls = [sql.SQL("pg_catalog.set_config({}, {}, {})").format(name, value, is_local) for name, value in foreign]
    if not calls:
        return b""
    undone = sql.SQL("SELECT {};\n").format(sql.SQL(", ").join(calls)).as_bytes(None)
    is_read_only = is_local and any(name == _READ_ONLY for name, _ in foreign)
    return b"SET TRANSACTION READ WRITE;\n" + undone if is_read_only else undone


@contextmanager
def translated_errors() -> Iterator[None]:
    """
    Turn the driver's errors into ours, by SQLSTATE and never by text.

    Raises:
        DatabaseConflict: The transaction was rolled back by a lock, a deadlock or a time-out; it may be tried again.
        AnswerTooLarge: The same, and it fails again unless it asks for less.
        TextNotUtf8: The same, because a text cannot be sent as UTF-8.
        DatabaseUnavailable: The connection is gone or the server takes no work.
        SchemaMismatch: A table, column or privilege is missing.
    """
    try:
        yield
    except psycopg.Error as error:
        translated = _translate(error)
        if translated is None:
            raise
        raise translated from error


def roll_back(connection: psycopg.Connection) -> None:
    """
    End the transaction of *connection*, if there is one, without its effects.

    Raises:
        DatabaseUnavailable: The connection broke, which ends the transaction as well.
    """
    with translated_errors():
        connection.rollback()


def _translate(error: psycopg.Error) -> OutboxRelayError | None:
    state = error.sqlstate
    text = " ".join(str(error).split())
    if state is None:  # raised by the driver or libpq, not by the server; refused connections among them
        return DatabaseUnavailable(text) if isinstance(error, psycopg.OperationalError) else None
    if state in _UNANSWERABLE:
        return _UNANSWERABLE[state](text)
    if state in _CONFLICT:
        return DatabaseConflict(text)
    if state in _REMEDY_OF_MISMATCH:
        return SchemaMismatch(f"{text}: {_REMEDY_OF_MISMATCH[state]}")
    if state in _UNAVAILABLE or state[:2] in _UNAVAILABLE:
        return DatabaseUnavailable(text)
    return None
