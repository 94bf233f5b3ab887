"""
Hostile rows from INSERT to Kafka: each arrives unchanged or is parked for a reason, and none stops a lane.

RELAY_FUZZ_ROWS says how many in each envelope; the full run is `make fuzz`.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

import psycopg
import pytest

from outbox_relay.consumer.record import message_from
from outbox_relay.errors import InvalidMessage
from outbox_relay.wire import RESERVED_HEADERS
from outbox_relay.writer import Message, Outbox
from outbox_relay.writer.message import TOMBSTONE
from tests.fixtures.hostile import Fate, Hostile, HostileRow, Topics
from tests.fixtures.pipeline import Pipeline
from tests.fixtures.topics import read_topic
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from confluent_kafka import Message as KafkaRecord

    from outbox_relay.sandbox.kafka import Kafka
    from tests.fixtures.daemon import Daemon, Event
    from tests.fixtures.postgres import Database

pytestmark = pytest.mark.kafka

ROWS = int(os.environ.get("RELAY_FUZZ_ROWS", "3000"))
PEAK_MEMORY_BYTES = 400 * 1024 * 1024
SETTLING_SECONDS = max(60, ROWS / 50)
FATES = {True: {Fate.ARRIVES, Fate.WAITS, Fate.OPEN}, False: {Fate.PARKS, Fate.OPEN}}
COLUMNS = (
    "message_id",
    "aggregate_type",
    "aggregate_id",
    "event_type",
    "payload",
    "payload_bytes",
    "headers",
    "created_at",
)

SELECT_ROWS = """
SELECT
    sequence_no,
    message_id::text,
    aggregate_type,
    aggregate_id,
    event_type,
    CASE WHEN state = 'published' THEN coalesce(convert_to(payload::text, 'UTF8'), payload_bytes) END AS value,
    CASE WHEN state = 'published' THEN headers::text END AS headers,
    (extract(epoch FROM created_at) * 1000)::bigint AS created_at_ms,
    state = 'published' AS is_published,
    reason_code || ': ' || reason AS parked_reason
