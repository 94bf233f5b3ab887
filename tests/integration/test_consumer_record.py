"""Reading records: of both clients, as relays write them and as others do."""

from __future__ import annotations

import asyncio
import inspect
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import UUID

import confluent_kafka
import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.structs import ConsumerRecord

from outbox_relay.consumer import Message, message_from
from outbox_relay.errors import ForeignRecord
from outbox_relay.relay import message as wire

if TYPE_CHECKING:
    from collections.abc import Callable

    from outbox_relay.consumer import Record
    from outbox_relay.sandbox.kafka import Kafka
    from tests.fixtures.kafka import CreateTopic

    Headers = list[tuple[str, str | bytes | None]]

ID = "0d9c3d5e-7f4c-4c0b-9f6e-3d1f0d1f2a3b"
HEADERS: Headers = [
    ("id", ID.encode()),
    ("event_type", b"order_placed"),
    ("aggregate_type", b"order"),
    ("sequence_no", b"42"),
    ("source", b"shop.public"),
    ("content-type", b"application/json"),
]
CLOUDEVENT_HEADERS: Headers = [
    ("ce_specversion", b"1.0"),
    ("ce_id", ID.encode()),
    ("ce_source", b"shop.public"),
    ("ce_type", b"order_placed"),
    ("ce_subject", "käse".encode()),
    ("ce_time", b"2026-11-21T05:00:00.123Z"),
    ("ce_aggregatetype", b"order"),
    ("ce_sequence", b"0000000000000000042"),
    ("content-type", b"application/json"),
]


def as_text(headers: Headers) -> dict[str, str]:
    return {name: value.decode() for name, value in headers if isinstance(value, bytes)}


EXPECTED = Message(
    message_id=UUID(ID),
    source="shop.public",
    sequence_no=42,
    aggregate_type="order",
    event_type="order_placed",
    key="käse",
    payload=b"{}",
    headers=as_text(HEADERS),
    created_at=datetime(2026, 11, 21, 5, 0, 0, 123_000, tzinfo=UTC),
    topic="order.events",
    partition=3,
    offset=7,
)
CREATED_AT_MS = 1_795_237_200_123


def confluent_record(
    *,
    headers: Headers | None = HEADERS,
    key: bytes | None = "käse".encode(),
    value: bytes | None = b"{}",
    timestamp_ms: int = CREATED_AT_MS,
) -> Record:
    return confluent_kafka.Message(
        topic="order.events",
        partition=3,
        offset=7,
        key=key,
        value=value,
        headers=headers and list(headers),
        timestamp=(confluent_kafka.TIMESTAMP_CREATE_TIME, timestamp_ms),
    )


def aiokafka_record(
    *,
    headers: Headers | None = HEADERS,
    key: object = "käse".encode(),
    value: object = b"{}",
    timestamp_ms: int = CREATED_AT_MS,
) -> Record:
    known = {
        "topic": "order.events",
        "partition": 3,
        "offset": 7,
        "timestamp": timestamp_ms,
        "timestamp_type": 0,
        "key": key,
        "value": value,
        "headers": tuple(headers or ()),
    }
    record: Record = ConsumerRecord(**dict.fromkeys(inspect.signature(ConsumerRecord).parameters) | known)
    return record


both_clients = pytest.mark.parametrize("record", [confluent_record, aiokafka_record])


def with_header(name: str, value: bytes | None) -> Headers:
    return [(other, value if other == name else kept) for other, kept in HEADERS]


@both_clients
def test_a_record_becomes_a_message(record: Callable[..., Record]) -> None:
    assert message_from(record()) == EXPECTED


@both_clients
def test_a_cloudevent_becomes_the_same_message_but_for_its_headers(record: Callable[..., Record]) -> None:
    assert message_from(record(headers=CLOUDEVENT_HEADERS)) == replace(EXPECTED, headers=as_text(CLOUDEVENT_HEADERS))


@both_clients
def test_the_attribute_unordered_makes_a_message_unordered(record: Callable[..., Record]) -> None:
    assert message_from(record(headers=[*CLOUDEVENT_HEADERS, ("ce_unordered", b"1")])).is_unordered


@both_clients
@pytest.mark.parametrize("name", ["ce_id", "ce_source", "ce_type", "ce_aggregatetype", "ce_sequence"])
def test_a_cloudevent_of_another_producer_is_foreign(record: Callable[..., Record], name: str) -> None:
    headers = [header for header in CLOUDEVENT_HEADERS if header[0] != name]
    with pytest.raises(ForeignRecord, match=f'not written by a relay: it has no header "{name}"'):
        message_from(record(headers=headers))


@both_clients
def test_a_tombstone_has_no_payload(record: Callable[..., Record]) -> None:
    assert message_from(record(value=None)) == replace(EXPECTED, payload=None)


@both_clients
@pytest.mark.parametrize(
    ("headers", "replay"),
    [
        (HEADERS, None),
        ([*HEADERS, ("replay", b"june")], "june"),
        (CLOUDEVENT_HEADERS, None),
        ([*CLOUDEVENT_HEADERS, ("ce_replay", b"june")], "june"),
    ],
    ids=["native", "native replay", "cloudevent", "cloudevent replay"],
)
def test_the_header_replay_names_the_replay(
    record: Callable[..., Record], headers: Headers, replay: str | None
) -> None:
    assert message_from(record(headers=headers)).replay == replay


