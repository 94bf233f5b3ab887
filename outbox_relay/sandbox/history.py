"""What is recorded of a run: what writers, PostgreSQL, Kafka, operators and consumers know of each message."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from outbox_relay.wire import NATIVE

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

# Not known to a writer, or not the message's own: the number is compared by itself, the others may differ by delivery.
_UNCOMPARED_HEADERS = frozenset({NATIVE.sequence_no, NATIVE.source, NATIVE.unordered, NATIVE.replay})


class Outcome(Enum):
    """What a writer knows about its transaction."""

    COMMITTED = "committed"
    ROLLED_BACK = "rolled_back"
    UNKNOWN = "unknown"


class State(Enum):
    """What marks and pending messages say of a row; a skipped one is in the audit table only."""

    PUBLISHED = "published"
    WAITING = "waiting"
    PARKED = "parked"
    UNPUBLISHED = "unpublished"
    SKIPPED = "skipped"


class Place(NamedTuple):
    """A partition."""

    topic: str
    partition: int


@dataclass(frozen=True, slots=True)
class Write:
    """
    One message a writer put into the outbox.

    Of a message that an operator edits while it is parked, the digests are those of what it becomes.

    Attributes:
        digest: Of its value, by `digest`.
        ended_at: `time.monotonic()` after its transaction ended.
        headers: Of its headers, by `headers_digest`; None where the writer does not tell.
    """

    message_id: str
    key: str
    digest: bytes
    outcome: Outcome
    ended_at: float
    headers: bytes | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """
    One row of the outbox at the end of the run.

    Attributes:
        is_counted: A mark that has passed it counts it; False if its writer was given up on.
    """

    message_id: str
    key: str
    sequence_no: int
    state: State
    shard: int = 0
    is_counted: bool = True


@dataclass(frozen=True, slots=True)
class Mark:
    """What a relay has written down about a shard: all up to a number is settled, and how many messages that were."""

    shard: int
    through: int
    messages: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Record:
    """
    One record of a topic.

    Attributes:
        arrived_at: `time.monotonic()` when the consumer got it.
        headers: Digest of its headers, by `headers_digest`.
        is_replay: An operator had the message published once more.
    """

    topic: str
    partition: int
    offset: int
    key: str
    message_id: str
    sequence_no: int
    is_unordered: bool
    digest: bytes
    arrived_at: float
    aggregate_type: str = ""
    headers: bytes = b""
    is_replay: bool = False

    @property
    def place(self) -> Place:
        """The partition that holds it."""
        return Place(self.topic, self.partition)


@dataclass(frozen=True, slots=True)
class Hold:
    """
    A parked message as an operator saw it, under `on_poison = "park"`: until its release, nothing behind it may go out.

    Attributes:
        begins: The end of each partition, read after the message was seen to be parked.
        ends: The end of each partition, read before the release was asked for; None if it never was. A partition that
            is left out was empty.
    """

    aggregate_type: str
    key: str
    sequence_no: int
    begins: Mapping[Place, int]
    ends: Mapping[Place, int] | None = None


@dataclass(frozen=True, slots=True)
class History:
    """
    Everything that was recorded of a run.

    Message ids are unique among the writes and among the rows.

    Attributes:
        rows_are_kept: False where somebody deletes rows, for then one that is missing proves nothing.
        marks: In the order of their numbers, shard by shard.
        partition_counts: How many partitions each topic had, one after the other. A topic that is left out is not
            judged by where its records are.
        effects: Of each consumer the message ids in the order of their effects, those of replays left out.
        most_duplicates: How many the faults of the run account for; None is any number.
    """

    writes: Sequence[Write]
    rows: Sequence[Row]
    records: Sequence[Record]
    rows_are_kept: bool = True
    marks: Sequence[Mark] = ()
    partition_counts: Mapping[str, Collection[int]] = field(default_factory=dict)
    holds: Sequence[Hold] = ()
    effects: Mapping[str, Sequence[str]] = field(default_factory=dict)
    most_duplicates: int | None = None


def digest(value: bytes | None) -> bytes:
    """Eight bytes that stand for *value*, so that a long history fits into memory; none for a tombstone."""
    return b"" if value is None else hashlib.blake2b(value, digest_size=8).digest()


def headers_digest(headers: Iterable[tuple[str, bytes | None]]) -> bytes:
    """Eight bytes that stand for a record's headers, but for those that its writer cannot foresee; in any order."""
    compared = sorted(repr(header) for header in headers if header[0] not in _UNCOMPARED_HEADERS)
    return digest("".join(compared).encode())


def expected_headers(
    message_id: str,
    *,
    aggregate_type: str,
    event_type: str,
    content_type: str | None = "application/json",
    own: Mapping[str, str] | None = None,
) -> bytes:
    """Give the digest that the headers of a message's record shall have, in the relay's own envelope."""
    headers = {
        NATIVE.message_id: message_id,
        NATIVE.aggregate_type: aggregate_type,
        NATIVE.event_type: event_type,
        **({"content-type": content_type} if content_type else {}),
        **(own or {}),
    }
    return headers_digest((name, value.encode()) for name, value in headers.items())


def commit_to_arrival_seconds(history: History) -> list[float]:
    """Seconds from each commit to the message's first arrival, where both clocks are those of one machine."""
    return [arrived_at - write.ended_at for write, arrived_at in arrivals(history)]


def arrivals(history: History) -> list[tuple[Write, float]]:
    """Give each committed message that is in Kafka, with the time of its first arrival."""
    arrived_at: dict[str, float] = {}
    for record in history.records:
        arrived_at[record.message_id] = min(record.arrived_at, arrived_at.get(record.message_id, record.arrived_at))
    return [
        (write, arrived_at[write.message_id])
        for write in history.writes
        if write.outcome is Outcome.COMMITTED and write.message_id in arrived_at
    ]
