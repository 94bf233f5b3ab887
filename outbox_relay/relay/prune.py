"""
Prune: remove messages that were published longer ago than they are kept, oldest first.

By small batches of rows; in the partitioned layout by whole partitions, and by rows what is old in a partition that has
to stay for the sake of others.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from psycopg import ClientCursor

from outbox_relay.database import translated_errors
from outbox_relay.relay.session import repeat_until_stopped
from outbox_relay.sql import statement

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from psycopg import Connection

    from outbox_relay.observe.telemetry import Telemetry

_MOST_OPEN_MESSAGES = 10_000  # that are searched for those of an overtaken transaction
_ROUND_SECONDS = 30.0
_LAP_SECONDS = 3600.0
_BEHIND_ALL_IDS = 2**63 - 1


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """
    What may be removed, how much at once, and the server's time-outs for each transaction, in seconds.

    Attributes:
        schema: Where the outbox is.
        older_than_seconds: Since a message was published, by the database's clock; more than 0.
        messages: Rows that a batch looks at, and so the most that it removes. More: the horizon, to which a batch looks
            like a writer, is held for longer.
        lock_timeout: Wait for somebody else's lock.
        transaction_timeout: PostgreSQL ends a transaction that is idle for longer.
    """

    schema: str = "public"
    older_than_seconds: float = 7 * 86_400.0
    messages: int = 500
    lock_timeout: float = 2.0
    statement_timeout: float = 30.0
    transaction_timeout: float = 30.0


@dataclass(frozen=True, slots=True)
class PrunedBatch:
    """
    What became of one batch.

    Attributes:
        messages: How many were removed, or would have been.
        after: The id behind which the next batch begins.
        is_last: Nothing behind it is old enough.
    """

    messages: int
    after: int
    is_last: bool


@dataclass(frozen=True, slots=True)
class _Look:
    """The next rows by id; the columns of `prune_look.sql`."""

    through: int | None
    messages: int
    old: int
    is_recent: bool

    def is_end(self, options: PruneOptions) -> bool:
        """Tell whether the table ends here."""
        return self.messages < options.messages


def prune_batch(
    connection: Connection, *, options: PruneOptions, after: int, before: int = _BEHIND_ALL_IDS
) -> PrunedBatch | None:
    """
    Remove what is old enough among the next rows between two ids, both left out; None while somebody else prunes.

    *connection* is in autocommit mode; the batch is a transaction of its own. The next one begins further on when
    nothing recent was among the rows, for what they leave behind is unpublished, parked or published late, and may be
    so for long.

    Raises:
        DatabaseUnavailable: The connection broke; the batch may have been removed.
        DatabaseConflict: A lock or a time-out rolled the batch back.
        SchemaMismatch: There is no outbox, or this role may not remove its messages.
    """
    with translated_errors():
        if not _begin_alone(connection, options=options):
            return None
        look = _look(connection, options=options, after=after, before=before)
        if look.old:
            removed = _delete(connection, options=options, after=after, through=look.through)
        else:
            removed = 0
            connection.commit()
    return PrunedBatch(
        messages=removed,
        after=after if look.is_recent else look.through or after,
        is_last=look.is_end(options) or (look.is_recent and not removed),
    )


def count_batch(connection: Connection, *, options: PruneOptions, after: int, before: int) -> PrunedBatch:
    """Count what `prune_batch` would remove, without waiting for anybody."""
    with translated_errors():
        connection.execute(begin_statement(options))
        look = _look(connection, options=options, after=after, before=before)
        connection.commit()
    return PrunedBatch(
        messages=look.old,
        after=look.through or after,
        is_last=look.is_end(options) or (look.is_recent and not look.old),
    )


def open_partition(connection: Connection, *, options: PruneOptions) -> None:
    """
    Let new rows go to the next partition if it is time, and see to it that others lie ahead.

    Nothing is done while somebody else prunes, who has done it, or in the plain layout.

    Raises:
        SchemaMismatch: This role may not open partitions.
    """
    with translated_errors():
        if _is_partitioned(connection, options=options) and _begin_alone(connection, options=options):
            connection.execute(statement("partition_open", schema=options.schema))
            connection.commit()


def prune_partition(connection: Connection, *, options: PruneOptions) -> PrunedBatch | None:
    """
    Drop the oldest partition in which all is old enough, as `prune_batch` removes rows; it is read as a whole first.

    The last batch is the one that finds none, at once in the plain layout.
    """
    with translated_errors():
        if not _is_partitioned(connection, options=options):
            return PrunedBatch(messages=0, after=0, is_last=True)
        if not _begin_alone(connection, options=options):
            return None
        age = {"older_than_seconds": options.older_than_seconds}
        [(messages,)] = connection.execute(statement("partition_drop", schema=options.schema), age).fetchall()
        connection.commit()
    return PrunedBatch(messages=messages or 0, after=0, is_last=messages is None)


def first_kept_id(connection: Connection, *, options: PruneOptions) -> int:
    """
    Give the id from which on partitions are kept as a whole; behind all ids in the plain layout.

    What is old below it, after `prune_partition` has found no more, is in partitions that stay for the sake of others.
    """
    with translated_errors():
        if not _is_partitioned(connection, options=options):
            return _BEHIND_ALL_IDS
        age = {"older_than_seconds": options.older_than_seconds}
        [(first_id,)] = connection.execute(statement("partition_kept", schema=options.schema), age).fetchall()
    return int(first_id)


def prune_unordered(connection: Connection, *, options: PruneOptions) -> int:
    """Remove the records of overtaken transactions of which every message is published; give their number."""
    parameters = {"older_than_seconds": options.older_than_seconds, "most": _MOST_OPEN_MESSAGES}
    with translated_errors():
        connection.execute(begin_statement(options))
        [(removed,)] = connection.execute(statement("prune_unordered", schema=options.schema), parameters).fetchall()
        connection.commit()
    return int(removed)


class Pruner:
    """
    One per process, in a thread of its own; of all relays one prunes at a time.

    It goes on where it stopped, and begins a new lap from the lowest id every hour, for what was released or published
    late behind it. Between rounds it keeps no connection. A failure makes no relay unready: it is told and tried again.
    """

    def __init__(
        self,
        *,
        options: PruneOptions,
        connect: Callable[[], Connection],
        telemetry: Telemetry,
        stop: threading.Event,
    ) -> None:
        self._options = options
        self._connect = connect
        self._telemetry = telemetry
        self._stop = stop
        self._after = 0
        self._before = _BEHIND_ALL_IDS
        self._lap_at = 0.0

    def run(self) -> None:
        """Prune until stopped."""
        repeat_until_stopped(
            "prune",
            connect=self._connect,
            work=self._prune,
            fail=self._telemetry.pruning_failed,
            pause=min(_ROUND_SECONDS, self._options.older_than_seconds),
            telemetry=self._telemetry,
            stop=self._stop,
        )

    def _prune(self, connection: Connection) -> None:
        """Take one round; as much time passes between two batches as they take."""
        open_partition(connection, options=self._options)
        if time.monotonic() >= self._lap_at and not self._begin_lap(connection):
            return
        while not self._stop.is_set():
            started = time.monotonic()
            batch = prune_batch(connection, options=self._options, after=self._after, before=self._before)
            if batch is None:
                return
            self._after = batch.after
            seconds = time.monotonic() - started
            self._telemetry.batch_pruned(batch.messages, seconds=seconds)
            if batch.is_last:
                break
            self._stop.wait(seconds)
        prune_unordered(connection, options=self._options)

    def _begin_lap(self, connection: Connection) -> bool:
        """Drop partitions, then go back to the lowest id for what they leave; False while somebody else prunes."""
        before = first_kept_id(connection, options=self._options)
        while not self._stop.is_set():
            started = time.monotonic()
            dropped = prune_partition(connection, options=self._options)
            if dropped is None:
                return False
            if dropped.is_last:
                break
            self._telemetry.batch_pruned(dropped.messages, seconds=time.monotonic() - started)
        self._after = 0
        self._before = before
        self._lap_at = time.monotonic() + min(_LAP_SECONDS, self._options.older_than_seconds)
        return True


@lru_cache
def begin_statement(options: PruneOptions) -> bytes:
    """Give the statements that begin a transaction of pruning and set what it needs."""
    return statement("prune_begin", schema=options.schema) % {
        b"lock_timeout_ms": round(options.lock_timeout * 1000),
        b"statement_timeout_ms": round(options.statement_timeout * 1000),
        b"transaction_timeout_ms": round(options.transaction_timeout * 1000),
    }


def _begin_alone(connection: Connection, *, options: PruneOptions) -> bool:
    """Begin a transaction, unless somebody else prunes."""
    connection.execute(begin_statement(options))
    [(is_alone,)] = connection.execute(statement("prune_lock", schema=options.schema)).fetchall()
    if not is_alone:
        connection.rollback()
    return bool(is_alone)


def _is_partitioned(connection: Connection, *, options: PruneOptions) -> bool:
    [(is_partitioned,)] = connection.execute(statement("partition_exists", schema=options.schema)).fetchall()
    return bool(is_partitioned)


def _look(connection: Connection, *, options: PruneOptions, after: int, before: int) -> _Look:
    parameters = {
        "after": after,
        "before": before,
        "messages": options.messages,
        "older_than_seconds": options.older_than_seconds,
    }
    [row] = connection.execute(statement("prune_look", schema=options.schema), parameters).fetchall()
    return _Look(*row)


def _delete(connection: Connection, *, options: PruneOptions, after: int, through: int | None) -> int:
    """Remove and commit; the number is that of the first of the two statements."""
    parameters = {"after": after, "through": through, "older_than_seconds": options.older_than_seconds}
    return ClientCursor(connection).execute(statement("prune_delete", schema=options.schema), parameters).rowcount
