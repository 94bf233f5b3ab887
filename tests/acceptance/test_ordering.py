"""Per key, first deliveries come in sequence order, whatever the writers do and however many relays there are."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay.sandbox.history import Outcome
from tests.fixtures.daemon import outbox_relay
from tests.fixtures.load import Plan, commit_messages, insert_messages
from tests.fixtures.pipeline import flaws
from tests.fixtures.postgres import login
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    import psycopg

    from outbox_relay.sandbox.history import Write
    from tests.fixtures.daemon import Daemon
    from tests.fixtures.pipeline import Pipeline

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

ORDERING_TIMEOUT = 1.0
SLACK_SECONDS = 5.0

OpenTransaction = dict[str, object]
Forgotten = tuple[OpenTransaction, "Callable[[], None]"]


def unordered_messages(pipeline: Pipeline) -> set[str]:
    return {record.message_id for record in pipeline.records() if record.is_unordered}


def committed(writes: list[Write]) -> list[Write]:
    return [replace(write, outcome=Outcome.COMMITTED) for write in writes]


def open_writers(pipeline: Pipeline) -> list[OpenTransaction]:
    """Who holds the horizon, by `outbox-relay status --json`."""
    command = outbox_relay("status", "--json")
    environment = os.environ | pipeline.environment()
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return cast("list[OpenTransaction]", json.loads(finished.stdout)["writers"])


def blockers(relay: Daemon) -> list[OpenTransaction]:
    return cast("list[OpenTransaction]", relay.wait_for_event("horizon_held")["blockers"])


@pytest.mark.parametrize(("relays", "lanes"), [(1, 4), (2, 3), (4, 2)])
def test_no_message_of_a_key_overtakes_another(pipeline: Pipeline, relays: int, lanes: int) -> None:
    plan = Plan(writers=12, keys=6 * relays, bulk_rows=300)
    with pipeline.relays(relays, lanes=lanes, batch_size=1000):
        with pipeline.load(plan) as load:
            load.await_more(40_000)
        pipeline.await_settled()
    verdict = pipeline.judge(load.writes)
    assert verdict.writes[Outcome.COMMITTED] > 20_000
    assert verdict.writes[Outcome.ROLLED_BACK] > 1_000
    assert flaws(verdict) == {}


def left_open(writer: psycopg.Connection) -> Forgotten:
    """Leave *writer* in its transaction; give what names it, and how it ends."""
    return {"pid": writer.info.backend_pid, "application_name": "forgetful shop"}, writer.commit


def prepared(writer: psycopg.Connection) -> Forgotten:
    """Prepare the transaction of *writer*; give what names it, and how it ends."""
    gid = f"forgotten in {writer.info.dbname}"
    writer.execute(f"PREPARE TRANSACTION '{gid}'")
    writer.commit()
    writer.autocommit = True

    def end() -> None:
        writer.execute(f"COMMIT PREPARED '{gid}'")

    return {"pid": 0, "gid": gid}, end


@pytest.mark.parametrize("forget", [left_open, prepared])
def test_a_forgotten_writer_delays_others_by_the_ordering_timeout_at_most(
    pipeline: Pipeline, forget: Callable[[psycopg.Connection], Forgotten]
) -> None:
    with (
        login(pipeline.database, group="outbox_relay, outbox_pruner, pg_read_all_stats") as role,
        pipeline.relays(
            2,
            ordering_timeout=ORDERING_TIMEOUT,
            database_url=make_conninfo(pipeline.database.dsn, user=role),
        ) as relays,
        pipeline.database.connect(application_name="forgetful shop") as forgetful,
        pipeline.database.connect() as punctual,
    ):
        late = insert_messages(forgetful, "order-1", "order-2")
        name, end = forget(forgetful)
        punctual_writes = commit_messages(punctual, "order-1", "payment-1")
        pipeline.await_settled(timeout=ORDERING_TIMEOUT + SLACK_SECONDS)

        for relay in relays:
            [blocker] = blockers(relay)
            assert blocker | name == blocker
            given_up = relay.wait_for_event("writer_given_up")
            assert given_up | name == given_up
        [writer] = open_writers(pipeline)
        assert writer | name == writer

        end()
        eventually(lambda: len(pipeline.rows()) == 4)
        pipeline.await_settled(timeout=SLACK_SECONDS)
        writes = [*committed(late), *punctual_writes, *commit_messages(punctual, "order-1")]
        pipeline.await_settled(timeout=SLACK_SECONDS)
    assert unordered_messages(pipeline) == {write.message_id for write in late}
    assert flaws(pipeline.judge(writes)) == {"given_up": 2}


def test_a_writer_that_goes_on_after_it_was_given_up_marks_all_its_messages(pipeline: Pipeline) -> None:
    with (
        pipeline.relays(2, ordering_timeout=ORDERING_TIMEOUT) as relays,
        pipeline.database.connect() as forgetful,
        pipeline.database.connect() as punctual,
    ):
        late = insert_messages(forgetful, "order-1")
        writes = commit_messages(punctual, "order-1")
        for relay in relays:
            relay.wait_for_event("writer_given_up")
        late += insert_messages(forgetful, "order-1")
        writes += commit_messages(punctual, "order-1")
        pipeline.await_settled(timeout=SLACK_SECONDS)
        late += insert_messages(forgetful, "order-1", "payment-1")
        forgetful.commit()
        pipeline.await_settled(timeout=SLACK_SECONDS)
        writes += commit_messages(punctual, "order-1", "payment-1")
        pipeline.await_settled(timeout=SLACK_SECONDS)
    assert unordered_messages(pipeline) == {write.message_id for write in late}
    assert flaws(pipeline.judge(writes + committed(late))) == {"given_up": 4}


def test_a_long_transaction_that_writes_elsewhere_holds_up_nothing(pipeline: Pipeline) -> None:
    with pipeline.database.connect() as etl, pipeline.database.connect() as punctual:
        etl.execute("CREATE TABLE elsewhere AS SELECT generate_series(1, 1000) AS number")
        with pipeline.relays(2, ordering_timeout=60) as relays:
            writes = []
            for _ in range(5):
                writes += commit_messages(punctual, "order-1", "payment-1")
                pipeline.await_settled(timeout=SLACK_SECONDS)
            for relay in relays:
                assert relay.events_named("horizon_held") == []
    assert flaws(pipeline.judge(writes)) == {}
