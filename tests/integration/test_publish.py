"""What the publisher writes to Kafka and reports, on a real broker, and its recovery from errors, on a mock cluster."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import pytest
from confluent_kafka import Consumer, KafkaError, TopicPartition
from confluent_kafka import Message as KafkaMessage

from outbox_relay.config.kafka import DEFAULTS
from outbox_relay.errors import KafkaUnavailable
from outbox_relay.relay.failures import NO_REPORT, WITHDRAWN, Outcome, Scope
from outbox_relay.relay.message import Record
from outbox_relay.relay.publish import Publisher
from outbox_relay.sandbox.mock_cluster import ApiKey
from outbox_relay.sandbox.ports import ReservedPort
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from outbox_relay.sandbox.kafka import Kafka
    from outbox_relay.sandbox.mock_cluster import MockCluster
    from tests.fixtures.kafka import CreateTopic

LONG_ENOUGH = 20.0

# From the tests of Kafka's own client: a key and its murmur2 hash.
MURMUR2 = {
    "21": -973932308,
    "foobar": -790332482,
    "a-little-bit-long-string": -985981536,
    "a-little-bit-longer-string": -1486304829,
    "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    "abc": 479470107,
}


def record(topic: str, key: str, *, value: str | bytes | None = "value") -> Record:
    return Record(topic, key, value, [("id", "1")], 1_700_000_000_123)


def incompressible(size: int, *, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)  # noqa: S311 -- no secret


def send(publisher: Publisher, records: Sequence[Record], *, seconds: float = LONG_ENOUGH) -> list[Outcome]:
    return publisher.publish(records, deadline=time.monotonic() + seconds)


def written(bootstrap_servers: str, topic: str) -> list[KafkaMessage]:
    """Every record of *topic*, partition by partition."""
    consumer = Consumer({"bootstrap.servers": bootstrap_servers, "group.id": "reader", "log_level": 0})
    try:
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        ends = {number: consumer.get_watermark_offsets(TopicPartition(topic, number))[1] for number in partitions}
        consumer.assign([TopicPartition(topic, number, 0) for number in partitions])
        found: list[KafkaMessage] = []
        deadline = time.monotonic() + LONG_ENOUGH
        while len(found) < sum(ends.values()) and time.monotonic() < deadline:
            found += consumer.consume(1000, timeout=0.1)
    finally:
        consumer.close()
    assert not [message for message in found if message.error()]
    return sorted(found, key=lambda message: (message.partition(), message.offset()))


def values(messages: Sequence[KafkaMessage]) -> list[str | bytes | None]:
    return [message.value() for message in messages]


@pytest.fixture
def make_publisher() -> Iterator[Callable[..., Publisher]]:
    """Make publishers with the relay's own settings, less what a test gives; they are closed afterwards."""
    made: list[Publisher] = []

    def make(bootstrap_servers: str, **settings: str | int) -> Publisher:
        given = {name.replace("_", "."): value for name, value in settings.items()}
        made.append(Publisher(lambda: {**DEFAULTS, "bootstrap.servers": bootstrap_servers, "log_level": 0, **given}))
        return made[-1]

    yield make
    for publisher in made:
        publisher.close()


@pytest.fixture
def publisher(kafka: Kafka, make_publisher: Callable[..., Publisher]) -> Publisher:
    return make_publisher(kafka.bootstrap_servers)


@pytest.fixture
def mocked(mock_cluster: MockCluster, make_publisher: Callable[..., Publisher]) -> Publisher:
    """A publisher that has written to the topic "orders" of the mock cluster already."""
    mock_cluster.create_topic("orders")
    publisher = make_publisher(mock_cluster.bootstrap_servers)
    assert send(publisher, [record("orders", "k", value="first")]) == [None]
    return publisher


