"""What befalls the process of a relay: signals at bad moments, a wall clock that jumps, little memory."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from outbox_relay.sandbox.history import Outcome, State
from tests.fixtures.daemon import Daemon, outbox_relay
from tests.fixtures.load import Plan
from tests.fixtures.pipeline import flaws, short_times
from tests.fixtures.waiting import eventually
from tests.fixtures.wall_clock import WallClock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from outbox_relay.sandbox.kafka import KafkaCluster
    from tests.fixtures.pipeline import Pipeline

PACKAGE = Path(__file__).parents[2] / "outbox_relay"
DECIDING = ("relay", "observe")
WALL_CLOCKS = {"time", "time_ns", "now", "utcnow", "today", "localtime", "gmtime", "ctime"}

LANES = 2
BATCH_SIZE = 500
SHORT_TIMES = short_times(publish_deadline=2)
GRACE_SECONDS = 25.0  # the default of DRAIN_TIMEOUT
PLAN = Plan(writers=6, bulk_rows=100)
HOURS = 3600

# 5,000 is the figure of the catalogue, which takes minutes and 10 GB of disk: give --timeout=0 with it.
MEMORY_ROWS = int(os.environ.get("RELAY_TEST_MEMORY_ROWS", "400"))
MEMORY_ROW_BYTES = 990_000
MEMORY_LIMIT_BYTES = 256 * 1024 * 1024  # less than the messages together; half of it are the stacks of threads

INSERT_LARGE = """
INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload_bytes)
SELECT 'order', 'order-' || number %% 7, 'happened', %s FROM generate_series(1, %s) AS number
"""


@pytest.mark.kafka
@pytest.mark.slow
def test_sigterm_while_kafka_is_away_releases_the_batches_in_hand_and_exits_with_0(
    own_kafka_pipeline: Pipeline, own_kafka: KafkaCluster
) -> None:
    pipeline = own_kafka_pipeline
    with pipeline.load(PLAN) as load:
        with pipeline.relays(1, lanes=LANES, batch_size=BATCH_SIZE, **SHORT_TIMES) as [relay]:
            load.await_more(2_000)
            own_kafka.kill()
            eventually(pipeline.open_transactions, message="no batch was in hand when Kafka went away")
            relay.terminate()
            assert relay.wait(timeout=GRACE_SECONDS) == 0
        assert relay.wait_for_event("relay_stopped")["is_drained"] is True
        assert pipeline.open_transactions() == 0
        assert State.UNPUBLISHED in pipeline.states()
    own_kafka.restart()
    with pipeline.relays(1):
        pipeline.await_settled()
    verdict = pipeline.judge(load.writes)
    assert flaws(verdict).keys() <= {"duplicated"}
    assert len(verdict.duplicated) <= LANES * BATCH_SIZE


@pytest.mark.kafka
def test_a_relay_that_is_stopped_for_a_moment_goes_on_as_if_nothing_had_been(pipeline: Pipeline) -> None:
    with pipeline.relays(1) as [relay]:
        with pipeline.load(PLAN) as load:
            for _ in range(5):
                load.await_more(200)
                relay.pause()
                load.await_more(500)
                relay.resume()
        pipeline.await_settled()
        assert relay.events_named("database_lost", "kafka_lost", "deliveries_failed", "thread_failed") == []
    assert flaws(pipeline.judge(load.writes)) == {}


@pytest.fixture
def wall_clock(tmp_path: Path) -> WallClock:
    return WallClock(tmp_path)


@pytest.mark.kafka
@pytest.mark.outside("it reads files of the test")
def test_a_wall_clock_that_jumps_by_hours_changes_nothing(pipeline: Pipeline, wall_clock: WallClock) -> None:
    with Daemon(pipeline.environment(retention="1h") | wall_clock.environment) as relay:
        relay.wait_for_event("relay_started")
        with pipeline.load(PLAN) as load:
            for hours in (30, -30, 0, -6, 30):
                load.await_more(500)
                wall_clock.set(ahead_seconds=hours * HOURS)
        pipeline.await_settled()
        relay.terminate()
        assert relay.wait() == 0
    said_on = {str(event["timestamp"])[:10] for event in relay.events}
    assert len(said_on) > 1  # its log is the one thing that shows the other clock
    failures = ("database_lost", "kafka_lost", "deliveries_failed", "thread_failed", "writer_given_up")
    assert relay.events_named(*failures) == []
    assert len(pipeline.rows()) == sum(write.outcome is Outcome.COMMITTED for write in load.writes)
    assert flaws(pipeline.judge(load.writes)) == {}


def wall_clock_reads(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in WALL_CLOCKS:
            yield ast.unparse(node)
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            yield from (name.name for name in node.names if name.name in WALL_CLOCKS)


@pytest.mark.parametrize("room", DECIDING)
def test_no_decision_of_the_relay_reads_a_wall_clock(room: str) -> None:
    modules = sorted((PACKAGE / room).rglob("*.py"))
    assert modules
    reads = {path.name: [*wall_clock_reads(ast.parse(path.read_text(encoding="utf-8")))] for path in modules}
    assert {name: found for name, found in reads.items() if found} == {}


@pytest.mark.kafka
@pytest.mark.slow
def test_messages_of_a_megabyte_pass_through_little_memory(pipeline: Pipeline) -> None:
    with pipeline.database.connect() as writer:
        writer.execute(INSERT_LARGE, [os.urandom(MEMORY_ROW_BYTES), MEMORY_ROWS])
    limited = ["prlimit", f"--data={MEMORY_LIMIT_BYTES}", *outbox_relay("run")]
    with Daemon(pipeline.environment(lanes=LANES), command=limited) as relay:
        pipeline.await_settled(timeout=60 + MEMORY_ROWS / 20)
        assert relay.events_named("thread_failed", "database_lost", "kafka_lost") == []
    assert pipeline.states() == [State.PUBLISHED] * MEMORY_ROWS