FROM outbox_message
ORDER BY sequence_no
"""


class Row(NamedTuple):
    """What the table holds of a message in the end; of a parked one without its contents."""

    sequence_no: int
    message_id: str
    aggregate_type: str
    aggregate_id: str
    event_type: str
    value: bytes | None
    headers: str
    created_at_ms: int
    is_published: bool
    parked_reason: str | None


class Writer:
    """Writes rows by one way in, batch by batch; what is refused in a batch is written row by row."""

    def __init__(self, dsn: str, write: Callable[[psycopg.Connection, Sequence[HostileRow]], None]) -> None:
        self._dsn = dsn
        self._write = write
        self.written: list[HostileRow] = []
        self.refused: list[HostileRow] = []

    def run(self, rows: Iterator[HostileRow]) -> None:
        with psycopg.connect(self._dsn) as connection:
            while batch := list(islice(rows, 50)):
                if not self._transact(connection, batch):
                    for row in batch:
                        done = self._transact(connection, [row])
                        (self.written if done else self.refused).append(row)
                else:
                    self.written += batch

    def _transact(self, connection: psycopg.Connection, rows: Sequence[HostileRow]) -> bool:
        try:
            self._write(connection, rows)
            connection.commit()
        except (
            psycopg.DataError,
            psycopg.IntegrityError,
            psycopg.errors.ProgramLimitExceeded,
            psycopg.errors.StatementTooComplex,
            InvalidMessage,
        ):
            connection.rollback()
            return False
        return True


def insert(connection: psycopg.Connection, rows: Sequence[HostileRow]) -> None:
    for row in rows:
        names, places = ", ".join(row.values), ", ".join(f"%({name})s" for name in row.values)
        connection.execute(f"INSERT INTO outbox ({names}) VALUES ({places})".encode(), row.values)


def copy(connection: psycopg.Connection, rows: Sequence[HostileRow]) -> None:
    with connection.cursor().copy(f"COPY outbox ({', '.join(COLUMNS)}) FROM STDIN".encode()) as lines:
        for row in rows:
            lines.write_row([({"created_at": "now"} | row.values)[name] for name in COLUMNS])


def call(connection: psycopg.Connection, rows: Sequence[HostileRow]) -> None:
    """By outbox_write, which takes no time."""
    for row in rows:
        names = [name for name in COLUMNS if name != "created_at"]
        places = ", ".join(f"{name} => %({name})s" for name in names)
        connection.execute(f"SELECT outbox_write({places})".encode(), row.values)


def write(connection: psycopg.Connection, rows: Sequence[HostileRow]) -> None:
    """By the library, which takes values and no JSON; what Python cannot read as JSON is given as bytes."""
    Outbox().write_many(connection, [_message(row) for row in rows])


def _message(row: HostileRow) -> Message:
    payload: object = TOMBSTONE
    payload_bytes = row.payload_bytes
    try:
        payload = payload if row.payload is None else json.loads(row.payload)
    except (ValueError, RecursionError):
        payload_bytes = (row.payload or "").encode()
    try:
        headers = json.loads(row.headers or "null")
    except (ValueError, RecursionError) as error:
        raise InvalidMessage("headers that Python cannot read") from error
    return Message(
        aggregate_type=row.aggregate_type,
        aggregate_id=row.aggregate_id,
        event_type=row.event_type,
        payload=payload,
        payload_bytes=payload_bytes,
        headers=headers,
        message_id=UUID(row.message_id),
    )


WAYS = (insert, copy, call, write)


class Fuzz:
    """One envelope's relays, topics and writers."""

    def __init__(self, database: Database, kafka: Kafka, *, prefix: str, seed: int, envelope: str) -> None:
        self.pipeline = Pipeline(database, kafka, prefix=prefix, seed=seed)
        self.envelope = envelope
        self._topics = Topics(
            ordinary=[f"{prefix}{name}" for name in ("order", "UPPER", "a.b", "-_", "x" * (249 - len(prefix)))],
            colons=(f"{prefix}a", f"{prefix}a:b"),
            recent=f"{prefix}recent",
            missing=[f"{prefix}missing", f"{prefix}lost"],
        )
        self._colon_topic = f"{prefix}colon"
        self._create(*self._topics.ordinary, self._colon_topic)
        self._create(self._topics.recent, **{"message.timestamp.before.max.ms": "3600000"})
        self.settings: dict[str, str | float] = {
            "topic_template": "{aggregate_type}",
            "topic_map": json.dumps(dict.fromkeys(self._topics.colons, self._colon_topic)),
            "envelope": envelope,
            "source": "urn:shop",
            "publish_deadline": 60,  # a busy machine's Kafka is slow, which is no fault of a row
            "kafka__message_timeout_ms": 70_000,
            "transaction_timeout": 80,
            "drain_timeout": 90,
            "log_format": "json",
        }
        self.writers = [Writer(database.writer_dsn, way) for way in WAYS]
        self._generators = [
            Hostile(Random(seed + number), self._topics, is_strict=envelope == "cloudevents")  # noqa: S311 -- repeatable
            for number in range(len(WAYS))
        ]

    @property
    def waiting(self) -> int:
        """How many messages were written whose topic is missing."""
        return sum(row.fate is Fate.WAITS for writer in self.writers for row in writer.written)

    def write(self, count: int) -> None:
        with ThreadPoolExecutor(len(self.writers)) as threads:
            rows = [generator.rows(count // len(self.writers)) for generator in self._generators]
            list(threads.map(Writer.run, self.writers, rows))

    def create_missing_topics(self) -> None:
        self._create(*self._topics.missing)

    def rows(self) -> list[Row]:
        with self.pipeline.database.connect() as connection, connection.cursor(name="rows") as cursor:
            cursor.itersize = 500
            return [Row(*row) for row in cursor.execute(SELECT_ROWS)]

    def records(self) -> list[KafkaRecord]:
        servers = self.pipeline.kafka.bootstrap_servers
        topics = [*self._topics.ordinary, *self._topics.missing, self._topics.recent, self._colon_topic]
        return [record for topic in topics for record in read_topic(servers, topic, timeout=SETTLING_SECONDS)]

    def _create(self, *topics: str, **config: str) -> None:
        """Create topics that keep what says it is fifty years old."""
        for topic in topics:
            self.pipeline.kafka.create_topic(topic, partitions=3, config={"retention.ms": "-1"} | config)


@pytest.fixture(params=["native", "cloudevents"])
def fuzz(database: Database, kafka: Kafka, topic_prefix: str, seed: int, request: pytest.FixtureRequest) -> Fuzz:
    return Fuzz(database, kafka, prefix=topic_prefix, seed=seed, envelope=request.param)


@pytest.mark.timeout(max(300, ROWS / 20))
def test_hostile_rows_arrive_unchanged_or_are_parked_and_stop_no_lane(fuzz: Fuzz) -> None:
    with fuzz.pipeline.relays(2, **fuzz.settings) as relays:
        fuzz.write(ROWS)
        with suppress(TimeoutError):  # what the relays said is told below
            eventually(lambda: fuzz.pipeline.unpublished() == fuzz.waiting, timeout=SETTLING_SECONDS)
        unpublished = fuzz.pipeline.unpublished()
        fuzz.create_missing_topics()
        fuzz.pipeline.await_settled(timeout=SETTLING_SECONDS)
        peaks = [relay.peak_memory_bytes for relay in relays]
        for relay in relays:
            relay.terminate()
        exits = [relay.wait() for relay in relays]
    assert unexpected_events(relays) == []
    assert (unpublished, exits) == (fuzz.waiting, [0, 0])
    rows = fuzz.rows()
    records = fuzz.records()
    print_outcome(fuzz, rows, peaks)
    assert [relay.other_lines for relay in relays] == [[], []]
    assert mistaken_fates(fuzz, rows) == []
    assert differences(rows, records) == []
    assert overtaken(records) == []
    assert [row for row in rows if row.parked_reason and not is_understandable(row.parked_reason)] == []
    assert max(peaks) < PEAK_MEMORY_BYTES


def print_outcome(fuzz: Fuzz, rows: Sequence[Row], peaks: Sequence[int]) -> None:
    """Shown with -s, and when the test fails."""
    reasons = Counter(reason_kind(row.parked_reason) for row in rows if row.parked_reason)
    arrived = sum(row.is_published for row in rows)
    lines = [f"{fuzz.envelope}: {arrived} arrived unchanged, peak of the relays {[peak >> 20 for peak in peaks]} MiB"]
    for writer, way in zip(fuzz.writers, WAYS, strict=True):
        lines.append(f"  {way.__name__}: {len(writer.written)} written, {len(writer.refused)} refused")
    lines += [f"  {count} parked: {reason}" for reason, count in reasons.most_common()]
    print(*lines, sep="\n")  # noqa: T201 -- the figures of a full run


def reason_kind(reason: str) -> str:
    """What reasons have in common that differ in names and numbers."""
    return re.sub(r"\".*\"|'.*'|\(.*\)|[\d,]+| is \S+(?=:)", "_", reason)[:100]


def unexpected_events(relays: Sequence[Daemon]) -> list[Event]:
    names = {"thread_failed", "database_lost", "claim_conflicted", "kafka_lost"}
    return [event for relay in relays for event in relay.events if event.get("event") in names]


def mistaken_fates(fuzz: Fuzz, rows: Sequence[Row]) -> list[str]:
    """Statements of rows that should not have become what they are."""
    states: dict[str, set[bool]] = defaultdict(set)
    for row in rows:
        states[row.message_id].add(row.is_published)
    found = []
    for writer, way in zip(fuzz.writers, WAYS, strict=True):
        changes = way in {call, write}  # or refuses what would park: no time is given, and no number that Python rounds
        for given in writer.written:
            mistaken = {state for state in states[given.message_id] if given.fate not in FATES[state]}
            if mistaken - ({True} if changes else set()):
                found.append(f"{way.__name__}, {given.fate.value}: {given.insert()}")
        found += [
            f"{way.__name__} refused: {given.insert()}"
            for given in writer.refused
            if given.fate is not Fate.REFUSED and (given.aggregate_id.startswith("good") or not changes)
        ]
    return found[:10]


def differences(rows: Sequence[Row], records: Sequence[KafkaRecord]) -> list[str]:
    """
    What is not in Kafka, or not as it is in the table.

    Twice is allowed: a message whose text PostgreSQL cannot make ends a stint, and what that had published comes again.
    """
    arrived: dict[int, list[KafkaRecord]] = defaultdict(list)
    for record in records:
        arrived[message_from(record).sequence_no].append(record)
    found = []
    for row in rows:
        if bool(arrived[row.sequence_no]) != row.is_published:
            found.append(f"{len(arrived[row.sequence_no])} records of {row!r:.2000}")
        found += [
            f"{what} of {row!r:.2000}" for record in arrived[row.sequence_no] if (what := _difference(row, record))
        ]
    return found[:5]


def _difference(row: Row, record: KafkaRecord) -> str:
    message = message_from(record)
    own = json.loads(row.headers)
    given = dict(record.headers() or [])
    if not own.keys() & {"content-type"}:
        given.pop("content-type", None)
    sent = {name: value for name, value in given.items() if name not in RESERVED_HEADERS}
    expected = {
        "key": row.aggregate_id.encode(),
        "value": row.value,
        "headers": {name: value.encode() for name, value in own.items()},
        "timestamp": row.created_at_ms,
        "message": (row.message_id, row.aggregate_type, row.event_type, row.aggregate_id, row.value),
    }
    actual = {
        "key": record.key(),
        "value": record.value(),
        "headers": sent,
        "timestamp": record.timestamp()[1],
        "message": (str(message.message_id), message.aggregate_type, message.event_type, message.key, message.payload),
    }
    return ", ".join(name for name in expected if expected[name] != actual[name])


def overtaken(records: Sequence[KafkaRecord]) -> list[tuple[str, str]]:
    """Keys whose messages are in more than one partition, or not in the order of their numbers."""
    places: dict[tuple[str, str], list[tuple[int, int, int]]] = defaultdict(list)
    for record in records:
        message = message_from(record)
        places[message.aggregate_type, message.key].append((message.partition, message.offset, message.sequence_no))
    return [
        key
        for key, found in places.items()
        if len({partition for partition, _, _ in found}) > 1
        or [number for _, _, number in sorted(found)] != sorted(number for _, _, number in found)
    ]


def is_understandable(reason: str) -> bool:
    """A code, what is wrong and what to do, in a length that a terminal shows, on one line."""
    return re.match(r"[A-Z_a-z]+: .{20,}", reason) is not None and len(reason) < 1000 and reason.isprintable()
