"""
Alerts in incidents made on purpose, and their runbooks pasted: the alert goes away, and all messages arrive.

The rules are the ones that are shipped, with their times divided, see `sped_up`. One stand serves all tests, each of
which leaves it in order; the dashboard's queries are asked of its Prometheus.
"""

from __future__ import annotations

import os
import signal
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import psycopg
import pytest

from tests.fixtures.kafka import running_cluster
from tests.fixtures.load import insert_messages
from tests.fixtures.marks import mark, set_aside
from tests.fixtures.postgres import binaries_of, create_database, running_server, temporary_directory
from tests.fixtures.stand import JOB, Stand
from tests.fixtures.waiting import eventually
from tests.monitoring.files import ALERTS, METRIC, panels, queried, sped_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fixtures.postgres import Database
    from tests.monitoring.files import Panel

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

ALTER_TOPIC = (
    'kafka-configs.sh --bootstrap-server "$BROKERS" --alter --entity-type topics --entity-name "$TOPIC" --add-config'
)

DEAD_ROWS = 1_000
BACKLOG = 5_000
NOT_AT_ONCE = {
    "outbox_relay_failed_deliveries_total": "has a series for each code that was seen",
    "outbox_relay_lost_connections_total": "has a series for each part that was lost",
    "outbox_relay_partitions_ahead_seconds": "is there in the partitioned layout only",
    "outbox_consumer_messages_total": "is told by applications",
    "outbox_consumer_pruned_messages_total": "the same",
}

LOCK_SHARD = """
SELECT FROM outbox_shard WHERE shard = hashtextextended('order:' || %s, 0) & 15 FOR UPDATE
"""

FALSE_MARK = """
INSERT INTO outbox_published (shard, through, messages, checksum)
SELECT shard, sequence_no, 0, 0 FROM outbox WHERE sequence_no = %s
"""

BURN = """
CREATE PROCEDURE burn(transactions bigint) LANGUAGE plpgsql AS $$
BEGIN
    FOR number IN 1..transactions LOOP
        PERFORM pg_current_xact_id();
        COMMIT;
    END LOOP;
END
$$;
"""


@pytest.fixture(scope="module")
def serving(postgres_version: int) -> Iterator[Stand]:
    with (
        temporary_directory() as directory,
        running_server(postgres_version) as server,
        running_cluster(brokers=1) as kafka,
    ):
        stand = Stand(
            directory,
            database=create_database(server),
            kafka=kafka,
            rules=sped_up(ALERTS.read_text(encoding="utf-8")),
            binaries=binaries_of(postgres_version),
        )
        with stand:
            yield stand


@pytest.fixture
def stand(serving: Stand) -> Stand:
    """In order: Prometheus sees a relay that has published everything."""
    serving.write("order-1")
    eventually(lambda: serving.prometheus.query("outbox_relay_unpublished_messages == 0"))
    return serving


def test_nothing_is_even_pending_while_all_is_in_order(stand: Stand) -> None:
    with stand.database.connect(autocommit=True) as admin:
        admin.execute("VACUUM outbox, outbox_published, outbox_pending")
    eventually(lambda: stand.prometheus.alerts() == [], timeout=60)
    for number in range(20):
        stand.write(f"order-{number}")
        stand.pipeline.await_settled()
        assert stand.prometheus.alerts() == []


@pytest.mark.parametrize("panel", [p for p in panels() if p.kind != "state-timeline"], ids=lambda panel: panel.title)
def test_panel_of_the_dashboard_shows_what_a_relay_in_service_tells(stand: Stand, panel: Panel) -> None:
    for expression in panel.expressions:
        if set(METRIC.findall(expression)) & NOT_AT_ONCE.keys():
            stand.prometheus.query(queried(expression, job=JOB))  # which raises if it cannot be understood
        else:
            eventually(partial(stand.prometheus.query, queried(expression, job=JOB)), message=f"nothing: {expression}")


def test_a_killed_relay_is_noticed_and_restarted(stand: Stand) -> None:
    with stand.incident("OutboxRelayDown"):
        stand.stop_relay()
        stand.write("order-1", "order-2")
        stand.prometheus.await_firing("OutboxRelayDown")
        stand.mend("OutboxRelayDown")


