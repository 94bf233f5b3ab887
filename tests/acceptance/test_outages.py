"""Kafka, PostgreSQL or the network are away: the relay waits without locks, recovers by itself and loses nothing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay.sandbox.history import State
from outbox_relay.sandbox.kafka import KafkaCluster
from outbox_relay.sandbox.ports import ReservedPort
from outbox_relay.sandbox.postgres import PostgresServer
from tests.fixtures.load import Plan, commit_messages
from tests.fixtures.pipeline import COMMIT_OF_MARKS, Pipeline, flaws, most_in_hand, short_times
from tests.fixtures.probes import ask
from tests.fixtures.proxy import TcpProxy
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from outbox_relay.sandbox.kafka import Kafka
    from tests.fixtures.postgres import Database

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

LANES = 2
BATCH_SIZE = 500
STINT = most_in_hand(batch_size=BATCH_SIZE)
AWAY_SECONDS = 8.0
PUBLISH_DEADLINE = 3
SHORT_TIMES = short_times(publish_deadline=PUBLISH_DEADLINE)
SLACK_SECONDS = 5.0
KAFKA_BACK_SECONDS = 15.0
CRASHES = 3
REPLAYED_SECONDS = 2.0  # a crash loses marks of the last 3 x wal_writer_delay, 0.6 s, and of what commits meanwhile
PLAN = Plan(writers=6, bulk_rows=100)


def stays(condition: Callable[[], bool], *, seconds: float) -> bool:
    """Whether *condition* is true all the time."""
    end = time.monotonic() + seconds
    eventually(lambda: time.monotonic() > end or not condition(), timeout=seconds + SLACK_SECONDS)
    return condition()


def test_kafka_away_at_start_is_waited_for(own_kafka_pipeline: Pipeline, own_kafka: KafkaCluster) -> None:
    pipeline, port = own_kafka_pipeline, ReservedPort()
    own_kafka.kill()
    with pipeline.relay(metrics_port=port.number, **SHORT_TIMES) as relay, pipeline.database.connect() as writer:
        relay.wait_for_event("kafka_lost")
        writes = commit_messages(writer, "order-1", "payment-1", "order-1")
        assert stays(lambda: pipeline.open_transactions() == 0, seconds=SLACK_SECONDS)
        assert ask(port.number, "/livez") == (200, "ok\n")
        assert ask(port.number, "/readyz") == (503, "kafka has not been reached yet\n")
        own_kafka.restart()
        pipeline.await_settled(timeout=KAFKA_BACK_SECONDS)
        relay.wait_until_ready()
        assert [len(relay.events_named(name)) for name in ("kafka_lost", "kafka_recovered")] == [1, 1]
    assert flaws(pipeline.judge(writes)) == {}


@pytest.mark.parametrize(
    ("go_away", "come_back"),
    [
        (KafkaCluster.kill, KafkaCluster.restart),
        (KafkaCluster.stop, KafkaCluster.restart),
        (KafkaCluster.pause, KafkaCluster.resume),
    ],
    ids=["killed", "stopped", "paused"],
)
def test_kafka_going_away_under_load_holds_no_transaction_open(
    own_kafka_pipeline: Pipeline,
    own_kafka: KafkaCluster,
    go_away: Callable[[KafkaCluster], None],
    come_back: Callable[[KafkaCluster], None],
) -> None:
    pipeline, port = own_kafka_pipeline, ReservedPort()
    settings = {"lanes": LANES, "batch_size": BATCH_SIZE, "metrics_port": port.number, **SHORT_TIMES}
    with pipeline.relay(**settings) as relay:
        relay.wait_until_ready()
        with pipeline.load(PLAN) as load:
            load.await_more(2_000)
            go_away(own_kafka)
            relay.wait_for_event("kafka_lost", timeout=PUBLISH_DEADLINE + SLACK_SECONDS)
            # Each lane finds out for itself, at the publish deadline of a batch of its own.
            eventually(
                lambda: stays(lambda: pipeline.open_transactions() == 0, seconds=1.0),
                timeout=LANES * PUBLISH_DEADLINE + SLACK_SECONDS,
            )
            assert stays(lambda: pipeline.open_transactions() == 0, seconds=AWAY_SECONDS)
            assert ask(port.number, "/livez") == (200, "ok\n")
            assert ask(port.number, "/readyz") == (503, "kafka is away\n")
            come_back(own_kafka)
            relay.wait_for_event("kafka_recovered", timeout=KAFKA_BACK_SECONDS)
        pipeline.await_settled()
        assert ask(port.number, "/readyz") == (200, "ok\n")
        assert [len(relay.events_named(name)) for name in ("kafka_lost", "kafka_recovered")] == [1, 1]
    verdict = pipeline.judge(load.writes)
    assert flaws(verdict).keys() <= {"duplicated"}
    assert len(verdict.duplicated) <= LANES * BATCH_SIZE


def test_database_away_at_start_is_waited_for(own_postgres_pipeline: Pipeline, own_postgres: PostgresServer) -> None:
    pipeline, port = own_postgres_pipeline, ReservedPort()
    own_postgres.stop()
    with pipeline.relay(metrics_port=port.number) as relay:
        relay.wait_for_event("database_lost")
        assert ask(port.number, "/livez") == (200, "ok\n")
        status, reasons = ask(port.number, "/readyz")
        assert (status, reasons.splitlines()[0]) == (503, "database has not been reached yet")
        own_postgres.start()
        relay.wait_until_ready()
        with pipeline.database.connect() as writer:
            writes = commit_messages(writer, "order-1", "payment-1")
        pipeline.await_settled()
        assert [len(relay.events_named(name)) for name in ("database_lost", "database_recovered")] == [1, 1]
    assert flaws(pipeline.judge(writes)) == {}


def stop_immediately(server: PostgresServer) -> None:
    server.stop("immediate")


@pytest.mark.parametrize(("crash", "is_synchronous"), [(stop_immediately, False), (PostgresServer.kill, True)])
def test_crashes_of_the_database_under_load_lose_nothing(
    own_postgres_pipeline: Pipeline, crash: Callable[[PostgresServer], None], *, is_synchronous: bool
) -> None:
    pipeline, server = own_postgres_pipeline, own_postgres_pipeline.database.server
    crashed_at = []
    with pipeline.relay(lanes=LANES, batch_size=BATCH_SIZE, synchronous_commit=str(is_synchronous)) as relay:
        relay.wait_for_event("relay_started")
        with pipeline.load(PLAN) as load:
            for number in range(1, CRASHES + 1):
                load.await_more(3_000)
                crashed_at.append(time.monotonic())
                crash(server)
                relay.wait_for_events("database_lost", count=number)
                server.start()
                relay.wait_for_events("database_recovered", count=number, timeout=SLACK_SECONDS)
            load.await_more(1_000)
        pipeline.await_settled()
        relay.terminate()
        assert relay.wait() == 0
    verdict = pipeline.judge(load.writes)
    assert flaws(verdict).keys() <= {"unknown", "recovered", "duplicated"}
    replayed = sum(0 <= at - write.ended_at < REPLAYED_SECONDS for write in load.writes for at in crashed_at)
    assert len(verdict.duplicated) <= CRASHES * LANES * STINT + (0 if is_synchronous else replayed)


def test_commit_that_the_server_never_got_repeats_its_stint(pipeline: Pipeline) -> None:
    published: list[int] = []
    with TcpProxy("127.0.0.1", pipeline.database.server.port) as proxy:
        proxy.cut_before(COMMIT_OF_MARKS, action=lambda: published.append(len(pipeline.records())))
        duplicated = publish_through(proxy, pipeline)
        assert proxy.fired["cut_before"] == 1
    assert published == [duplicated]
    assert duplicated > 0


def test_commit_whose_reply_is_lost_repeats_nothing(pipeline: Pipeline) -> None:
    with TcpProxy("127.0.0.1", pipeline.database.server.port) as proxy:
        proxy.swallow_reply_to(COMMIT_OF_MARKS)
        duplicated = publish_through(proxy, pipeline)
        assert proxy.fired["swallowed"] == 1
    assert duplicated == 0


def publish_through(proxy: TcpProxy, pipeline: Pipeline) -> int:
    """Publish 250 messages in batches of 100 by a relay behind *proxy*; give the number of duplicates."""
    with pipeline.database.connect() as writer:
        writes = commit_messages(writer, *["order-1"] * 250)
    behind_proxy = make_conninfo(pipeline.database.relay_dsn, port=proxy.port)
    with pipeline.relay(database_url=behind_proxy, lanes=1, batch_size=100) as relay:
        pipeline.await_settled()
        relay.wait_for_event("database_recovered")
    verdict = pipeline.judge(writes)
    assert flaws(verdict).keys() <= {"duplicated"}
    return len(verdict.duplicated)


def test_a_network_cut_again_and_again_under_load_loses_nothing(pipeline: Pipeline) -> None:
    with TcpProxy("127.0.0.1", pipeline.database.server.port) as proxy:
        behind_proxy = make_conninfo(pipeline.database.relay_dsn, port=proxy.port)
        with pipeline.relays(1, database_url=behind_proxy, lanes=LANES, batch_size=BATCH_SIZE) as [relay]:
            with pipeline.load(PLAN) as load:
                for number in range(1, 6):
                    load.await_more(1_000)
                    proxy.cut()
                    relay.wait_for_events("database_recovered", count=number)
            pipeline.await_settled()
        assert proxy.fired["cut"] >= 5
    verdict = pipeline.judge(load.writes)
    assert flaws(verdict).keys() <= {"duplicated"}
    assert len(verdict.duplicated) <= 5 * LANES * STINT


def test_messages_of_an_unknown_topic_wait_while_others_flow(
    database: Database, kafka: Kafka, topic_prefix: str, seed: int
) -> None:
    pipeline = Pipeline(database, kafka, prefix=topic_prefix, seed=seed)
    kafka.create_topic(pipeline.topic("order"))
    kafka.create_topic(pipeline.topic("parcel"))
    with pipeline.relays(1) as [relay], database.connect() as writer:
        writes = commit_messages(writer, "payment-1", "order-1", "payment-1")
        held = relay.wait_for_event("topic_held", timeout=60)
        assert held["topic"] == pipeline.topic("payment")
        writes += commit_messages(writer, "payment-2", "order-1")
        waiting, published = State.WAITING, State.PUBLISHED
        states = [waiting, published, waiting, waiting, published]
        eventually(lambda: pipeline.states() == states)
        kafka.create_topic(pipeline.topic("payment"))
        pipeline.await_settled()
        relay.wait_for_event("topic_released")
    assert flaws(pipeline.judge(writes)) == {}
