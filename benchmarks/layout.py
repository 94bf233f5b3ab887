"""What the relay's statements cost on partitions, beside the plain table, and what pruning costs; without Kafka."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import psycopg

from benchmarks.bench import Bench, insert_messages, say
from benchmarks.lane import SCHEMA, claim, reach, read
from benchmarks.report import Figure, Table, by_case
from benchmarks.rounds import in_rounds
from benchmarks.usage import process_seconds
from outbox_relay.operate import migrate
from outbox_relay.relay.prune import PruneOptions, prune_all
from outbox_relay.relay.read import Limits
from outbox_relay.relay.settle import record_marks

if TYPE_CHECKING:
    from outbox_relay.relay.reconcile import Repair

PARTITIONS = (0, 9, 60)
SMALL = Limits(messages=64)
SMALL_BATCHES = 20
EMPTY_CLAIMS = 100


@dataclass(frozen=True, slots=True)
class Cost:
    """
    Processor time of the session in PostgreSQL, and the milliseconds of the longest batch of pruning.

    Attributes:
        drain: Microseconds a message of reading large batches and recording their marks.
        small: Milliseconds of a claim with a small batch, until it is recorded.
        empty: Milliseconds of a claim that finds nothing.
        prune: Microseconds a message of removing the published ones.
    """

    drain: float
    small: float
    empty: float
    prune: float
    longest_ms: float


FIGURES = (
    Figure("drain, us/message", "drain", digits=1),
    Figure(f"{SMALL.messages} messages, ms", "small", digits=2),
    Figure("empty claim, ms", "empty", digits=2),
    Figure("prune, us/message", "prune", digits=2),
    Figure("longest batch, ms", "longest_ms", digits=1),
)


def measure(bench: Bench) -> list[Table]:
    """Drain the same messages from each layout, then remove them, in turns."""
    costs = in_rounds(PARTITIONS, partial(_cost, bench), repeat=bench.plan.repeat)
    table = by_case(
        "Layouts",
        f"{bench.plan.layout_messages:,} messages read and their marks recorded in batches of {Limits().messages:,}, "
        "beside as many published ones, which lie in all partitions but the open one and two ahead; then batches of "
        f"{SMALL.messages} messages, and claims that find none. In the end all is pruned, by rows or by partitions. "
        "All of it is processor time of the session, but for the longest batch of pruning, which others wait for.",
        case="layout",
        figures=FIGURES,
        samples={
            f"{partitions} partitions" if partitions else "plain": samples for partitions, samples in costs.items()
        },
    )
    return [table]


def _cost(bench: Bench, partitions: int) -> Cost:
    say(f"layout: {partitions} partitions")
    count = bench.plan.layout_messages
    with bench.database() as dsn, psycopg.connect(dsn, autocommit=True) as connection:
        _publish(connection, count=count, partitions=partitions)
        insert_messages(connection, count=count)
        drain_seconds, _ = _drain(connection, limits=Limits())
        insert_messages(connection, count=SMALL_BATCHES * SMALL.messages)
        small_seconds, batches = _drain(connection, limits=SMALL)
        began = _used(connection)
        for _ in range(EMPTY_CLAIMS):
            claim(connection, reach(connection))
        empty_seconds = _used(connection) - began
        began = _used(connection)
        removed, longest_seconds = _prune(connection, is_partitioned=partitions > 0)
        prune_seconds = _used(connection) - began
    return Cost(
        drain=drain_seconds / count * 1e6,
        small=small_seconds / batches * 1e3,
        empty=empty_seconds / EMPTY_CLAIMS * 1e3,
        prune=prune_seconds / removed * 1e6,
        longest_ms=longest_seconds * 1e3,
    )


def _publish(connection: psycopg.Connection, *, count: int, partitions: int) -> None:
    """Insert published messages, spread over all partitions that are closed in the end."""
    closed = max(partitions - 3, 1)
    if partitions:
        migrate.apply(connection, schema=SCHEMA, line="partitioned")
        connection.execute("UPDATE outbox_partition SET open_for = '1 microsecond'")
    for _ in range(closed):
        insert_messages(connection, count=count // closed, are_published=True)
        if partitions:
            connection.execute("SELECT outbox_open_partition()")


def _drain(connection: psycopg.Connection, *, limits: Limits) -> tuple[float, int]:
    """Read and record until nothing is left; return the seconds of the session and the number of batches."""
    reached = reach(connection)
    began = _used(connection)
    batches = 0
    while (claimed := claim(connection, reached)).held:
        claimed.marks.pass_over(read(connection, claimed, reached, limits=limits))
        record_marks(connection, claimed.marks, schema=SCHEMA)
        batches += 1
    return _used(connection) - began, batches


def _prune(connection: psycopg.Connection, *, is_partitioned: bool) -> tuple[int, float]:
    """Remove what is published; return how much that was, and the seconds of the longest batch."""
    if is_partitioned:
        connection.execute("SELECT outbox_open_partition()")
    removed = 0
    seconds = []
    started = time.monotonic()
    for batch in prune_all(connection, options=PruneOptions(older_than_seconds=1e-6), after={}, on_repair=_refuse):
        seconds.append(time.monotonic() - started)
        removed += 0 if batch is None else batch.messages
        started = time.monotonic()
    return removed, max(seconds)


def _used(connection: psycopg.Connection) -> float:
    return process_seconds(connection.info.backend_pid)


def _refuse(repair: Repair) -> None:
    raise RuntimeError(f"marks and rows disagree: {repair}")