def test_locked_shards_stall_the_relay_until_their_holder_is_ended(stand: Stand) -> None:
    alerts = ("OutboxRelayStalled", "OutboxRelayCanaryLate")
    with stand.incident(*alerts), closing(stand.database.connect(application_name="by hand")) as person:
        person.execute("SELECT FROM outbox_shard ORDER BY shard FOR UPDATE")
        stand.write("order-1")
        for alert in alerts:
            stand.prometheus.await_firing(alert)
        stand.mend("OutboxRelayCanaryLate")
        assert "by hand" in stand.mend("OutboxRelayStalled")
        with pytest.raises(psycopg.OperationalError):
            person.execute("SELECT")


@contextmanager
def held_shard(stand: Stand, key: str) -> Iterator[int]:
    """Somebody holds the shard of *key* while a message of it is written; yields its number."""
    with closing(stand.database.connect(application_name="by hand")) as person:
        person.execute(LOCK_SHARD, [key])
        stand.write(key)
        query = "SELECT max(sequence_no) FROM outbox WHERE aggregate_id = %s"
        [(number,)] = person.execute(query, [key]).fetchall()
        yield number


def test_a_message_that_waits_where_somebody_holds_the_shard_gets_through_when_he_is_ended(stand: Stand) -> None:
    with stand.incident("OutboxRelayMessagesWaiting"), held_shard(stand, "order-1") as number:
        with stand.database.connect() as admin:
            set_aside(admin, number, state="waiting")
            mark(admin, shard=shard_of(admin, number), through=number)
        stand.prometheus.await_firing("OutboxRelayMessagesWaiting")
        assert "by hand" in stand.mend("OutboxRelayMessagesWaiting")


def test_a_message_below_a_mark_that_has_not_counted_it_is_found_and_published(stand: Stand) -> None:
    with stand.incident("OutboxRelayMessagesSkipped"):
        with held_shard(stand, "order-1") as number, stand.database.connect() as admin:
            admin.execute(FALSE_MARK, [number])
        stand.prometheus.await_firing("OutboxRelayMessagesSkipped")
        stand.mend("OutboxRelayMessagesSkipped")


def shard_of(connection: psycopg.Connection, number: int) -> int:
    [(shard,)] = connection.execute("SELECT shard FROM outbox WHERE sequence_no = %s", [number]).fetchall()
    return int(shard)


def test_a_relay_that_falls_behind_is_helped_by_a_second_one(stand: Stand) -> None:
    with stand.other_relay(lanes=1, batch_size=1), stand.incident("OutboxRelayFallingBehind"):

        def has_fallen_behind() -> bool:
            if stand.pipeline.unpublished() < BACKLOG:
                stand.write(*["order-1", "order-2"] * 500)
            return "OutboxRelayFallingBehind" in stand.prometheus.firing()

        eventually(has_fallen_behind, timeout=90)
        stand.mend("OutboxRelayFallingBehind")
    stand.stop_relay("outbox-relay@2")


def test_kafka_away_is_noticed_and_started(stand: Stand) -> None:
    with stand.incident("OutboxRelayKafkaAway"):
        stand.kafka.kill()
        stand.write("order-1", "order-2")
        stand.prometheus.await_firing("OutboxRelayKafkaAway")
        stand.mend("OutboxRelayKafkaAway")


def test_postgresql_away_is_noticed_and_started(stand: Stand) -> None:
    with stand.incident("OutboxRelayDatabaseAway"):
        stand.database.server.stop("immediate")
        stand.prometheus.await_firing("OutboxRelayDatabaseAway")
        stand.mend("OutboxRelayDatabaseAway")
        stand.write("order-1")


def test_a_missing_topic_is_created_and_its_messages_arrive(stand: Stand) -> None:
    topic = stand.pipeline.topic("parcel")
    with stand.incident("OutboxRelayTopicHeld"):
        stand.run('kafka-topics.sh --bootstrap-server "$BROKERS" --delete --topic "$TOPIC"', TOPIC=topic)
        stand.write("parcel-1", "order-1", "parcel-1")
        stand.prometheus.await_firing("OutboxRelayTopicHeld", timeout=60)
        assert f"topic {topic}: does not exist" in stand.mend("OutboxRelayTopicHeld", TOPIC=topic)


def test_a_topic_that_refuses_messages_parks_them_until_it_takes_more(stand: Stand) -> None:
    topic = stand.pipeline.topic("payment")
    with stand.incident("OutboxRelayMessagesParked"):
        stand.run(f"{ALTER_TOPIC} max.message.bytes=100", TOPIC=topic)
        stand.write("payment-1", "order-1", "payment-1")
        stand.prometheus.await_firing("OutboxRelayMessagesParked")
        printed = stand.mend("OutboxRelayMessagesParked", TOPIC=topic, REASON="TOO_LARGE")
        assert "released 2 messages of 1 key" in printed


