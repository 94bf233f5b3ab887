"""
Prune: remove messages that were published longer ago than they are kept, lowest numbers first.

By small batches of rows; in the partitioned layout by whole partitions, and by rows what is old in a partition that has
to stay for the sake of others. The marks say what is old: no row is read for its date.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from psycopg import ClientCursor

from outbox_relay.database import translated_errors
from outbox_relay.errors import ConfigurationError
from outbox_relay.relay.reconcile import ReconcileOptions, reconcile_through
from outbox_relay.relay.session import repeat_until_stopped
from outbox_relay.sql import numbers, statement

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from psycopg import Connection

    from outbox_relay.errors import OutboxRelayError
    from outbox_relay.observe.telemetry import Telemetry
    from outbox_relay.relay.reconcile import Repair

BEHIND_ALL = 2**63 - 1
_ROUND_SECONDS = 30.0
_SHORTEST_PAUSE_SECONDS = 1.0
_LAP_SECONDS = 3600.0
_MOST_RECORDS = 1_000


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """
    What may be removed, how much at once, and the server's time-outs for each transaction, in seconds.

    Attributes:
        schema: Where the outbox is.
        older_than_seconds: Since a message was published, by the database's clock; more than 0.
        messages: About how many messages the first batch removes. More: the horizon, to which a batch looks like a
            writer, is held for longer.
        most_messages: Each batch that follows at once is twice as large as the one before, up to this.
        lock_timeout: Wait for somebody else's lock.
        transaction_timeout: PostgreSQL ends a transaction that is idle for longer.
    """

    schema: str = "public"
    older_than_seconds: float = 7 * 86_400.0
    messages: int = 1_000
    most_messages: int = 5_000
    lock_timeout: float = 2.0
    statement_timeout: float = 30.0
    transaction_timeout: float = 30.0


@dataclass(frozen=True, slots=True)
class PrunedBatch:
    """
    What became of one batch.

    Attributes:
        messages: How many were removed, or would have been.
        is_last: There was nothing more to remove.
        pruned: The shards that have come further, and up to which number.
        disagreed: The mark of each shard that has counted other rows than there are. Nothing below it was removed.
    """

    messages: int
    is_last: bool = False
    pruned: Mapping[int, int] = field(default_factory=dict)
    disagreed: Mapping[int, int] = field(default_factory=dict)


class _Range(NamedTuple):
    """Messages of a shard that are old enough; the columns of `prune_look.sql`."""

    shard: int
    after_no: int
    until_no: int
    through: int


def check_pruning(connection: Connection, *, schema: str) -> None:
    """
    Return normally when this role may remove messages.

    Raises:
        ConfigurationError: It may not; the message has the GRANT.
    """
    with translated_errors():
        [(may_remove,)] = connection.execute(statement("prune_privilege", schema=schema)).fetchall()
    if not may_remove:
        user = connection.info.user
        raise ConfigurationError(
            f"role {user!r} may not remove the messages that OUTBOX_RELAY_RETENTION says are old:"
            f" GRANT outbox_pruner TO {user}; or set it to 0, and prune by cron"
        )


def prune_all(
    connection: Connection,
    *,
    options: PruneOptions,
    after: Mapping[int, int],
    on_repair: Callable[[Repair], None],
) -> Iterator[PrunedBatch | None]:
    """
    Remove all that is old enough, partitions first; yield each batch, and None while somebody else prunes.

    *connection* is in autocommit mode; each batch is a transaction of its own. Marks that have counted other rows than
    there are get reconciled, and what was skipped goes to outbox_pending. A shard that disagrees even then is left as
    it is.

    Args:
        after: For each shard the number behind which the rows begin; 0 for a shard that is left out.
        on_repair: Is told what was skipped.

    Raises:
        DatabaseUnavailable: The connection broke; the batch may have been removed.
        DatabaseConflict: A lock or a time-out rolled the batch back.
        SchemaMismatch: There is no outbox, or this role may not remove its messages.
    """
    open_partition(connection, options=options)
    before = first_kept_number(connection, options=options)
    yield from _drop_partitions(connection, options=options, on_repair=on_repair)
    yield from _prune_rows(connection, options=options, after=after, before=before, on_repair=on_repair)


def prune_batch(
    connection: Connection,
    *,
    options: PruneOptions,
    after: Mapping[int, int],
    before: int = BEHIND_ALL,
    reconciled: Mapping[int, int] | None = None,
) -> PrunedBatch | None:
    """
    Remove the next rows that are old enough, below the number *before*; None while somebody else prunes.

    Args:
        reconciled: Up to which mark a shard has just been reconciled: rows that are missing there are no disagreement.
    """
    with translated_errors():
        if not _begin_alone(connection, options=options):
            return None
        ranges = _look(connection, options=options, after=after, before=before)
        if not ranges:
            connection.commit()
            return PrunedBatch(0, is_last=True)
        messages, agreed = _delete(connection, ranges, reconciled=reconciled or {}, schema=options.schema)
    return PrunedBatch(
        messages,
        pruned={each.shard: each.until_no for each in ranges if each.shard in agreed},
        disagreed={each.shard: each.through for each in ranges if each.shard not in agreed},
    )


def count_batch(connection: Connection, *, options: PruneOptions, after: Mapping[int, int], before: int) -> PrunedBatch:
    """Count what `prune_batch` would remove, without waiting for anybody."""
    with translated_errors():
        connection.execute(begin_statement(options))
        ranges = _look(connection, options=options, after=after, before=BEHIND_ALL)
        parameters = {
            "shards": numbers(each.shard for each in ranges),
            "after_nos": numbers(each.after_no for each in ranges),
            "throughs": numbers(each.through for each in ranges),
            "before": before,
        }
        [(messages,)] = connection.execute(statement("prune_count", schema=options.schema), parameters).fetchall()
        connection.commit()
    return PrunedBatch(messages, is_last=not ranges, pruned={each.shard: each.through for each in ranges})


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


def drop_partition(connection: Connection, *, options: PruneOptions, reconciled_no: int = 0) -> PrunedBatch | None:
    """
    Drop the oldest partition in which all is old enough; it is counted as a whole first.

    The last batch is the one that finds none, at once in the plain layout.

    Args:
        reconciled_no: Up to which mark the shards that disagreed have just been reconciled: rows that are missing there
            are no disagreement.
    """
    with translated_errors():
        if not _is_partitioned(connection, options=options):
            return PrunedBatch(0, is_last=True)
        if not _begin_alone(connection, options=options):
            return None
        parameters = {"older_than_seconds": options.older_than_seconds, "reconciled_no": reconciled_no}
        rows = connection.execute(statement("partition_drop", schema=options.schema), parameters).fetchall()
        connection.commit()
    disagreed = {shard: through for messages, shard, through in rows if messages is None}
    return PrunedBatch(sum(messages or 0 for messages, _, _ in rows), is_last=not rows, disagreed=disagreed)


def first_kept_number(connection: Connection, *, options: PruneOptions) -> int:
    """
    Return the number from which on partitions are kept as a whole; behind all numbers in the plain layout.

    What is old below it, after `drop_partition` has found no more, is in partitions that stay for the sake of others.
    Ask before dropping: a partition that becomes old in between is left to the next time, and not removed by rows.
    """
    with translated_errors():
        if not _is_partitioned(connection, options=options):
            return BEHIND_ALL
        age = {"older_than_seconds": options.older_than_seconds}
        [(number,)] = connection.execute(statement("partition_kept", schema=options.schema), age).fetchall()
    return int(number)


def prune_unordered(connection: Connection, *, options: PruneOptions) -> int:
    """Remove the records of writers that were given up on of which no message is left; return how many."""
    with translated_errors():
        connection.execute(begin_statement(options))
        query = statement("prune_unordered", schema=options.schema)
        [(removed,)] = connection.execute(query, {"most": _MOST_RECORDS}).fetchall()
        connection.commit()
    return int(removed)


class Pruner:
    """
    One per process, in a thread of its own; of all relays one prunes at a time.

    It goes on where it stopped, and begins a new lap from the lowest number every hour, for what was released or
    published late behind it. Between rounds it keeps no connection. A failure makes no relay unready: it is told and
    tried again.
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
        self._pause_seconds = min(_ROUND_SECONDS, max(_SHORTEST_PAUSE_SECONDS, options.older_than_seconds))
        self._after: dict[int, int] = {}
        self._lap_ends_at = 0.0

    def run(self) -> None:
        """Prune until stopped."""
        repeat_until_stopped(
            "prune",
            connect=self._connect,
            work=self._prune,
            fail=self._fail,
            pause=self._pause_seconds,
            telemetry=self._telemetry,
            stop=self._stop,
        )

    def _fail(self, error: OutboxRelayError) -> None:
        """Tell what failed, and wait longer: while a partition cannot be dropped, writers stand behind each attempt."""
        self._telemetry.pruning_failed(error)
        self._stop.wait(_ROUND_SECONDS - self._pause_seconds)

    def _prune(self, connection: Connection) -> None:
        """Take round after round until nothing more is old enough."""
        while self._take_round(connection):
            pass
        if not self._stop.is_set():
            prune_unordered(connection, options=self._options)

    def _take_round(self, connection: Connection) -> bool:
        """Prune for some time, so that partitions are tended again; True if there is more to do."""
        round_ends_at = time.monotonic() + _ROUND_SECONDS
        if self._lap_ends_at < time.monotonic():
            self._lap_ends_at = time.monotonic() + _LAP_SECONDS
            self._after = {}
        return any(time.monotonic() > round_ends_at for _ in self._batches(connection))

    def _batches(self, connection: Connection) -> Iterator[PrunedBatch]:
        """Prune batch after batch until stopped; as much time passes between two as they take."""
        started = time.monotonic()
        for batch in prune_all(
            connection, options=self._options, after=self._after, on_repair=self._telemetry.skipped_messages_found
        ):
            if batch is None:
                return
            self._after |= batch.pruned
            seconds = time.monotonic() - started
            self._telemetry.batch_pruned(batch.messages, seconds=seconds)
            if self._stop.wait(seconds):
                return
            yield batch
            started = time.monotonic()


