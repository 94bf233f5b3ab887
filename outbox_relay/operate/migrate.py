"""Apply the forward-only migrations, and say which are applied, pending or unknown."""

from __future__ import annotations

import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psycopg
from psycopg import errors
from psycopg.pq import TransactionStatus
from psycopg.sql import SQL, Composed, Identifier

import outbox_relay
from outbox_relay.database import translated_errors
from outbox_relay.errors import ConfigurationError, MigrationError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime
    from importlib.resources.abc import Traversable

    from psycopg import Connection
    from psycopg.rows import TupleRow

_ATTEMPTS = 10
_LOCK_TIMEOUT_SECONDS = 2.0
_PAUSE_SECONDS = 1.0  # between attempts, so that writers queued behind the migration's lock get through

_CREATE_SCHEMA = SQL("""\
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = {name}) THEN
        CREATE SCHEMA {schema};
    END IF;
END
$$;
""")

_CREATE_TABLE = SQL("""\
CREATE TABLE IF NOT EXISTS {schema}.outbox_relay_migration (
    line       text NOT NULL,
    version    integer NOT NULL,
    name       text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT outbox_relay_migration_pkey PRIMARY KEY (line, version)
);
""")

_SETTINGS = SQL("""\
SET LOCAL search_path = {schema};
SET LOCAL lock_timeout = {lock_timeout};
SET LOCAL statement_timeout = 0;
""")

_REMEDIES = {
    "42501": "Use a role that owns the schema, or may create in it: GRANT CREATE ON SCHEMA <schema> TO <role>",
    "42P07": "If another tool applied it, go on with that tool, or record it in outbox_relay_migration",
    "55P03": f"No lock in {_ATTEMPTS} attempts: end the long transactions (see pg_stat_activity) and run it again",
}

_RECORD = SQL("INSERT INTO outbox_relay_migration (line, version, name) VALUES ({line}, {version}, {name})")


@dataclass(frozen=True, slots=True)
class Migration:
    """One file of a line: NUMBER_NAME.sql."""

    number: int
    name: str
    sql: str

    def __str__(self) -> str:
        return f"{self.number:04}_{self.name}"


@dataclass(frozen=True, slots=True)
class MigrationState:
    """Where one migration stands in one database; unknown means that a newer version of this project applied it."""

    number: int
    name: str
    state: Literal["applied", "pending", "unknown"]
    applied_at: datetime | None

    def __str__(self) -> str:
        return f"{self.number:04}_{self.name}"


def migrations(line: str = "outbox") -> list[Migration]:
    """All migrations of *line* in this version, oldest first."""
    files = [file for file in _directory(line).iterdir() if file.name.endswith(".sql")]
    return sorted((_read(file) for file in files), key=lambda migration: migration.number)


def expected_version(line: str = "outbox") -> int:
    """The number of the newest migration of *line* in this version."""
    return migrations(line)[-1].number


def apply(
    conn: Connection, *, schema: str, line: str = "outbox", lock_timeout_seconds: float = _LOCK_TIMEOUT_SECONDS
) -> list[Migration]:
    """
    Apply what is pending, each migration in its own transaction, and return those applied now.

    Of two that run at once, one waits and then finds the work done. Settings last for one transaction only, so this
    works behind a transaction pooler and leaves the session as it was.

    Args:
        lock_timeout_seconds: Longest wait for a lock, and so the longest wait of the writers that queue behind it,
            before a migration steps back and tries again.

    Raises:
        MigrationError: A migration failed, or got no lock in ten attempts. It is rolled back; those before it stay.
        ConfigurationError: The role lacks a privilege.
        DatabaseUnavailable: The connection broke. Run it again.
    """
    with _errors_of(f"schema {schema!r} could not be prepared"), _exclusive_transaction(conn):
        conn.execute(_create_migration_table(schema))
    settings = _settings(schema, lock_timeout_seconds=lock_timeout_seconds)
    return [
        migration for migration in migrations(line) if _apply_patiently(conn, migration, line=line, settings=settings)
    ]


def status(conn: Connection, *, schema: str, line: str = "outbox") -> list[MigrationState]:
    """Every migration that this version or the database knows, oldest first."""
    states = {
        migration.number: MigrationState(migration.number, migration.name, "pending", None)
        for migration in migrations(line)
    }
    with _errors_of(f"migrations in schema {schema!r} could not be read"), conn.transaction():
        applied = _applied(conn, schema=schema, line=line)
    for number, name, applied_at in applied:
        states[number] = MigrationState(number, name, "applied" if number in states else "unknown", applied_at)
    return [states[number] for number in sorted(states)]


