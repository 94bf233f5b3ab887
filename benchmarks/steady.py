"""A relay under steady load, looked at in equal steps: sizes, the relay's own metrics, and processor time."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psycopg

from benchmarks.relay import running_relays
from benchmarks.topic import temporary_topic
from benchmarks.usage import tree_seconds
from benchmarks.writers import write_steadily

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from benchmarks.bench import Bench
    from benchmarks.relay import Relay

SELECT_SIZES = """
SELECT
    pg_table_size('outbox') / 1e6::float8 AS table_megabytes,
    pg_indexes_size('outbox') / 1e6::float8 AS index_megabytes,
    pg_total_relation_size('outbox_published') / 1e6::float8 AS mark_megabytes
"""


@dataclass(frozen=True, slots=True)
class Load:
    """
    What is written and watched.

    Attributes:
        rate: One-row transactions a second.
        looks: How many times it is looked at, after the first look at the beginning.
        snapshot: Between which parts of the time another session holds a snapshot open.
        settings: Of the relay.
    """

    rate: int
    seconds: float
    looks: int
    snapshot: tuple[float, float] | None = None
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Look:
    """What there was at one moment; the counters, and those among the metrics, run from the beginning."""

    seconds: float
    relay_seconds: float
    postgres_seconds: float
    table_megabytes: float
    index_megabytes: float
    mark_megabytes: float
    metrics: Mapping[str, float]

    def metric(self, name: str) -> float:
        """Return the sum of one of the relay's metrics, named without its prefix."""
        return self.metrics.get(f"outbox_relay_{name}", 0.0)

    @property
    def published(self) -> float:
        """Messages published so far."""
        return self.metric("published_messages_total")


def watch(bench: Bench, load: Load) -> list[Look]:
    """Run *load* against an empty outbox; return the look at the beginning and those after each step."""
    settings = {"OUTBOX_RELAY_SURVEY_INTERVAL": str(load.seconds / load.looks / 4), **load.settings}
    with (
        bench.database() as dsn,
        temporary_topic(bench.kafka) as topic,
        running_relays(bench, dsn=dsn, topic=topic, settings=settings) as [relay],
        ThreadPoolExecutor(1) as threads,
        psycopg.connect(dsn, autocommit=True) as observer,
        psycopg.connect(dsn, autocommit=True) as holder,
    ):
        writing = threads.submit(write_steadily, bench, dsn, rate=load.rate, seconds=load.seconds)
        looks = []
        for part in _parts(load):
            looks.append(_look(bench, relay, observer))
            _hold_between(holder, load.snapshot, part=part)
        writing.result()
    return looks


def _parts(load: Load) -> Iterator[float]:
    """Yield the parts of the time that have passed, each when it has: 0, ..., 1."""
    started = time.monotonic()
    for number in range(load.looks + 1):
        part = number / load.looks
        time.sleep(max(0.0, started + part * load.seconds - time.monotonic()))
        yield part


def _hold_between(holder: psycopg.Connection, snapshot: tuple[float, float] | None, *, part: float) -> None:
    begin, end = snapshot or (2.0, 2.0)
    is_open = holder.info.transaction_status is not psycopg.pq.TransactionStatus.IDLE
    if not is_open and begin <= part < end:
        holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        holder.execute("SELECT FROM outbox LIMIT 1")
    elif is_open and part >= end:
        holder.execute("COMMIT")


def _look(bench: Bench, relay: Relay, observer: psycopg.Connection) -> Look:
    [(table_megabytes, index_megabytes, mark_megabytes)] = observer.execute(SELECT_SIZES).fetchall()
    return Look(
        seconds=time.monotonic(),
        relay_seconds=relay.cpu_seconds(),
        postgres_seconds=tree_seconds(bench.server.pid),
        table_megabytes=table_megabytes,
        index_megabytes=index_megabytes,
        mark_megabytes=mark_megabytes,
        metrics=relay.metrics(),
    )
