"""Whether messages get dearer while another session's snapshot keeps vacuum from removing anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.bench import Bench, say
from benchmarks.report import Figure, Table, by_case
from benchmarks.steady import Load, Look, watch

if TYPE_CHECKING:
    from collections.abc import Sequence

RATE = 2_000
LOOKS = 10
CASES = {"none": None, "held open": (0.0, 1.0)}


@dataclass(frozen=True, slots=True)
class Cost:
    """Processor time for each message in the first and in the last tenth of the time, and what there is at its end."""

    relay_first: float
    relay_last: float
    postgres_first: float
    postgres_last: float
    dead_rows: float
    outbox_megabytes: float
    mark_megabytes: float


FIGURES = (
    Figure("relay us/message: first", "relay_first", digits=1),
    Figure("last tenth", "relay_last", digits=1),
    Figure("PostgreSQL us/message: first", "postgres_first", digits=1),
    Figure("last tenth", "postgres_last", digits=1),
    Figure("dead rows", "dead_rows"),
    Figure("outbox MB", "outbox_megabytes", digits=1),
    Figure("marks MB", "mark_megabytes", digits=2),
)


def measure(bench: Bench) -> list[Table]:
    """Run the same traffic without and with an open snapshot, once each."""
    seconds = bench.plan.snapshot_seconds
    table = by_case(
        "A snapshot that is held open",
        f"Measured once: {RATE:,} one-row transactions a second for {seconds:g} s, a relay with its default settings. "
        "The snapshot is that of a `REPEATABLE READ` transaction which stays open throughout. PostgreSQL's processor "
        "time is that of the writers too; dead rows are those of all tables.",
        case="snapshot",
        figures=FIGURES,
        samples={name: [_cost(_watch(bench, name))] for name in CASES},
    )
    return [table]


def _watch(bench: Bench, name: str) -> list[Look]:
    say(f"snapshot: {name}")
    return watch(bench, Load(RATE, bench.plan.snapshot_seconds, LOOKS, snapshot=CASES[name]))


def _cost(looks: Sequence[Look]) -> Cost:
    relay_first, postgres_first = _microseconds(*looks[:2])
    relay_last, postgres_last = _microseconds(*looks[-2:])
    return Cost(
        relay_first=relay_first,
        relay_last=relay_last,
        postgres_first=postgres_first,
        postgres_last=postgres_last,
        dead_rows=looks[-1].metric("dead_tuples"),
        outbox_megabytes=looks[-1].table_megabytes + looks[-1].index_megabytes,
        mark_megabytes=looks[-1].mark_megabytes,
    )


def _microseconds(before: Look, after: Look) -> tuple[float, float]:
    """Return the processor time of relay and PostgreSQL for each message that was published between two looks."""
    scale = 1e6 / max(after.published - before.published, 1)
    relay_seconds = after.relay_seconds - before.relay_seconds
    postgres_seconds = after.postgres_seconds - before.postgres_seconds
    return relay_seconds * scale, postgres_seconds * scale
