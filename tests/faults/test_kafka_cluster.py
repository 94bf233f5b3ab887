"""Of three brokers some are killed or hand over their partitions: the relay waits or goes on, and loses nothing."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest
from confluent_kafka import ElectionType, TopicPartition
from confluent_kafka.admin import NewTopic

from outbox_relay.sandbox.history import State
from tests.fixtures.daemon import outbox_relay
from tests.fixtures.kafka import running_cluster
from tests.fixtures.load import Plan, commit_messages
from tests.fixtures.pipeline import Pipeline, flaws, short_times
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from confluent_kafka.admin import PartitionMetadata

    from outbox_relay.sandbox.kafka import KafkaCluster
    from tests.fixtures.postgres import Database

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

PUBLISHED, WAITING = State.PUBLISHED, State.WAITING
LANES = 2
BATCH_SIZE = 500
PLAN = Plan(writers=4, bulk_rows=100)
QUICK_TO_MISS_A_BROKER = {"broker.session.timeout.ms": "3000", "broker.heartbeat.interval.ms": "500"}
SHORT_TIMES = short_times(publish_deadline=3)
REQUEST_SECONDS = 30


@pytest.fixture(scope="module")
def kafka() -> Iterator[KafkaCluster]:
    """In the place of the broker that all tests share: three, each with a copy of every partition."""
    with running_cluster(brokers=3, settings=QUICK_TO_MISS_A_BROKER) as cluster:
        yield cluster


def leaders(pipeline: Pipeline, *topics: str) -> list[int]:
    """Who leads each partition of the topics, which are all of them unless named."""
    return [partition.leader for topic in topics or pipeline.topics for partition in partitions_of(pipeline, topic)]


def in_sync(pipeline: Pipeline, topic: str) -> list[list[int]]:
    """Who has all of each partition."""
    return [partition.isrs for partition in partitions_of(pipeline, topic)]


def partitions_of(pipeline: Pipeline, topic: str) -> list[PartitionMetadata]:
    """As the broker that is asked knows them: none, until it has heard of a new topic."""
    found = pipeline.kafka.admin().list_topics(topic, timeout=REQUEST_SECONDS).topics[topic].partitions
    return [partition for _, partition in sorted(found.items())]


def test_brokers_killed_one_after_the_other_under_load_repeat_nothing(pipeline: Pipeline, kafka: KafkaCluster) -> None:
    """Whoever leads a partition, and whoever is the controller, is killed once; then leaders are moved back."""
    with pipeline.relays(1, lanes=LANES, batch_size=BATCH_SIZE):
        with pipeline.load(PLAN) as load:
            for node in (1, 2, 3):
                assert node in leaders(pipeline)
                kafka.kill(node)
                eventually(lambda: node not in leaders(pipeline))  # noqa: B023 -- at once
                load.await_more(500)
                kafka.restart(node)
            moved = leaders(pipeline)
            prefer_first_replicas(pipeline)
            eventually(lambda: leaders(pipeline) != moved)
            load.await_more(500)
        pipeline.await_settled()
    assert flaws(pipeline.judge(load.writes)) == {}


def prefer_first_replicas(pipeline: Pipeline) -> None:
    """Have each partition led by the first of its brokers, as an operator does after a restart."""
    admin = pipeline.kafka.admin()
    partitions = [TopicPartition(topic, number) for topic in pipeline.topics for number in range(3)]
    admin.elect_leaders(ElectionType.PREFERRED, partitions).result(REQUEST_SECONDS)


def test_messages_wait_while_too_few_copies_would_be_written(
    database: Database, kafka: KafkaCluster, topic_prefix: str, seed: int
) -> None:
    pipeline = Pipeline(database, kafka, prefix=topic_prefix, seed=seed)
    kafka.create_topic(pipeline.topic("order"), config={"min.insync.replicas": "3"})
    kafka.create_topic(pipeline.topic("payment"), config={"min.insync.replicas": "2"})
    kafka.create_topic(pipeline.topic("parcel"))
    with pipeline.relays(1, **SHORT_TIMES) as [relay], database.connect() as writer:
        writes = commit_messages(writer, "order-1", "payment-1")
        pipeline.await_settled()
        kafka.kill(2)
        writes += commit_messages(writer, "order-1", "payment-1")
        relay.wait_for_event("kafka_lost")
        eventually(lambda: pipeline.states() == [PUBLISHED, PUBLISHED, WAITING, PUBLISHED])
        kafka.restart(2)
        pipeline.await_settled()
        relay.wait_for_event("kafka_recovered")
    assert flaws(pipeline.judge(writes)).keys() <= {"duplicated"}


def test_two_of_three_brokers_killed_under_load_hold_everything_until_one_is_back(
    pipeline: Pipeline, kafka: KafkaCluster
) -> None:
    with pipeline.relays(1, lanes=LANES, batch_size=BATCH_SIZE, **SHORT_TIMES) as [relay]:
        with pipeline.load(PLAN) as load:
            load.await_more(500)
            kafka.kill(1)
            kafka.kill(3)
            relay.wait_for_event("kafka_lost")
            waiting = pipeline.unpublished()
            load.await_more(500)
            assert pipeline.unpublished() > waiting
        kafka.restart(1)
        pipeline.await_settled()
    kafka.restart(3)
    verdict = pipeline.judge(load.writes)
    lost = len(relay.events_named("kafka_lost"))
    assert flaws(verdict).keys() <= {"duplicated"}
    assert len(verdict.duplicated) <= lost * LANES * BATCH_SIZE


def test_what_an_unclean_election_throws_away_is_still_in_the_table_and_can_be_replayed(
    database: Database, kafka: KafkaCluster, topic_prefix: str, seed: int
) -> None:
    """A limit: what Kafka acknowledged and forgets afterwards is marked published."""
    pipeline = Pipeline(database, kafka, prefix=topic_prefix, seed=seed)
    for name in ("payment", "parcel"):
        kafka.create_topic(pipeline.topic(name))
    topic = pipeline.topic("order")
    create_fragile_topic(pipeline, topic, leader=1, follower=2)
    with pipeline.relays(1, **SHORT_TIMES), database.connect() as writer:
        writes = commit_messages(writer, "order-1")
        pipeline.await_settled()
        kafka.kill(2)
        eventually(lambda: in_sync(pipeline, topic) == [[1]])
        lost = commit_messages(writer, "order-1", "order-2")
        pipeline.await_settled()
        kafka.kill(1)
        kafka.restart(2)
        eventually(lambda: leaders(pipeline, topic) == [2], timeout=60)
        kafka.restart(1)
        last = commit_messages(writer, "order-2")
        pipeline.await_settled()
        writes += lost + last
        ids = sorted(write.message_id for write in lost)
        verdict = pipeline.judge(writes)
        assert sorted(verdict.lost) == sorted(verdict.false_mark) == ids
        replay(pipeline, numbers=range(2, 4))
    assert sorted(pipeline.judge(writes).replayed) == ids


def create_fragile_topic(pipeline: Pipeline, topic: str, *, leader: int, follower: int) -> None:
    """Of one partition with two copies, of which the leader alone is enough, and a stale one may lead."""
    config = {"min.insync.replicas": "1", "unclean.leader.election.enable": "true"}
    admin = pipeline.kafka.admin()
    wanted = NewTopic(topic, 1, replica_assignment=[[leader, follower]], config=config)
    admin.create_topics([wanted])[topic].result(REQUEST_SECONDS)
    eventually(lambda: in_sync(pipeline, topic) == [[leader, follower]])


def replay(pipeline: Pipeline, *, numbers: range) -> None:
    bounds = [f"--from-sequence={numbers[0]}", f"--through-sequence={numbers[-1]}"]
    subprocess.run(
        outbox_relay("replay", *bounds, "--why=unclean election", "--yes"),
        env=os.environ | pipeline.environment(database_url=pipeline.database.dsn),
        check=True,
        timeout=120,
    )
