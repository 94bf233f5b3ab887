"""Say at start whether the database has the tables, columns and privileges that the relay needs, as it needs them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outbox_relay.database import translated_errors
from outbox_relay.errors import SchemaMismatch
from outbox_relay.operate import migrate
from outbox_relay.relay.horizon import check_tables
from outbox_relay.sql import statement

if TYPE_CHECKING:
    from psycopg import Connection
    from psycopg.rows import TupleRow


def check_schema(conn: Connection, *, schema: str) -> str | None:
    """
    Return normally when this version can run on *schema*, with a warning when a newer version has migrated it.

    A newer schema is no error: migrations stay compatible with the version before, so that relays can be upgraded
    after the database. Without a record of migrations (another tool applied them) the catalog alone decides.

    Raises:
        SchemaMismatch: Something is missing, or was changed so that messages would be missed; the message has the
            command or the SQL that mends it.
        DatabaseUnavailable: The connection broke.
    """
    _check_catalog(conn, schema=schema)
    check_tables(conn, schema=schema)
    warnings = [_compare_versions(conn, schema=schema, line=line) for line in _lines(conn, schema=schema)]
    return "; ".join(filter(None, warnings)) or None


def _check_catalog(conn: Connection, *, schema: str) -> None:
    missing = _rows(conn, "list_missing", schema=schema)
    absent = sorted({name for name, _ in missing if name is not None})
    if absent:
        raise SchemaMismatch(
            f"schema {schema!r} has no {', '.join(absent)}: "
            "run `outbox-relay migrate apply`, or correct OUTBOX_RELAY_SCHEMA"
        )
    if missing:
        raise SchemaMismatch(
            f"role {conn.info.user!r} lacks privileges that `GRANT outbox_relay TO {conn.info.user}` gives, or: "
            + "; ".join(remedy for _, remedy in missing)
        )


def _rows(conn: Connection, name: str, *, schema: str) -> list[TupleRow]:
    with translated_errors(), conn.transaction():
        return conn.execute(statement(name, schema=schema), {"schema": schema}).fetchall()


def _lines(conn: Connection, *, schema: str) -> list[str]:
    """Return the lines of migrations that *schema* has; one that is on its way to partitions works as it did before."""
    [(is_partitioned,)] = _rows(conn, "partition_exists", schema=schema)
    return ["outbox", "partitioned"] if is_partitioned else ["outbox"]


def _compare_versions(conn: Connection, *, schema: str, line: str) -> str | None:
    states = migrate.status(conn, schema=schema, line=line)
    pending = [str(state) for state in states if state.state == "pending"]
    if pending and len(pending) < len(states):
        flag = " --partitioned" if line == "partitioned" else ""
        raise SchemaMismatch(
            f"schema {schema!r} is older than this version and waits for {', '.join(pending)}: "
            f"run `outbox-relay migrate apply{flag}`"
        )
    unknown = [str(state) for state in states if state.state == "unknown"]
    if unknown:
        return f"schema {schema!r} has {', '.join(unknown)} of a newer version: this one runs on it, upgrade it soon"
    return None
