"""Published messages go when they are old enough, beside relays and writers at work, and nothing is lost by it."""

from __future__ import annotations

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay.operate import migrate
from outbox_relay.sandbox.history import State
from outbox_relay.sandbox.ports import ReservedPort
from tests.fixtures.daemon import outbox_relay
from tests.fixtures.load import Plan, commit_messages
from tests.fixtures.marks import mark, set_aside
from tests.fixtures.pipeline import flaws
from tests.fixtures.postgres import login
from tests.fixtures.probes import ask
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from psycopg import Connection

    from tests.fixtures.pipeline import Pipeline
    from tests.fixtures.postgres import Database

DAY = 86_400.0
INSERT = """
INSERT INTO outbox (aggregate_type, aggregate_id, event_type)
SELECT 'order', 'order-' || number, 'placed' FROM generate_series(1, %s) AS number
RETURNING sequence_no
"""


def publish(admin: Connection, count: int, *, days_ago: float) -> list[int]:
    """Insert messages that were published so many days ago."""
    numbers = [row[0] for row in admin.execute(INSERT, [count]).fetchall()]
    mark(admin, age_seconds=days_ago * DAY)
    return numbers


def prune(database_url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_RELAY_")}
    return subprocess.run(
        outbox_relay("prune", *arguments),
        env=environment | {"OUTBOX_RELAY_DATABASE_URL": database_url},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def count(database: Database) -> int:
    with database.connect() as connection:
        [(number,)] = connection.execute("SELECT count(*) FROM outbox").fetchall()
    return int(number)


@pytest.mark.kafka
@pytest.mark.slow
def test_pruning_beside_relays_and_writers_loses_nothing(pipeline: Pipeline) -> None:
    with pipeline.database.connect(autocommit=True) as admin:
        set_aside(admin, *publish(admin, 1, days_ago=8))
    plan = Plan(writers=4, bulk_rows=100)
    with pipeline.relays(2, retention="1s", log_level="debug") as relays, ThreadPoolExecutor(1) as cron:
        with pipeline.load(plan) as load:
            load.await_more(2_000)
            for relay in relays:
                relay.wait_for_event("batch_pruned")
            by_hand = cron.submit(prune, pipeline.database.dsn, "--older-than", "1s", "--yes")
            load.await_more(4_000)
            assert by_hand.result().returncode == 0
        pipeline.await_settled()
        eventually(lambda: count(pipeline.database) == 1, timeout=60, message="published messages are kept")
        for relay in relays:
            relay.terminate()
            assert relay.wait() == 0
    assert pipeline.states() == [State.PARKED]
    assert flaws(pipeline.judge(load.writes)) == {}


@pytest.mark.kafka
@pytest.mark.slow
def test_an_outbox_is_partitioned_and_partitions_come_and_go_beside_relays_and_writers(pipeline: Pipeline) -> None:
    plan = Plan(writers=4, bulk_rows=100)
    with pipeline.database.connect(autocommit=True) as admin, pipeline.relays(2, retention="1s") as relays:
        with pipeline.load(plan) as load:
            load.await_more(1_000)
            migrate.apply(admin, schema="public", line="partitioned")
            admin.execute("UPDATE outbox_partition SET open_for = '1 second'")
            load.await_more(1_000)
            eventually(lambda: first_partition(admin) > 0, timeout=120, message="the first partition is not dropped")
            load.await_more(2_000)
        pipeline.await_settled()
        eventually(lambda: count(pipeline.database) == 0, timeout=120, message="published messages are kept")
        for relay in relays:
            relay.terminate()
            assert relay.wait() == 0
    assert flaws(pipeline.judge(load.writes)) == {}


def first_partition(admin: Connection) -> int:
    [(number,)] = admin.execute("SELECT min(number) FROM outbox_partition").fetchall()
    return int(number)


@pytest.mark.kafka
def test_a_relay_keeps_what_is_young_and_everything_with_a_retention_of_zero(pipeline: Pipeline) -> None:
    with pipeline.database.connect(autocommit=True) as admin:
        publish(admin, 700, days_ago=8)
    with pipeline.relay(retention=0) as relay, pipeline.database.connect() as writer:
        commit_messages(writer, "order-1")
        relay.wait_for_event("relay_started")
        pipeline.await_settled()
        assert count(pipeline.database) == 701
    with pipeline.relay():
        eventually(lambda: count(pipeline.database) == 1, timeout=30, message="the week-old messages are kept")


@pytest.mark.kafka
def test_a_relay_that_cannot_prune_says_so_and_goes_on_publishing(pipeline: Pipeline) -> None:
    port = ReservedPort()
    with (
        pipeline.database.connect() as blocker,
        pipeline.database.connect() as writer,
        pipeline.relay(metrics_port=port.number, lock_timeout=0.05, retention="1s") as relay,
    ):
        relay.wait_until_ready()
        writes = commit_messages(writer, "order-1")
        pipeline.await_settled()
        blocker.execute("SELECT FROM outbox FOR UPDATE")
        assert "lock timeout" in str(relay.wait_for_event("pruning_failed")["error"])
        writes += commit_messages(writer, "order-2")
        pipeline.await_settled()
        assert ask(port.number, "/readyz") == (200, "ok\n")
        assert "outbox_relay_failed_prunings_total 0.0" not in ask(port.number, "/metrics")[1]
        blocker.rollback()
        eventually(lambda: count(pipeline.database) == 0, timeout=90, message="it does not try again")
    assert flaws(pipeline.judge(writes)) == {}


def test_cron_prunes_as_a_login_that_may_do_nothing_else(database: Database) -> None:
    with database.connect(autocommit=True) as admin:
        set_aside(admin, *publish(admin, 1, days_ago=8))
        publish(admin, 700, days_ago=8)
    with login(database, group="outbox_pruner") as name:
        url = make_conninfo(database.dsn, user=name)
        refused = prune(url)
        counted = prune(url, "--dry-run")
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "--yes" in refused.stderr
        assert (counted.returncode, counted.stdout) == (0, "700 messages would be removed\n")
        assert count(database) == 701
        longer = prune(url, "--older-than", "9d", "--yes", "--json")
        assert json.loads(longer.stdout) == {"pruned_messages": 0, "pruned_unordered": 0, "skipped_messages": 0}
        pruned = prune(url, "--older-than", "7d", "--yes", "--json")
        assert (pruned.returncode, pruned.stderr) == (0, "")
        assert json.loads(pruned.stdout) == {"pruned_messages": 700, "pruned_unordered": 0, "skipped_messages": 0}
    assert count(database) == 1


def test_a_prune_says_what_was_skipped_and_keeps_it(database: Database) -> None:
    with database.connect(autocommit=True) as admin:
        admin.execute("SELECT nextval('outbox_sequence_no_seq')")
        publish(admin, 700, days_ago=8)
        admin.execute(
            "INSERT INTO outbox (aggregate_type, aggregate_id, event_type, sequence_no)"
            " OVERRIDING SYSTEM VALUE VALUES ('order', 'order-1', 'placed', 1)"
        )
    pruned = prune(database.dsn, "--older-than", "7d", "--yes")
    assert (pruned.returncode, pruned.stdout) == (0, "700 messages removed\n")
    assert pruned.stderr == "skipped messages that stay, for a relay publishes them now: 1\n"
    assert count(database) == 1


def test_a_login_without_the_role_is_told_to_get_it(database: Database) -> None:
    with login(database, group="outbox_writer") as name:
        refused = prune(make_conninfo(database.dsn, user=name), "--yes")
    assert (refused.returncode, refused.stdout) == (3, "")
    assert "permission denied for table outbox" in refused.stderr


def test_a_database_that_is_away_ends_the_command_with_its_code(database: Database) -> None:
    away = prune(make_conninfo(database.dsn, port=ReservedPort().number), "--yes")
    assert (away.returncode, away.stdout) == (4, "")
