"""When messages stand still, and when it only looks so."""

from __future__ import annotations

from outbox_relay.observe.progress import Progress
from outbox_relay.relay.survey import Head, HeadState

MAX_AGE = 60.0


def head(number: int, *, shard: int = 3, state: HeadState = "unpublished", aggregate_type: str = "order") -> Head:
    return Head(shard, sequence_no=number, state=state, aggregate_type=aggregate_type, age_seconds=1_000_000.0)


def seen(*looks: tuple[float, list[Head]]) -> Progress:
    """What is known after each of the looks, at its time."""
    progress = Progress(known_until=0.0)
    for at, heads in looks:
        progress.saw(heads, now=at, until=at + 45)
    return progress


def test_the_same_first_message_for_too_long_stands_still() -> None:
    progress = seen((0, [head(7)]), (40, [head(7)]))
    assert progress.why_stuck(now=60, max_age=MAX_AGE) == []
    assert progress.why_stuck(now=61, max_age=MAX_AGE) == [
        "message 7 has been the next of shard 3 for 61 s; 1 stand still"
    ]


def test_a_backlog_of_any_age_that_gets_shorter_does_not_stand_still() -> None:
    looks = [(at, [head(100 + at), head(200 + at, shard=4)]) for at in range(0, 3_600, 15)]
    assert seen(*looks).why_stuck(now=3_600, max_age=MAX_AGE) == []


def test_a_late_message_in_front_of_the_others_begins_anew() -> None:
    progress = seen((0, [head(7)]), (40, [head(5)]), (80, [head(5)]))
    assert progress.why_stuck(now=99, max_age=MAX_AGE) == []


def test_a_message_that_waits_stands_still_although_the_next_ones_of_its_shard_are_published() -> None:
    looks = [(at, [head(100 + at), head(7, state="waiting")]) for at in range(0, 75, 15)]
    assert seen(*looks).why_stuck(now=61, max_age=MAX_AGE) == [
        "message 7 has waited first in shard 3 for 61 s; 1 stand still"
    ]


def test_a_message_that_waits_stands_still_although_those_of_another_type_get_through() -> None:
    looks = [
        (at, [head(7, state="waiting"), head(9 + at, state="waiting", aggregate_type="basket")])
        for at in range(0, 75, 15)
    ]
    assert seen(*looks).why_stuck(now=61, max_age=MAX_AGE) == [
        "message 7 has waited first in shard 3 for 61 s; 1 stand still"
    ]


def test_the_next_message_of_a_shard_stands_still_although_those_that_wait_are_published() -> None:
    looks = [(at, [head(100), head(7 + at, state="waiting")]) for at in range(0, 75, 15)]
    assert seen(*looks).why_stuck(now=61, max_age=MAX_AGE) == [
        "message 100 has been the next of shard 3 for 61 s; 1 stand still"
    ]


def test_a_shard_that_was_empty_in_between_begins_anew() -> None:
    progress = seen((0, [head(7)]), (30, []), (60, [head(7)]))
    assert progress.why_stuck(now=100, max_age=MAX_AGE) == []


def test_the_shard_that_has_stood_still_longest_is_named() -> None:
    progress = seen(
        (0, [head(7), head(9, shard=4), head(11, shard=5)]),
        (30, [head(8), head(9, shard=4), head(12, shard=5)]),
        (60, [head(8), head(9, shard=4), head(12, shard=5)]),
    )
    assert progress.why_stuck(now=95, max_age=MAX_AGE) == [
        "message 9 has been the next of shard 4 for 95 s; 3 stand still"
    ]


def test_what_was_known_long_ago_is_no_reason() -> None:
    progress = seen((0, [head(7)]), (40, [head(7)]))
    assert progress.why_stuck(now=85, max_age=MAX_AGE) != []
    assert progress.why_stuck(now=86, max_age=MAX_AGE) == []


def test_a_time_in_which_nobody_looked_does_not_count() -> None:
    progress = seen((0, [head(7)]), (500, [head(7)]))
    assert progress.why_stuck(now=501, max_age=MAX_AGE) == []
