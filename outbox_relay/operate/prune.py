"""Prune an outbox once, from end to end, for cron or for an operator."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from outbox_relay.database import roll_back
from outbox_relay.errors import DatabaseConflict
from outbox_relay.relay.failures import Backoff
from outbox_relay.relay.prune import count_batch, first_kept_number, prune_all, prune_unordered

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg import Connection

    from outbox_relay.relay.prune import PrunedBatch, PruneOptions
    from outbox_relay.relay.reconcile import Repair

_BUSY_SECONDS = 0.05  # while a relay prunes a batch
_ATTEMPTS = 8  # in about 10 s


@dataclass(frozen=True, slots=True)
class Pruned:
    """
    What was removed.

    Attributes:
        messages: Published messages.
        unordered: Records of writers that were given up on, of which no message is left.
        skipped: Messages that no mark had counted. They were not removed, and wait to be published.
    """

    messages: int
    unordered: int
    skipped: int = 0


def prune(connection: Connection, *, options: PruneOptions, on_batch: Callable[[int], None]) -> Pruned:
    """
    Remove every message that is old enough, and what is remembered of writers that were given up on.

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
    run = _Run(options=options, on_batch=on_batch)
    backoff = Backoff()
    chance = random.Random()  # noqa: S311 -- jitter, no secret
    while True:
        try:
            run.remove_messages(connection)
            unordered = prune_unordered(connection, options=options)
            return Pruned(run.messages, unordered=unordered, skipped=run.skipped)
        except DatabaseConflict:
            run.conflicts += 1
            if run.conflicts == _ATTEMPTS:
                raise
        if run.conflicts == 1:
            backoff.reset()
        roll_back(connection)
        time.sleep(backoff.next_pause(chance))


def count_prunable(connection: Connection, *, options: PruneOptions, on_batch: Callable[[int], None]) -> int:
    """Count the messages that `prune` would remove; raise what it raises."""
    options = replace(options, messages=options.most_messages)
    before = first_kept_number(connection, options=options)
    found = 0
    after: dict[int, int] = {}
    while not (batch := count_batch(connection, options=options, after=after, before=before)).is_last:
        found += batch.messages
        after |= batch.pruned
        on_batch(found)
    return found


class _Run:
    """How far a run has come, whatever interrupted it."""

    def __init__(self, *, options: PruneOptions, on_batch: Callable[[int], None]) -> None:
        self.messages = 0
        self.skipped = 0
        self.conflicts = 0  # since the last batch
        self._options = options
        self._on_batch = on_batch
        self._after: dict[int, int] = {}

    def remove_messages(self, connection: Connection) -> None:
        """Prune batch after batch up to the last one, with as much time between two as they take."""
        started = time.monotonic()
        for batch in prune_all(connection, options=self._options, after=self._after, on_repair=self._note):
            if batch is None:
                time.sleep(_BUSY_SECONDS)
            else:
                self._count(batch)
                time.sleep(time.monotonic() - started)
            started = time.monotonic()

    def _count(self, batch: PrunedBatch) -> None:
        self._after |= batch.pruned
        self.conflicts = 0
        self.messages += batch.messages
        if batch.messages:
            self._on_batch(self.messages)

    def _note(self, repair: Repair) -> None:
        self.skipped += repair.messages
