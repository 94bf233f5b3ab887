"""What a message may be, and what is refused before it reaches a database, as tables of cases."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from confluent_kafka import KafkaException, Producer

from outbox_relay.errors import InvalidMessage, NoTransaction
from outbox_relay.relay.message import Addressing
from outbox_relay.wire import RESERVED_HEADERS
from outbox_relay.writer import TOMBSTONE, Message
from outbox_relay.writer.rows import MAX_MESSAGE_BYTES, Pending, Row, encode
from tests.fixtures.outbox import PLAIN

if TYPE_CHECKING:
    from collections.abc import Mapping

ID = UUID("8c4f0b0e-5d1c-4e64-9f0b-5f1d0d3f7a11")
FIELDS: Mapping[str, Any] = {
    "aggregate_type": "order",
    "aggregate_id": "4711",
    "event_type": "placed",
    "message_id": ID,
}


def refusal(**fields: Any) -> str:  # noqa: ANN401 -- right and wrong ones
    with pytest.raises(InvalidMessage) as raised:
        row(**fields)
    return str(raised.value)


def row(*, max_message_bytes: int = MAX_MESSAGE_BYTES, **fields: Any) -> Row:  # noqa: ANN401 -- right and wrong ones
    [encoded] = encode([Message(**{**FIELDS, **fields})], max_message_bytes=max_message_bytes)
    return encoded


def test_a_message_becomes_a_row_of_what_was_given_and_nothing_else() -> None:
    assert row(
        payload={"total": 1.5, "to": "Zoë"},
        headers={"tenant": "Köln"},
        created_at=datetime(2026, 11, 21, 5, tzinfo=timezone(timedelta(hours=1))),
    ) == Row(
        message_id=ID,
        aggregate_type="order",
        aggregate_id="4711",
        event_type="placed",
        payload='{"total": 1.5, "to": "Zoë"}',
        payload_bytes=None,
        headers='{"tenant": "Köln"}',
        created_at="2026-11-21T05:00:00+01:00",
    )


@pytest.mark.parametrize(
    ("fields", "payload", "payload_bytes"),
    [
        ({}, None, None),
        ({"payload": TOMBSTONE}, None, None),
        ({"payload": None}, "null", None),
        ({"payload": ""}, '""', None),
        ({"payload": False}, "false", None),
        ({"payload_bytes": b""}, None, b""),
        ({"payload_bytes": b"\x00\xff"}, None, b"\x00\xff"),
    ],
)
def test_only_a_message_without_any_payload_is_a_tombstone(
    fields: Mapping[str, Any], payload: str | None, payload_bytes: bytes | None
) -> None:
    encoded = row(**fields)
    assert (encoded.payload, encoded.payload_bytes) == (payload, payload_bytes)


def test_every_message_has_an_id_of_its_own_from_the_start() -> None:
    fields = {name: value for name, value in FIELDS.items() if name != "message_id"}
    one, two = Message(**fields), Message(**fields)
    assert (one.message_id.version, one.message_id != two.message_id) == (4, True)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"aggregate_type": ""}, "aggregate_type is empty: give the text that names it"),
        ({"aggregate_id": ""}, "aggregate_id is empty: give the text that names it"),
        ({"event_type": ""}, "event_type is empty: give the text that names it"),
        ({"aggregate_id": 4711}, "aggregate_id is 4711: give a str"),
        ({"event_type": None}, "event_type is None: give a str"),
        ({"aggregate_id": b"x" * 200}, f"aggregate_id is b'{'x' * 98}: give a str"),
        ({"aggregate_id": "a\0b"}, "aggregate_id is 'a\\x00b': PostgreSQL stores no NUL character, leave it out"),
        ({"aggregate_id": "\ud800"}, "aggregate_id is '\\ud800': a lone surrogate is no character, leave it out"),
        ({"headers": None}, "headers is None: give a mapping of str to str"),
        ({"headers": [("a", "b")]}, "headers is [('a', 'b')]: give a mapping of str to str"),
        ({"headers": {"attempt": 3}}, 'header "attempt" is 3: give a str'),
        ({"headers": {"attempt": None}}, 'header "attempt" is None: give a str'),
        ({"headers": {3: "attempt"}}, "the name of a header is 3: give a str"),
        ({"headers": {"a": "\0"}}, "header \"a\" is '\\x00': PostgreSQL stores no NUL character, leave it out"),
        (
            {"headers": {"\udfff": "a"}},
            "the name of a header is '\\udfff': a lone surrogate is no character, leave it out",
        ),
        *(
            ({"headers": {name: "x"}}, f'header "{name}" is set by the relay: choose another name')
            for name in sorted(RESERVED_HEADERS)
        ),
        (
            {"payload": 1, "payload_bytes": b"1"},
            "payload and payload_bytes are both given: a message has one value, leave one out",
        ),
        (
            {"payload": None, "payload_bytes": b"1"},
            "payload and payload_bytes are both given: a message has one value, leave one out",
        ),
        ({"payload_bytes": "text"}, "payload_bytes is 'text': give bytes, or a JSON value as payload"),
        ({"message_id": str(ID)}, f"message_id is '{ID}': give a uuid.UUID"),
        (
            {"created_at": datetime(2026, 11, 21)},  # noqa: DTZ001 -- what is refused
            "created_at is 2026-11-21 00:00:00, without a time zone: give one, as in datetime.now(UTC)",
        ),
        ({"created_at": date(2026, 11, 21)}, "created_at is datetime.date(2026, 11, 21): give a datetime.datetime"),
        (
            {"created_at": datetime(1970, 1, 1, tzinfo=UTC)},
            "created_at is 1970-01-01 00:00:00+00:00: a Kafka timestamp is after 1970-01-01, give a later one",
        ),
        ({"payload": {"a": "\0"}}, "payload contains a NUL character, which jsonb cannot store: leave it out"),
        ({"payload": {"\\\0": 1}}, "payload contains a NUL character, which jsonb cannot store: leave it out"),
    ],
)
def test_what_could_never_be_published_is_refused_with_its_value_and_the_remedy(
    fields: Mapping[str, Any], expected: str
) -> None:
    assert refusal(**fields) == expected


def circular() -> list[object]:
    values: list[object] = []
    values.append(values)
    return values


@pytest.mark.parametrize(
    "payload",
    [Decimal("1.50"), {"at": datetime.now(UTC)}, {1, 2}, b"bytes", float("nan"), [float("-inf")], "\ud800", circular()],
    ids=["decimal", "datetime", "set", "bytes", "NaN", "infinity", "lone surrogate", "circular"],
)
def test_a_payload_that_is_no_json_is_refused_with_the_way_out(payload: object) -> None:
    assert refusal(payload=payload).startswith("payload is no JSON (")
    assert refusal(payload=payload).endswith("convert what JSON lacks, or encode it yourself and give payload_bytes")


def test_an_escaped_backslash_before_u0000_is_no_nul_character() -> None:
    assert row(payload="\\u0000").payload == '"\\\\u0000"'


def test_a_message_too_large_is_refused_with_its_size_and_one_byte_less_is_not() -> None:
    limit = 500 + len("order4711placed{}") + 1000
    assert row(payload_bytes=b"x" * 1000, max_message_bytes=limit).payload_bytes == b"x" * 1000
    assert refusal(payload_bytes=b"x" * 1001, max_message_bytes=limit) == (
        f"message {ID} of order 4711 takes 1,518 bytes, max_message_bytes is 1,517: send a reference instead of the "
        "payload, or raise it together with message.max.bytes of the relay and max.message.bytes of the topic"
    )


@pytest.mark.parametrize("fields", [{"payload": "ä" * 400}, {"headers": {"ä" * 200: "ö" * 200}}])
def test_size_is_counted_in_bytes_of_everything(fields: Mapping[str, Any]) -> None:
    assert "takes 1,3" in refusal(max_message_bytes=1_000, **fields)


def test_kafkas_producer_takes_the_largest_message_that_is_allowed() -> None:
    fields: dict[str, Any] = {"aggregate_type": "t" * 100, "event_type": "e" * 1000, "headers": {"h" * 100: "v"}}
    counted = 500 + 4 + 100 + 1000 + len(json.dumps(fields["headers"]))
    largest = row(**fields, payload_bytes=b"x" * (MAX_MESSAGE_BYTES - counted))
    record = Addressing(source="s" * 100).record(
        PLAIN._replace(
            aggregate_type=largest.aggregate_type,
            event_type=largest.event_type,
            payload=None,
            payload_bytes=largest.payload_bytes,
            headers=largest.headers,
            sequence_no=2**63 - 1,
        ),
        topic="orders",
    )
    producer = Producer({"bootstrap.servers": "127.0.0.1:1", "log_level": 0})
    producer.produce(record.topic, record.value, record.key, headers=record.headers)
    with pytest.raises(KafkaException, match="MSG_SIZE_TOO_LARGE"):
        producer.produce(record.topic, b"x" * MAX_MESSAGE_BYTES, record.key, headers=record.headers)
    producer.purge()


def test_a_pending_message_is_kept_as_it_was_when_it_was_written() -> None:
    pending = Pending(max_message_bytes=MAX_MESSAGE_BYTES)
    payload = {"total": 1}
    pending.write(Message(**FIELDS, payload=payload))
    payload["total"] = 2
    assert [kept.payload for kept in pending.end()] == ['{"total": 1}']


def test_a_message_written_after_its_block_is_refused_not_lost() -> None:
    pending = Pending(max_message_bytes=MAX_MESSAGE_BYTES)
    pending.end()
    with pytest.raises(NoTransaction) as raised:
        pending.write(Message(**FIELDS))
    assert str(raised.value) == f"the block of message {ID} has ended: write inside of it"