def test_a_writer_that_stays_open_is_named_and_ended(stand: Stand) -> None:
    alerts = ("OutboxRelayHorizonHeld", "OutboxRelayWriterGivenUp")
    with stand.incident(*alerts), closing(stand.database.connect(application_name="checkout")) as writer:
        stand.writes += insert_messages(writer, "order-1")
        stand.write("order-2")
        for alert in alerts:
            stand.prometheus.await_firing(alert)
        assert "checkout" in stand.mend("OutboxRelayHorizonHeld")
        with pytest.raises(psycopg.OperationalError):
            writer.commit()


def test_a_forgotten_prepared_transaction_is_rolled_back(stand: Stand) -> None:
    with stand.incident("OutboxRelayPreparedTransactionForgotten"):
        with stand.database.connect() as writer:
            stand.writes += insert_messages(writer, "order-1")
            writer.execute("PREPARE TRANSACTION 'it''s forgotten'")
            writer.commit()
        stand.prometheus.await_firing("OutboxRelayPreparedTransactionForgotten")
        assert "ROLLBACK PREPARED" in stand.mend("OutboxRelayPreparedTransactionForgotten")


def test_a_held_snapshot_bloats_the_table_and_ages_the_database_until_all_is_mended(stand: Stand) -> None:
    alerts = [f"OutboxRelay{name}" for name in ("SnapshotHeld", "VacuumHeldBack", "TableBloated", "WraparoundNear")]
    with stand.incident(*alerts), closing(stand.database.connect(application_name="report")) as reader:
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        [(messages,)] = reader.execute("SELECT count(*) FROM outbox").fetchall()
        with stand.database.connect(autocommit=True) as admin:
            admin.execute("ALTER TABLE outbox SET (autovacuum_enabled = off)")
            for _ in range(2 + DEAD_ROWS // messages):
                admin.execute("UPDATE outbox SET headers = headers")
            admin.execute(BURN)
            admin.execute("SET synchronous_commit = off")
            admin.execute("CALL burn(101000)")
            admin.execute("DROP PROCEDURE burn")
        for alert in alerts:
            stand.prometheus.await_firing(alert, timeout=60)
        for alert in alerts:
            stand.mend(alert)
        with pytest.raises(psycopg.OperationalError):
            reader.execute("SELECT")


def test_a_thread_that_waits_for_ever_is_freed_by_a_restart(stand: Stand) -> None:
    with stand.incident("OutboxRelayThreadStuck"), frozen(stand.database, "outbox-relay lane-1"):
        stand.write("order-1")
        alert = stand.prometheus.await_firing("OutboxRelayThreadStuck")
        assert alert["labels"]["thread"] == "lane-1"
        stand.mend("OutboxRelayThreadStuck")
        stand.pipeline.await_settled()


@contextmanager
def frozen(database: Database, name: str) -> Iterator[None]:
    """The server's process of a session neither answers nor ends in the block; it is idle, and holds no locks."""
    query = "SELECT pid, state FROM pg_stat_activity WHERE application_name = %s"
    with database.connect(autocommit=True) as admin:

        def freeze_idle() -> int:
            [(pid, _)] = admin.execute(query, [name]).fetchall()
            os.kill(pid, signal.SIGSTOP)
            if admin.execute(query, [name]).fetchall() == [(pid, "idle")]:
                return int(pid)
            os.kill(pid, signal.SIGCONT)
            return 0

        frozen_pid = eventually(freeze_idle)
    try:
        yield
    finally:
        os.kill(frozen_pid, signal.SIGCONT)


def test_pruning_without_the_privilege_is_noticed_and_granted(stand: Stand) -> None:
    # A relay without the privilege would not start.
    with stand.other_relay(retention=1), stand.incident("OutboxRelayPruningFails"):
        with stand.database.connect(autocommit=True) as admin:
            admin.execute("REVOKE DELETE ON outbox FROM outbox_pruner")
        stand.write("order-1")
        stand.prometheus.await_firing("OutboxRelayPruningFails", timeout=60)
        stand.mend("OutboxRelayPruningFails")
        kept = stand.writes[-1].message_id
        eventually(lambda: kept not in {row.message_id for row in stand.pipeline.rows()}, message="nothing is pruned")
