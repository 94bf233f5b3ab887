"""How much the next claim takes, what a lane remembers of its shards, and the time-outs of its transaction."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from outbox_relay.relay.claim import SHARDS, Batch, ClaimOptions, Floors, begin_statement, fewer, next_limits
from tests.fixtures.outbox import message

OPTIONS = ClaimOptions(messages=1000, stored_bytes=1_000_000, shards=4)


def batch(messages: int, *, stored_bytes: int) -> Batch:
    """A batch of *messages* that are of the same size, together *stored_bytes*."""
    size = stored_bytes // max(messages, 1)
    return Batch([message(number, stored_bytes=size) for number in range(messages)], [0] * SHARDS, [], waiting=[])


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (batch(0, stored_bytes=0), 1000),
        (batch(1000, stored_bytes=2000), 1000),
        (batch(1000, stored_bytes=1_000_000), 1000),
        (batch(100, stored_bytes=499_900), 1000),
        (batch(100, stored_bytes=500_000), 200),
        (batch(100, stored_bytes=1_000_000), 200),
        (batch(1, stored_bytes=5_000_000), 4),
    ],
    ids=["empty", "full", "full in both", "below half the bytes", "half the bytes", "cut by bytes", "one per shard"],
)
def test_a_batch_that_was_cut_by_its_bytes_halves_the_waste_of_the_next(found: Batch, expected: int) -> None:
    assert next_limits(OPTIONS, found, most=OPTIONS).messages == expected


def test_limits_grow_again_up_to_the_most() -> None:
    limits = next_limits(OPTIONS, batch(100, stored_bytes=1_000_000), most=OPTIONS)
    sizes = []
    for _ in range(4):
        limits = next_limits(limits, batch(10, stored_bytes=100), most=OPTIONS)
        sizes.append(limits.messages)
    assert sizes == [400, 800, 1000, 1000]
    assert limits == OPTIONS


def test_limits_grow_again_from_one_message_without_its_contents() -> None:
    limits = OPTIONS
    asked = []
    for _ in range(4):
        limits = fewer(limits, is_too_large=True)
        asked.append((limits.messages, limits.shards, limits.readable_bytes))
    assert asked == [(62, 4, 8_000_000), (1, 1, 8_000_000), (1, 1, 0), (1, 1, 0)]
    assert next_limits(limits, batch(1, stored_bytes=100_000), most=OPTIONS) == replace(OPTIONS, messages=2)


def test_a_claim_that_only_takes_too_long_is_for_one_message_at_least_and_reads_it() -> None:
    limits = OPTIONS
    for _ in range(9):
        limits = fewer(limits, is_too_large=False)
    assert limits == replace(OPTIONS, messages=1, shards=1)


def test_a_batch_that_a_message_has_cut_has_more_and_halves_the_waste_of_the_next() -> None:
    found = replace(batch(20, stored_bytes=400), is_cut=True)
    assert found.may_have_more(OPTIONS)
    assert next_limits(OPTIONS, found, most=OPTIONS).messages == 40


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (batch(0, stored_bytes=0), False),
        (batch(249, stored_bytes=249), False),
        (batch(250, stored_bytes=250), True),
        (batch(10, stored_bytes=249_990), False),
        (batch(10, stored_bytes=250_000), True),
    ],
    ids=["empty", "few", "one shard may be full", "few bytes", "one shard may be full of bytes"],
)
def test_there_may_be_more_when_one_shard_could_have_reached_its_part(*, found: Batch, expected: bool) -> None:
    assert found.may_have_more(OPTIONS) is expected


def test_a_floor_belongs_to_its_shard_and_generation() -> None:
    floors = Floors()
    floors.remember(3, generation=7, settled_through=100)
    assert floors.parameters() == {
        "floors": "{0,0,0,100,0,0,0,0,0,0,0,0,0,0,0,0}",
        "generations": "{0,0,0,7,0,0,0,0,0,0,0,0,0,0,0,0}",
    }


def test_forgetting_gives_the_floors_there_were_and_reads_everything_again() -> None:
    floors = Floors()
    floors.remember(3, generation=7, settled_through=100)
    assert floors.forget() == [0, 0, 0, 100, *[0] * 12]
    assert floors.parameters()["floors"] == "{0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}"


def test_restored_floors_are_those_of_the_named_shards_only() -> None:
    floors = Floors()
    floors.remember(3, generation=7, settled_through=100)
    floors.remember(4, generation=7, settled_through=200)
    floors.restore(floors.forget(), shards=[4, 5])
    assert floors.parameters()["floors"] == "{0,0,0,0,200,0,0,0,0,0,0,0,0,0,0,0}"


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
