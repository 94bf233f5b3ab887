"""Prune an outbox once, from end to end, for cron or for an operator."""

from __future__ import annotations

import random
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

from outbox_relay.database import roll_back
from outbox_relay.errors import DatabaseConflict
from outbox_relay.relay.failures import Backoff
from outbox_relay.relay.prune import (
    count_batch,
    first_kept_id,
    open_partition,
    prune_batch,
    prune_partition,
    prune_unordered,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg import Connection

    from outbox_relay.relay.prune import PrunedBatch, PruneOptions

_T = TypeVar("_T")
_BUSY_SECONDS = 0.05  # while a relay prunes a batch
_ATTEMPTS = 8  # in about 10 s


@dataclass(frozen=True, slots=True)
class Pruned:
    """
    What was removed.

    Attributes:
        messages: Published messages.
        unordered: Records of transactions that were given up on, of which every message is published.
    """

    messages: int
    unordered: int


def prune(connection: Connection, *, options: PruneOptions, on_batch: Callable[[int], None]) -> Pruned:
    """
    Remove every message that is old enough, and what is remembered of overtaken transactions.

    *connection* is in autocommit mode. Partitions are opened and dropped first, as it is time. Each batch is a
    transaction, and as much time passes between two of them as they take. One that a lock or a time-out rolled back is
    tried again, some times in a row. Whatever ends this early leaves the batches so far removed.

    Args:
        on_batch: Is told how many messages are removed so far.

    Raises:
        DatabaseUnavailable: The connection broke.
        DatabaseConflict: A lock or a time-out rolled a batch back at each attempt.
        SchemaMismatch: There is no outbox, or this role may not remove its messages.
    """
    persist = partial(_persist, connection)
    persist(lambda: open_partition(connection, options=options))
    before = first_kept_id(connection, options=options)
    partitions = _batches(lambda _after: persist(lambda: prune_partition(connection, options=options)))
    rows = _batches(lambda after: persist(lambda: prune_batch(connection, options=options, after=after, before=before)))
    removed = 0
    for batch in chain(partitions, rows):
        removed += batch.messages
        if batch.messages:
            on_batch(removed)
    return Pruned(removed, persist(lambda: prune_unordered(connection, options=options)))


def count_prunable(connection: Connection, *, options: PruneOptions, on_batch: Callable[[int], None]) -> int:
    """Count the messages that `prune` would remove; raise what it raises."""
    found = after = 0
    before = first_kept_id(connection, options=options)
    while True:
        batch = count_batch(connection, options=options, after=after, before=before)
        found += batch.messages
        after = batch.after
        on_batch(found)
        if batch.is_last:
            return found


def _persist(connection: Connection, work: Callable[[], _T]) -> _T:
    """Do *work*, and do it again after a pause while a lock or a time-out rolls it back, `_ATTEMPTS` times in all."""
    backoff = Backoff()
    chance = random.Random()  # noqa: S311 -- jitter, no secret
    for _ in range(_ATTEMPTS - 1):
        with suppress(DatabaseConflict):
            return work()
        roll_back(connection)
        time.sleep(backoff.next_pause(chance))
    return work()


def _batches(prune_next: Callable[[int], PrunedBatch | None]) -> Iterator[PrunedBatch]:
    """Prune batch after batch up to the last one, with as much time between two as they take."""
    after = 0
    while True:
        started = time.monotonic()
        batch = prune_next(after)
        if batch is None:
            time.sleep(_BUSY_SECONDS)
            continue
        yield batch
        if batch.is_last:
            return
        after = batch.after
        time.sleep(time.monotonic() - started)
