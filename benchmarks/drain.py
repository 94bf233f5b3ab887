"""How fast a backlog goes, beside the limits measured in the same rounds."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psycopg

from benchmarks.bench import Bench, say
from benchmarks.limits import LIMITS, measure_limits
from benchmarks.relay import running_relays
from benchmarks.report import Table, share, spread
from benchmarks.topic import temporary_topic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from outbox_relay.relay.settle import SettleMode


@dataclass(frozen=True, slots=True)
class Case:
    """How the relays are set up."""

    settle: SettleMode
    processes: int
    lanes: int

    def __str__(self) -> str:
        return f"{self.settle}, {self.processes} x {self.lanes}"


@dataclass(frozen=True, slots=True)
class Drained:
    """What one drain took; the memory is that of the largest process."""

    per_second: float
    cpu_microseconds: float
    peak_megabytes: float


def measure(bench: Bench) -> list[Table]:
    """Measure the limits, and then each set-up, round by round."""
    plan = bench.plan
    cases = [Case(mode, processes, lanes) for mode in ("mark", "delete") for processes, lanes in plan.drain_relays]
    limits: dict[str, list[float]] = {name: [] for name in LIMITS}
    drains: dict[Case, list[Drained]] = {case: [] for case in cases}
    for _ in range(plan.repeat):
        for name, rate in measure_limits(bench).items():
            limits[name].append(rate)
        for case, drained in drains.items():
            drained.append(_drain(bench, case))
    return [_limit_table(limits, count=plan.drain_messages), _drain_table(drains, limits, count=plan.drain_messages)]


def _drain(bench: Bench, case: Case) -> Drained:
    """Let relays drain a backlog; they begin together, warm, when the shards are let go."""
    say(f"drain: {case}")
    count = bench.plan.drain_messages
    settings = {"OUTBOX_RELAY_SETTLE": case.settle, "OUTBOX_RELAY_LANES": str(case.lanes)}
    with (
        bench.database(backlog=count) as dsn,
        temporary_topic(bench.kafka) as topic,
        _held_shards(dsn) as let_go,
        running_relays(case.processes, dsn=dsn, kafka=bench.kafka, topic=topic, settings=settings) as relays,
    ):
        cpu_before = sum(relay.cpu_seconds() for relay in relays)
        let_go()
        topic.await_messages(count)
        cpu_seconds = sum(relay.cpu_seconds() for relay in relays) - cpu_before
        first, last = topic.written_between()
        return Drained(
            per_second=count / (last - first),
            cpu_microseconds=cpu_seconds / count * 1e6,
            peak_megabytes=max(relay.peak_megabytes() for relay in relays),
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
        "records, a linger of 5 ms and five requests in flight; updating and deleting use its statements.",
        ("limit", "messages/s"),
        [(text, spread(limits[name])) for name, text in LIMITS.items()],
    )


def _drain_table(drains: dict[Case, list[Drained]], limits: dict[str, list[float]], *, count: int) -> Table:
    return Table(
        "Drain of a backlog",
        f"{count:,} messages with 200 bytes of payload and 10,000 keys, one topic with 8 partitions. The relays start "
        "on held shards and begin together when these are let go. Timed by the broker's clock, from the first message "
        "that it wrote to the last; the first claim and the last settlement fall outside. `of mark/delete` is the "
        "ratio to the limit of the row's own settle mode. Processor time is that of all relay processes; memory is "
        "the peak of the largest one.",
        (
            "settle, processes x lanes",
            "messages/s",
            "of produce",
            "of copy",
            "of mark/delete",
            "CPU us/message",
            "peak MB",
        ),
        [
            (
                str(case),
                spread(rates := [drained.per_second for drained in samples]),
                share(rates, of=limits["produce"]),
                share(rates, of=limits["copy"]),
                share(rates, of=limits[case.settle]),
                spread([drained.cpu_microseconds for drained in samples], digits=1),
                spread([drained.peak_megabytes for drained in samples]),
            )
            for case, samples in drains.items()
        ],
    )