@lru_cache
def begin_statement(options: PruneOptions) -> bytes:
    """Return the statements that begin a transaction of pruning and set what it needs."""
    return statement("prune_begin", schema=options.schema) % {
        b"lock_timeout_ms": round(options.lock_timeout * 1000),
        b"statement_timeout_ms": round(options.statement_timeout * 1000),
        b"transaction_timeout_ms": round(options.transaction_timeout * 1000),
    }


def _drop_partitions(
    connection: Connection, *, options: PruneOptions, on_repair: Callable[[Repair], None]
) -> Iterator[PrunedBatch | None]:
    """Drop partition after partition; reconcile one whose marks disagree, and try it once more."""
    reconciled_no = 0
    while True:
        batch = drop_partition(connection, options=options, reconciled_no=reconciled_no)
        if batch is None:
            yield None
            continue
        disagreed_no = max(batch.disagreed.values(), default=BEHIND_ALL)
        if batch.is_last or disagreed_no <= reconciled_no:
            return
        if batch.disagreed:
            _reconcile(connection, batch.disagreed, after={}, options=options, on_repair=on_repair)
            reconciled_no = disagreed_no
        yield batch


def _prune_rows(
    connection: Connection,
    *,
    options: PruneOptions,
    after: Mapping[int, int],
    before: int,
    on_repair: Callable[[Repair], None],
) -> Iterator[PrunedBatch | None]:
    """Prune batch after batch; reconcile a shard whose marks disagree, and try it once more."""
    reconciled: dict[int, int] = {}
    while True:
        batch = prune_batch(connection, options=options, after=after, before=before, reconciled=reconciled)
        if batch is None:
            yield None
            continue
        if batch.is_last:
            return
        through = {shard: number for shard, number in batch.disagreed.items() if number > reconciled.get(shard, 0)}
        _reconcile(connection, through, after=after, options=options, on_repair=on_repair)
        reconciled |= through
        yield batch
        left_alone = dict.fromkeys(batch.disagreed.keys() - through.keys(), BEHIND_ALL)
        after = {**after, **batch.pruned, **left_alone}
        options = replace(options, messages=min(2 * options.messages, options.most_messages))


