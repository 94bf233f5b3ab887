"""What an operator asks first: how much waits, for how long, what is parked, and who holds the horizon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from psycopg import sql

from outbox_relay.relay.horizon import OpenTransaction, among, describe, list_writers, observe
from outbox_relay.relay.survey import SurveyOptions, read_backlog

if TYPE_CHECKING:
    from psycopg import Connection

MOST_COUNTED = 100_000


@dataclass(frozen=True, slots=True)
class Status:
    """
    The state of one outbox.

    Attributes:
        unpublished: Messages that wait, counted up to `MOST_COUNTED`.
        oldest_age_seconds: Age of the oldest of them by `created_at`; 0 when none waits.
        parked: Messages set aside, counted up to `MOST_COUNTED`.
        parked_keys: Keys they belong to.
        writers: Open and prepared transactions that may still add lower numbers, the oldest first.
    """

    unpublished: int
    oldest_age_seconds: float
    parked: int
    parked_keys: int
    writers: list[OpenTransaction]


def read_status(connection: Connection, *, schema: str) -> Status:
    """
    Look at the outbox in *schema*; *connection* is in autocommit mode.

    Raises:
        DatabaseUnavailable: The connection broke.
        DatabaseConflict: The table is locked by somebody who changes its definition, or looking takes too long.
        SchemaMismatch: There is no outbox in *schema*, or this role may not read it.
    """
    backlog = read_backlog(connection, options=SurveyOptions(schema=schema, messages=MOST_COUNTED))
    return Status(
        unpublished=backlog.unpublished_messages,
        oldest_age_seconds=backlog.oldest_unpublished_seconds,
        parked=backlog.parked_messages,
        parked_keys=backlog.parked_keys,
        writers=open_writers(connection, schema=schema),
    )


def open_writers(connection: Connection, *, schema: str) -> list[OpenTransaction]:
    """
    Give the open and prepared transactions that may still add lower numbers, the oldest first.

    The relays hold a writer's lock too while they settle; an observation leaves them out.
    """
    running = observe(connection, schema=schema).running
    writers = list_writers(connection, schema=schema)
    return describe(connection, schema=schema, xids=among(running, writers))


def how_to_end(transaction: OpenTransaction) -> str:
    """Give the statement that ends *transaction* without its effects, for an operator to paste."""
    if transaction.gid:
        return sql.SQL("ROLLBACK PREPARED {};").format(transaction.gid).as_string()
    return f"SELECT pg_terminate_backend({transaction.pid});"