@pytest.mark.kafka
def test_a_record_arrives_as_it_was_handed_over(kafka: Kafka, topic: CreateTopic, publisher: Publisher) -> None:
    name = topic("orders")
    headers = [("id", "8c4f"), ("traceparent", "00-ab"), ("grüße", "schön ✓"), ("empty", "")]
    records = [
        Record(name, "ä", '{"total": 1.50}', [*headers], 1_700_000_000_123),
        Record(name, "b", b"\x00\xff", [], 1),
        Record(name, "tombstone", None, [], 2),
        Record(name, "empty", b"", [], 3),
        Record(name, "", "empty key", [], 4),
    ]
    assert send(publisher, records) == [None] * 5
    arrived = written(kafka.bootstrap_servers, name)
    assert [(message.key(), message.value(), message.timestamp()[1]) for message in arrived] == [
        ("ä".encode(), b'{"total": 1.50}', 1_700_000_000_123),
        (b"b", b"\x00\xff", 1),
        (b"tombstone", None, 2),
        (b"empty", b"", 3),
        (b"", b"empty key", 4),
    ]
    own_headers = [(header, value.encode()) for header, value in headers]
    assert [message.headers() for message in arrived] == [own_headers, None, None, None, None]


@pytest.mark.kafka
def test_a_key_goes_to_the_partition_that_java_would_choose(
    kafka: Kafka, topic: CreateTopic, publisher: Publisher
) -> None:
    name = topic("orders", partitions=7)
    assert send(publisher, [record(name, key) for key in MURMUR2]) == [None] * len(MURMUR2)
    chosen = {
        (message.key() or b"").decode(): message.partition() for message in written(kafka.bootstrap_servers, name)
    }
    assert chosen == {key: (hashed & 0x7FFFFFFF) % 7 for key, hashed in MURMUR2.items()}


@pytest.mark.kafka
def test_thousands_of_records_keep_the_order_of_their_keys(
    kafka: Kafka, topic: CreateTopic, publisher: Publisher
) -> None:
    name = topic("orders", partitions=3)
    records = [record(name, str(number % 7), value=str(number)) for number in range(5000)]
    assert send(publisher, records) == [None] * 5000
    by_key: dict[bytes | str | None, list[int]] = {}
    for message in written(kafka.bootstrap_servers, name):
        by_key.setdefault(message.key(), []).append(int(message.value() or -1))
    assert by_key == {str(key).encode(): list(range(key, 5000, 7)) for key in range(7)}


@pytest.mark.kafka
def test_a_missing_topic_is_told_and_found_once_it_is_there(
    topic: CreateTopic, topic_prefix: str, publisher: Publisher
) -> None:
    there, missing = topic("orders"), f"{topic_prefix}missing"
    publisher.probe()
    failures = publisher.unavailable([there, missing])
    assert {name: (failure.scope, failure.code) for name, failure in failures.items()} == {
        missing: (Scope.TOPIC, "UNKNOWN_TOPIC_OR_PART")
    }
    topic("missing")
    eventually(lambda: publisher.unavailable([there, missing]) == {})
    assert send(publisher, [record(missing, "k")]) == [None]


@pytest.mark.kafka
def test_small_records_that_are_too_large_together_all_arrive_in_order(
    kafka: Kafka, topic: CreateTopic, publisher: Publisher
) -> None:
    name = topic("orders", config={"max.message.bytes": "2000"})
    payloads = [incompressible(100, seed=number) for number in range(100)]
    records = [record(name, "k", value=payload) for payload in payloads]
    first = send(publisher, records)
    assert {outcome.scope for outcome in first if outcome} == {Scope.BATCH}
    acknowledged = first.index(next(outcome for outcome in first if outcome))
    assert values(written(kafka.bootstrap_servers, name)) == payloads[:acknowledged]

    assert send(publisher, records[acknowledged:]) == [None] * (100 - acknowledged)
    assert values(written(kafka.bootstrap_servers, name)) == payloads


