"""What the parts can do at most when nothing but the one thing is asked of them: no relay can be faster."""

from __future__ import annotations

import time
from itertools import cycle, islice
from typing import TYPE_CHECKING

import psycopg
from confluent_kafka import KafkaException, Producer

from benchmarks.bench import AGGREGATE_TYPE, KEYS, Bench
from benchmarks.topic import temporary_topic
from outbox_relay.config import Settings
from outbox_relay.relay.claim import ClaimOptions, Floors, claim
from outbox_relay.relay.message import Addressing, prepare
from outbox_relay.sql import statement

if TYPE_CHECKING:
    from collections.abc import Callable

    from confluent_kafka import KafkaError, Message

    from outbox_relay.relay.message import Record

BATCH = 5_000
FLUSH_SECONDS = 60.0
QUEUE_FULL_SECONDS = 0.01

LIMITS = {
    "produce": "`produce()` in a loop with a delivery callback for each message",
    "copy": "`COPY outbox TO STDOUT`",
    "mark": f"`UPDATE` of {BATCH:,} ids, commit, again",
    "delete": f"`DELETE` of {BATCH:,} ids, commit, again",
}


def measure_limits(bench: Bench) -> dict[str, float]:
    """Give messages a second for each name in `LIMITS`."""
    count = bench.plan.drain_messages
    with bench.database(backlog=count) as dsn:
        rates = {
            "produce": _rate(count, lambda: None) if not count else _produce(bench, dsn, count=count),
            "copy": _rate(count, lambda: _copy(dsn)),
            "mark": _rate(count, lambda: _settle(dsn, "settle_mark", count=count)),
        }
    with bench.database(backlog=count) as dsn:
        rates["delete"] = _rate(count, lambda: _settle(dsn, "settle_delete", count=count))
    return rates
