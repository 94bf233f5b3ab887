"""What a relay takes while there is nothing to do."""

from __future__ import annotations

import time
from dataclasses import dataclass

from benchmarks.bench import Bench, say
from benchmarks.relay import running_relays
from benchmarks.report import Table, spread
from benchmarks.rounds import in_rounds
from benchmarks.topic import temporary_topic

BACKLOGS = {"never used": 0, "drained": 1_000}


@dataclass(frozen=True, slots=True)
class Idle:
    """Processor time as a share of one core, and memory."""

    cpu_percent: float
    peak_megabytes: float


def measure(bench: Bench) -> list[Table]:
    """Watch a relay beside an outbox without and with a past, in turns."""
    plan = bench.plan
    samples = in_rounds(BACKLOGS, lambda name: _watch(bench, name), repeat=plan.repeat)
    table = Table(
        "Idle",
        f"A relay with its default settings, watched for {plan.idle_seconds:g} s after as long a time to come to rest.",
        ("outbox", "CPU, % of one core", "peak MB"),
        [
            (
                name,
                spread([idle.cpu_percent for idle in measured], digits=1),
                spread([idle.peak_megabytes for idle in measured]),
            )
            for name, measured in samples.items()
        ],
    )
    return [table]


def _watch(bench: Bench, name: str) -> Idle:
    say(f"idle: outbox {name}")
    backlog, seconds = BACKLOGS[name], bench.plan.idle_seconds
    with (
        bench.database(backlog=backlog) as dsn,
        temporary_topic(bench.kafka) as topic,
        running_relays(dsn=dsn, kafka=bench.kafka, topic=topic) as [relay],
    ):
        topic.await_messages(backlog)
        time.sleep(seconds)
        started, cpu_before = time.monotonic(), relay.cpu_seconds()
        time.sleep(seconds)
        cpu_seconds = relay.cpu_seconds() - cpu_before
        return Idle(cpu_seconds / (time.monotonic() - started) * 100, relay.peak_megabytes())