def _reconcile(
    connection: Connection,
    through: Mapping[int, int],
    *,
    after: Mapping[int, int],
    options: PruneOptions,
    on_repair: Callable[[Repair], None],
) -> None:
    reconciling = ReconcileOptions(
        schema=options.schema,
        lock_timeout=options.lock_timeout,
        statement_timeout=options.statement_timeout,
        transaction_timeout=options.transaction_timeout,
    )
    for repair in reconcile_through(connection, options=reconciling, after=after, through=through):
        on_repair(repair)


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


def _look(connection: Connection, *, options: PruneOptions, after: Mapping[int, int], before: int) -> list[_Range]:
    parameters = {
        "shards": numbers(after.keys()),
        "after_nos": numbers(after.values()),
        "before": before,
        "messages": options.messages,
        "older_than_seconds": options.older_than_seconds,
    }
    rows = connection.execute(statement("prune_look", schema=options.schema), parameters).fetchall()
    return [_Range(*row) for row in rows]


def _delete(
    connection: Connection, ranges: Sequence[_Range], *, reconciled: Mapping[int, int], schema: str
) -> tuple[int, set[int]]:
    """Remove and commit; return how many messages are gone, and the shards whose marks agreed with their rows."""
    shards, after_nos, until_nos, throughs = zip(*ranges, strict=True)
    cursor = ClientCursor(connection).execute(
        statement("prune_delete", schema=schema),
        {
            "shards": numbers(shards),
            "after_nos": numbers(after_nos),
            "until_nos": numbers(until_nos),
            "throughs": numbers(throughs),
            "are_reconciled": numbers(int(reconciled.get(each.shard, 0) >= each.through) for each in ranges),
        },
    )
    [(messages, agreed)] = cursor.fetchall()
    return messages, set(agreed or ())
