"""Reads what PostgreSQL and Kafka hold of a run, as values of its history."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, TopicPartition

from outbox_relay.errors import KafkaUnavailable
from outbox_relay.sandbox.history import Place, Record, Row, State, digest, headers_digest
from outbox_relay.wire import NATIVE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from threading import Event

    from confluent_kafka import Message
    from psycopg import Connection

METADATA_TIMEOUT_SECONDS = 10.0
END_TIMEOUT_SECONDS = 60.0
POLL_SECONDS = 0.1

SELECT_ROWS = """
SELECT
    message_id::text,
    aggregate_id,
    sequence_no,
    CASE
        WHEN parked_at IS NOT NULL THEN 'parked'
        WHEN published_at IS NOT NULL THEN 'published'
        ELSE 'unpublished'
    END
FROM outbox
UNION ALL
SELECT
    message_id::text,
    aggregate_id,
    sequence_no,
    'skipped'
FROM outbox_audit
WHERE action = 'skip'
ORDER BY sequence_no
"""


def read_rows(connection: Connection) -> list[Row]:
    """Read the outbox, and what operators took out of it for good, in sequence order."""
    return [
        Row(message_id, key, sequence_no, State(state))
        for message_id, key, sequence_no, state in connection.execute(SELECT_ROWS)
    ]


def read_topics(bootstrap_servers: str, *, topics: Iterable[str], stop: Event) -> list[Record]:
    """
    Read *topics* from their beginning, live, until *stop* is set; then on to what is their end at that moment.

    Raises:
        KafkaUnavailable: A topic does not exist, or its end is not reached in time.
    """
    with _reader(bootstrap_servers) as consumer:
        partitions = _partitions(consumer, topics)
        consumer.assign(partitions)
        records: list[Record] = []
        while not stop.is_set():
            records += _poll(consumer)
        deadline = time.monotonic() + END_TIMEOUT_SECONDS
        ends = _ends(consumer, partitions)
        while not _is_past(ends, consumer.position(partitions)):
            if time.monotonic() > deadline:
                raise KafkaUnavailable(f"the end of the topics was not reached within {END_TIMEOUT_SECONDS:g} s")
            records += _poll(consumer)
        return records


def read_ends(bootstrap_servers: str, *, topics: Iterable[str]) -> dict[Place, int]:
    """
    Read where each partition ends, but for empty ones.

    Raises:
        KafkaUnavailable: A topic does not exist, or no broker answers.
    """
    with _reader(bootstrap_servers) as consumer:
        return _ends(consumer, _partitions(consumer, topics))


def count_partitions(bootstrap_servers: str, *, topics: Iterable[str]) -> dict[str, int]:
    """
    Count the partitions of each topic.

    Raises:
        KafkaUnavailable: A topic does not exist, or no broker answers.
    """
    with _reader(bootstrap_servers) as consumer:
        return {topic: len(_partitions(consumer, [topic])) for topic in topics}


@contextmanager
def _reader(bootstrap_servers: str) -> Iterator[Consumer]:
    """
    Give a consumer whose partitions are assigned, not subscribed to.

    It needs no group then, and librdkafka's mock cluster has none that works.
    """
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": "outbox-relay-history",  # demanded by librdkafka, never joined
            "enable.auto.commit": False,
            "log_level": 0,  # librdkafka mends its connections itself
            "fetch.wait.max.ms": 10,  # the mock cluster answers a waiting fetch only when its time is up
        }
    )
    try:
        yield consumer
    except KafkaException as error:
        raise KafkaUnavailable(f"the topics cannot be read: {error}") from error
    finally:
        consumer.close()


def _partitions(consumer: Consumer, topics: Iterable[str]) -> list[TopicPartition]:
    partitions = []
    for topic in topics:
        metadata = consumer.list_topics(topic, timeout=METADATA_TIMEOUT_SECONDS).topics[topic]
        if metadata.error is not None:
            raise KafkaUnavailable(f"topic {topic!r} cannot be read: {metadata.error}")
        partitions += [TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in metadata.partitions]
    return partitions


def _ends(consumer: Consumer, partitions: Iterable[TopicPartition]) -> dict[Place, int]:
    """Return the end offsets of those partitions that hold anything."""
    ends = {}
    for partition in partitions:
        low, high = consumer.get_watermark_offsets(partition, timeout=METADATA_TIMEOUT_SECONDS)
        if high > low:
            ends[Place(partition.topic, partition.partition)] = high
    return ends


def _is_past(ends: Mapping[Place, int], positions: Sequence[TopicPartition]) -> bool:
    return all(place.offset >= ends.get(Place(place.topic, place.partition), place.offset) for place in positions)


def _poll(consumer: Consumer) -> list[Record]:
    """Return at most one record; errors pass by, as librdkafka mends its connections itself."""
    message = consumer.poll(POLL_SECONDS)
    return [] if message is None or message.error() is not None else [_record(message)]


def _record(message: Message) -> Record:
    headers = cast("list[tuple[str, bytes]]", message.headers() or [])
    named = dict(headers)
    return Record(
        topic=message.topic() or "",
        partition=message.partition() or 0,
        offset=message.offset() or 0,
        key=(message.key() or b"").decode(),
        message_id=named.get(NATIVE.message_id, b"").decode(),
        sequence_no=int(named.get(NATIVE.sequence_no, b"-1")),
        is_unordered=NATIVE.unordered in named,
        digest=digest(message.value()),
        arrived_at=time.monotonic(),
        aggregate_type=named.get(NATIVE.aggregate_type, b"").decode(),
        headers=headers_digest(headers),
        is_replay=NATIVE.replay in named,
    )
