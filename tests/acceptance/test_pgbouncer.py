"""Behind a PgBouncer that pools transactions every statement may meet another session: all promises hold."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest
from psycopg.conninfo import make_conninfo

from tests.fixtures.daemon import outbox_relay
from tests.fixtures.load import Plan, commit_messages
from tests.fixtures.pgbouncer import pooled
from tests.fixtures.pipeline import flaws
from tests.fixtures.postgres import RELAY_LOGIN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fixtures.pipeline import Pipeline

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

POOL_SIZE = 6  # below the sessions of two relays, so that they share


@pytest.fixture
def pooled_dsn(pipeline: Pipeline) -> Iterator[str]:
    with pooled(pipeline.database, pool_size=POOL_SIZE, users=["postgres", RELAY_LOGIN]) as port:
        yield make_conninfo(pipeline.database.relay_dsn, port=port)


def test_two_relays_that_share_a_pool_lose_nothing_and_keep_the_order(pipeline: Pipeline, pooled_dsn: str) -> None:
    with pipeline.relays(2, database_url=pooled_dsn, lanes=2, batch_size=500) as relays:
        with pipeline.load(Plan(keys=12)) as load:
            load.await_more(10_000)
        pipeline.await_settled()
    for relay in relays:
        assert relay.events_named("database_lost", "thread_failed", "claim_conflicted") == []
    assert flaws(pipeline.judge(load.writes)) == {}


def test_a_killed_relay_leaves_its_shards_to_the_other_at_once(pipeline: Pipeline, pooled_dsn: str) -> None:
    with pipeline.relays(2, database_url=pooled_dsn, lanes=2, batch_size=100) as relays:
        with pipeline.load(Plan(keys=12)) as load:
            load.await_more(3_000)
            relays[0].kill()
            load.await_more(3_000)
        pipeline.await_settled()
    assert flaws(pipeline.judge(load.writes)).keys() <= {"duplicated"}


@pytest.mark.parametrize(
    "arguments",
    [["status"], ["doctor"], ["parked", "list"], ["prune", "--older-than", "1d", "--yes"], ["reconcile", "--repair"]],
    ids=" ".join,
)
def test_the_commands_work_behind_it(pipeline: Pipeline, pooled_dsn: str, arguments: list[str]) -> None:
    with pipeline.database.connect() as writer:
        commit_messages(writer, "order-1")
    finished = subprocess.run(
        outbox_relay(*arguments),
        env=os.environ | pipeline.environment(database_url=pooled_dsn),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
