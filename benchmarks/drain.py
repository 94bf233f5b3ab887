"""How fast a backlog goes, beside the limits measured in the same rounds."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psycopg

from benchmarks.bench import Bench, say
from benchmarks.limits import LIMITS, measure_limits
from benchmarks.relay import running_relays
from benchmarks.report import Figure, Table, share, spread
from benchmarks.topic import temporary_topic
from benchmarks.usage import USE, Meter, Use

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True, slots=True)
class Case:
    """How the relays are set up."""

    processes: int
    lanes: int

    def __str__(self) -> str:
        return f"{self.processes} x {self.lanes}"


@dataclass(frozen=True, slots=True)
class Drained:
    """What one drain took; the memory is that of the largest process."""

    per_second: float
    relay_microseconds: float
    use: Use
    peak_megabytes: float


FIGURES = (
    Figure("messages/s", "per_second"),
    Figure("relay us/message", "relay_microseconds", digits=1),
    *USE,
    Figure("peak MB", "peak_megabytes"),
)


def measure(bench: Bench) -> list[Table]:
    """Measure the limits, and then each set-up, round by round."""
    plan = bench.plan
    limits: dict[str, list[float]] = {name: [] for name in LIMITS}
    drains: dict[Case, list[Drained]] = {Case(*relays): [] for relays in plan.drain_relays}
    for _ in range(plan.repeat):
        for name, rate in measure_limits(bench).items():
            limits[name].append(rate)
        for case, drained in drains.items():
            drained.append(drain(bench, case))
    return [_limit_table(limits, count=plan.drain_messages), _drain_table(drains, limits, count=plan.drain_messages)]


def drain(bench: Bench, case: Case) -> Drained:
    """Let relays drain a backlog; they begin together, warm, when the shards are let go."""
    say(f"drain: {bench.installation.name}, {case}")
    count = bench.plan.drain_messages
    settings = {"OUTBOX_RELAY_LANES": str(case.lanes)}
    with bench.database(backlog=count) as dsn, temporary_topic(bench.kafka) as topic:
        with (
            _held_shards(dsn) as let_go,
            running_relays(bench, dsn=dsn, topic=topic, count=case.processes, settings=settings) as relays,
        ):
            meter = Meter(bench, dsn)
            cpu_before = sum(relay.cpu_seconds() for relay in relays)
            let_go()
            topic.await_messages(count)
            cpu_seconds = sum(relay.cpu_seconds() for relay in relays) - cpu_before
            peak_megabytes = max(relay.peak_megabytes() for relay in relays)
        first, last = topic.written_between()
        return Drained(
            per_second=count / (last - first),
            relay_microseconds=cpu_seconds / count * 1e6,
            use=meter.per_message(count),
            peak_megabytes=peak_megabytes,
        )


@contextmanager
def _held_shards(dsn: str) -> Iterator[Callable[[], None]]:
    """Hold every shard as a relay does, so that relays start and find nothing to claim; yield what ends it."""
    with psycopg.connect(dsn) as connection:
        connection.execute("SELECT FROM outbox_shard ORDER BY shard FOR UPDATE")
        yield connection.rollback


def _limit_table(limits: dict[str, list[float]], *, count: int) -> Table:
    return Table(
        "Limits",
        f"Each part alone with {count:,} messages, in the same rounds as the drains below. Producing uses the relay's "
        "records, a linger of 5 ms and five requests in flight; reading and recording use its statements.",
        ("limit", "messages/s"),
        [(text, spread(limits[name])) for name, text in LIMITS.items()],
    )


def _drain_table(drains: dict[Case, list[Drained]], limits: dict[str, list[float]], *, count: int) -> Table:
    rate = FIGURES[0]
    return Table(
        "Drain of a backlog",
        f"{count:,} messages with 200 bytes of payload and 10,000 keys, one topic with 8 partitions. The relays start "
        "on held shards and begin together when these are let go. Timed by the broker's clock, from the first message "
        "that it wrote to the last; the first claim and the last marks fall outside. `relay` is the processor time of "
        "all relay processes, `PostgreSQL` that of all processes of the server, its background included. The log, the "
        "dead rows and the marks are all the relays': nobody else writes. Memory is the peak of the largest process.",
        ("processes x lanes", *(figure.head for figure in FIGURES), "of produce", "of read"),
        [
            (
                str(case),
                *(figure.cell(samples) for figure in FIGURES),
                share(rate.values(samples), of=limits["produce"]),
                share(rate.values(samples), of=limits["read"]),
            )
            for case, samples in drains.items()
        ],
    )
