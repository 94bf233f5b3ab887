"""Messages that Kafka will never take are set aside with the later ones of their key, and disturb nothing else."""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from outbox_relay.sandbox.history import State
from tests.fixtures.load import commit_messages
from tests.fixtures.pipeline import Pipeline, flaws

if TYPE_CHECKING:
    from psycopg import Connection

    from outbox_relay.sandbox.history import Record
    from outbox_relay.sandbox.kafka import Kafka
    from tests.fixtures.postgres import Database

pytestmark = pytest.mark.kafka

PUBLISHED, PARKED = State.PUBLISHED, State.PARKED
PEAK_MEMORY_BYTES = 250 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Poison:
    """A message that Kafka would never take, its code, and what the reason must name: the value and the remedy."""

    aggregate_type: str = "order"
    key: str = "guilty"
    payload: bytes | None = b"x"
    headers: str = "{}"
    code: str = "unpublishable"
    reason: tuple[str, ...] = ()


POISONS = {
    "too large": Poison(
        payload=os.urandom(1_200_000), code="MSG_SIZE_TOO_LARGE", reason=("1,200,", "message.max.bytes")
    ),
    "far too large": Poison(payload=bytes(9_000_000), code="MSG_SIZE_TOO_LARGE", reason=("9,000,0", "shrink it")),
    "key too large": Poison(key=os.urandom(600_000).hex(), code="MSG_SIZE_TOO_LARGE", reason=("message.max.bytes",)),
    "header is no string": Poison(headers='{"attempt": 3}', reason=('header "attempt" is 3', "a header is a string")),
    "header is the relay's": Poison(headers='{"id": "7"}', reason=('header "id"', "choose another name")),
    "header is no string, key is in no index": Poison(
        key=base64.b85encode(os.urandom(80_000)).decode(),
        headers='{"attempt": 3}',
        reason=('header "attempt" is 3',),
    ),
    "illegal topic": Poison("or der", reason=("or der", "OUTBOX_RELAY_TOPIC_MAP")),
    "topic too long": Poison("o" * 250, reason=("o" * 250, "OUTBOX_RELAY_TOPIC_MAP")),
}


def insert(connection: Connection, poison: Poison, *, key: str) -> None:
    connection.execute(
        """
        INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload_bytes, headers)
        VALUES (%s, %s, 'happened', %s, %s)
        """,
        [poison.aggregate_type, key, poison.payload, poison.headers],
    )
    connection.commit()


def insert_rows(connection: Connection, *, aggregate_type: str, rows: int, keys: int, size: int) -> None:
    """Insert *rows* messages of *size* bytes that no compression shrinks."""
    query = """
        INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload_bytes)
        VALUES (%s, %s, 'happened', %s)
    """
    connection.cursor().executemany(
        query, [(aggregate_type, f"{aggregate_type}-{number % keys}", os.urandom(size)) for number in range(rows)]
    )
    connection.commit()


def reasons(pipeline: Pipeline) -> list[tuple[str, str]]:
    """The reasons of parked messages, each a code and a text, in sequence order."""
    with pipeline.database.connect() as connection:
        query = "SELECT reason_code, reason FROM outbox_pending WHERE state = 'parked' ORDER BY sequence_no"
        return connection.execute(query).fetchall()


def numbers(records: list[Record], *, key: str) -> list[int]:
    """The sequence numbers of a key in the order of arrival; one partition holds them all."""
    ordered = sorted((record for record in records if record.key == key), key=lambda record: record.offset)
    return [record.sequence_no for record in ordered]


@pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS.keys())
def test_poison_parks_only_the_later_messages_of_its_key(pipeline: Pipeline, poison: Poison) -> None:
    successor = Poison(aggregate_type=poison.aggregate_type)
    with pipeline.relays(1), pipeline.database.connect() as writer:
        writes = commit_messages(writer, "order-before", "order-other")
        insert(writer, poison, key=poison.key)
        insert(writer, successor, key=poison.key)
        writes += commit_messages(writer, "order-other", "payment-1")
        pipeline.await_settled()
        insert(writer, successor, key=poison.key)
        pipeline.await_settled()
    assert pipeline.states() == [PUBLISHED, PUBLISHED, PARKED, PARKED, PUBLISHED, PUBLISHED, PARKED]
    (code, own), *behind = reasons(pipeline)
    assert (code, [part for part in poison.reason if part not in own]) == (poison.code, [])
    assert behind == [("behind_parked", "an earlier message of the key is parked")] * 2
    assert flaws(pipeline.judge(writes)) == {}


def test_a_topic_outside_the_allowed_ones_is_parked(pipeline: Pipeline) -> None:
    allowed = f'["{pipeline.topic("order")}"]'
    with pipeline.relays(1, allowed_topics=allowed), pipeline.database.connect() as writer:
        commit_messages(writer, "order-1", "payment-1", "order-1")
        pipeline.await_settled()
    assert pipeline.states() == [PUBLISHED, PARKED, PUBLISHED]
    [(code, reason)] = reasons(pipeline)
    assert code == "unpublishable"
    assert pipeline.topic("payment") in reason
    assert "OUTBOX_RELAY_ALLOWED_TOPICS" in reason


