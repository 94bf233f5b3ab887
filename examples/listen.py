"""A small consuming loop for effects that an ORM commits; with psycopg use `outbox_relay.consumer.kafka`."""

from __future__ import annotations

import os
import signal
from threading import Event
from typing import TYPE_CHECKING

from confluent_kafka import Consumer, KafkaException

if TYPE_CHECKING:
    from collections.abc import Callable

    from outbox_relay.consumer import Record


def listen(commit_effect: Callable[[Record], None]) -> None:
    """
    Take each record of TOPIC until SIGTERM, and commit its offset when *commit_effect* has returned.

    An error ends it; whatever starts it again lets it go on at the record that failed.
    """
    stop = Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    consumer = Consumer(
        {
            "bootstrap.servers": os.environ["KAFKA_BOOTSTRAP_SERVERS"],
            "group.id": os.environ.get("GROUP_ID", "loyalty"),
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
        }
    )
    try:
        consumer.subscribe([os.environ.get("TOPIC", "order.events")])
        while not stop.is_set():
            record = consumer.poll(0.2)
            if record is None:
                continue
            if error := record.error():
                raise KafkaException(error)
            commit_effect(record)
            consumer.commit(message=record, asynchronous=False)
    finally:
        consumer.close()
