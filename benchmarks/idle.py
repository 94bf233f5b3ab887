"""What a relay takes while there is nothing to do."""

from __future__ import annotations

import time
from dataclasses import dataclass

from benchmarks.bench import Bench, say
from benchmarks.relay import running_relays
from benchmarks.report import Figure, Table, by_case
from benchmarks.rounds import in_rounds
from benchmarks.topic import temporary_topic
from benchmarks.usage import tree_seconds

BACKLOGS = {"never used": 0, "drained": 1_000}


@dataclass(frozen=True, slots=True)
class Idle:
    """Processor time of the relay and of PostgreSQL as a share of one core, and the relay's memory."""

    relay_percent: float
    postgres_percent: float
    peak_megabytes: float


FIGURES = (
    Figure("relay, % of one core", "relay_percent", digits=1),
    Figure("PostgreSQL, % of one core", "postgres_percent", digits=1),
    Figure("peak MB", "peak_megabytes"),
)


def measure(bench: Bench) -> list[Table]:
    """Watch a relay beside an outbox without and with a past, in turns."""
    plan = bench.plan
    samples = in_rounds(BACKLOGS, lambda name: _watch(bench, name), repeat=plan.repeat)
    method = (
        f"A relay with its default settings, watched for {plan.idle_seconds:g} s after as long a time to come to rest."
    )
    return [by_case("Idle", method, case="outbox", figures=FIGURES, samples=samples)]


def _watch(bench: Bench, name: str) -> Idle:
    say(f"idle: outbox {name}")
    backlog, seconds = BACKLOGS[name], bench.plan.idle_seconds
    with (
        bench.database(backlog=backlog) as dsn,
        temporary_topic(bench.kafka) as topic,
        running_relays(bench, dsn=dsn, topic=topic) as [relay],
    ):
        topic.await_messages(backlog)
        time.sleep(seconds)
        started, relay_before, postgres_before = time.monotonic(), relay.cpu_seconds(), tree_seconds(bench.server.pid)
        time.sleep(seconds)
        relay_seconds = relay.cpu_seconds() - relay_before
        postgres_seconds = tree_seconds(bench.server.pid) - postgres_before
        percent = 100 / (time.monotonic() - started)
        return Idle(relay_seconds * percent, postgres_seconds * percent, relay.peak_megabytes())
