"""PostgreSQL is there and refuses: locks, deadlocks, ended sessions, no connection, not ready, not writable."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, LiteralString

import pytest
from psycopg import sql

from outbox_relay.sandbox.ports import ReservedPort
from tests.fixtures.load import Plan, commit_messages
from tests.fixtures.pipeline import TERMINATE_RELAYS, flaws, most_in_hand
from tests.fixtures.probes import ask
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from outbox_relay.sandbox.postgres import PostgresServer
    from tests.fixtures.daemon import Daemon
    from tests.fixtures.pipeline import Pipeline

pytestmark = pytest.mark.kafka

LANES = 2
BATCH_SIZE = 500
STINT = most_in_hand(batch_size=BATCH_SIZE)
ENDED_SESSIONS = 5
RESTARTS = 3
REFUSED_MARKS = 3
PLAN = Plan(writers=6, bulk_rows=100)

SELECT_ENDED = sql.SQL("""
SELECT count({function}(pid))
FROM pg_stat_activity
WHERE datname = current_database()
    AND application_name LIKE 'outbox-relay lane%'
    AND state <> 'idle'
""")

FAIL_MARKS: LiteralString = """
CREATE SEQUENCE attempted_mark;
GRANT USAGE ON SEQUENCE attempted_mark TO outbox_relay;
CREATE FUNCTION fail_mark() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF nextval('attempted_mark') <= {refused} THEN
        RAISE EXCEPTION 'made up' USING ERRCODE = '{state}';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER fail_mark AFTER INSERT ON outbox_published FOR EACH STATEMENT EXECUTE FUNCTION fail_mark();
