"""How much the next read returns, and the time-outs of a lane's transaction."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from outbox_relay.relay.claim import ClaimOptions, begin_statement
from outbox_relay.relay.read import Batch, Limits, fewer, next_limits
from tests.fixtures.outbox import message

LIMITS = Limits(messages=1000, stored_bytes=1_000_000, shards=4)


def batch(messages: int, *, stored_bytes: int) -> Batch:
    """A batch of *messages* that are of the same size, together *stored_bytes*."""
    size = stored_bytes // max(messages, 1)
    return Batch([message(number, stored_bytes=size) for number in range(messages)], [], frozenset({0}))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (batch(0, stored_bytes=0), 1000),
        (batch(1000, stored_bytes=2000), 1000),
        (batch(1000, stored_bytes=1_000_000), 1000),
        (batch(100, stored_bytes=499_900), 1000),
        (batch(100, stored_bytes=500_000), 200),
        (batch(100, stored_bytes=1_000_000), 200),
        (batch(1, stored_bytes=5_000_000), 2),
    ],
    ids=["empty", "full", "full in both", "below half the bytes", "half the bytes", "cut by bytes", "a large one"],
)
def test_a_batch_that_was_cut_by_its_bytes_halves_the_waste_of_the_next(found: Batch, expected: int) -> None:
    assert next_limits(LIMITS, found, most=LIMITS).messages == expected


def test_limits_grow_again_up_to_the_most() -> None:
    limits = next_limits(LIMITS, batch(100, stored_bytes=1_000_000), most=LIMITS)
    sizes = []
    for _ in range(4):
        limits = next_limits(limits, batch(10, stored_bytes=100), most=LIMITS)
        sizes.append(limits.messages)
    assert sizes == [400, 800, 1000, 1000]
    assert limits == LIMITS


def test_limits_shrink_to_the_first_message_of_each_shard_without_its_contents_and_grow_again() -> None:
    limits = LIMITS
    asked = []
    for _ in range(3):
        limits = fewer(limits, is_too_large=True)
        asked.append((limits.messages, limits.shards, limits.readable_bytes))
    assert asked == [(62, 4, 8_000_000), (1, 4, 0), (1, 4, 0)]
    none_too_large = replace(batch(0, stored_bytes=0), is_cut=True)
    limits = next_limits(limits, none_too_large, most=LIMITS)
    assert limits == replace(LIMITS, messages=1)
    assert next_limits(limits, batch(4, stored_bytes=80), most=LIMITS) == replace(LIMITS, messages=2)


def test_a_read_that_only_takes_too_long_is_for_one_message_at_least_and_with_its_contents() -> None:
    limits = LIMITS
    for _ in range(9):
        limits = fewer(limits, is_too_large=False)
    assert limits == replace(LIMITS, messages=1, shards=1)


def test_a_batch_that_a_message_has_cut_has_more_and_halves_the_waste_of_the_next() -> None:
    found = replace(batch(20, stored_bytes=400), is_cut=True)
    assert found.may_have_more(LIMITS, shards=1)
    assert next_limits(LIMITS, found, most=LIMITS).messages == 40


@pytest.mark.parametrize(
    ("found", "shards", "expected"),
    [
        (batch(0, stored_bytes=0), 4, False),
        (batch(249, stored_bytes=249), 4, False),
        (batch(250, stored_bytes=250), 4, True),
        (batch(999, stored_bytes=999), 1, False),
        (batch(1000, stored_bytes=1000), 1, True),
        (batch(10, stored_bytes=249_990), 4, False),
        (batch(10, stored_bytes=250_000), 4, True),
    ],
    ids=[
        "empty",
        "few",
        "one shard may be full",
        "few of a single shard",
        "the single shard is full",
        "few bytes",
        "one shard may be full of bytes",
    ],
)
def test_there_may_be_more_when_one_shard_could_have_reached_its_part(
    *, found: Batch, shards: int, expected: bool
) -> None:
    assert found.may_have_more(LIMITS, shards=shards) is expected


def test_time_outs_are_given_to_the_server_in_milliseconds() -> None:
    options = ClaimOptions(lock_timeout=0.25, statement_timeout=1.5, transaction_timeout=30.0)
    settings = begin_statement(options).decode()
    assert re.findall(r"(\w+_timeout) = (\d+)", settings) == [
        ("lock_timeout", "250"),
        ("statement_timeout", "1500"),
        ("idle_in_transaction_session_timeout", "30000"),
        ("tcp_user_timeout", "30000"),
    ]


def test_marks_survive_a_crash_of_the_server_when_asked_to() -> None:
    assert b"synchronous_commit = on" in begin_statement(ClaimOptions(synchronous_commit=True))
    assert b"synchronous_commit = off" in begin_statement(ClaimOptions())
