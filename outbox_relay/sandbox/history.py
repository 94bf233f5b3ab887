"""
The judge of a run: what writers committed, what the table says and what Kafka holds, turned into verdicts.

The words are those of Jepsen's set checkers: lost, unexpected, duplicated, recovered. It does not know how the
relay works.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from typing import TYPE_CHECKING, cast

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, TopicPartition

from outbox_relay.errors import KafkaUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
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
ORDER BY sequence_no
"""


class Outcome(Enum):
    """What a writer knows about its transaction."""

    COMMITTED = "committed"
    ROLLED_BACK = "rolled_back"
    UNKNOWN = "unknown"


class State(Enum):
    """What the outbox says about a row."""

    PUBLISHED = "published"
    PARKED = "parked"
    UNPUBLISHED = "unpublished"


@dataclass(frozen=True, slots=True)
class Write:
    """One message a writer put into the outbox; *ended_at* is `time.monotonic()` after its transaction ended."""

    message_id: str
    key: str
    digest: bytes
    outcome: Outcome
    ended_at: float


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the outbox at the end of the run."""

    message_id: str
    key: str
    sequence_no: int
    state: State


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a topic; *arrived_at* is `time.monotonic()` when the consumer got it."""

    topic: str
    partition: int
    offset: int
    key: str
    message_id: str
    sequence_no: int
    is_unordered: bool
    digest: bytes
    arrived_at: float


@dataclass(frozen=True, slots=True)
class History:
    """
    Everything that was recorded of a run.

    Message ids are unique among the writes and among the rows. Where settling deletes rows, say so with
    *rows_are_kept*, for then a row that is missing proves nothing.
    """

    writes: Sequence[Write]
    rows: Sequence[Row]
    records: Sequence[Record]
    rows_are_kept: bool = True


@dataclass(frozen=True, slots=True)
class Verdict:
    """
    What became of the messages, as message ids.

    Attributes:
        published: Distinct messages in Kafka, whoever wrote them.
        parked: Committed, not in Kafka, and the table says that the relay put them aside.
        recovered: The writer does not know whether it committed; table and Kafka agree that it did.
        duplicated: One entry for each record beyond a message's first.
        given_up: In Kafka with the header `unordered`: the relay did not wait for them and says so.
        lost: Committed, but neither in Kafka nor parked.
        unexpected: In Kafka, although no transaction committed it.
        reordered: First of its message in Kafka, but behind a record of its key with a higher sequence number.
        false_mark: The table says published, Kafka does not have it.
        corrupted: Key, value or sequence number in Kafka differ from what was written.
    """

    writes: Mapping[Outcome, int]
    published: int
    parked: tuple[str, ...]
    recovered: tuple[str, ...]
    duplicated: tuple[str, ...]
    given_up: tuple[str, ...]
    lost: tuple[str, ...]
    unexpected: tuple[str, ...]
    reordered: tuple[str, ...]
    false_mark: tuple[str, ...]
    corrupted: tuple[str, ...]

    @property
    def is_correct(self) -> bool:
        """Whether every promise of the relay was kept; a duplicate breaks none."""
        return not (self.lost or self.unexpected or self.reordered or self.false_mark or self.corrupted)

    def counts(self) -> dict[str, int]:
        """How many messages each word applies to, by name."""
        return {
            "committed": self.writes.get(Outcome.COMMITTED, 0),
            "rolled_back": self.writes.get(Outcome.ROLLED_BACK, 0),
            "unknown": self.writes.get(Outcome.UNKNOWN, 0),
            "published": self.published,
            "parked": len(self.parked),
            "recovered": len(self.recovered),
            "duplicated": len(self.duplicated),
            "given_up": len(self.given_up),
            "lost": len(self.lost),
            "unexpected": len(self.unexpected),
            "reordered": len(self.reordered),
            "false_mark": len(self.false_mark),
            "corrupted": len(self.corrupted),
        }


def judge(history: History) -> Verdict:
    """Compare what was committed with what was published. Linear in the history, but for a sort by offset."""
    writes = {write.message_id: write for write in history.writes}
    rows = {row.message_id: row for row in history.rows}
    records = sorted(history.records, key=attrgetter("topic", "partition", "offset"))
    firsts = _first_of_each_message(records)

    committed = {message_id for message_id, write in writes.items() if write.outcome is Outcome.COMMITTED}
    unknown = {message_id for message_id, write in writes.items() if write.outcome is Outcome.UNKNOWN}
    recovered = unknown & firsts.keys() & (rows.keys() if history.rows_are_kept else firsts.keys())
    missing = (committed | (unknown & rows.keys())) - firsts.keys()
    parked = {message_id for message_id in missing & rows.keys() if rows[message_id].state is State.PARKED}

    return Verdict(
        writes=Counter(write.outcome for write in history.writes),
        published=len(firsts),
        parked=_sorted(parked),
        recovered=_sorted(recovered),
        duplicated=tuple(record.message_id for record in records if firsts[record.message_id] is not record),
        given_up=tuple(record.message_id for record in firsts.values() if record.is_unordered),
        lost=_sorted(missing - parked),
        unexpected=_sorted(firsts.keys() - committed - recovered),
        reordered=_reordered(firsts.values()),
        false_mark=_sorted(row.message_id for row in _published(history.rows) if row.message_id not in firsts),
        corrupted=_sorted({r.message_id for r in records if _is_corrupted(r, writes=writes, rows=rows)}),
    )