"""


@contextmanager
def probed_relay(pipeline: Pipeline) -> Iterator[tuple[Daemon, int]]:
    """A relay that is ready, and the port of its probes."""
    port = ReservedPort()
    with pipeline.relay(metrics_port=port.number, lanes=LANES) as relay:
        relay.wait_until_ready()
        yield relay, port.number


def assert_it_goes_on(pipeline: Pipeline, relay: Daemon, port: int) -> None:
    """The database is back: what was committed is published, once, and the relay is ready without a restart."""
    relay.wait_for_event("database_recovered")
    with pipeline.database.connect() as writer:
        writes = commit_messages(writer, "order-1", "payment-1", "order-1")
    pipeline.await_settled()
    eventually(lambda: ask(port, "/readyz")[0] == 200)
    assert flaws(pipeline.judge(writes)) == {}


def test_a_table_lock_that_waits_is_not_made_to_wait_by_the_relay(pipeline: Pipeline) -> None:
    with (
        ThreadPoolExecutor(1) as thread,
        pipeline.relays(1, lock_timeout=0.2, retention=0, survey_interval=0) as [relay],
        pipeline.database.connect() as reader,
    ):
        with pipeline.database.connect() as blocker, pipeline.database.connect() as writer:
            blocker.execute("SELECT FROM outbox_shard FOR UPDATE")  # the messages are claimed behind the migration
            writes = commit_messages(writer, "order-1", "order-1")
            reader.execute("SELECT FROM outbox")
            migrating = thread.submit(add_column, pipeline)
            eventually(lambda: waiting_for_table(writer), message="the migration does not wait")
        relay.wait_for_events("claim_conflicted", count=3)
        assert not migrating.done()
        reader.rollback()
        migrating.result()
        pipeline.await_settled()
    assert flaws(pipeline.judge(writes)) == {}


def add_column(pipeline: Pipeline) -> None:
    with pipeline.database.connect() as migration:
        migration.execute("ALTER TABLE outbox ADD COLUMN tenant text")


def waiting_for_table(connection: Connection) -> bool:
    query = "SELECT FROM pg_locks WHERE relation = 'outbox'::regclass AND mode = 'AccessExclusiveLock' AND NOT granted"
    return connection.execute(query).fetchone() is not None


def test_messages_that_somebody_locks_are_published_all_the_same(pipeline: Pipeline) -> None:
    with pipeline.database.connect() as somebody:
        writes = commit_messages(somebody, "order-1", "order-1", "payment-1")
        somebody.execute("SELECT FROM outbox FOR UPDATE")
        with pipeline.relays(1) as [relay]:
            pipeline.await_settled()
            assert relay.events_named("claim_conflicted", "database_lost") == []
    assert flaws(pipeline.judge(writes)) == {}


def test_a_relay_that_is_the_victim_of_a_deadlock_tries_again(pipeline: Pipeline) -> None:
    with pipeline.database.connect() as somebody:
        writes = commit_messages(somebody, "order-1", "order-1")
        somebody.execute("SET deadlock_timeout = '1min'")  # so that it is the relay that finds out, and is ended
        somebody.execute("LOCK TABLE outbox_published IN SHARE MODE")  # lets marks be read, but not written
        with pipeline.relays(1, lock_timeout=25, lanes=1) as [relay]:
            eventually(pipeline.waits_for_lock)
            somebody.execute("SELECT FROM outbox_shard FOR UPDATE")
            assert "deadlock detected" in str(relay.wait_for_event("claim_conflicted")["error"])
            somebody.rollback()
            pipeline.await_settled()
    assert flaws(pipeline.judge(writes)) == {"duplicated": 2}


@pytest.mark.parametrize("state", ["40001", "53100", "25006", "XX000", "P0001"])
def test_marks_that_are_refused_repeat_one_stint_and_then_single_messages(
    pipeline: Pipeline, state: LiteralString
) -> None:
    with pipeline.database.connect() as admin:
        admin.execute(FAIL_MARKS.format(state=state, refused=REFUSED_MARKS))
        writes = commit_messages(admin, *["order-1"] * 50)
    with pipeline.relays(1, lanes=1, batch_size=16):
        pipeline.await_settled()
    with pipeline.database.connect() as admin:
        assert admin.execute("SELECT last_value > %s FROM attempted_mark", [REFUSED_MARKS]).fetchone() == (True,)
    verdict = pipeline.judge(writes)
    assert flaws(verdict).keys() == {"duplicated"}
    assert len(verdict.duplicated) <= len(writes) + (REFUSED_MARKS - 1)


@pytest.mark.slow
@pytest.mark.parametrize("function", ["pg_terminate_backend", "pg_cancel_backend"])
def test_sessions_that_an_administrator_ends_under_load_repeat_their_stints_at_most(
    pipeline: Pipeline, function: str
) -> None:
    end = SELECT_ENDED.format(function=sql.Identifier(function))
    with (
        pipeline.relays(1, lanes=LANES, batch_size=BATCH_SIZE) as [relay],
        pipeline.database.connect(autocommit=True) as admin,
        pipeline.load(PLAN) as load,
    ):
        for number in range(1, ENDED_SESSIONS + 1):
            load.await_more(300)
            eventually(lambda: admin.execute(end).fetchall() != [(0,)], message="no lane was at work")
            if function == "pg_terminate_backend":
                relay.wait_for_events("database_recovered", count=number)
    with pipeline.relays(1):
        pipeline.await_settled()
    verdict = pipeline.judge(load.writes)
    assert flaws(verdict).keys() <= {"duplicated"}
    assert len(verdict.duplicated) <= ENDED_SESSIONS * LANES * STINT


@pytest.mark.slow
def test_orderly_restarts_of_the_database_under_load_lose_nothing(own_postgres_pipeline: Pipeline) -> None:
    pipeline, server = own_postgres_pipeline, own_postgres_pipeline.database.server
    with pipeline.relays(1, lanes=LANES, batch_size=BATCH_SIZE) as [relay]:
        with pipeline.load(PLAN) as load:
            for number in range(1, RESTARTS + 1):
                load.await_more(500)
                server.restart("fast")
                relay.wait_for_events("database_recovered", count=number)
        pipeline.await_settled()
    verdict = pipeline.judge(load.writes)
    assert flaws(verdict).keys() <= {"unknown", "recovered", "duplicated"}
    assert len(verdict.duplicated) <= RESTARTS * LANES * STINT


@pytest.mark.parametrize(
    ("refuse", "accept", "cause"),
    [
        ("ALTER DATABASE {} CONNECTION LIMIT 0", "ALTER DATABASE {} CONNECTION LIMIT -1", "too many connections"),
        (
            "ALTER DATABASE {} SET default_transaction_read_only = on",
            "ALTER DATABASE {} RESET default_transaction_read_only",
            "read-only",
        ),
    ],
    ids=["too many connections", "not writable, as a standby"],
)
def test_a_database_that_takes_no_relay_is_asked_until_it_does(
    pipeline: Pipeline, refuse: LiteralString, accept: LiteralString, cause: str
) -> None:
    name = sql.Identifier(pipeline.database.name)
    with probed_relay(pipeline) as (relay, port), pipeline.database.connect(autocommit=True) as admin:
        admin.execute(sql.SQL(refuse).format(name))
        admin.execute(TERMINATE_RELAYS)
        eventually(lambda: ask(port, "/readyz")[0] == 503)
        assert cause in refusal(pipeline)
        assert ask(port, "/livez") == (200, "ok\n")
        admin.execute(sql.SQL(accept).format(name))
        assert_it_goes_on(pipeline, relay, port)


def refusal(pipeline: Pipeline) -> str:
    """What a relay that starts now is told."""
    with pipeline.relay() as relay:
        return str(relay.wait_for_event("database_lost")["reason"])


def test_a_server_that_shuts_down_or_starts_up_is_waited_for(own_postgres_pipeline: Pipeline) -> None:
    pipeline, server = own_postgres_pipeline, own_postgres_pipeline.database.server
    with probed_relay(pipeline) as (relay, port):
        with pipeline.database.connect(autocommit=True) as admin:  # a smart shutdown waits for this session
            os.kill(server.pid, signal.SIGTERM)
            eventually(lambda: "received smart shutdown" in server.log_path.read_text())
            admin.execute(TERMINATE_RELAYS)
            eventually(lambda: "the database system is shutting down" in server.log_path.read_text())
            eventually(lambda: ask(port, "/readyz")[0] == 503)
        server.stop("fast")
        start_slowly(server)
        assert "the database system is starting up" in server.log_path.read_text()
        assert_it_goes_on(pipeline, relay, port)


def start_slowly(server: PostgresServer) -> None:
    """Start with a recovery that takes seconds, for the sake of those who ask meanwhile."""
    with (server.data_directory / "postgresql.auto.conf").open("a") as settings:
        settings.write("restore_command = 'sleep 2; false'\n")
    signal_file = server.data_directory / "recovery.signal"
    signal_file.touch()
    os.chown(signal_file, server.data_directory.stat().st_uid, -1)
    server.start()


@pytest.mark.parametrize(
    ("damage", "mend", "remedy"),
    [
        ("ALTER TABLE outbox RENAME TO gone", "ALTER TABLE gone RENAME TO outbox", "outbox-relay migrate apply"),
        (
            "ALTER TABLE outbox RENAME payload_bytes TO gone",
            "ALTER TABLE outbox RENAME gone TO payload_bytes",
            "outbox-relay migrate apply",
        ),
        (
            "REVOKE UPDATE (shard) ON outbox_shard FROM outbox_relay, outbox_pruner",
            "GRANT UPDATE (shard) ON outbox_shard TO outbox_relay, outbox_pruner",
            "GRANT outbox_relay TO",
        ),
    ],
    ids=["table", "column", "privilege"],
)
def test_what_is_taken_away_from_a_running_relay_is_named_and_waited_for(
    pipeline: Pipeline, damage: LiteralString, mend: LiteralString, remedy: str
) -> None:
    with probed_relay(pipeline) as (relay, port), pipeline.database.connect(autocommit=True) as admin:
        with pipeline.database.connect() as blocker, pipeline.database.connect() as writer:
            blocker.execute("SELECT FROM outbox_shard FOR UPDATE")  # the message is claimed after the damage
            writes = commit_messages(writer, "order-1")
            admin.execute(damage)
        lost = relay.wait_for_event("database_lost")
        assert remedy in str(lost["reason"])
        assert ask(port, "/livez") == (200, "ok\n")
        eventually(lambda: ask(port, "/readyz")[0] == 503)
        admin.execute(mend)
        pipeline.await_settled()
        eventually(lambda: ask(port, "/readyz")[0] == 200)
    assert flaws(pipeline.judge(writes)) == {}
