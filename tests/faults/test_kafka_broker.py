"""A broker is slow or loses its answers, a topic is forbidden, deleted or changed: messages wait, none is parked."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import confluent_kafka
import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    ResourcePatternType,
    ResourceType,
)

from outbox_relay.sandbox.history import State
from outbox_relay.sandbox.judge import judge
from tests.fixtures.kafka import proxied_broker
from tests.fixtures.load import Plan, commit_messages
from tests.fixtures.pipeline import Pipeline, flaws, short_times
from tests.fixtures.topics import read_topic
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from outbox_relay.sandbox.kafka import KafkaCluster
    from tests.fixtures.daemon import Daemon
    from tests.fixtures.postgres import Database
    from tests.fixtures.proxy import TcpProxy

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

PUBLISHED, PARKED = State.PUBLISHED, State.PARKED
LANES = 2
BATCH_SIZE = 500
PLAN = Plan(writers=4, bulk_rows=100)
SHORT_TIMES = short_times(publish_deadline=3)
MORE_MEMORY_BYTES = 40 * 1024 * 1024
REQUEST_SECONDS = 10


@pytest.fixture(scope="module")
def broker() -> Iterator[tuple[KafkaCluster, TcpProxy]]:
    with proxied_broker() as both:
        yield both


@pytest.fixture
def kafka(broker: tuple[KafkaCluster, TcpProxy]) -> KafkaCluster:
    """In the place of the broker that all tests share."""
    return broker[0]


@pytest.fixture
def proxy(broker: tuple[KafkaCluster, TcpProxy]) -> Iterator[TcpProxy]:
    proxy = broker[1]
    proxy.fired.clear()
    yield proxy
    proxy.heal()


@pytest.fixture
def admin(kafka: KafkaCluster) -> AdminClient:
    return kafka.admin()


def behind(proxy: TcpProxy) -> str:
    return f"127.0.0.1:{proxy.port}"


def await_batches(relay: Daemon, *, messages: int) -> int:
    """Wait until the relay has published so many messages from now on; give the number of batches that took."""
    before = len(relay.events_named("batch_published"))

    def sizes() -> list[int]:
        return [int(str(event["messages"])) for event in relay.events_named("batch_published")[before:]]

    eventually(lambda: sum(sizes()) >= messages)
    return len(sizes())


def test_a_slow_broker_gets_fewer_and_larger_batches_and_repeats_nothing(pipeline: Pipeline, proxy: TcpProxy) -> None:
    settings: dict[str, str | float] = {"lanes": LANES, "batch_size": 10 * BATCH_SIZE, "log_level": "debug"}
    with pipeline.relays(1, kafka__bootstrap_servers=behind(proxy), **settings) as [relay]:
        with pipeline.load(PLAN) as load:
            quick, memory = await_batches(relay, messages=5_000), relay.peak_memory_bytes
            proxy.slow_down(seconds=0.5)
            slow = await_batches(relay, messages=5_000)
            assert proxy.fired["delayed"] >= 2 * slow
            proxy.heal()
        pipeline.await_settled()
        assert slow < quick
        assert relay.peak_memory_bytes < memory + MORE_MEMORY_BYTES
    assert flaws(pipeline.judge(load.writes)) == {}


def test_a_broker_slower_than_the_deadline_repeats_no_more_than_the_batches_in_hand(
    pipeline: Pipeline, proxy: TcpProxy
) -> None:
    settings = {"lanes": LANES, "batch_size": BATCH_SIZE, **SHORT_TIMES}
    with pipeline.relays(1, kafka__bootstrap_servers=behind(proxy), **settings) as [relay]:
        with pipeline.load(PLAN) as load:
            load.await_more(500)
            proxy.slow_down(seconds=2.5)
            lost = relay.wait_for_event("kafka_lost")
            load.await_more(500)
            proxy.heal()
            relay.wait_for_event("kafka_recovered")
        pipeline.await_settled()
        assert lost["reason"]
    verdict = pipeline.judge(load.writes)
    assert flaws(verdict).keys() <= {"duplicated"}
    late = len(relay.events_named("kafka_lost"))
    assert len(verdict.duplicated) <= late * LANES * BATCH_SIZE


def test_an_answer_that_is_lost_after_the_write_repeats_nothing(pipeline: Pipeline, proxy: TcpProxy) -> None:
    written: list[int] = []
    proxy.swallow_reply_to(b"order-swallowed", action=lambda: written.append(len(pipeline.records())))
    servers = behind(proxy)
    with pipeline.relays(1, kafka__bootstrap_servers=servers, kafka__compression_type="none") as [relay]:
        with pipeline.database.connect() as writer:
            writes = commit_messages(writer, *["order-swallowed"] * 10)
        pipeline.await_settled()
        relay.terminate()
        assert relay.wait() == 0
    assert (proxy.fired["swallowed"], written) == (1, [10])
    assert flaws(pipeline.judge(writes)) == {}


def test_without_an_idempotent_producer_the_same_loss_repeats_the_message(pipeline: Pipeline, proxy: TcpProxy) -> None:
    topic = pipeline.topic("order")
    producer = confluent_kafka.Producer({"bootstrap.servers": behind(proxy), "log_level": 0})
    proxy.swallow_reply_to(b"order-swallowed")
    producer.produce(topic, key="order-swallowed")
    assert producer.flush(REQUEST_SECONDS) == 0
    assert proxy.fired["swallowed"] == 1
    assert len(read_topic(pipeline.kafka.bootstrap_servers, topic)) == 2


@contextlib.contextmanager
def forbidden(admin: AdminClient, *, topic: str) -> Iterator[None]:
    """Within the context the user `relay` may see the topic, but not write to it."""
    rule = (ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, "User:relay", "*", AclOperation.WRITE)
    refusal = AclBinding(*rule, AclPermissionType.DENY)
    admin.create_acls([refusal])[refusal].result(REQUEST_SECONDS)
    yield
    filter_ = AclBindingFilter(*rule, AclPermissionType.DENY)
    assert admin.delete_acls([filter_])[filter_].result(REQUEST_SECONDS) == [refusal]


def test_a_topic_that_is_forbidden_and_allowed_again_under_load_is_held_while_others_flow(
    pipeline: Pipeline, kafka: KafkaCluster, admin: AdminClient, topic_prefix: str
) -> None:
    rule = (ResourceType.TOPIC, topic_prefix, ResourcePatternType.PREFIXED, "User:relay", "*", AclOperation.ALL)
    grant = AclBinding(*rule, AclPermissionType.ALLOW)
    admin.create_acls([grant])[grant].result(REQUEST_SECONDS)
    login = {
        "kafka__bootstrap_servers": kafka.servers_of("LOGIN"),
        "kafka__security_protocol": "SASL_PLAINTEXT",
        "kafka__sasl_mechanism": "PLAIN",
        "kafka__sasl_username": "relay",
        "kafka__sasl_password": "let me in",
    }

    def payments() -> int:
        return len(read_topic(kafka.bootstrap_servers, pipeline.topic("payment")))

    with pipeline.relays(1, lanes=LANES, batch_size=BATCH_SIZE, **login) as [relay]:
        with pipeline.load(PLAN) as load:
            load.await_more(500)
            with forbidden(admin, topic=pipeline.topic("order")):
                held = relay.wait_for_events("topic_held", count=2 * LANES)
                assert {event["topic"] for event in held} == {pipeline.topic("order")}
                flowed = payments()
                load.await_more(500)
                eventually(lambda: payments() > flowed)
        pipeline.await_settled()
        relay.wait_for_event("topic_released")
    verdict = pipeline.judge(load.writes)
    assert flaws(verdict).keys() <= {"duplicated"}
    assert len(verdict.duplicated) <= LANES * BATCH_SIZE


def test_a_topic_that_is_deleted_and_created_again_gets_what_is_written_from_then_on(
    pipeline: Pipeline, admin: AdminClient
) -> None:
    topic = pipeline.topic("order")
    with pipeline.relays(1) as [relay], pipeline.database.connect() as writer:
        commit_messages(writer, "order-1", "order-2", "order-1")
        pipeline.await_settled()
        admin.delete_topics([topic])[topic].result(REQUEST_SECONDS)
        writes = commit_messages(writer, "order-1", "payment-1", "order-2", "order-1")
        relay.wait_for_event("topic_held")
        eventually(lambda: pipeline.unpublished() == 3)
        pipeline.kafka.create_topic(topic, partitions=3)
        pipeline.await_settled()
        relay.wait_for_event("topic_released")
        writes += commit_messages(writer, "order-1", "order-2")
        pipeline.await_settled()
    # The marks of the first three are of the topic that was deleted.
    verdict = pipeline.judge(writes)
    assert {**flaws(verdict), "false_mark": 0} == {"false_mark": 0}
    assert len(verdict.false_mark) == 3


def test_a_topic_that_takes_less_while_messages_flow_gets_them_in_smaller_batches(
    pipeline: Pipeline, admin: AdminClient
) -> None:
    with pipeline.relays(1, lanes=LANES) as [relay]:
        with pipeline.load(PLAN) as load:
            load.await_more(500)
            limit = ConfigEntry("max.message.bytes", "1000", incremental_operation=AlterConfigOpType.SET)
            resource = ConfigResource(ResourceType.TOPIC, pipeline.topic("order"), incremental_configs=[limit])
            admin.incremental_alter_configs([resource])[resource].result(REQUEST_SECONDS)
            refused = relay.wait_for_event("deliveries_failed")
            load.await_more(500)
        pipeline.await_settled()
        assert refused["codes"]
    verdict = pipeline.judge(load.writes)
    assert flaws(verdict).keys() <= {"duplicated"}
    assert len(verdict.duplicated) <= LANES * BATCH_SIZE


def insert(connection: Connection, *, key: str, ahead: str = "0 s", payload: bytes | None = b"x") -> None:
    connection.execute(
        """
        INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload_bytes, created_at)
        VALUES ('order', %s, 'happened', %s, now() + %s::interval)
        """,
        [key, payload, ahead],
    )
    connection.commit()


def test_a_time_that_the_topic_refuses_parks_its_key_with_the_reason(pipeline: Pipeline) -> None:
    with pipeline.relays(1), pipeline.database.connect() as writer:
        insert(writer, key="before")
        insert(writer, key="guilty", ahead="2 h")
        insert(writer, key="guilty")
        insert(writer, key="other")
        pipeline.await_settled()
        [(reason,)] = writer.execute("SELECT reason FROM outbox_pending WHERE sequence_no = 2").fetchall()
    assert pipeline.states() == [PUBLISHED, PARKED, PARKED, PUBLISHED]
    assert "further from now than the topic" in reason


def test_a_compacted_topic_takes_tombstones_and_even_an_empty_key(
    database: Database, kafka: KafkaCluster, topic_prefix: str, seed: int
) -> None:
    pipeline = Pipeline(database, kafka, prefix=topic_prefix, seed=seed)
    kafka.create_topic(pipeline.topic("order"), config={"cleanup.policy": "compact"})
    with pipeline.relays(1), database.connect() as writer:
        insert(writer, key="")
        insert(writer, key="gone", payload=None)
        insert(writer, key="", payload=None)
        pipeline.await_settled()
    assert pipeline.states() == [PUBLISHED] * 3
    records = read_topic(kafka.bootstrap_servers, pipeline.topic("order"))
    assert [(record.key(), record.value()) for record in records] == [(b"", b"x"), (b"gone", None), (b"", None)]


def test_partitions_that_are_added_under_load_are_noticed_and_lose_nothing(
    pipeline: Pipeline, admin: AdminClient
) -> None:
    topic = pipeline.topic("order")
    with pipeline.relays(1, lanes=LANES, kafka__topic_metadata_refresh_interval_ms=500) as [relay]:
        with pipeline.load(PLAN) as load:
            eventually(lambda: read_topic(pipeline.kafka.bootstrap_servers, topic))
            admin.create_partitions([NewPartitions(topic, 6)])[topic].result(REQUEST_SECONDS)
            noticed = relay.wait_for_event("partitions_changed")
            load.await_more(500)
        pipeline.await_settled()
        relay.terminate()
        assert relay.wait() == 0
    assert (noticed["topic"], noticed["partitions"]) == (topic, 6)
    assert len(relay.events_named("partitions_changed")) == 1
    history = pipeline.history(load.writes)
    assert max(record.partition for record in history.records if record.topic == topic) > 2
    assert judge(history).misplaced  # what came before is where it belonged then
    counts = {**history.partition_counts, topic: (3, 6)}
    assert flaws(judge(replace(history, partition_counts=counts))) == {}
