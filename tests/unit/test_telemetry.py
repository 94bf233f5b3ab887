"""What the loop tells becomes metrics and health."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
import structlog

from outbox_relay.errors import KafkaUnavailable
from outbox_relay.observe.metrics import Metrics
from outbox_relay.observe.telemetry import Telemetry
from outbox_relay.relay.message import Addressing
from outbox_relay.relay.survey import Backlog, Head, HeadState
from tests.fixtures.outbox import message

if TYPE_CHECKING:
    from outbox_relay.relay.message import Message

AN_HOUR_AGO = 3_600.0


class Clock:
    """Stands in for the module `time` of the telemetry."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("outbox_relay.observe.telemetry.time", clock)
    return clock


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def telemetry(clock: Clock, metrics: Metrics) -> Telemetry:  # noqa: ARG001 -- the time begins with it
    """The telemetry of a relay that has reached both sides."""
    telemetry = Telemetry(
        logger=structlog.get_logger(),
        metrics=metrics,
        topic_of=Addressing().topic,
        live_max_age=60.0,
        ready_max_age=60.0,
    )
    telemetry.kafka_recovered("lane-1")
    telemetry.database_recovered("lane-1")
    return telemetry


def look(telemetry: Telemetry, clock: Clock, *heads: Head) -> None:
    backlog = Backlog(
        list(heads),
        unpublished_messages=len(heads),
        waiting_messages=0,
        parked_messages=0,
        parked_keys=0,
        uncollected_writers=0,
        unreconciled_seconds=0.0,
    )
    telemetry.backlog_surveyed(backlog, until=clock.now + 45)


def head(number: int, *, state: HeadState = "unpublished", aggregate_type: str = "order") -> Head:
    return Head(number % 16, sequence_no=number, state=state, aggregate_type=aggregate_type, age_seconds=AN_HOUR_AGO)


def publish(telemetry: Telemetry, *published: Message, acknowledged_at: float = 0.0) -> None:
    telemetry.batch_published(
        "lane-1", published, acknowledged_at=acknowledged_at, read_seconds=0.1, publish_seconds=0.1
    )


def test_a_message_that_does_not_move_makes_the_relay_unready(telemetry: Telemetry, clock: Clock) -> None:
    for _ in range(5):
        look(telemetry, clock, head(7))
        clock.now += 15
    assert telemetry.why_not_ready() == ["message 7 has been the next of shard 7 for 75 s; 1 stand still"]
    look(telemetry, clock)
    assert telemetry.why_not_ready() == []


def test_open_writers_are_named_as_a_reason_only_when_nothing_moves(telemetry: Telemetry, clock: Clock) -> None:
    telemetry.horizon_polled(held_seconds=70.0, blockers=2)
    look(telemetry, clock, head(7))
    assert telemetry.why_not_ready() == []
    clock.now += 30
    look(telemetry, clock, head(7))
    clock.now += 31
    assert telemetry.why_not_ready()[-1:] == ["open writers have held up new messages for 70 s"]


def test_messages_that_wait_for_a_held_topic_do_not_make_the_relay_unready(telemetry: Telemetry, clock: Clock) -> None:
    telemetry.topic_held("order.events", reason="unknown topic")
    for _ in range(10):
        look(telemetry, clock, head(7, state="waiting"), head(8, state="waiting", aggregate_type="no topic"))
        clock.now += 15
    assert telemetry.why_not_ready() == ["message 8 has waited first in shard 8 for 150 s; 1 stand still"]


def test_a_shard_stands_still_even_if_the_topic_of_its_next_message_is_held(telemetry: Telemetry, clock: Clock) -> None:
    telemetry.topic_held("order.events", reason="unknown topic")
    for _ in range(10):
        look(telemetry, clock, head(7))
        clock.now += 15
    assert telemetry.why_not_ready() == ["message 7 has been the next of shard 7 for 150 s; 1 stand still"]


def test_the_time_without_kafka_does_not_count_afterwards(telemetry: Telemetry, clock: Clock) -> None:
    telemetry.kafka_lost("lane-1", "away")
    for _ in range(10):
        look(telemetry, clock, head(7))
        clock.now += 15
    assert telemetry.why_not_ready() == ["kafka is away"]
    telemetry.kafka_recovered("lane-1")
    look(telemetry, clock, head(7))
    clock.now += 15
    assert telemetry.why_not_ready() == []


def test_a_backlog_that_cannot_be_read_makes_the_relay_unready_unless_it_publishes(
    telemetry: Telemetry, clock: Clock
) -> None:
    look(telemetry, clock)
    clock.now += 45 + 61
    assert telemetry.why_not_ready() == ["nothing was published for 61 s, and what waits cannot be read"]
    telemetry.marks_recorded(1, messages=5, seconds=0.01)
    assert telemetry.why_not_ready() == []
    clock.now += 61
    telemetry.marks_recorded(0, messages=0, seconds=0.01)
    assert telemetry.why_not_ready() != []


def test_without_a_greatest_age_a_standstill_is_no_reason(clock: Clock, metrics: Metrics) -> None:
    telemetry = Telemetry(logger=structlog.get_logger(), metrics=metrics, topic_of=str)
    telemetry.kafka_recovered("lane-1")
    telemetry.database_recovered("lane-1")
    look(telemetry, clock, head(7))
    clock.now += AN_HOUR_AGO
    assert telemetry.why_not_ready() == []


def test_a_thread_that_does_not_move_is_stuck_whatever_the_parts_do(telemetry: Telemetry, clock: Clock) -> None:
    telemetry.beat("lane-1")
    telemetry.kafka_lost("lane-1", str(KafkaUnavailable("away")))
    clock.now += 60
    assert telemetry.why_not_alive() == []
    clock.now += 1
    assert telemetry.why_not_alive() == ["thread lane-1 has not moved for 61 s"]


def test_the_age_of_a_message_at_its_acknowledgement_is_reckoned_by_one_clock(
    telemetry: Telemetry, metrics: Metrics
) -> None:
    sent = [message(1)._replace(created_at_ms=1_000_000), message(2)._replace(created_at_ms=1_000_200)]
    publish(telemetry, *sent, acknowledged_at=1_000.3)
    value = metrics.registry.get_sample_value
    assert value("outbox_relay_commit_to_ack_seconds_count") == 2
    assert value("outbox_relay_commit_to_ack_seconds_sum") == pytest.approx(0.4)
    assert value("outbox_relay_commit_to_ack_seconds_bucket", {"le": "0.25"}) == 1


def test_a_canary_shows_how_long_it_has_been_on_its_way(telemetry: Telemetry, clock: Clock, metrics: Metrics) -> None:
    def open_seconds() -> float | None:
        return metrics.registry.get_sample_value("outbox_relay_canary_open_seconds")

    assert open_seconds() == 0
    telemetry.canary_written(at=clock.now)
    clock.now += 12
    assert open_seconds() == 12
    telemetry.canary_arrived(12.5)
    assert open_seconds() == 0
    assert metrics.registry.get_sample_value("outbox_relay_canary_seconds_sum") == 12.5


def test_what_is_in_kafka_and_not_marked_is_counted_by_cause(telemetry: Telemetry, metrics: Metrics) -> None:
    telemetry.messages_republished(5, cause="conflict")
    telemetry.messages_republished(2, cause="conflict")
    count = metrics.registry.get_sample_value
    assert count("outbox_relay_republished_messages_total", {"cause": "conflict"}) == 7
    assert count("outbox_relay_republished_messages_total", {"cause": "connection"}) == 0