def sql(*, schema: str, line: str = "outbox", after: int = 0) -> str:
    """
    The migrations numbered above *after* as one script, for review or for another tool.

    The script records what it applies, so that `apply` and `status` see it. In a second run each transaction fails
    on its record and changes nothing.
    """
    head = f"-- outbox-relay {outbox_relay.__version__}, line {line}. Run with: psql -v ON_ERROR_STOP=1\n"
    settings = _settings(schema, lock_timeout_seconds=_LOCK_TIMEOUT_SECONDS).as_string()
    bodies = [_create_migration_table(schema).as_string()] + [
        f"-- {migration}\n{settings}{_record(migration, line=line).as_string()};\n\n{migration.sql}"
        for migration in migrations(line)
        if migration.number > after
    ]
    return head + "".join(f"\nBEGIN;\n{body}COMMIT;\n" for body in bodies)


def _directory(line: str) -> Traversable:
    installed = resources.files(outbox_relay) / "migrations" / line
    if installed.is_dir():
        return installed
    return Path(outbox_relay.__file__).parents[1] / "migrations" / line  # a checkout keeps them at its top


def _read(file: Traversable) -> Migration:
    number, _, name = file.name.removesuffix(".sql").partition("_")
    return Migration(int(number), name, file.read_text(encoding="utf-8"))


def _apply_patiently(conn: Connection, migration: Migration, *, line: str, settings: Composed) -> bool:
    with _errors_of(f"migration {migration} is rolled back"):
        for _ in range(_ATTEMPTS - 1):
            with suppress(errors.LockNotAvailable):
                return _apply_once(conn, migration, line=line, settings=settings)
            time.sleep(_PAUSE_SECONDS)
        return _apply_once(conn, migration, line=line, settings=settings)


def _apply_once(conn: Connection, migration: Migration, *, line: str, settings: Composed) -> bool:
    """Apply *migration* unless the database has a record of it; say whether it was applied now."""
    with _exclusive_transaction(conn):
        conn.execute(settings)
        is_new = conn.execute(_record(migration, line=line) + SQL(" ON CONFLICT DO NOTHING")).rowcount == 1
        if is_new:
            conn.execute(migration.sql.encode())
    return is_new


@contextmanager
def _exclusive_transaction(conn: Connection) -> Iterator[None]:
    """A transaction that waits until no other runner is in one; the lock ends with it, behind a pooler too."""
    if conn.info.transaction_status in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
        raise MigrationError("migrations need a connection without an open transaction: commit or roll back first")
    with conn.transaction():
        conn.execute("SELECT pg_advisory_xact_lock(hashtextextended('outbox_relay_migration', 0))")
        yield


def _create_migration_table(schema: str) -> Composed:
    names = {"name": schema, "schema": Identifier(schema)}
    return _CREATE_SCHEMA.format(**names) + _CREATE_TABLE.format(**names)


def _settings(schema: str, *, lock_timeout_seconds: float) -> Composed:
    return _SETTINGS.format(schema=Identifier(schema), lock_timeout=f"{round(lock_timeout_seconds * 1000)}ms")


def _record(migration: Migration, *, line: str) -> Composed:
    return _RECORD.format(line=line, version=migration.number, name=migration.name)


def _applied(conn: Connection, *, schema: str, line: str) -> list[TupleRow]:
    table = Identifier(schema, "outbox_relay_migration")
    [(exists,)] = conn.execute("SELECT to_regclass(%s) IS NOT NULL", [table.as_string(conn)])
    if not exists:
        return []
    query = SQL("SELECT version, name, applied_at FROM {table} WHERE line = {line} ORDER BY version")
    return conn.execute(query.format(table=table, line=line)).fetchall()


@contextmanager
def _errors_of(what: str) -> Iterator[None]:
    with translated_errors():
        try:
            yield
        except errors.InsufficientPrivilege as error:
            raise ConfigurationError(_message(what, error)) from error
        except errors.LockNotAvailable as error:
            raise MigrationError(_message(what, error)) from error
        except psycopg.OperationalError:
            raise  # the server's or the network's fault
        except psycopg.Error as error:
            raise MigrationError(_message(what, error)) from error


def _message(what: str, error: psycopg.Error) -> str:
    failure = f"{what}: {error.diag.message_primary or error}"
    remedy = error.diag.message_hint or _REMEDIES.get(error.sqlstate or "")
    return f"{failure}. {remedy}" if remedy else failure
