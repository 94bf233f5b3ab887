"""What an operator asks first: how much waits, why and for how long, what is parked, and who holds things up."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

from psycopg import sql

from outbox_relay.database import translated_errors
from outbox_relay.relay.horizon import OpenTransaction, among, describe, list_writers, observe
from outbox_relay.relay.survey import SurveyOptions, begin_statement, read_backlog
from outbox_relay.sql import statement

if TYPE_CHECKING:
    from collections.abc import Collection

    from psycopg import Connection
    from psycopg.rows import TupleRow

    from outbox_relay.relay.survey import Head

MOST_COUNTED = 100_000
_OURS = "outbox-relay "  # how application names of relays and of our commands begin


@dataclass(frozen=True, slots=True)
class Shard:
    """
    How far one shard has come.

    Attributes:
        published_through: Its newest mark; None before the first one.
        published_seconds_ago: Age of that mark.
        last_no: The highest number that is committed; None when the shard is empty.
        next_no: The first message that is not in Kafka and not parked; None when there is none.
        next_age_seconds: Its age by `created_at`.
    """

    shard: int
    published_through: int | None
    published_seconds_ago: float | None
    last_no: int | None
    next_no: int | None
    next_age_seconds: float | None


@dataclass(frozen=True, slots=True)
class Status:
    """
    The state of one outbox.

    Attributes:
        unpublished: Messages that are not in Kafka and not parked, counted up to `MOST_COUNTED`.
        oldest_age_seconds: Age of the oldest of them by `created_at`; 0 when there is none.
        oldest_no: Its number.
        waiting: Those of them that a mark has passed, and that the relay sends as soon as it can.
        waiting_reasons: How many wait for which reason, the most frequent first.
        longest_wait_seconds: For how long the first of them has been waiting; 0 when none is.
        parked: Messages set aside, counted up to `MOST_COUNTED`.
        parked_keys: Keys they belong to.
        uncollected_writers: Given-up writers that have ended and whose messages nobody has collected.
        unreconciled_seconds: Age of the oldest mark that nobody has compared with the messages; 0 when there is none.
        writers: Open and prepared transactions that may still add lower numbers, the oldest first.
        lockers: Transactions other than relays' that hold shards, so that nobody publishes there, the oldest first.
    """

    unpublished: int
    oldest_age_seconds: float
    oldest_no: int | None
    waiting: int
    waiting_reasons: dict[str, int]
    longest_wait_seconds: float
    parked: int
    parked_keys: int
    uncollected_writers: int
    unreconciled_seconds: float
    writers: list[OpenTransaction]
    lockers: list[OpenTransaction]
    shards: list[Shard]


def read_status(connection: Connection, *, schema: str) -> Status:
    """
    Look at the outbox in *schema*; *connection* is in autocommit mode.

    Raises:
        DatabaseUnavailable: The connection broke.
        DatabaseConflict: The table is locked by somebody who changes its definition, or looking takes too long.
        SchemaMismatch: There is no outbox in *schema*, or this role may not read it.
    """
    options = SurveyOptions(schema=schema, messages=MOST_COUNTED)
    backlog = read_backlog(connection, options=options)
    shards, waiting_reasons = _look_closer(connection, options=options)
    oldest = max(backlog.heads, key=attrgetter("age_seconds"), default=None)
    next_heads = {head.shard: head for head in sorted(backlog.heads, key=attrgetter("sequence_no"), reverse=True)}
    return Status(
        unpublished=backlog.unpublished_messages,
        oldest_age_seconds=backlog.oldest_unpublished_seconds,
        oldest_no=oldest.sequence_no if oldest else None,
        waiting=backlog.waiting_messages,
        waiting_reasons=waiting_reasons,
        longest_wait_seconds=backlog.oldest_waiting_seconds,
        parked=backlog.parked_messages,
        parked_keys=backlog.parked_keys,
        uncollected_writers=backlog.uncollected_writers,
        unreconciled_seconds=backlog.unreconciled_seconds,
        writers=open_writers(connection, schema=schema),
        lockers=_lockers(connection, schema=schema, xids={last_locker for *_, last_locker in shards}),
        shards=[_shard(*shard, head=next_heads.get(shard[0])) for *shard, _ in shards],
    )


def _look_closer(connection: Connection, *, options: SurveyOptions) -> tuple[list[TupleRow], dict[str, int]]:
    """Return the rows of `status_shards.sql`, and how many messages wait for which reason."""
    with translated_errors():
        connection.execute(begin_statement(options))
        shards = connection.execute(statement("status_shards", schema=options.schema)).fetchall()
        count = statement("status_reasons", schema=options.schema)
        reasons: dict[str, int] = dict(connection.execute(count, {"most": options.messages}).fetchall())
        connection.commit()
    return shards, reasons


def _shard(
    shard: int,
    published_through: int | None,
    published_seconds_ago: float | None,
    last_no: int | None,
    *,
    head: Head | None,
) -> Shard:
    return Shard(
        shard,
        published_through=published_through,
        published_seconds_ago=published_seconds_ago,
        last_no=last_no,
        next_no=head.sequence_no if head else None,
        next_age_seconds=head.age_seconds if head else None,
    )


def _lockers(connection: Connection, *, schema: str, xids: Collection[int]) -> list[OpenTransaction]:
    """Return those of the transactions that still run, but for relays and our own commands."""
    return [
        transaction
        for transaction in describe(connection, schema=schema, xids=xids)
        if transaction.gid or (transaction.pid and not transaction.application_name.startswith(_OURS))
    ]


def open_writers(connection: Connection, *, schema: str) -> list[OpenTransaction]:
    """
    Return the open and prepared transactions that may still add lower numbers, the oldest first.

    A command that settles messages by hand holds a writer's lock too while it does; an observation leaves it out.
    """
    running = observe(connection, schema=schema).running
    writers = list_writers(connection, schema=schema)
    return describe(connection, schema=schema, xids=among(running, writers))


def how_to_end(transaction: OpenTransaction) -> str:
    """Return the statement that ends *transaction* without its effects, for an operator to paste."""
    if transaction.gid:
        return sql.SQL("ROLLBACK PREPARED {};").format(transaction.gid).as_string()
    return f"SELECT pg_terminate_backend({transaction.pid});"
