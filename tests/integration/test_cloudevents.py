"""What a relay writes as CloudEvents, read from a broker by the official SDK and by our own library."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, cast

import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_kafka_event, to_binary_event
from confluent_kafka import Consumer, TopicPartition
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outbox_relay.config.kafka import DEFAULTS
from outbox_relay.consumer import Message as ConsumedMessage
from outbox_relay.consumer import message_from
from outbox_relay.relay.message import Addressing
from outbox_relay.relay.publish import Publisher
from outbox_relay.wire import RESERVED_HEADERS
from tests.fixtures.outbox import PLAIN
from tests.integration.test_publish import send

if TYPE_CHECKING:
    from collections.abc import Iterator

    from confluent_kafka import Message as KafkaRecord

    from outbox_relay.relay.message import Message
    from outbox_relay.sandbox.kafka import Kafka
    from tests.fixtures.kafka import CreateTopic

SOURCE = "https://shop.example/orders"
ADDRESSING = Addressing(source=SOURCE, envelope="cloudevents")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LATEST_MS = 1_700_000_000_000  # a broker refuses a time in the future

TEXT = st.text(
    st.characters(exclude_categories=["Cc", "Cs"]).filter(
        lambda character: ord(character) & 0xFFFE != 0xFFFE and not 0xFDD0 <= ord(character) <= 0xFDEF
    ),
    min_size=1,
)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | ANY_TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(ANY_TEXT, inner),
    max_leaves=5,
)
ATTRIBUTE_NAMES = st.from_regex(r"ce_[a-z0-9]{1,20}", fullmatch=True).filter(
    lambda name: name not in RESERVED_HEADERS | {"ce_data", "ce_datacontenttype", "ce_partitionkey"}
)
OTHER_NAMES = ANY_TEXT.filter(
    lambda name: name.lower() != "content-type" and not name.lower().startswith("ce_") and name not in RESERVED_HEADERS
)
CONTENT_TYPES = st.sampled_from(["text/plain;charset=utf-8", "application/avro"])


@st.composite
def rows(draw: st.DrawFn) -> Message:
    """Any row that can be an event."""
    headers = draw(st.dictionaries(ATTRIBUTE_NAMES, TEXT, max_size=3))
    headers |= draw(st.dictionaries(OTHER_NAMES, ANY_TEXT, max_size=3))
    if draw(st.booleans()):
        headers["content-type"] = draw(CONTENT_TYPES)
    payload, payload_bytes = draw(
        st.one_of(
            st.tuples(JSON.map(partial(json.dumps, ensure_ascii=False)), st.none()),
            st.tuples(st.none(), st.binary()),
            st.just((None, None)),
        )
    )
    return PLAIN._replace(
        sequence_no=draw(st.integers(1, 2**63 - 1)),
        message_id=str(draw(st.uuids())),
        aggregate_type=draw(TEXT),
        aggregate_id=draw(TEXT),
        event_type=draw(TEXT),
        payload=payload,
        payload_bytes=payload_bytes,
        headers=json.dumps(headers),
        created_at_ms=draw(st.integers(1, LATEST_MS)),
        is_unordered=draw(st.booleans()),
    )


class Path:
    """From a publisher through one partition of a real broker to a consumer."""

    def __init__(self, kafka: Kafka, topic: str) -> None:
        servers = kafka.bootstrap_servers
        self.topic = topic
        self._publisher = Publisher(lambda: {**DEFAULTS, "bootstrap.servers": servers, "log_level": 0})
        self._consumer = Consumer({"bootstrap.servers": servers, "group.id": topic, "log_level": 0})
        self._consumer.assign([TopicPartition(topic, 0, 0)])

    def travel(self, messages: list[Message]) -> list[KafkaRecord]:
        records = [ADDRESSING.record(message, topic=self.topic) for message in messages]
        assert send(self._publisher, records) == [None] * len(records)
        return self._consumer.consume(len(records), timeout=30)

    def close(self) -> None:
        self._consumer.close()
        self._publisher.close()


@pytest.fixture
def path(kafka: Kafka, topic: CreateTopic) -> Iterator[Path]:
    path = Path(kafka, topic("events"))
    yield path
    path.close()


def wire_value(message: Message) -> bytes | None:
    return message.payload_bytes if message.payload is None else message.payload.encode()


def event_of(message: Message) -> dict[str, object]:
    """The attributes of the event that *message* is, by the names of the specification."""
    own = json.loads(message.headers or "{}")
    attributes = {
        "specversion": "1.0",
        "id": message.message_id,
        "source": SOURCE,
        "type": message.event_type,
        "subject": message.aggregate_id,
        "time": EPOCH + timedelta(milliseconds=message.created_at_ms),
        "aggregatetype": message.aggregate_type,
        "sequence": f"{message.sequence_no:019}",
        "partitionkey": message.aggregate_id,  # as the SDK calls the record's key
    }
    if wire_value(message) is not None:
        attributes["datacontenttype"] = "application/octet-stream" if message.payload is None else "application/json"
    if message.is_unordered:
        attributes["unordered"] = "1"
    if "content-type" in own:
        attributes["datacontenttype"] = own["content-type"]
    return attributes | {name.removeprefix("ce_"): text for name, text in own.items() if name.startswith("ce_")}


def check(message: Message, kafka_message: KafkaMessage) -> None:
    """The SDK reads *kafka_message* as the event that *message* is, and its data as the SDK itself would write it."""
    event = from_kafka_event(kafka_message)
    assert event.get_attributes() == event_of(message)
    if message.payload is not None and "json" in str(event.get_datacontenttype()):
        assert event.get_data() == json.loads(message.payload)
    else:
        assert to_binary_event(event).value == (wire_value(message) or b"")


@given(message=rows())
@settings(deadline=None)
def test_the_official_sdk_reads_the_event_that_the_row_is(message: Message) -> None:
    record = ADDRESSING.record(message, topic="order.events")
    headers = {name: str(value).encode() for name, value in record.headers}
    check(message, KafkaMessage(headers, record.key.encode(), wire_value(message) or b""))


@given(messages=st.lists(rows(), min_size=10, max_size=50))
@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@pytest.mark.kafka
def test_the_official_sdk_and_our_library_read_from_a_broker_what_a_relay_wrote(
    path: Path, messages: list[Message]
) -> None:
    for row, record in zip(messages, path.travel(messages), strict=True):
        check(row, KafkaMessage(headers_of(record), record.key(), record.value() or b""))
        assert message_from(record) == consumed(row, record)


def headers_of(record: KafkaRecord) -> dict[str, bytes]:
    return dict(cast("list[tuple[str, bytes]]", record.headers()))


def consumed(row: Message, record: KafkaRecord) -> ConsumedMessage:
    return ConsumedMessage(
        message_id=uuid.UUID(row.message_id),
        source=SOURCE,
        sequence_no=row.sequence_no,
        aggregate_type=row.aggregate_type,
        event_type=row.event_type,
        key=row.aggregate_id,
        payload=wire_value(row),
        headers={name: value.decode() for name, value in headers_of(record).items()},
        created_at=EPOCH + timedelta(milliseconds=row.created_at_ms),
        topic=str(record.topic()),
        partition=0,
        offset=int(record.offset() or 0),
        is_unordered=row.is_unordered,
    )
