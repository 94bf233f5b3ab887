"""Reads what PostgreSQL and Kafka hold of a run, as values of its history."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, TopicPartition

from outbox_relay.errors import KafkaUnavailable
from outbox_relay.sandbox.history import Mark, Place, Record, Row, State, digest, headers_digest
from outbox_relay.wire import NATIVE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from threading import Event

    from confluent_kafka import Message
    from psycopg import Connection

METADATA_TIMEOUT_SECONDS = 10.0
END_TIMEOUT_SECONDS = 60.0
POLL_SECONDS = 0.1

# By the tables and not by the view that people are given: whoever judges shares no reading of them.
SELECT_ROWS = """
SELECT
    outbox.message_id::text,
    outbox.aggregate_id,
    outbox.sequence_no,
    CASE
        WHEN pending.state IS NOT NULL THEN pending.state
        WHEN late.transaction_id IS NOT NULL AND late.collected_at IS NULL THEN 'waiting'
        WHEN outbox.sequence_no <= newest.through THEN 'published'
        ELSE 'unpublished'
    END,
    outbox.shard,
    late.transaction_id IS NULL
FROM outbox
LEFT JOIN (SELECT shard, max(through) AS through FROM outbox_published GROUP BY shard) AS newest
    ON newest.shard = outbox.shard
LEFT JOIN outbox_pending AS pending
    ON pending.shard = outbox.shard AND pending.sequence_no = outbox.sequence_no
LEFT JOIN outbox_unordered AS late
    ON late.transaction_id = outbox.transaction_id
    AND outbox.sequence_no > late.from_no
    AND outbox.sequence_no <= coalesce(late.to_no, outbox.sequence_no)
UNION ALL
SELECT
    message_id::text,
    aggregate_id,
    sequence_no,
    'skipped',
    hashtextextended(aggregate_type || ':' || aggregate_id, 0) & 15,
    true
FROM outbox_audit
WHERE action = 'skip' AND message_id IS NOT NULL
ORDER BY sequence_no
"""

COUNT_UNSETTLED = """
SELECT count(*)
FROM outbox
LEFT JOIN (SELECT shard, max(through) AS through FROM outbox_published GROUP BY shard) AS newest
    ON newest.shard = outbox.shard
LEFT JOIN outbox_pending AS pending
    ON pending.shard = outbox.shard AND pending.sequence_no = outbox.sequence_no
WHERE outbox.sequence_no <= %s
    AND pending.state IS DISTINCT FROM 'parked'
    AND (
        pending.state = 'waiting'
        OR outbox.sequence_no > coalesce(newest.through, 0)
        OR outbox.transaction_id IN (SELECT transaction_id FROM outbox_unordered WHERE collected_at IS NULL)
    )
"""

SELECT_MARKS = "SELECT shard, through, messages, checksum FROM outbox_published ORDER BY shard, through"


def read_rows(connection: Connection) -> list[Row]:
    """Read the outbox, and what operators took out of it for good, in sequence order."""
    return [
        Row(message_id, key, number, State(state), shard, is_counted)
        for message_id, key, number, state, shard, is_counted in connection.execute(SELECT_ROWS)
    ]


def read_outbox(connection: Connection) -> tuple[list[Row], list[Mark]]:
    """Read the rows as `read_rows` does, and the marks of the same moment."""
    with connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        return read_rows(connection), [Mark(*mark) for mark in connection.execute(SELECT_MARKS)]


def count_unsettled(connection: Connection, *, through: int = 2**63 - 1) -> int:
    """Count the messages up to a number that are neither published nor parked."""
    [(count,)] = connection.execute(COUNT_UNSETTLED, [through]).fetchall()
    return int(count)


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