def commit_to_arrival_seconds(history: History) -> list[float]:
    """Seconds from each commit to the message's first arrival, where both clocks are those of one machine."""
    arrivals: dict[str, float] = {}
    for record in history.records:
        arrivals[record.message_id] = min(record.arrived_at, arrivals.get(record.message_id, record.arrived_at))
    return [
        arrivals[write.message_id] - write.ended_at
        for write in history.writes
        if write.outcome is Outcome.COMMITTED and write.message_id in arrivals
    ]


def digest(value: bytes | None) -> bytes:
    """Eight bytes that stand for *value*, so that a long history fits into memory; none for a tombstone."""
    return b"" if value is None else hashlib.blake2b(value, digest_size=8).digest()


def read_rows(connection: Connection) -> list[Row]:
    """Read the outbox, in sequence order."""
    return [
        Row(message_id, key, sequence_no, State(state))
        for message_id, key, sequence_no, state in connection.execute(SELECT_ROWS)
    ]


def read_topics(bootstrap_servers: str, *, topics: Iterable[str], stop: Event) -> list[Record]:
    """
    Read *topics* from their beginning, live, until *stop* is set; then on to what is their end at that moment.

    Partitions are assigned, not subscribed to: the reader needs no group, and librdkafka's mock cluster has none that
    works.

    Raises:
        KafkaUnavailable: A topic does not exist, or its end is not reached in time.
    """
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": "outbox-relay-history",  # demanded by librdkafka, never joined
            "enable.auto.commit": False,
            "fetch.wait.max.ms": 10,  # the mock cluster answers a waiting fetch only when its time is up
        }
    )
    try:
        partitions = [partition for topic in topics for partition in _partitions(consumer, topic=topic)]
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
    except KafkaException as error:
        raise KafkaUnavailable(f"the topics cannot be read: {error}") from error
    else:
        return records
    finally:
        consumer.close()


def _first_of_each_message(records: Iterable[Record]) -> dict[str, Record]:
    firsts: dict[str, Record] = {}
    for record in records:
        firsts.setdefault(record.message_id, record)
    return firsts


def _reordered(firsts: Iterable[Record]) -> tuple[str, ...]:
    """Order is promised per key within a partition: a changed number of partitions splits a key's history."""
    newest: dict[tuple[str, int, str], int] = {}
    reordered = []
    for record in firsts:
        if record.is_unordered:
            continue
        place = (record.topic, record.partition, record.key)
        if record.sequence_no < newest.get(place, record.sequence_no):
            reordered.append(record.message_id)
        else:
            newest[place] = record.sequence_no
    return tuple(reordered)


def _is_corrupted(record: Record, *, writes: Mapping[str, Write], rows: Mapping[str, Row]) -> bool:
    write, row = writes.get(record.message_id), rows.get(record.message_id)
    return (write is not None and (record.key, record.digest) != (write.key, write.digest)) or (
        row is not None and (record.key, record.sequence_no) != (row.key, row.sequence_no)
    )


def _published(rows: Iterable[Row]) -> Iterable[Row]:
    return (row for row in rows if row.state is State.PUBLISHED)


def _sorted(message_ids: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(message_ids))


def _partitions(consumer: Consumer, *, topic: str) -> list[TopicPartition]:
    metadata = consumer.list_topics(topic, timeout=METADATA_TIMEOUT_SECONDS).topics[topic]
    if metadata.error is not None:
        raise KafkaUnavailable(f"topic {topic!r} cannot be read: {metadata.error}")
    return [TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in metadata.partitions]


def _ends(consumer: Consumer, partitions: Iterable[TopicPartition]) -> dict[tuple[str, int], int]:
    """Return the end offsets of those partitions that hold anything."""
    ends = {}
    for partition in partitions:
        low, high = consumer.get_watermark_offsets(partition, timeout=METADATA_TIMEOUT_SECONDS)
        if high > low:
            ends[partition.topic, partition.partition] = high
    return ends


def _is_past(ends: Mapping[tuple[str, int], int], positions: Iterable[TopicPartition]) -> bool:
    return all(place.offset >= ends.get((place.topic, place.partition), place.offset) for place in positions)


def _poll(consumer: Consumer) -> list[Record]:
    """Return at most one record; errors pass by, as librdkafka mends its connections itself."""
    message = consumer.poll(POLL_SECONDS)
    return [] if message is None or message.error() is not None else [_record(message)]


def _record(message: Message) -> Record:
    headers = dict(cast("list[tuple[str, bytes]]", message.headers() or []))
    return Record(
        topic=message.topic() or "",
        partition=message.partition() or 0,
        offset=message.offset() or 0,
        key=(message.key() or b"").decode(),
        message_id=headers.get("id", b"").decode(),
        sequence_no=int(headers.get("sequence_no", b"-1")),
        is_unordered="unordered" in headers,
        digest=digest(message.value()),
        arrived_at=time.monotonic(),
    )
