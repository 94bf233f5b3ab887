"""How long a message takes from the writer's commit to a consumer, at a steady rate of one-row transactions."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import quantiles
from threading import Event
from typing import TYPE_CHECKING

from benchmarks.bench import Bench, say
from benchmarks.relay import running_relays
from benchmarks.report import Figure, Table, by_case
from benchmarks.rounds import in_rounds
from benchmarks.topic import temporary_topic
from benchmarks.usage import USE, Meter, Use
from benchmarks.writers import WRITERS, logged_writes
from outbox_relay.sandbox.history import History, commit_to_arrival_seconds
from outbox_relay.sandbox.reading import read_topics

if TYPE_CHECKING:
    from benchmarks.relay import Relay
    from benchmarks.topic import Topic
    from outbox_relay.sandbox.history import Record, Write


@dataclass(frozen=True, slots=True)
class Traffic:
    """One run with a relay: what was written and read, and what the relay took."""

    writes: list[Write]
    records: list[Record]
    cores: float
    peak_megabytes: float


@dataclass(frozen=True, slots=True)
class Latency:
    """
    What one rate showed; times in milliseconds.

    Attributes:
        writers: What the writers take without a relay.
        use: What is taken beyond that with one.
    """

    written_per_second: float
    median: float
    p95: float
    p99: float
    cores: float
    peak_megabytes: float
    use: Use
    writers: Use


LATENCY = (
    Figure("written/s", "written_per_second"),
    Figure("median ms", "median", digits=1),
    Figure("p95 ms", "p95", digits=1),
    Figure("p99 ms", "p99", digits=1),
    Figure("relay cores", "cores", digits=2),
    Figure("peak MB", "peak_megabytes"),
)
TAKEN = (
    *USE,
    Figure("PostgreSQL us/message, writers alone", "writers.postgres_microseconds", digits=1),
    Figure("log bytes/message, writers alone", "writers.wal_bytes", digits=1),
)


def measure(bench: Bench) -> list[Table]:
    """Measure each rate, round by round."""
    plan = bench.plan
    rates = in_rounds(plan.latency_rates, lambda rate: measure_rate(bench, rate), repeat=plan.repeat)
    samples = {f"{rate:,}": measured for rate, measured in rates.items()}
    latency = by_case(
        "Latency from commit to consumer",
        f"One-row transactions from {WRITERS} connections of `pgbench`, which starts them at random times (Poisson) "
        f"whether or not earlier ones are done; {plan.latency_seconds:g} s after {plan.warm_up_seconds:g} s of "
        "warm-up; a relay with its default settings. From the moment the writer knows of its commit to the moment "
        "the consumer has the message, in ms. A rate that was not written was not measured: compare the first two "
        "columns.",
        case="asked/s",
        figures=LATENCY,
        samples=samples,
    )
    taken = by_case(
        "What steady traffic takes",
        "The same runs, warm-up included. In each round the writers also run without a relay, as long and on an outbox "
        "of their own; that is taken away from what the same writers, relay and consumer take together.",
        case="asked/s",
        figures=TAKEN,
        samples=samples,
    )
    return [latency, taken]


def measure_rate(bench: Bench, rate: int) -> Latency:
    """Run the writers alone, and then with a relay and a consumer."""
    say(f"latency: {bench.installation.name}, {rate} transactions/s")
    seconds = bench.plan.warm_up_seconds + bench.plan.latency_seconds
    with bench.database() as dsn:
        meter = Meter(bench, dsn)
        alone = meter.per_message(len(logged_writes(bench, dsn, rate=rate, seconds=seconds)))
    with bench.database() as dsn, temporary_topic(bench.kafka) as topic:
        with running_relays(bench, dsn=dsn, topic=topic) as [relay]:
            meter = Meter(bench, dsn)
            traffic = _run(bench, dsn, relay, topic, rate=rate, seconds=seconds)
        together = meter.per_message(len(traffic.writes))
    return _latency(traffic, use=together.beyond(alone), writers=alone, warm_up_seconds=bench.plan.warm_up_seconds)


def _run(bench: Bench, dsn: str, relay: Relay, topic: Topic, *, rate: int, seconds: float) -> Traffic:
    stop = Event()
    with ThreadPoolExecutor(1) as threads:
        # The only busy thread of this process while pgbench runs, so that it is never late to stamp a message.
        consumer = threads.submit(read_topics, bench.kafka.bootstrap_servers, topics=[topic.name], stop=stop)
        started, cpu_before = time.monotonic(), relay.cpu_seconds()
        try:
            writes = logged_writes(bench, dsn, rate=rate, seconds=seconds)
            cores = (relay.cpu_seconds() - cpu_before) / (time.monotonic() - started)
            topic.await_messages(len(writes))
        finally:
            stop.set()
        return Traffic(writes, consumer.result(), cores=cores, peak_megabytes=relay.peak_megabytes())


def _latency(traffic: Traffic, *, use: Use, writers: Use, warm_up_seconds: float) -> Latency:
    warm_at = min(write.ended_at for write in traffic.writes) + warm_up_seconds
    writes = [write for write in traffic.writes if write.ended_at >= warm_at]
    latencies = commit_to_arrival_seconds(History(writes, rows=(), records=traffic.records))
    if len(latencies) < len(writes):
        raise RuntimeError(f"{len(writes) - len(latencies)} of {len(writes)} messages did not arrive")
    ended = [write.ended_at for write in writes]
    percentiles = [seconds * 1000 for seconds in quantiles(latencies, n=100)]
    return Latency(
        written_per_second=len(writes) / (max(ended) - min(ended)),
        median=percentiles[49],
        p95=percentiles[94],
        p99=percentiles[98],
        cores=traffic.cores,
        peak_megabytes=traffic.peak_megabytes,
        use=use,
        writers=writers,
    )