@both_clients
def test_the_header_unordered_makes_a_message_unordered(record: Callable[..., Record]) -> None:
    assert message_from(record(headers=[*HEADERS, ("unordered", b"1")])).is_unordered


@both_clients
def test_of_a_repeated_header_the_last_one_counts(record: Callable[..., Record]) -> None:
    headers = [*HEADERS, ("traceparent", b"first"), ("traceparent", b"second")]
    assert message_from(record(headers=headers)).headers["traceparent"] == "second"


@both_clients
def test_what_others_add_in_bytes_does_no_harm(record: Callable[..., Record]) -> None:
    message = message_from(record(headers=[*HEADERS, ("binary", b"a\xff"), ("empty", None)]))
    assert (message.headers["binary"], message.headers["empty"]) == ("a\\xff", "")


@both_clients
@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"headers": None}, 'it has no header "id"'),
        *[
            ({"headers": [header for header in HEADERS if header[0] != name]}, f'it has no header "{name}"')
            for name in ("id", "event_type", "aggregate_type", "sequence_no", "source")
        ],
        ({"headers": with_header("id", b"4711")}, "its header \"id\" is '4711', not a UUID"),
        ({"headers": with_header("id", b"\xff")}, "its header \"id\" is '\\\\xff', not a UUID"),
        *[
            (
                {"headers": with_header("sequence_no", text)},
                f'its header "sequence_no" is {text.decode()!r}, not a number from 1 to 9223372036854775807',
            )
            for text in (b"", b"0", b"-1", b"+1", b" 1", b"1_0", b"1.0", "\u0661".encode(), b"9223372036854775808")
        ],
        ({"key": None}, "its key is missing, not bytes"),
        ({"key": b"\xff"}, "its key is b'\\xff', not UTF-8"),
        ({"timestamp_ms": -1}, "it has no time stamp"),
        ({"timestamp_ms": 10**17}, "its time stamp is 100000000000000000 ms, beyond the year 9999"),
    ],
    ids=str,
)
def test_a_record_that_no_relay_has_written_is_refused_with_the_reason(
    record: Callable[..., Record], parts: dict[str, object], reason: str
) -> None:
    with pytest.raises(ForeignRecord) as raised:
        message_from(record(**parts))
    assert str(raised.value) == f"the record at offset 7 of order.events[3] was not written by a relay: {reason}"


def test_the_largest_number_is_accepted() -> None:
    assert message_from(confluent_record(headers=with_header("sequence_no", b"9223372036854775807"))).sequence_no > 0


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"key": "text"}, "its key is str, not bytes"),
        ({"value": {}}, "its value is dict, not bytes: read the topic without a deserializer"),
    ],
)
def test_deserialized_parts_are_refused(parts: dict[str, object], reason: str) -> None:
    with pytest.raises(ForeignRecord, match=reason):
        message_from(aiokafka_record(**parts))  # type: ignore[arg-type]  # one of several by name


def read_with_confluent(kafka: Kafka, topic: str) -> list[Message]:
    consumer = confluent_kafka.Consumer({"bootstrap.servers": kafka.bootstrap_servers, "group.id": topic})
    try:
        consumer.assign([confluent_kafka.TopicPartition(topic, 0, 0)])
        return [message_from(record) for record in consumer.consume(3, timeout=30)]
    finally:
        consumer.close()


async def read_with_aiokafka(kafka: Kafka, topic: str) -> list[Message]:
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=kafka.bootstrap_servers, auto_offset_reset="earliest")
    await consumer.start()
    try:
        return [message_from(await asyncio.wait_for(consumer.getone(), timeout=30)) for _ in range(3)]
    finally:
        await consumer.stop()


@pytest.mark.kafka
def test_both_clients_bring_the_message_that_a_relay_publishes(kafka: Kafka, topic: CreateTopic) -> None:
    orders = topic("orders")
    row = wire.Message(
        sequence_no=42,
        shard=0,
        message_id=ID,
        aggregate_type="order",
        aggregate_id="käse",
        event_type="order_placed",
        payload="{}",
        payload_bytes=None,
        headers='{"traceparent": "ü"}',
        created_at_ms=CREATED_AT_MS,
        stored_bytes=2,
        is_unordered=False,
        is_behind_parked=False,
        is_behind_waiting=False,
    )
    rows = [row, row._replace(payload=None), row._replace(is_unordered=True)]
    producer = confluent_kafka.Producer({"bootstrap.servers": kafka.bootstrap_servers})
    for sent in rows:
        record = wire.Addressing(source="shop.public").record(sent, topic=orders)
        producer.produce(
            orders, record.value, record.key, partition=0, headers=record.headers, timestamp=record.timestamp_ms
        )
    assert producer.flush(30) == 0

    messages = read_with_confluent(kafka, orders)
    plain = replace(EXPECTED, topic=orders, partition=0, offset=0, headers={**EXPECTED.headers, "traceparent": "ü"})
    without_type = {name: value for name, value in plain.headers.items() if name != "content-type"}
    assert messages == [
        plain,
        replace(plain, payload=None, offset=1, headers=without_type),
        replace(plain, is_unordered=True, offset=2, headers={**plain.headers, "unordered": "1"}),
    ]
    assert asyncio.run(read_with_aiokafka(kafka, orders)) == messages
