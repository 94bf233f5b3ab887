"""Whether claims get dearer while another session's snapshot keeps vacuum from removing what is published."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import psycopg

from benchmarks.bench import Bench, say
from benchmarks.relay import running_relays
from benchmarks.report import Table, spread
from benchmarks.rounds import in_rounds
from benchmarks.topic import temporary_topic

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.fixtures.daemon import Event


@dataclass(frozen=True, slots=True)
class ClaimCost:
    """Microseconds of claiming per message, in the first and in the last quarter of the batches."""

    first: float
    last: float


def measure(bench: Bench) -> list[Table]:
    """Drain with and without an open snapshot, in turns."""
    costs = in_rounds((False, True), lambda is_held: _drain(bench, is_held=is_held), repeat=bench.plan.repeat)
    table = Table(
        "Claims while a snapshot is held open",
        f"A backlog of {bench.plan.snapshot_messages:,} messages drained in one go by one lane, which logs each batch. "
        "The snapshot is that of a `REPEATABLE READ` transaction which stays open throughout, so that the index "
        "entries of published messages stay too.",
        ("snapshot", "first quarter, us/message", "last quarter, us/message", "last / first"),
        [
            (
                "held open" if is_held else "none",
                spread([cost.first for cost in samples], digits=1),
                spread([cost.last for cost in samples], digits=1),
                spread([cost.last / cost.first for cost in samples], digits=2),
            )
            for is_held, samples in costs.items()
        ],
    )
    return [table]


def _drain(bench: Bench, *, is_held: bool) -> ClaimCost:
    say(f"snapshot: {'held open' if is_held else 'none'}")
    count = bench.plan.snapshot_messages
    settings = {"OUTBOX_RELAY_LOG_LEVEL": "debug", "OUTBOX_RELAY_LOG_FORMAT": "json", "OUTBOX_RELAY_LANES": "1"}
    with (
        bench.database(backlog=count) as dsn,
        temporary_topic(bench.kafka) as topic,
        _snapshot(dsn, is_held=is_held),
    ):
        with running_relays(dsn=dsn, kafka=bench.kafka, topic=topic, settings=settings) as [relay]:
            topic.await_messages(count)
        batches = [event for event in relay.events if event["event"] == "batch_published"]
    quarter = max(1, len(batches) // 4)
    return ClaimCost(_claim_cost(batches[:quarter]), _claim_cost(batches[-quarter:]))


@contextmanager
def _snapshot(dsn: str, *, is_held: bool) -> Iterator[None]:
    with psycopg.connect(dsn) as connection:
        if is_held:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            connection.execute("SELECT FROM outbox LIMIT 1")
        yield


def _claim_cost(batches: Sequence[Event]) -> float:
    seconds = sum(cast("float", batch["claim_seconds"]) for batch in batches)
    return seconds * 1e6 / sum(cast("int", batch["messages"]) for batch in batches)
