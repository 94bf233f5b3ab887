"""Compare all marks with the rows once, for an operator or a check."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from outbox_relay.database import roll_back, translated_errors
from outbox_relay.errors import DatabaseConflict
from outbox_relay.relay.failures import Backoff
from outbox_relay.relay.reconcile import FROM_THE_BEGINNING, compare_batch, repair
from outbox_relay.sql import statement

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg import Connection

    from outbox_relay.relay.reconcile import Batch, Interval, ReconcileOptions, Repair

_ATTEMPTS = 8  # in about 10 s


@dataclass(slots=True)
class Reconciled:
    """
    What was found.

    Attributes:
        messages: How many were compared with their marks.
        damaged: The intervals in which messages were skipped, by their shards and marks.
        repairs: What is waiting to be published now; empty if nothing was to be repaired.
    """

    messages: int = 0
    damaged: dict[tuple[int, int], Interval] = field(default_factory=dict)
    repairs: list[Repair] = field(default_factory=list)


def count_marked(connection: Connection, *, options: ReconcileOptions) -> int:
    """Return how many messages the marks have counted, which is about how many `reconcile` compares."""
    with translated_errors():
        [(messages,)] = connection.execute(statement("reconcile_total", schema=options.schema)).fetchall()
    return max(0, int(messages))


def reconcile(
    connection: Connection, *, options: ReconcileOptions, repairs: bool, on_batch: Callable[[int], None]
) -> Reconciled:
    """
    Compare every message that is kept with the mark that passed it, thoroughly.

    *connection* is in autocommit mode. Each batch is a transaction, and as much time passes between two of them as they
    take. A batch that a lock or a time-out rolled back is tried again, some times in a row. Relays may run beside it.

    Args:
        repairs: Let relays publish what was skipped; otherwise nothing is changed.
        on_batch: Is told how many messages a batch has compared.

    Raises:
        DatabaseUnavailable: The connection broke.
        DatabaseConflict: A lock or a time-out rolled a batch back at each attempt.
        SchemaMismatch: There is no outbox, or this role may not read it, or not repair it.
    """
    found = Reconciled()
    after = dict(FROM_THE_BEGINNING)
    backoff = Backoff()
    chance = random.Random()  # noqa: S311 -- jitter, no secret
    conflicts = 0
    is_last = False
    while not is_last:
        started = time.monotonic()
        try:
            batch = compare_batch(connection, options=options, after=after, is_thorough=True)
            _take_in(found, batch, repairs=partial(repair, connection, options=options) if repairs else None)
        except DatabaseConflict:
            conflicts += 1
            if conflicts == _ATTEMPTS:
                raise
            roll_back(connection)
            time.sleep(backoff.next_pause(chance))
            continue
        conflicts = 0
        backoff.reset()
        after |= batch.positions
        is_last = batch.is_last
        on_batch(batch.messages)
        time.sleep(time.monotonic() - started)
    return found


def _take_in(found: Reconciled, batch: Batch, *, repairs: Callable[[Interval], Iterator[Repair]] | None) -> None:
    """Keep what the batch has found, and repair it; what was repaired before a conflict is kept, too."""
    found.damaged = {(each.shard, each.through): each for each in batch.damaged} | found.damaged
    if repairs is not None:
        for interval in batch.damaged:
            found.repairs += repairs(interval)
    found.messages += batch.messages
