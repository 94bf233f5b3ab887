"""What the parts can do at most when nothing but one thing is asked of them: no relay can be faster."""

from __future__ import annotations

import time
from itertools import cycle, islice
from typing import TYPE_CHECKING

import psycopg
from confluent_kafka import KafkaException, Producer

from benchmarks.bench import KEYS, Bench, say
from benchmarks.lane import SCHEMA, claim, reach, read
from benchmarks.topic import temporary_topic
from outbox_relay.config import Settings
from outbox_relay.relay.claim import ClaimOptions, begin_statement
from outbox_relay.relay.marks import Marks
from outbox_relay.relay.message import Addressing, prepare
from outbox_relay.relay.read import Limits
from outbox_relay.relay.settle import record_marks
from outbox_relay.relay.shards import SHARDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from confluent_kafka import KafkaError, Message

    from outbox_relay.relay.message import Record

BATCH = 5_000
FLUSH_SECONDS = 60.0
QUEUE = 10_000  # two batches of the relay
QUEUE_FULL_SECONDS = 0.01
LOG_ERRORS = 3

LIMITS = {
    "produce": "`produce()` in a loop with a delivery callback per message",
    "copy": "`COPY outbox TO STDOUT`",
    "read": "the read of a relay, batch after batch in one transaction",
    "mark": f"one transaction with {SHARDS} marks for {BATCH:,} messages",
}


def measure_limits(bench: Bench) -> dict[str, float]:
    """Return messages a second for each name in `LIMITS`."""
    say("limits")
    count = bench.plan.drain_messages
    with bench.database(backlog=count) as dsn:
        seconds = {
            "produce": _produce_seconds(bench, _records(dsn), count=count),
            "copy": _copy_seconds(dsn),
            "read": _read_seconds(dsn),
            "mark": _mark_seconds(dsn, count=count),
        }
    return {name: count / seconds[name] for name in LIMITS}


def _records(dsn: str) -> list[Record]:
    """Return what the relay itself would send: about one record of each key."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        reached = reach(connection)
        messages = read(connection, claim(connection, reached), reached, limits=Limits(messages=KEYS))
    return prepare(messages, addressing=Addressing(source="benchmark"), on_poison="park").records


def _produce_seconds(bench: Bench, records: Sequence[Record], *, count: int) -> float:
    """Produce as fast as one producer can: the relay's settings, with a short linger and five requests in flight."""
    settings = Settings(kafka={"bootstrap.servers": bench.kafka.bootstrap_servers})
    fast = {"linger.ms": 5, "max.in.flight.requests.per.connection": 5, "log_level": LOG_ERRORS}
    producer = Producer({**settings.producer_config(), **fast})
    acknowledged = 0

    def report(error: KafkaError | None, _message: Message) -> None:
        nonlocal acknowledged
        acknowledged += error is None

    with temporary_topic(bench.kafka) as topic:
        producer.produce(topic.name)
        producer.flush(FLUSH_SECONDS)  # the first message of a producer waits for its producer id
        started = time.monotonic()
        for _, key, value, headers, timestamp_ms in islice(cycle(records), count):
            while len(producer) >= QUEUE:
                producer.poll(QUEUE_FULL_SECONDS)
            producer.produce(topic.name, value, key, on_delivery=report, headers=headers, timestamp=timestamp_ms)
        producer.flush(FLUSH_SECONDS)
        seconds = time.monotonic() - started
    if acknowledged != count:
        raise KafkaException(f"{acknowledged} of {count} messages were acknowledged")
    return seconds


def _copy_seconds(dsn: str) -> float:
    with psycopg.connect(dsn) as connection:
        started = time.monotonic()
        with connection.cursor().copy("COPY outbox TO STDOUT") as rows:
            for _ in rows:
                pass
        return time.monotonic() - started


def _read_seconds(dsn: str) -> float:
    with psycopg.connect(dsn, autocommit=True) as connection:
        started = time.monotonic()
        reached = reach(connection)
        claimed = claim(connection, reached)
        while messages := read(connection, claimed, reached):
            claimed.marks.pass_over(messages)
        return time.monotonic() - started


def _mark_seconds(dsn: str, *, count: int) -> float:
    """Record marks as stints do, with commits that do not wait for the disk."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        started = time.monotonic()
        for through in range(BATCH, count + BATCH, BATCH):
            marks = Marks(dict.fromkeys(range(SHARDS), 0))
            for shard in range(SHARDS):
                marks.pass_nothing(shard, through=through)
            connection.execute(begin_statement(ClaimOptions(schema=SCHEMA)))
            record_marks(connection, marks, schema=SCHEMA)
        return time.monotonic() - started
