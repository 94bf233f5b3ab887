"""Topics that are held, probed, released and forgiven, by a clock that the test tells."""

from __future__ import annotations

import random

import pytest

from outbox_relay.relay.holds import HeldTopics


class Longest(random.Random):
    """Always draws the longest pause: 1, 2, 4, ... up to 30 seconds."""

    def uniform(self, a: float, b: float) -> float:
        return max(a, b)


@pytest.fixture
def held() -> HeldTopics:
    return HeldTopics(Longest())


def test_nothing_is_held_at_first(held: HeldTopics) -> None:
    assert (bool(held), held.topics, held.aggregate_types, held.due(now=1e9)) == (False, [], set(), [])


def test_a_held_topic_takes_all_its_types_out_of_claims(held: HeldTopics) -> None:
    held.hold("events", aggregate_type="order", now=0.0)
    held.hold("events", aggregate_type="basket", now=0.0)
    held.hold("bills", aggregate_type="bill", now=0.0)
    assert (held.topics, held.aggregate_types) == (["events", "bills"], {"order", "basket", "bill"})


def test_only_the_first_failure_holds(held: HeldTopics) -> None:
    assert held.hold("events", aggregate_type="order", now=0.0)
    assert not held.hold("events", aggregate_type="order", now=0.5)
    assert held.due(now=1.0) == ["events"]


def test_a_topic_is_due_when_its_pause_is_over_and_not_before(held: HeldTopics) -> None:
    held.hold("events", aggregate_type="order", now=10.0)
    assert held.due(now=10.99) == []
    assert held.due(now=11.0) == ["events"]


def test_every_probe_that_fails_doubles_the_pause_up_to_half_a_minute(held: HeldTopics) -> None:
    held.hold("events", aggregate_type="order", now=0.0)
    pauses = []
    for _ in range(7):
        held.postpone("events", now=0.0)
        pauses.append(next(second for second in range(100) if held.due(now=second)))
    assert pauses == [2, 4, 8, 16, 30, 30, 30]


def test_a_released_topic_is_claimed_again_and_not_probed(held: HeldTopics) -> None:
    held.hold("events", aggregate_type="order", now=0.0)
    held.release("events")
    assert (held.topics, held.aggregate_types, held.due(now=1e9)) == ([], set(), [])


def test_a_topic_that_fails_right_after_its_release_waits_longer(held: HeldTopics) -> None:
    held.hold("events", aggregate_type="order", now=0.0)
    held.release("events")
    assert held.hold("events", aggregate_type="order", now=10.0)
    assert held.due(now=11.9) == []
    assert held.due(now=12.0) == ["events"]


def test_a_topic_that_took_a_message_is_forgiven(held: HeldTopics) -> None:
    held.hold("events", aggregate_type="order", now=0.0)
    held.release("events")
    assert held
    held.acknowledged(["events", "never held"])
    assert not held
    held.hold("events", aggregate_type="order", now=10.0)
    assert held.due(now=11.0) == ["events"]


def test_a_message_that_was_taken_before_the_hold_forgives_nothing(held: HeldTopics) -> None:
    held.hold("events", aggregate_type="order", now=0.0)
    held.acknowledged(["events"])
    assert held.topics == ["events"]
