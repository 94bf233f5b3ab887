"""Connections to PostgreSQL, and the one place where the driver's errors become this project's."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import psycopg
from psycopg.conninfo import conninfo_to_dict

from outbox_relay.errors import (
    AnswerTooLarge,
    ConfigurationError,
    DatabaseConflict,
    DatabaseUnavailable,
    OutboxRelayError,
    SchemaMismatch,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_CLIENT_DEFAULTS: dict[str, str | int] = {
    "target_session_attrs": "read-write",  # a relay needs the primary; libpq tries every host given
    "connect_timeout": 10,
    # A peer that vanished is noticed within 30 s; Linux would take two hours.
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,
}

# What a SQLSTATE, or its first two characters, means for the caller.
_TOO_LARGE = "54000"
_CONFLICT = {"40001", "40P01", "55P03", "57014"}
_UNAVAILABLE = {"08", "53", "57", "58", "25006", "25P03", "XX"}
_REMEDY_OF_MISMATCH = {
    "42P01": "apply the migrations: outbox-relay migrate apply",
    "42703": "apply the migrations: outbox-relay migrate apply",
    "3F000": "check OUTBOX_RELAY_SCHEMA, then: outbox-relay migrate apply",
    "42501": "grant the group role of the job to your login role, e.g. GRANT outbox_relay TO <login role>",
}


def connect(conninfo: str, *, application_name: str) -> psycopg.Connection:
    """
    Open a connection to the primary, in autocommit mode; the caller closes it.

    An empty *conninfo* leaves everything to libpq's PG* variables. Parameters in *conninfo* win over our defaults.
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
    settings = _CLIENT_DEFAULTS | {"application_name": application_name} | given
    with translated_errors():
        connection = psycopg.connect("", autocommit=True, **settings)  # type: ignore[arg-type]
        try:
            if _is_pooled(connection):
                connection.prepare_threshold = None
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


@contextmanager
def translated_errors() -> Iterator[None]:
    """
    Turn the driver's errors into ours, by SQLSTATE and never by text.

    Raises:
        DatabaseConflict: The transaction was rolled back by a lock, a deadlock or a time-out; it may be tried again.
        AnswerTooLarge: The same, and it fails again unless it asks for less.
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
    if state == _TOO_LARGE:
        return AnswerTooLarge(text)
    if state in _CONFLICT:
        return DatabaseConflict(text)
    if state in _REMEDY_OF_MISMATCH:
        return SchemaMismatch(f"{text}: {_REMEDY_OF_MISMATCH[state]}")
    if state in _UNAVAILABLE or state[:2] in _UNAVAILABLE:
        return DatabaseUnavailable(text)
    return None