@pytest.mark.kafka
def test_one_record_that_is_too_large_is_found_guilty_and_nothing_of_its_key_overtakes_it(
    kafka: Kafka, topic: CreateTopic, publisher: Publisher
) -> None:
    name, other = topic("orders", config={"max.message.bytes": "2000"}), topic("baskets")
    payloads = [incompressible(3000 if number == 50 else 100, seed=number) for number in range(100)]
    records = [record(name, "k", value=payload) for payload in payloads]

    first = send(publisher, records)
    assert {outcome.scope for outcome in first if outcome} == {Scope.BATCH}
    acknowledged = first.index(next(outcome for outcome in first if outcome))
    second = send(publisher, [record(other, "k"), *records[acknowledged:]])
    assert second[0] is None
    outcomes = [None] * acknowledged + second[1:]
    assert outcomes[:50] == [None] * 50
    guilty = outcomes[50]
    assert guilty is not None
    assert (guilty.scope, guilty.code) == (Scope.MESSAGE, "MSG_SIZE_TOO_LARGE")
    assert set(outcomes[51:]) == {WITHDRAWN}
    assert values(written(kafka.bootstrap_servers, name)) == payloads[:50]

    assert send(publisher, records[51:]) == [None] * 49
    assert values(written(kafka.bootstrap_servers, name)) == payloads[:50] + payloads[51:]


@pytest.mark.kafka
@pytest.mark.parametrize(
    "batching",
    [
        {},
        {"batch_size": 2_000_000},
        {"batch_num_messages": 500},
        {"linger_ms": 20_000},
        {"retries": 1, "compression_type": "none"},
    ],
    ids=str,
)
def test_nothing_of_a_key_overtakes_a_refused_record_however_the_settings_allow_to_make_batches(
    kafka: Kafka, topic: CreateTopic, make_publisher: Callable[..., Publisher], batching: dict[str, int]
) -> None:
    name = topic("orders", config={"max.message.bytes": "2000"})
    payloads = [incompressible(3000 if number == 0 else 100, seed=number) for number in range(500)]
    publisher = make_publisher(kafka.bootstrap_servers, **batching)

    outcomes = send(publisher, [record(name, "k", value=payload) for payload in payloads])

    assert None not in outcomes
    assert values(written(kafka.bootstrap_servers, name)) == []


@pytest.mark.kafka
def test_a_record_beyond_the_clients_own_limit_stops_its_key_only(
    kafka: Kafka, topic: CreateTopic, make_publisher: Callable[..., Publisher]
) -> None:
    name = topic("orders")
    publisher = make_publisher(kafka.bootstrap_servers, message_max_bytes=2000)
    records = [record(name, "k"), record(name, "k", value=bytes(3000)), record(name, "other"), record(name, "k")]
    first, guilty, other, behind = send(publisher, records)
    assert (first, other, behind) == (None, None, WITHDRAWN)
    assert guilty is not None
    assert (guilty.scope, guilty.code) == (Scope.MESSAGE, "MSG_SIZE_TOO_LARGE")
    assert [message.key() for message in written(kafka.bootstrap_servers, name)] == [b"k", b"other"]


@pytest.mark.kafka
def test_what_does_not_fit_the_queue_is_withdrawn_and_the_rest_acknowledged(
    kafka: Kafka, topic: CreateTopic, make_publisher: Callable[..., Publisher]
) -> None:
    name = topic("orders")
    publisher = make_publisher(kafka.bootstrap_servers, queue_buffering_max_messages=10)
    outcomes = send(publisher, [record(name, "k", value=str(number)) for number in range(100)])
    fitted = outcomes.count(None)
    assert fitted >= 10
    assert outcomes == [None] * fitted + [WITHDRAWN] * (100 - fitted)
    assert len(written(kafka.bootstrap_servers, name)) == fitted


