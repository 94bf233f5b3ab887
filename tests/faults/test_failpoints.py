"""Relays die, freeze, fail and dawdle at each point of the loop: nothing is lost, and what is repeated is bounded."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from random import Random
from typing import TYPE_CHECKING, Literal, get_args

import psutil
import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay.relay.failpoints import Point
from tests.fixtures.load import Plan, commit_messages
from tests.fixtures.pipeline import COMMIT_OF_MARKS, flaws, most_in_hand, short_times
from tests.fixtures.proxy import TcpProxy
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fixtures.daemon import Daemon
    from tests.fixtures.pipeline import Pipeline

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

POINTS: tuple[Point, ...] = get_args(Point)
NOTHING_OPEN: tuple[Point, ...] = ("before_claim", "after_claim", "after_commit")
KILLS = 3
BATCH_SIZE = 100
STINT = most_in_hand(batch_size=BATCH_SIZE)
TIMEOUT_SECONDS = 120.0
PLAN = Plan(writers=4, bulk_rows=100, longest_pause=0.05)
SETTINGS = {"batch_size": BATCH_SIZE, "ordering_timeout": 60}  # no writer is given up on, however slow the machine
SHORT_TIMES = short_times(publish_deadline=2)


@contextmanager
def victim(pipeline: Pipeline, failpoints: str, **settings: str | float) -> Iterator[Daemon]:
    """A relay of one lane, so that nothing but the point it fails at repeats a message."""
    armed: dict[str, str | float] = {"failpoints": failpoints, "allow_failpoints": "true", "lanes": 1, **SETTINGS}
    with pipeline.relay(**(armed | settings)) as relay:
        yield relay


def reached(relay: Daemon) -> list[object]:
    """The points at which something has happened so far."""
    return [event["point"] for event in relay.events_named("failpoint_reached")]


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_repeats_its_stint_at_most_and_nothing_where_none_was_sent(
    pipeline: Pipeline, seed: int, point: Point
) -> None:
    random = Random(seed)  # noqa: S311 -- repeatable
    left = []
    with pipeline.load(PLAN) as load:
        for _ in range(KILLS):
            with victim(pipeline, f"{point}=kill@{random.randint(1, 20)}") as relay:
                assert relay.wait(timeout=TIMEOUT_SECONDS) == -signal.SIGKILL
                assert reached(relay) == [point]
            left.append(len(pipeline.in_hand()))
    with pipeline.relays(1, **SETTINGS):
        pipeline.await_settled(timeout=TIMEOUT_SECONDS)
    verdict = pipeline.judge(load.writes)
    assert flaws(verdict).keys() <= {"duplicated"}
    assert max(left) <= (0 if point in NOTHING_OPEN else STINT)
    assert len(verdict.duplicated) <= sum(left)


def test_a_kill_before_the_marks_repeats_exactly_what_they_would_have_passed(pipeline: Pipeline) -> None:
    with pipeline.database.connect() as writer:
        writes = commit_messages(writer, *["order-1"] * (BATCH_SIZE + 10))
    with victim(pipeline, "before_record=kill") as relay:
        assert relay.wait(timeout=TIMEOUT_SECONDS) == -signal.SIGKILL
    left = pipeline.in_hand()
    with pipeline.relays(1):
        pipeline.await_settled(timeout=TIMEOUT_SECONDS)
    verdict = pipeline.judge(writes)
    assert flaws(verdict).keys() == {"duplicated"}
    assert sorted(verdict.duplicated) == sorted(left)


def test_the_shards_of_a_killed_relay_are_free_at_once(pipeline: Pipeline) -> None:
    with pipeline.database.connect() as writer:
        writes = commit_messages(writer, *[f"order-{number}" for number in range(20)])
    never = {"publish_deadline": 600, "kafka__message_timeout_ms": 700_000, "transaction_timeout": 800}
    with victim(pipeline, "after_claim=kill", drain_timeout=600, **never) as relay:
        assert relay.wait(timeout=TIMEOUT_SECONDS) == -signal.SIGKILL
    with pipeline.relays(1):
        pipeline.await_settled(timeout=TIMEOUT_SECONDS)
    assert flaws(pipeline.judge(writes)) == {}


def test_a_kill_before_the_server_gets_the_marks_repeats_the_stint(pipeline: Pipeline) -> None:
    left, duplicates = killed_at_commit(pipeline, "cut_before")
    assert left == duplicates > 0


def test_a_kill_after_the_server_got_the_marks_repeats_nothing(pipeline: Pipeline) -> None:
    assert killed_at_commit(pipeline, "swallowed") == (0, 0)


def killed_at_commit(pipeline: Pipeline, fault: Literal["cut_before", "swallowed"]) -> tuple[int, int]:
    """Kill a relay when its marks and COMMIT are on the way, or are answered; count what it leaves, and duplicates."""
    with pipeline.database.connect() as writer:
        writes = commit_messages(writer, *["order-1"] * (BATCH_SIZE + 10))
    with TcpProxy("127.0.0.1", pipeline.database.server.port) as proxy:
        behind_proxy = make_conninfo(pipeline.database.relay_dsn, port=proxy.port)
        with pipeline.relay(database_url=behind_proxy, lanes=1, batch_size=BATCH_SIZE) as relay:
            set_trap = proxy.cut_before if fault == "cut_before" else proxy.swallow_reply_to
            set_trap(COMMIT_OF_MARKS, action=lambda: os.kill(relay.pid, signal.SIGKILL))
            assert relay.wait(timeout=TIMEOUT_SECONDS) == -signal.SIGKILL
        assert proxy.fired[fault] == 1
    left = pipeline.in_hand()
    with pipeline.relays(1):
        pipeline.await_settled(timeout=TIMEOUT_SECONDS)
    verdict = pipeline.judge(writes)
    assert flaws(verdict).keys() <= {"duplicated"}
    return len(left), len(verdict.duplicated)


def test_a_kill_during_the_mark_repeats_nothing_for_the_server_finishes_it(pipeline: Pipeline) -> None:
    with pipeline.database.connect() as writer:
        writes = commit_messages(writer, *["order-1"] * BATCH_SIZE)
    with pipeline.database.connect() as blocker:
        blocker.execute("LOCK TABLE outbox_published IN SHARE MODE")  # lets marks be read, but not written
        with pipeline.relay(lanes=1, lock_timeout=25) as relay:
            eventually(pipeline.waits_for_lock)
            relay.kill()
        blocker.rollback()
    with pipeline.relays(1):
        pipeline.await_settled(timeout=TIMEOUT_SECONDS)
    assert flaws(pipeline.judge(writes)) == {}


@pytest.mark.parametrize("point", ["after_produce", "before_settle"])
def test_a_relay_that_freezes_beyond_its_transaction_repeats_its_stint_at_most(
    pipeline: Pipeline, point: Point
) -> None:
    frozen_dsn = make_conninfo(pipeline.database.relay_dsn, application_name="frozen")
    with (
        pipeline.relays(1, **SETTINGS, **SHORT_TIMES) as [other],
        pipeline.load(PLAN) as load,
        victim(pipeline, f"{point}=stop@5", database_url=frozen_dsn, **SHORT_TIMES) as frozen,
    ):
        process = psutil.Process(frozen.pid)
        eventually(
            lambda: process.status() == psutil.STATUS_STOPPED, timeout=TIMEOUT_SECONDS, message="it did not stop"
        )
        assert pipeline.open_transactions(of="frozen") == 1
        eventually(lambda: not pipeline.open_transactions(of="frozen"), message="the frozen relay keeps its locks")
        load.await_more(500)
        frozen.resume()
        frozen.wait_for_event("database_recovered")
        load.await_more(500)
        frozen.terminate()
        assert frozen.wait() == 0
        other.terminate()
        assert other.wait() == 0
    with pipeline.relays(1):
        pipeline.await_settled(timeout=TIMEOUT_SECONDS)
    verdict = pipeline.judge(load.writes)
    assert flaws(verdict).keys() <= {"duplicated"}
    assert len(verdict.duplicated) <= STINT


def test_an_unforeseen_error_at_any_point_is_logged_once_and_the_relay_goes_on(pipeline: Pipeline, seed: int) -> None:
    random = Random(seed)  # noqa: S311 -- repeatable
    failpoints = ",".join(f"{point}=raise@{random.randint(1, 5)}" for point in POINTS)
    with victim(pipeline, failpoints) as relay:
        with pipeline.load(PLAN) as load:
            eventually(
                lambda: len(reached(relay)) == len(POINTS), timeout=TIMEOUT_SECONDS, message="a point was missed"
            )
            load.await_more(100)
        pipeline.await_settled(timeout=TIMEOUT_SECONDS)
        relay.terminate()
        assert relay.wait(timeout=TIMEOUT_SECONDS) == 0
        failed = [str(event["error"]) for event in relay.events_named("thread_failed")]
        assert sorted(failed) == sorted(f"RuntimeError('failpoint {point}')" for point in POINTS)
    verdict = pipeline.judge(load.writes)
    assert flaws(verdict).keys() <= {"duplicated"}
    assert len(verdict.duplicated) <= (len(POINTS) - len(NOTHING_OPEN)) * STINT


def test_a_relay_that_dawdles_at_any_point_repeats_nothing(pipeline: Pipeline, seed: int) -> None:
    failpoints = ",".join(f"{point}=sleep:0.1@10%:{seed}" for point in POINTS if point != "after_report")
    with victim(pipeline, f"{failpoints},after_report=sleep:0.1@1%:{seed}") as relay:
        with pipeline.load(PLAN) as load:
            eventually(
                lambda: set(reached(relay)) == set(POINTS),
                timeout=TIMEOUT_SECONDS,
                message="it did not dawdle",
            )
        pipeline.await_settled(timeout=TIMEOUT_SECONDS)
    assert flaws(pipeline.judge(load.writes)) == {}
