"""Relays are killed, stopped and frozen under load: nothing is lost, nothing overtakes, duplicates stay bounded."""

from __future__ import annotations

import signal
from random import Random
from typing import TYPE_CHECKING

import pytest
from psycopg.conninfo import make_conninfo

from tests.fixtures.load import Plan, commit_messages
from tests.fixtures.pipeline import flaws, most_in_hand, short_times
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from tests.fixtures.daemon import Daemon
    from tests.fixtures.pipeline import Pipeline

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

KILLS = 20
LANES = 2
BATCH_SIZE = 500
STINT = most_in_hand(batch_size=BATCH_SIZE)
ZOMBIES = 3
PLAN = Plan(writers=8, bulk_rows=100)


def started(pipeline: Pipeline, **settings: str | float) -> Daemon:
    relay = pipeline.relay(lanes=LANES, batch_size=BATCH_SIZE, **settings)
    relay.wait_for_event("relay_started")
    return relay


def test_twenty_kills_lose_nothing_and_repeat_no_more_than_the_stints_in_hand(pipeline: Pipeline, seed: int) -> None:
    random = Random(seed)  # noqa: S311 -- repeatable
    relays = [started(pipeline) for _ in range(2)]
    with pipeline.load(PLAN) as load:
        for _ in range(KILLS):
            load.await_more(random.randrange(500))
            victim = random.randrange(len(relays))
            relays[victim].kill()
            assert relays[victim].wait() == -signal.SIGKILL
            relays[victim] = started(pipeline)
    pipeline.await_settled()
    for relay in relays:
        relay.kill()
    verdict = pipeline.judge(load.writes)
    assert flaws(verdict).keys() <= {"duplicated"}
    assert len(verdict.duplicated) <= KILLS * LANES * STINT


def test_sigterm_under_load_finishes_the_stints_in_hand(pipeline: Pipeline, seed: int) -> None:
    random = Random(seed)  # noqa: S311 -- repeatable
    with pipeline.load(PLAN) as load:
        for _ in range(6):
            with started(pipeline) as relay:
                load.await_more(random.randrange(1, 2_000))
                relay.terminate()
                assert relay.wait() == 0
                assert relay.wait_for_event("relay_stopped")["is_drained"] is True
    with started(pipeline):
        pipeline.await_settled()
    assert flaws(pipeline.judge(load.writes)) == {}


def test_a_second_signal_ends_the_relay_at_once(pipeline: Pipeline) -> None:
    with pipeline.database.connect() as blocker, pipeline.database.connect() as writer:
        blocker.execute("LOCK TABLE outbox_shard IN EXCLUSIVE MODE")
        writes = commit_messages(writer, "order-1")
        with started(pipeline, lock_timeout=25) as relay:
            eventually(pipeline.waits_for_lock)
            relay.terminate()
            relay.wait_for_event("relay_draining")
            relay.terminate()
            assert relay.wait(timeout=20) == 128 + signal.SIGTERM  # sooner than it gives up the lock
    with started(pipeline):
        pipeline.await_settled()
    assert flaws(pipeline.judge(writes)) == {}


def test_a_relay_frozen_beyond_its_transaction_does_no_harm_when_it_goes_on(pipeline: Pipeline) -> None:
    times = short_times(publish_deadline=2)
    frozen_dsn = make_conninfo(pipeline.database.relay_dsn, application_name="frozen")
    with (
        started(pipeline, database_url=frozen_dsn, **times) as frozen,
        started(pipeline, **times) as other,
        pipeline.load(PLAN) as load,
    ):
        for _ in range(ZOMBIES):
            pipeline.strike_in_transaction(frozen.pause, undo=frozen.resume, of="frozen")
            eventually(lambda: not pipeline.open_transactions(of="frozen"), message="the frozen relay keeps its locks")
            load.await_more(1_000)
            frozen.resume()
            load.await_more(1_000)
        other.terminate()
        assert other.wait() == 0
        load.await_more(100)
    with started(pipeline):
        pipeline.await_settled()
    verdict = pipeline.judge(load.writes)
    assert flaws(verdict).keys() <= {"duplicated"}
    assert len(verdict.duplicated) <= ZOMBIES * LANES * STINT
