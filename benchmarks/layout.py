"""What the relay's statements cost on partitions, beside the plain table; without Kafka."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import psycopg

from benchmarks.bench import Bench, insert_messages, say
from benchmarks.report import Table, spread
from benchmarks.rounds import in_rounds
from outbox_relay.operate import migrate
from outbox_relay.relay.claim import ClaimOptions, Floors, claim
from outbox_relay.relay.horizon import read_last_no
from outbox_relay.relay.settle import Settlement, settle

PARTITIONS = (0, 9, 60)
SMALL = ClaimOptions(messages=64)
EMPTY_CLAIMS = 100


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds per message of claiming and marking large batches; milliseconds of a small and an empty claim."""

    claim: float
    mark: float
    small: float
    empty: float


def measure(bench: Bench) -> list[Table]:
    """Drain the same messages from both layouts, in turns."""
    costs = in_rounds(PARTITIONS, partial(_cost, bench), repeat=bench.plan.repeat)
    count = bench.plan.layout_messages
    table = Table(
        "Layouts",
        f"{count:,} messages claimed and marked in batches of {ClaimOptions().messages:,} beside as many published "
        f"ones, which lie in all partitions but the open one and two ahead; then claims of {SMALL.messages} messages, "
        "and claims that find none.",
        ("layout", "claim, us/message", "mark, us/message", f"claim of {SMALL.messages}, ms", "empty claim, ms"),
        [
            (
                f"{partitions} partitions" if partitions else "plain",
                spread([cost.claim for cost in samples], digits=1),
                spread([cost.mark for cost in samples], digits=1),
                spread([cost.small for cost in samples], digits=2),
                spread([cost.empty for cost in samples], digits=2),
            )
            for partitions, samples in costs.items()
        ],
    )
    return [table]


def _cost(bench: Bench, partitions: int) -> Cost:
    say(f"layout: {partitions} partitions")
    count = bench.plan.layout_messages
    with bench.database() as dsn, psycopg.connect(dsn, autocommit=True) as connection:
        _publish(connection, count=count, partitions=partitions)
        insert_messages(connection, count=count)
        claim_seconds, mark_seconds, _ = _drain(connection, options=ClaimOptions())
        insert_messages(connection, count=20 * SMALL.messages)
        small_seconds, _, batches = _drain(connection, options=SMALL)
        started = time.monotonic()
        for _ in range(EMPTY_CLAIMS):
            claim(connection, options=SMALL, through=2**62, floors=Floors())
        empty_seconds = time.monotonic() - started
    return Cost(
        claim=claim_seconds / count * 1e6,
        mark=mark_seconds / count * 1e6,
        small=small_seconds / batches * 1e3,
        empty=empty_seconds / EMPTY_CLAIMS * 1e3,
    )


def _publish(connection: psycopg.Connection, *, count: int, partitions: int) -> None:
    """Insert published messages, spread over all partitions that are closed in the end."""
    closed = max(partitions - 3, 1)
    if partitions:
        migrate.apply(connection, schema="public", line="partitioned")
        connection.execute("UPDATE outbox_partition SET open_for = '1 microsecond'")
    for _ in range(closed):
        insert_messages(connection, count=count // closed, are_published=True)
        if partitions:
            connection.execute("SELECT outbox_open_partition()")


def _drain(connection: psycopg.Connection, *, options: ClaimOptions) -> tuple[float, float, int]:
    """Claim and mark until nothing is left; give the seconds of each, and the number of batches."""
    through = read_last_no(connection, schema="public")
    floors = Floors()
    claim_seconds = mark_seconds = 0.0
    batches = 0
    while True:
        started = time.monotonic()
        batch = claim(connection, options=options, through=through, floors=floors)
        claimed = time.monotonic()
        if not batch.messages:
            return claim_seconds, mark_seconds, batches
        settle(connection, schema="public", settlement=Settlement(published=batch.messages), mode="mark")
        claim_seconds += claimed - started
        mark_seconds += time.monotonic() - claimed
        batches += 1
        for message in batch.messages:
            floors.remember(message.shard, generation=0, settled_through=message.sequence_no)
