"""What the parts can do at most when nothing but one thing is asked of them: no relay can be faster."""

from __future__ import annotations

import time
from itertools import cycle, islice
from typing import TYPE_CHECKING

import psycopg
from confluent_kafka import KafkaException, Producer

from benchmarks.bench import KEYS, Bench, say
from benchmarks.topic import temporary_topic
from outbox_relay.config import Settings
from outbox_relay.relay.claim import ClaimOptions, Floors, claim
from outbox_relay.relay.message import Addressing, prepare
from outbox_relay.sql import numbers, statement

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
    "mark": f"`UPDATE outbox SET published_at` of {BATCH:,} ids per transaction",
    "delete": f"`DELETE FROM outbox` of {BATCH:,} ids per transaction",
}


def measure_limits(bench: Bench) -> dict[str, float]:
    """Give messages a second for each name in `LIMITS`."""
    say("limits")
    count = bench.plan.drain_messages
    with bench.database(backlog=count) as dsn:
        records = _records(dsn)
        seconds = {
            "copy": _copy_seconds(dsn),
            "mark": _settle_seconds(dsn, "settle_mark", count=count),
        }
    with bench.database(backlog=count) as dsn:
        seconds["delete"] = _settle_seconds(dsn, "settle_delete", count=count)
    seconds["produce"] = _produce_seconds(bench, records, count=count)
    return {name: count / seconds[name] for name in LIMITS}


def _records(dsn: str) -> list[Record]:
    """Give what the relay itself would send: one record of each key."""
    with psycopg.connect(dsn) as connection:
        batch = claim(connection, options=ClaimOptions(messages=KEYS), through=KEYS, floors=Floors())
        connection.rollback()
    return prepare(batch.messages, addressing=Addressing(source="benchmark"), on_poison="park").records


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


def _settle_seconds(dsn: str, name: str, *, count: int) -> float:
    """Run the relay's own statement for ids in rising order, with commits that do not wait for the disk, as it does."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SET synchronous_commit = off")
        settle = statement(name, schema="public")
        started = time.monotonic()
        for first in range(1, count + 1, BATCH):
            psycopg.ClientCursor(connection).execute(settle, {"ids": numbers(range(first, first + BATCH))})
        return time.monotonic() - started
