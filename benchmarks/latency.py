"""How long a message takes from the writer's commit to a consumer, at a steady rate of one-row transactions."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory
from threading import Event
from typing import TYPE_CHECKING
from uuid import UUID

from benchmarks.bench import AGGREGATE_TYPE, KEYS, Bench, say
from benchmarks.relay import running_relays
from benchmarks.report import Table, spread
from benchmarks.rounds import in_rounds
from benchmarks.topic import temporary_topic
from outbox_relay.sandbox.history import History, Outcome, Write, commit_to_arrival_seconds
from outbox_relay.sandbox.reading import read_topics

if TYPE_CHECKING:
    from outbox_relay.sandbox.history import Record

WRITERS = 16

# Client and count make the message id, by which a line of the log finds its record.
SCRIPT = f"""\
\\set count :count + 1
\\set customer random(1, {KEYS})
INSERT INTO outbox (message_id, aggregate_type, aggregate_id, event_type, payload)
VALUES (
    (lpad(to_hex(:client_id::bigint), 8, '0') || lpad(to_hex(:count::bigint), 24, '0'))::uuid,
    '{AGGREGATE_TYPE}',
    'customer-' || :customer::bigint,
    'order_placed',
    '{{"order": "{"0123456789abcdef" * 11}0123456789a"}}'
);
"""


@dataclass(frozen=True, slots=True)
class Latency:
    """What one run at one rate showed; times in milliseconds."""

    written_per_second: float
    median: float
    p95: float
    p99: float
    cores: float


def measure(bench: Bench) -> list[Table]:
    """Measure each rate, round by round."""
    plan = bench.plan
    rates = in_rounds(plan.latency_rates, lambda rate: _measure_rate(bench, rate), repeat=plan.repeat)
    table = Table(
        "Latency from commit to consumer",
        f"One-row transactions from {WRITERS} connections of `pgbench`, which starts them at random times (Poisson) "
        f"whether or not earlier ones are done; {plan.latency_seconds:g} s after {plan.warm_up_seconds:g} s of "
        "warm-up; a relay with its default settings. From the moment the writer knows of its commit to the moment "
        "the consumer has the message, in ms. A rate that was not written was not measured: compare the first two "
        "columns.",
        ("asked/s", "written/s", "median ms", "p95 ms", "p99 ms", "relay cores"),
        [
            (
                f"{rate:,}",
                spread([sample.written_per_second for sample in samples]),
                spread([sample.median for sample in samples], digits=1),
                spread([sample.p95 for sample in samples], digits=1),
                spread([sample.p99 for sample in samples], digits=1),
                spread([sample.cores for sample in samples], digits=2),
            )
            for rate, samples in rates.items()
        ],
    )
    return [table]


def _measure_rate(bench: Bench, rate: int) -> Latency:
    say(f"latency: {rate} transactions/s")
    plan = bench.plan
    stop = Event()
    with (
        bench.database() as dsn,
        temporary_topic(bench.kafka) as topic,
        running_relays(dsn=dsn, kafka=bench.kafka, topic=topic) as [relay],
        ThreadPoolExecutor(1) as threads,
    ):
        # The only busy thread of this process while pgbench runs, so that it is never late to stamp a message.
        consumer = threads.submit(read_topics, bench.kafka.bootstrap_servers, topics=[topic.name], stop=stop)
        started, cpu_before = time.monotonic(), relay.cpu_seconds()
        try:
            writes = write_steadily(bench, dsn, rate=rate, seconds=plan.warm_up_seconds + plan.latency_seconds)
            cores = (relay.cpu_seconds() - cpu_before) / (time.monotonic() - started)
            topic.await_messages(len(writes))
        finally:
            stop.set()
        records = consumer.result()
    warm_at = min(write.ended_at for write in writes) + plan.warm_up_seconds
    return _latency([write for write in writes if write.ended_at >= warm_at], records, cores=cores)


def write_steadily(bench: Bench, dsn: str, *, rate: int, seconds: float) -> list[Write]:
    """Write at *rate* for *seconds*; give every commit."""
    options = ("--rate", str(rate), "--time", str(round(seconds)), "--client", str(WRITERS), "--protocol=prepared")
    files = ("--no-vacuum", "--define=count=0", "--file=script.sql", "--log", "--log-prefix=transactions")
    with TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "script.sql").write_text(SCRIPT)
        bench.pgbench(dsn, *options, *files, directory=directory)
        [log] = directory.glob("transactions.*")
        return _writes(log)


def _writes(log: Path) -> list[Write]:
    """Read a log of pgbench: client, count, microseconds, script, and when it ended in seconds and microseconds."""
    since_epoch = time.time() - time.monotonic()
    counts: Counter[int] = Counter()
    writes = []
    for line in log.read_text().splitlines():
        client, _, _, _, seconds, microseconds, *_ = map(int, line.split())
        counts[client] += 1
        message_id = str(UUID(int=(client << 96) + counts[client]))
        ended_at = seconds + microseconds / 1e6 - since_epoch
        writes.append(Write(message_id, key="", digest=b"", outcome=Outcome.COMMITTED, ended_at=ended_at))
    return writes


def _latency(writes: list[Write], records: list[Record], *, cores: float) -> Latency:
    latencies = commit_to_arrival_seconds(History(writes, rows=(), records=records))
    if len(latencies) < len(writes):
        raise RuntimeError(f"{len(writes) - len(latencies)} of {len(writes)} messages did not arrive")
    ended = [write.ended_at for write in writes]
    percentiles = [seconds * 1000 for seconds in quantiles(latencies, n=100)]
    return Latency(
        written_per_second=len(writes) / (max(ended) - min(ended)),
        median=percentiles[49],
        p95=percentiles[94],
        p99=percentiles[98],
        cores=cores,
    )
