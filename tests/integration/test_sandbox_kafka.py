from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from confluent_kafka import KafkaError, Message, Producer
from confluent_kafka.admin import AdminClient

from outbox_relay.sandbox.mock_cluster import ApiKey, MockCluster

if TYPE_CHECKING:
    from outbox_relay.sandbox.kafka import Kafka, KafkaCluster
    from tests.fixtures.kafka import CreateTopic

MESSAGE_TIMED_OUT = KafkaError._MSG_TIMED_OUT  # noqa: SLF001 -- the client has no other name for it


class Sender:
    """A producer that remembers what became of its messages: None where one was acknowledged, else the error's code."""

    def __init__(self, bootstrap_servers: str, **settings: str | int) -> None:
        self.outcomes: list[int | None] = []
        options = {name.replace("_", "."): value for name, value in settings.items()}
        self._producer = Producer({"bootstrap.servers": bootstrap_servers, "log_level": 0, "acks": "all", **options})

    def send(self, topic: str, *, timeout: float = 30) -> int | None:
        self._producer.produce(topic, b"value", on_delivery=self._remember)
        assert self._producer.flush(timeout) == 0, "no delivery report"
        return self.outcomes[-1]

    def _remember(self, error: KafkaError | None, _message: Message) -> None:
        self.outcomes.append(error.code() if error else None)


@pytest.mark.kafka
def test_created_topic_is_usable_at_once(kafka: Kafka, topic: CreateTopic) -> None:
    name = topic("orders", partitions=3, config={"max.message.bytes": "2000"})
    assert Sender(kafka.bootstrap_servers).send(name) is None
    found = AdminClient({"bootstrap.servers": kafka.bootstrap_servers}).list_topics(name, timeout=10).topics[name]
    assert sorted(found.partitions) == [0, 1, 2]


@pytest.mark.kafka
def test_topics_do_not_come_into_being_by_themselves(kafka: Kafka, topic_prefix: str) -> None:
    sender = Sender(kafka.bootstrap_servers, allow_auto_create_topics="true", message_timeout_ms=3000)
    assert sender.send(f"{topic_prefix}never-created") == MESSAGE_TIMED_OUT


@pytest.mark.kafka
@pytest.mark.slow
def test_killed_broker_comes_back_at_its_address(own_kafka: KafkaCluster) -> None:
    own_kafka.create_topic("orders")
    sender = Sender(own_kafka.bootstrap_servers)
    assert sender.send("orders") is None
    own_kafka.kill()
    assert own_kafka.brokers_seen() == 0
    own_kafka.restart()
    assert sender.send("orders") is None


@pytest.mark.kafka
@pytest.mark.slow
def test_paused_broker_answers_nothing_until_it_is_resumed(own_kafka: KafkaCluster) -> None:
    own_kafka.pause()
    assert own_kafka.brokers_seen() == 0
    own_kafka.resume()
    own_kafka.wait_until_ready()
    assert own_kafka.brokers_seen() == 1


@pytest.mark.kafka
@pytest.mark.slow
def test_three_brokers_survive_the_loss_of_one(kafka_cluster: KafkaCluster) -> None:
    kafka_cluster.create_topic("orders")
    kafka_cluster.kill(2)
    assert Sender(kafka_cluster.bootstrap_servers).send("orders") is None


def test_injected_error_reaches_an_ordinary_producer(mock_cluster: MockCluster) -> None:
    mock_cluster.create_topic("orders")
    mock_cluster.push_errors(ApiKey.PRODUCE, [KafkaError.INVALID_RECORD])
    sender = Sender(mock_cluster.bootstrap_servers)
    assert [sender.send("orders"), sender.send("orders")] == [KafkaError.INVALID_RECORD, None]


def test_cleared_errors_reach_nobody(mock_cluster: MockCluster) -> None:
    mock_cluster.create_topic("orders")
    mock_cluster.push_errors(ApiKey.PRODUCE, [KafkaError.INVALID_RECORD])
    mock_cluster.clear_errors(ApiKey.PRODUCE)
    assert Sender(mock_cluster.bootstrap_servers).send("orders") is None


def test_mock_topic_error_shows_in_metadata(mock_cluster: MockCluster) -> None:
    mock_cluster.create_topic("orders")
    mock_cluster.set_topic_error("orders", KafkaError.UNKNOWN_TOPIC_OR_PART)
    admin = AdminClient({"bootstrap.servers": mock_cluster.bootstrap_servers, "log_level": 0})
    error = admin.list_topics("orders", timeout=10).topics["orders"].error
    assert error is not None
    assert error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART


def test_mock_broker_that_is_down_delivers_once_it_is_up(mock_cluster: MockCluster) -> None:
    mock_cluster.create_topic("orders")
    sender = Sender(mock_cluster.bootstrap_servers, message_timeout_ms=1000)
    mock_cluster.set_down()
    assert sender.send("orders") == MESSAGE_TIMED_OUT
    mock_cluster.set_up()
    assert sender.send("orders") is None


def test_slow_mock_broker_makes_a_message_time_out(mock_cluster: MockCluster) -> None:
    mock_cluster.create_topic("orders")
    sender = Sender(mock_cluster.bootstrap_servers, message_timeout_ms=1000)
    assert sender.send("orders") is None
    mock_cluster.set_round_trip(5000)
    assert sender.send("orders") == MESSAGE_TIMED_OUT


def test_mock_leader_moves_to_the_broker_that_was_named() -> None:
    with MockCluster(brokers=3) as cluster:
        cluster.create_topic("orders", replication=3)
        admin = AdminClient({"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0})
        for broker in (1, 2, 3):
            cluster.set_leader("orders", partition=0, broker=broker)
            assert admin.list_topics("orders", timeout=10).topics["orders"].partitions[0].leader == broker