def test_nothing_is_handed_over_after_the_deadline(mock_cluster: MockCluster, mocked: Publisher) -> None:
    assert send(mocked, [record("orders", "k")], seconds=-1) == [WITHDRAWN]
    assert values(written(mock_cluster.bootstrap_servers, "orders")) == [b"first"]


def test_an_empty_batch_has_no_outcomes(mocked: Publisher) -> None:
    assert send(mocked, []) == []


def test_a_broker_that_is_silent_leaves_no_report_and_works_again_later(
    mock_cluster: MockCluster, mocked: Publisher
) -> None:
    mock_cluster.set_round_trip(4000)
    assert send(mocked, [record("orders", "k"), record("orders", "k")], seconds=0.3) == [NO_REPORT, NO_REPORT]
    mock_cluster.set_round_trip(0)
    eventually(lambda: send(mocked, [record("orders", "k")]) == [None])


def test_no_broker_at_all_is_unavailable(make_publisher: Callable[..., Publisher]) -> None:
    publisher = make_publisher(f"127.0.0.1:{ReservedPort().number}")
    with pytest.raises(KafkaUnavailable, match="no broker answered within 5 s"):
        publisher.probe()


def test_a_lack_of_replicas_is_waited_out_and_not_reported(mock_cluster: MockCluster, mocked: Publisher) -> None:
    mock_cluster.push_errors(ApiKey.PRODUCE, [KafkaError.NOT_ENOUGH_REPLICAS] * 3)
    assert send(mocked, [record("orders", "k", value="second")]) == [None]
    assert values(written(mock_cluster.bootstrap_servers, "orders")) == [b"first", b"second"]
    assert mocked.producers_rebuilt == 0


def test_a_topic_that_may_not_be_written_to_is_the_topics_failure(mock_cluster: MockCluster, mocked: Publisher) -> None:
    mock_cluster.push_errors(ApiKey.PRODUCE, [KafkaError.TOPIC_AUTHORIZATION_FAILED])
    [outcome] = send(mocked, [record("orders", "k")])
    assert outcome is not None
    assert (outcome.scope, outcome.code) == (Scope.TOPIC, "TOPIC_AUTHORIZATION_FAILED")
    eventually(lambda: send(mocked, [record("orders", "k")]) == [None])


def test_a_topic_that_failed_is_sent_alone_until_it_takes_a_message(
    mock_cluster: MockCluster, mocked: Publisher
) -> None:
    mock_cluster.create_topic("payments")
    both = [record("orders", "k"), record("payments", "k")]
    mock_cluster.push_errors(ApiKey.PRODUCE, [KafkaError.TOPIC_AUTHORIZATION_FAILED])
    send(mocked, both[:1])
    for _ in range(3):
        mock_cluster.push_errors(ApiKey.PRODUCE, [KafkaError.TOPIC_AUTHORIZATION_FAILED])
        refused, taken = send(mocked, both)
        assert refused is not None
        assert refused.scope is Scope.TOPIC
        assert taken is None
    assert send(mocked, both) == [None, None]
    assert len(written(mock_cluster.bootstrap_servers, "payments")) == 4
    mock_cluster.push_errors(ApiKey.PRODUCE, [KafkaError.INVALID_PRODUCER_EPOCH])
    codes = [outcome.code for outcome in send(mocked, both[:1] * 2) if outcome is not None]
    assert codes == ["INVALID_PRODUCER_EPOCH"] * 2  # together again: alone, the second would not have been sent


def test_a_producer_that_failed_for_good_is_replaced(mock_cluster: MockCluster, mocked: Publisher) -> None:
    mock_cluster.push_errors(ApiKey.PRODUCE, [KafkaError.INVALID_PRODUCER_EPOCH])
    [outcome] = send(mocked, [record("orders", "k")])
    assert outcome is not None
    assert (outcome.scope, outcome.code) == (Scope.BATCH, "INVALID_PRODUCER_EPOCH")
    assert send(mocked, [record("orders", "k")]) == [None]
    assert mocked.producers_rebuilt == 1