def test_under_skip_the_later_messages_of_the_key_pass(pipeline: Pipeline) -> None:
    bad = Poison(headers='{"attempt": 3}')
    with pipeline.relays(1, on_poison="skip"), pipeline.database.connect() as writer:
        insert(writer, Poison(), key="guilty")
        insert(writer, bad, key="guilty")
        insert(writer, Poison(), key="guilty")
        pipeline.await_settled()
        insert(writer, Poison(), key="guilty")
        pipeline.await_settled()
    assert pipeline.states() == [PUBLISHED, PARKED, PUBLISHED, PUBLISHED]
    assert numbers(pipeline.records(), key="guilty") == [1, 3, 4]


@pytest.fixture
def narrow(database: Database, kafka: Kafka, topic_prefix: str, seed: int) -> Pipeline:
    """The topic of orders takes batches of 2,000 bytes at most."""
    pipeline = Pipeline(database, kafka, prefix=topic_prefix, seed=seed)
    for topic in pipeline.topics:
        narrowed = {"max.message.bytes": "2000"} if topic == pipeline.topic("order") else {}
        kafka.create_topic(topic, config=narrowed)
    return pipeline


def test_small_messages_all_pass_a_topic_that_takes_no_batch_of_them(narrow: Pipeline) -> None:
    with narrow.database.connect() as writer, narrow.relays(1):
        insert_rows(writer, aggregate_type="order", rows=100, keys=3, size=100)
        insert_rows(writer, aggregate_type="payment", rows=100, keys=3, size=100)
        narrow.await_settled()
    assert narrow.states() == [PUBLISHED] * 200
    records = narrow.records()
    assert [numbers(records, key=f"order-{key}") for key in range(3)] == [
        list(range(1 + key, 101, 3)) for key in range(3)
    ]


def test_nothing_overtakes_a_batch_that_was_refused(
    database: Database, kafka: Kafka, topic_prefix: str, seed: int
) -> None:
    """A producer sends the next batches of a partition before it knows that the topic refuses the first."""
    pipeline = Pipeline(database, kafka, prefix=topic_prefix, seed=seed)
    for topic in pipeline.topics:
        kafka.create_topic(topic, config={"max.message.bytes": "100000"})
    with database.connect() as writer:
        insert_rows(writer, aggregate_type="order", rows=104, keys=1, size=10_000)
    with pipeline.relays(1):
        pipeline.await_settled()
    assert list(dict.fromkeys(numbers(pipeline.records(), key="order-0"))) == list(range(1, 105))


def test_a_refused_message_is_not_overtaken_by_the_later_ones_of_its_key(narrow: Pipeline) -> None:
    with narrow.database.connect() as writer:
        insert(writer, Poison(payload=os.urandom(3_000)), key="order-0")
        insert_rows(writer, aggregate_type="order", rows=50, keys=5, size=100)
    with narrow.relays(1):
        narrow.await_settled()
    assert numbers(narrow.records(), key="order-0") == []
    assert narrow.states() == [PARKED, *[PARKED if number % 5 == 0 else PUBLISHED for number in range(50)]]


def test_only_the_message_that_a_topic_refuses_alone_is_parked(narrow: Pipeline) -> None:
    with narrow.database.connect() as writer, narrow.relays(1) as [relay]:
        insert_rows(writer, aggregate_type="order", rows=50, keys=5, size=100)
        insert(writer, Poison(payload=os.urandom(3_000)), key="order-0")
        insert_rows(writer, aggregate_type="order", rows=50, keys=5, size=100)
        narrow.await_settled()
        assert relay.wait_for_event("messages_parked")["first_sequence_no"] == 51
    behind = [PARKED if number % 5 == 0 else PUBLISHED for number in range(50)]
    assert narrow.states() == [PUBLISHED] * 50 + [PARKED] + behind
    records = narrow.records()
    assert numbers(records, key="order-0") == list(range(1, 51, 5))
    assert numbers(records, key="order-1") == [*range(2, 51, 5), *range(53, 102, 5)]
    code, reason = reasons(narrow)[0]
    assert code == "MSG_SIZE_TOO_LARGE"
    assert [part for part in ("3,", "max.message.bytes", narrow.topic("order")) if part not in reason] == []


def test_memory_stays_bounded_while_large_messages_pass(pipeline: Pipeline) -> None:
    with pipeline.database.connect() as writer:
        for _ in range(10):
            insert_rows(writer, aggregate_type="order", rows=30, keys=7, size=900_000)
    with pipeline.relays(1, batch_bytes="4MiB") as [relay]:
        pipeline.await_settled()
        peak = relay.peak_memory_bytes
    assert pipeline.states() == [PUBLISHED] * 300
    assert len(pipeline.records()) == 300
    assert peak < PEAK_MEMORY_BYTES
