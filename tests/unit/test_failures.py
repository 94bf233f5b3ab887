"""How far each error of Kafka reaches, and the pauses that follow."""

from __future__ import annotations

import random

import pytest
from confluent_kafka import KafkaError
from hypothesis import given
from hypothesis import strategies as st

from outbox_relay.relay.failures import (
    BEHIND_PARKED,
    BEHIND_WAITING,
    HELD_BACK,
    NO_REPORT,
    TOPIC_HELD,
    WITHDRAWN,
    Backoff,
    Scope,
    scope_of,
)

MESSAGE_CODES = {
    "INVALID_MSG_SIZE",
    "INVALID_RECORD",
    "INVALID_TIMESTAMP",
    "MSG_SIZE_TOO_LARGE",
    "RECORD_LIST_TOO_LARGE",
    "UNSUPPORTED_FOR_MESSAGE_FORMAT",
    "_BAD_COMPRESSION",
    "_BAD_MSG",
    "_INVALID_ARG",
}
BATCH_CODES = {
    "INVALID_PRODUCER_EPOCH",
    "INVALID_PRODUCER_ID_MAPPING",
    "OUT_OF_ORDER_SEQUENCE_NUMBER",
    "PRODUCER_FENCED",
    "UNKNOWN_PRODUCER_ID",
    "_INVALID_DIFFERENT_RECORD",
}
TOPIC_CODES = {
    "INVALID_REQUIRED_ACKS",
    "POLICY_VIOLATION",
    "TOPIC_AUTHORIZATION_FAILED",
    "TOPIC_EXCEPTION",
    "UNKNOWN_TOPIC_OR_PART",
    "_UNKNOWN_PARTITION",
    "_UNKNOWN_TOPIC",
}
EVERY_CODE = {KafkaError(code).name() for code in vars(KafkaError).values() if isinstance(code, int)}


class Chance(random.Random):
    """Draws the lowest or the highest that it may."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self._share = share

    def uniform(self, a: float, b: float) -> float:
        return a + (b - a) * self._share


def test_every_error_has_one_scope_and_what_is_not_understood_parks_nothing() -> None:
    by_scope = {scope: {code for code in EVERY_CODE if scope_of(code) is scope} for scope in Scope}
    assert by_scope == {
        Scope.MESSAGE: MESSAGE_CODES,
        Scope.TOPIC: TOPIC_CODES,
        Scope.BATCH: BATCH_CODES,
        Scope.CONNECTION: EVERY_CODE - MESSAGE_CODES - TOPIC_CODES - BATCH_CODES,
    }


@pytest.mark.parametrize(
    "code",
    [
        "_MSG_TIMED_OUT",
        "_ALL_BROKERS_DOWN",
        "_AUTHENTICATION",
        "_FATAL",
        "_TRANSPORT",
        "CLUSTER_AUTHORIZATION_FAILED",
        "NOT_ENOUGH_REPLICAS",
        "NOT_ENOUGH_REPLICAS_AFTER_APPEND",
        "SASL_AUTHENTICATION_FAILED",
        "THROTTLING_QUOTA_EXCEEDED",
        "an error of a later Kafka",
    ],
)
def test_an_outage_is_the_connections(code: str) -> None:
    assert scope_of(code) is Scope.CONNECTION


def test_our_own_failures_park_nothing_but_what_is_behind_a_parked_message() -> None:
    ours = [NO_REPORT, WITHDRAWN, BEHIND_WAITING, TOPIC_HELD, BEHIND_PARKED]
    assert [failure.scope for failure in ours] == [
        Scope.CONNECTION,
        Scope.BATCH,
        Scope.TOPIC,
        Scope.TOPIC,
        Scope.MESSAGE,
    ]


def test_what_was_never_sent_says_nothing_about_kafka() -> None:
    assert {BEHIND_WAITING, BEHIND_PARKED, TOPIC_HELD} == HELD_BACK


def test_pauses_double_up_to_the_cap() -> None:
    backoff = Backoff(first_seconds=0.1, most_seconds=1.0)
    pauses = [backoff.next_pause(Chance(1.0)) for _ in range(6)]
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])


def test_a_pause_is_never_shorter_than_a_tenth_of_the_first() -> None:
    backoff = Backoff(first_seconds=0.1, most_seconds=1.0)
    assert [backoff.next_pause(Chance(0.0)) for _ in range(3)] == pytest.approx([0.01, 0.01, 0.01])


def test_a_success_starts_again_from_the_first_pause() -> None:
    backoff = Backoff(first_seconds=0.1, most_seconds=1.0)
    first = backoff.next_pause(Chance(1.0))
    backoff.next_pause(Chance(1.0))
    backoff.reset()
    assert backoff.next_pause(Chance(1.0)) == first


@given(st.integers(0, 100), st.floats(0.0, 1.0))
def test_a_pause_stays_within_its_bounds_however_often_it_failed(failures: int, share: float) -> None:
    backoff = Backoff(first_seconds=0.1, most_seconds=5.0)
    for _ in range(failures):
        backoff.next_pause(Chance(share))
    assert 0.01 <= backoff.next_pause(Chance(share)) <= 5.0
