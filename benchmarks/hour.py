"""An hour of steady load in a time-lapse: whether sizes level off, and what an old snapshot does to them."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

import psycopg

from benchmarks.bench import Bench, say
from benchmarks.report import Table
from benchmarks.steady import Load, Look, watch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RATE = 1_000
LOOKS = 12
RETAINED = 1 / 12  # of the time: five minutes of an hour
NAP_SECONDS = 1  # of autovacuum, a minute by default
HEADS = (
    *("minute", "published/s", "read, ms", "table, MB", "indexes, MB", "marks, MB"),
    *("dead rows", "xmin age", "oldest tx, s"),
)
SHOWN = ("dead_tuples", "oldest_xmin_age", "longest_transaction_seconds")


def measure(bench: Bench) -> list[Table]:
    """Write at a steady rate with retention on; once alone, once with a snapshot open in the middle third."""
    seconds = bench.plan.hour_seconds
    method = (
        f"{RATE:,} one-row transactions a second for {seconds:g} s, published messages kept for "
        f"{seconds * RETAINED:g} s, autovacuum looking every {NAP_SECONDS} s: an hour {3600 / seconds:g} times as "
        "fast. How often the relay prunes, reconciles and joins marks is not shortened. Its own figures are those that "
        "its metrics show; dead rows are those of all tables."
    )
    return [
        _table("An hour with retention", method, _watch(bench, snapshot=None)),
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
    return Table(title, method, HEADS, rows)


def _figures(before: Look, after: Look) -> tuple[str, ...]:
    reads = after.metric("read_seconds_count") - before.metric("read_seconds_count")
    read_seconds = after.metric("read_seconds_sum") - before.metric("read_seconds_sum")
    return (
        f"{(after.published - before.published) / (after.seconds - before.seconds):,.0f}",
        f"{read_seconds / max(reads, 1) * 1000:.2f}",
        f"{after.table_megabytes:.1f}",
        f"{after.index_megabytes:.1f}",
        f"{after.mark_megabytes:.2f}",
        *(f"{after.metric(name):,.0f}" for name in SHOWN),
    )


def _watch(bench: Bench, *, snapshot: tuple[float, float] | None) -> list[Look]:
    seconds = bench.plan.hour_seconds
    say(f"hour: {seconds:g} s, snapshot {'in the middle' if snapshot else 'never'}")
    settings = {"OUTBOX_RELAY_RETENTION": str(seconds * RETAINED)}
    with _quick_autovacuum(bench):
        return watch(bench, Load(RATE, seconds, LOOKS, snapshot=snapshot, settings=settings))


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
