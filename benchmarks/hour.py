"""An hour of steady load in a time-lapse: whether sizes level off, and what an old snapshot does to them."""

from __future__ import annotations

import re
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import psycopg

from benchmarks.bench import Bench, say
from benchmarks.latency import write_steadily
from benchmarks.relay import running_relays
from benchmarks.report import Table
from benchmarks.topic import temporary_topic

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from benchmarks.relay import Relay

RATE = 1_000
LOOKS = 12
RETAINED = 1 / 12  # of the time: five minutes of an hour
NAP_SECONDS = 1  # of autovacuum, a minute by default
SELECT_SIZES = "SELECT pg_table_size('outbox') / 1e6, pg_indexes_size('outbox') / 1e6"
SHOWN = ("outbox_relay_dead_tuples", "outbox_relay_oldest_xmin_age", "outbox_relay_longest_transaction_seconds")


@dataclass(frozen=True, slots=True)
class Look:
    """What there was at one moment; the counters run from the beginning."""

    seconds: float
    published: float
    claims: float
    claim_seconds: float
    table_megabytes: float
    index_megabytes: float
    shown: Mapping[str, float]


def measure(bench: Bench) -> list[Table]:
    """Write at a steady rate with retention on; once alone, once with a snapshot open in the middle third."""
    seconds = bench.plan.hour_seconds
    method = (
        f"{RATE:,} one-row transactions a second for {seconds:g} s, published messages kept for "
        f"{seconds * RETAINED:g} s, autovacuum looking every {NAP_SECONDS} s: an hour {3600 / seconds:g} times as "
        "fast. The relay's own figures are those that its metrics show."
    )
    return [
        _table("An hour with retention", method, _watch(bench, snapshot=(2.0, 2.0))),
        _table(
            "The same hour beside an old snapshot",
            f"{method} A `REPEATABLE READ` transaction is open in the middle third.",
            _watch(bench, snapshot=(1 / 3, 2 / 3)),
        ),
    ]


def _table(title: str, method: str, looks: Sequence[Look]) -> Table:
    rows = [
        (f"{60 * number // LOOKS}", *_figures(before, after))
        for number, (before, after) in enumerate(pairwise(looks), 1)
    ]
    heads = ("minute", "published/s", "claim, ms", "table, MB", "indexes, MB", "dead rows", "xmin age", "oldest tx, s")
    return Table(title, method, heads, rows)


def _figures(before: Look, after: Look) -> tuple[str, ...]:
    return (
        f"{(after.published - before.published) / (after.seconds - before.seconds):,.0f}",
        f"{(after.claim_seconds - before.claim_seconds) / max(after.claims - before.claims, 1) * 1000:.2f}",
        f"{after.table_megabytes:.1f}",
        f"{after.index_megabytes:.1f}",
        *(f"{after.shown[name]:,.0f}" for name in SHOWN),
    )


def _watch(bench: Bench, *, snapshot: tuple[float, float]) -> list[Look]:
    """Give a look for each twelfth of the time; *snapshot* is opened and closed at parts of it."""
    seconds = bench.plan.hour_seconds
    say(f"hour: {seconds:g} s, snapshot {'never' if snapshot[0] > 1 else 'in the middle'}")
    settings = {
        "OUTBOX_RELAY_RETENTION": str(seconds * RETAINED),
        "OUTBOX_RELAY_SURVEY_INTERVAL": str(seconds / LOOKS / 4),
    }
    with (
        _quick_autovacuum(bench),
        bench.database() as dsn,
        temporary_topic(bench.kafka) as topic,
        running_relays(dsn=dsn, kafka=bench.kafka, topic=topic, settings=settings) as [relay],
        ThreadPoolExecutor(1) as threads,
        psycopg.connect(dsn, autocommit=True) as observer,
        psycopg.connect(dsn, autocommit=True) as holder,
    ):
        writing = threads.submit(write_steadily, bench, dsn, rate=RATE, seconds=seconds)
        started = time.monotonic()
        looks = [_look(relay, observer, seconds=0.0)]
        for number in range(1, LOOKS + 1):
            _hold_between(holder, snapshot, part=(number - 1) / LOOKS)
            time.sleep(max(0.0, started + number * seconds / LOOKS - time.monotonic()))
            looks.append(_look(relay, observer, seconds=time.monotonic() - started))
        writing.result()
    return looks


def _hold_between(holder: psycopg.Connection, snapshot: tuple[float, float], *, part: float) -> None:
    begin, end = snapshot
    is_open = holder.info.transaction_status is not psycopg.pq.TransactionStatus.IDLE
    if not is_open and begin <= part < end:
        holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        holder.execute("SELECT FROM outbox LIMIT 1")
    elif is_open and part >= end:
        holder.execute("COMMIT")


@contextmanager
def _quick_autovacuum(bench: Bench) -> Iterator[None]:
    with psycopg.connect(bench.server.dsn(), autocommit=True) as admin:
        admin.execute(f"ALTER SYSTEM SET autovacuum_naptime = '{NAP_SECONDS}s'")
        admin.execute("SELECT pg_reload_conf()")
        try:
            yield
        finally:
            admin.execute("ALTER SYSTEM RESET autovacuum_naptime")
            admin.execute("SELECT pg_reload_conf()")


def _look(relay: Relay, observer: psycopg.Connection, *, seconds: float) -> Look:
    figures = _scrape(relay)
    [(table_megabytes, index_megabytes)] = observer.execute(SELECT_SIZES).fetchall()
    return Look(
        seconds=seconds,
        published=figures.get("outbox_relay_published_messages_total", 0.0),
        claims=figures.get("outbox_relay_claim_seconds_count", 0.0),
        claim_seconds=figures.get("outbox_relay_claim_seconds_sum", 0.0),
        table_megabytes=float(table_megabytes),
        index_megabytes=float(index_megabytes),
        shown={name: figures.get(name, 0.0) for name in SHOWN},
    )


def _scrape(relay: Relay) -> dict[str, float]:
    """Give the sums of the relay's figures over their labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{relay.port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    figures: dict[str, float] = {}
    for name, value in re.findall(r"^(\w+)(?:{.*})? (\S+)$", "\n".join(lines), re.MULTILINE):
        figures[name] = figures.get(name, 0.0) + float(value)
    return figures
