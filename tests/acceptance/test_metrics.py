"""What the metrics tell of the database, of a canary, and of what went wrong."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay.relay.canary import AGGREGATE_TYPE
from outbox_relay.sandbox.ports import ReservedPort
from tests.fixtures.load import commit_messages, insert_messages
from tests.fixtures.pipeline import COMMIT_OF_MARKS
from tests.fixtures.postgres import login
from tests.fixtures.probes import scrape
from tests.fixtures.proxy import TcpProxy
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fixtures.pipeline import Pipeline

pytestmark = pytest.mark.kafka

FAIL_TWICE = """
CREATE SEQUENCE attempt;
GRANT USAGE ON SEQUENCE attempt TO PUBLIC;
CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    number CONSTANT bigint := nextval('attempt');
BEGIN
    IF number <= 2 THEN
        RAISE 'attempt %', number USING ERRCODE = CASE number WHEN 1 THEN '40001' ELSE 'P0001' END;
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER fail AFTER INSERT ON outbox_published FOR EACH STATEMENT EXECUTE FUNCTION fail()
"""

SELECT_SURVEY = """
SELECT query_start FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'outbox-relay survey'
"""


class Relay:
    """The metrics of a running relay."""

    def __init__(self, port: int) -> None:
        self._port = port

    def value(self, name: str, *labels: str) -> float | None:
        return scrape(self._port).get((f"outbox_relay_{name}", labels))

    def await_value(self, name: str, *labels: str, expected: float | None) -> None:
        eventually(lambda: self.value(name, *labels) == expected, message=f"{name} is not {expected}")


@contextmanager
def running(pipeline: Pipeline, **settings: str | float) -> Iterator[Relay]:
    port = ReservedPort()
    with pipeline.relay(metrics_port=port.number, **settings) as daemon:
        daemon.wait_until_ready()
        yield Relay(port.number)


def test_a_survey_shows_the_backlog_and_the_tables_with_the_grants_of_a_relay(pipeline: Pipeline) -> None:
    with (
        login(pipeline.database, group="outbox_relay") as role,
        pipeline.database.connect() as writer,
        pipeline.database.connect() as somebody,
        running(
            pipeline, survey_interval=0.1, retention=0, database_url=make_conninfo(pipeline.database.dsn, user=role)
        ) as relay,
    ):
        relay.await_value("unpublished_messages", expected=0)
        somebody.execute("SELECT FROM outbox_shard FOR UPDATE")
        commit_messages(writer, "order-1", "order-2", "order-3")
        relay.await_value("unpublished_messages", expected=3)
        assert (relay.value("oldest_unpublished_seconds") or 0) > 0
        assert relay.value("table_bytes", "outbox") == 8192 * 2
        assert relay.value("longest_transaction_seconds") is None
        somebody.rollback()
        relay.await_value("unpublished_messages", expected=0)
        assert relay.value("oldest_unpublished_seconds") == 0


def test_figures_of_the_database_disappear_while_it_is_away(pipeline: Pipeline) -> None:
    with TcpProxy("127.0.0.1", pipeline.database.server.port) as proxy:
        behind_proxy = make_conninfo(pipeline.database.relay_dsn, port=proxy.port)
        with running(pipeline, survey_interval=0.1, database_url=behind_proxy) as relay:
            relay.await_value("parked_messages", expected=0)
            proxy.cut(refuse=True)
            relay.await_value("parked_messages", expected=None)
            assert relay.value("xid_age") is None
            proxy.heal()
            relay.await_value("parked_messages", expected=0)


def test_a_scrape_asks_the_database_nothing(pipeline: Pipeline) -> None:
    with pipeline.database.connect(autocommit=True) as admin, running(pipeline, survey_interval=600) as relay:
        relay.await_value("unpublished_messages", expected=0)
        before = admin.execute(SELECT_SURVEY).fetchall()
        assert len(before) == 1
        for _ in range(50):
            assert relay.value("unpublished_messages") == 0
        assert admin.execute(SELECT_SURVEY).fetchall() == before


def test_without_a_survey_there_are_no_figures_of_the_database(pipeline: Pipeline) -> None:
    with pipeline.database.connect(autocommit=True) as admin, running(pipeline, survey_interval=0) as relay:
        assert relay.value("unpublished_messages") is None
        assert admin.execute(SELECT_SURVEY).fetchall() == []


def test_messages_whose_mark_is_lost_are_counted_by_cause(pipeline: Pipeline) -> None:
    with pipeline.database.connect(autocommit=True) as admin:
        admin.execute(FAIL_TWICE)
    with (
        TcpProxy("127.0.0.1", pipeline.database.server.port) as proxy,
        pipeline.database.connect() as writer,
        running(pipeline, database_url=make_conninfo(pipeline.database.relay_dsn, port=proxy.port)) as relay,
    ):
        commit_messages(writer, "order-1", "order-1", "order-1")
        pipeline.await_settled()
        relay.await_value("published_messages_total", pipeline.topic("order"), expected=9)
        proxy.cut_before(COMMIT_OF_MARKS)
        commit_messages(writer, "order-2", "order-2")
        pipeline.await_settled()
        causes = ("conflict", "error", "connection", "order")
        assert [relay.value("republished_messages_total", cause) for cause in causes] == [3, 3, 2, 0]
        assert proxy.fired["cut_before"] == 1


def test_open_writers_that_hold_the_horizon_are_counted(pipeline: Pipeline) -> None:
    with (
        pipeline.database.connect() as writer,
        pipeline.database.connect() as another,
        pipeline.database.connect() as third,
        running(pipeline, ordering_timeout=60) as relay,
    ):
        insert_messages(writer, "order-1")
        insert_messages(another, "order-2")
        commit_messages(third, "order-3")
        relay.await_value("horizon_blockers", expected=2)
        writer.rollback()
        relay.await_value("horizon_blockers", expected=1)
        another.rollback()
        relay.await_value("horizon_blockers", expected=0)


def test_a_refused_batch_is_counted_as_a_producer_and_as_what_it_leaves_parked(pipeline: Pipeline) -> None:
    pipeline.kafka.create_topic(pipeline.topic("small"), config={"max.message.bytes": "2000"})
    with pipeline.database.connect() as writer, running(pipeline, survey_interval=0.1, lanes=1) as relay:
        writer.execute(
            """
            INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload_bytes)
            SELECT 'small', 'key', 'happened', unnest(%s::bytea[])
            """,
            [[b"fits", os.urandom(5_000), b"comes later"]],
        )
        writer.commit()
        pipeline.await_settled()
        relay.await_value("parked_messages", expected=2)
        assert relay.value("parked_keys") == 1
        assert relay.value("newly_parked_messages_total") == 2
        commit_messages(writer, "order-1")  # for which the producer is needed again
        relay.await_value("rebuilt_producers_total", expected=1)


def test_the_age_of_each_message_at_its_acknowledgement_is_counted(pipeline: Pipeline) -> None:
    with pipeline.database.connect() as writer, running(pipeline) as relay:
        commit_messages(writer, "order-1", "order-2")
        with pipeline.database.connect() as backdating:
            backdating.execute(
                """
                INSERT INTO outbox (aggregate_type, aggregate_id, event_type, created_at)
                VALUES ('order', 'order-3', 'happened', now() - interval '100 seconds')
                """
            )
        relay.await_value("commit_to_ack_seconds_count", expected=3)
        seconds = relay.value("commit_to_ack_seconds_sum")
        assert seconds is not None
        assert 100 < seconds < 110
        assert relay.value("commit_to_ack_seconds_bucket", "60.0") == 2


def test_a_canary_measures_the_way_to_kafka_and_back(pipeline: Pipeline) -> None:
    pipeline.kafka.create_topic(pipeline.topic(AGGREGATE_TYPE))
    with (
        login(pipeline.database, group="outbox_relay, outbox_writer") as role,
        running(
            pipeline,
            canary_interval=0.05,
            retention=0,
            database_url=make_conninfo(pipeline.database.dsn, user=role),
        ) as relay,
    ):
        eventually(lambda: (relay.value("canary_seconds_count") or 0) >= 3)
        assert 0 < (relay.value("canary_seconds_sum") or 0) < 30
        published = relay.value("published_messages_total", pipeline.topic(AGGREGATE_TYPE)) or 0
        assert published >= 3
        with pipeline.database.connect() as somebody:
            somebody.execute("SELECT FROM outbox_shard FOR UPDATE")
            eventually(lambda: (relay.value("canary_open_seconds") or 0) > 0.5)
        eventually(lambda: (relay.value("canary_seconds_count") or 0) > published)


def test_a_canary_without_the_grant_exits_with_3_and_the_grant(pipeline: Pipeline) -> None:
    with login(pipeline.database, group="outbox_relay") as role:
        dsn = make_conninfo(pipeline.database.dsn, user=role)
        with pipeline.relay(database_url=dsn, canary_interval=1, retention=0) as relay:
            assert relay.wait() == 3
    assert f"GRANT outbox_writer TO {role}" in "".join(relay.other_lines)
