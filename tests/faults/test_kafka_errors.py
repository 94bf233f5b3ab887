"""Errors that brokers answer with, from librdkafka's mock cluster: sent again at once, nothing lost, the order kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest
from confluent_kafka import KafkaError

from outbox_relay.sandbox.kafka import Kafka
from outbox_relay.sandbox.mock_cluster import ApiKey
from tests.fixtures.load import commit_messages
from tests.fixtures.pipeline import Pipeline, flaws

if TYPE_CHECKING:
    from outbox_relay.sandbox.mock_cluster import MockCluster
    from tests.fixtures.daemon import Daemon
    from tests.fixtures.postgres import Database

TIMES = 3
BATCH_SIZE = 20
MESSAGES = 200

RETRIED_INSIDE = {
    "storage": KafkaError.KAFKA_STORAGE_ERROR,
    "no leader": KafkaError.NOT_LEADER_FOR_PARTITION,
    "too few replicas": KafkaError.NOT_ENOUGH_REPLICAS,
    "too few replicas after the write": KafkaError.NOT_ENOUGH_REPLICAS_AFTER_APPEND,
    "timed out": KafkaError.REQUEST_TIMED_OUT,
}
FATAL = {
    "fenced": KafkaError.INVALID_PRODUCER_EPOCH,
    "out of order": KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER,
    "not allowed to be idempotent": KafkaError.CLUSTER_AUTHORIZATION_FAILED,
}


@pytest.fixture
def mocked(database: Database, mock_cluster: MockCluster, topic_prefix: str, seed: int) -> Pipeline:
    pipeline = Pipeline(database, Kafka(mock_cluster.bootstrap_servers), prefix=topic_prefix, seed=seed)
    for topic in pipeline.topics:
        mock_cluster.create_topic(topic)
    return pipeline


@pytest.mark.parametrize("code", RETRIED_INSIDE.values(), ids=RETRIED_INSIDE)
def test_the_producer_repeats_by_itself_what_failed_with(
    mocked: Pipeline, mock_cluster: MockCluster, code: int
) -> None:
    with mocked.relays(1, lanes=1, batch_size=BATCH_SIZE) as [relay], mocked.database.connect() as writer:
        commit_messages(writer, "order-0")
        mocked.await_settled()
        before = mock_cluster.count_requests(ApiKey.PRODUCE)
        mock_cluster.push_errors(ApiKey.PRODUCE, [code] * TIMES)
        commit_messages(writer, "order-0")
        mocked.await_settled()
        assert mock_cluster.count_requests(ApiKey.PRODUCE) - before == TIMES + 1
        assert relay.events_named("deliveries_failed") == []


def codes(relay: Daemon) -> set[str]:
    """Kafka's names of the errors that messages failed with."""
    return {
        code for event in relay.events_named("deliveries_failed") for code in cast("dict[str, int]", event["codes"])
    }


@pytest.mark.parametrize("code", FATAL.values(), ids=FATAL)
def test_a_new_producer_takes_over_in_order_from_one_that_is(
    mocked: Pipeline, mock_cluster: MockCluster, code: int
) -> None:
    keys = ("order-0", "order-1", "payment-1", "parcel-2")
    with mocked.database.connect() as writer:
        writes = commit_messages(writer, *keys * (MESSAGES // len(keys)))
    mock_cluster.push_errors(ApiKey.PRODUCE, [0, 0, code] * TIMES)
    with mocked.relays(1, lanes=1, batch_size=BATCH_SIZE) as [relay]:
        mocked.await_settled()
        relay.terminate()
        assert relay.wait() == 0
    assert codes(relay) >= {KafkaError(code).name()}
    verdict = mocked.judge(writes)
    assert flaws(verdict).keys() <= {"duplicated"}
    assert len(verdict.duplicated) <= TIMES * BATCH_SIZE


def test_a_producer_that_gets_no_id_is_replaced(mocked: Pipeline, mock_cluster: MockCluster) -> None:
    mock_cluster.push_errors(ApiKey.INIT_PRODUCER_ID, [KafkaError.CLUSTER_AUTHORIZATION_FAILED] * TIMES)
    with mocked.relays(1, lanes=1) as [relay], mocked.database.connect() as writer:
        writes = commit_messages(writer, "order-1", "order-1")
        mocked.await_settled()
        assert relay.wait_for_event("kafka_recovered")
    assert mock_cluster.count_requests(ApiKey.INIT_PRODUCER_ID) > TIMES
    assert flaws(mocked.judge(writes)) == {}
