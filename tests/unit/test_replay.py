"""In which order, in which pieces and how fast a replay goes, and when the command refuses to begin."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from outbox_relay.cli.replay import replay
from outbox_relay.operate.replay import Found, Pace, ReplayOptions, chunks, in_order

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)


def found(number: int, *, position: int = 0, stored_bytes: int = 1) -> Found:
    return Found(number, position, "order", NOON, stored_bytes)


@st.composite
def drawn_by_writers(draw: st.DrawFn) -> tuple[list[Found], int]:
    """Messages in the order of their ids, and how many writers at most were between their two draws at once."""
    most_writers = draw(st.integers(1, 4))
    waiting: list[int] = []
    numbers: dict[int, int] = {}
    ids = 0
    for chance in draw(st.lists(st.integers(0, 100), max_size=60)):
        if waiting and (len(waiting) == most_writers or chance % 2):
            numbers[waiting.pop(chance % len(waiting))] = len(numbers) + 1
        else:
            ids += 1
            waiting.append(ids)
    return [found(numbers[position], position=position) for position in sorted(numbers)], most_writers


@given(drawn_by_writers())
def test_messages_come_in_sequence_order_however_writers_overlapped(drawn: tuple[list[Found], int]) -> None:
    messages, most_writers = drawn
    assert list(in_order(messages, most_ahead=most_writers)) == sorted(messages)


def test_a_message_that_too_many_were_ahead_of_comes_late_and_is_not_lost() -> None:
    messages = [found(number) for number in (2, 3, 4, 1)]
    assert [each.sequence_no for each in in_order(messages, most_ahead=2)] == [2, 1, 3, 4]


@given(st.lists(st.integers(1, 10)), st.integers(1, 5), st.integers(1, 20))
def test_chunks_are_the_messages_in_order_within_both_limits(sizes: list[int], messages: int, most_bytes: int) -> None:
    given = [found(number, stored_bytes=size) for number, size in enumerate(sizes)]
    parts = list(chunks(given, messages=messages, stored_bytes=most_bytes))
    assert [each for part in parts for each in part] == given
    assert all(1 <= len(part) <= messages for part in parts)
    assert all(len(part) == 1 or sum(each.stored_bytes for each in part) <= most_bytes for part in parts)


def test_chunks_are_as_large_as_the_limits_allow() -> None:
    given = [found(number, stored_bytes=size) for number, size in enumerate([3, 3, 3, 9, 1, 1, 1])]
    assert [len(part) for part in chunks(given, messages=3, stored_bytes=6)] == [2, 1, 1, 3]


@given(
    rate=st.floats(0.1, 10_000),
    chunk=st.integers(1, 500),
    delays=st.lists(st.floats(0, 3), min_size=1, max_size=20),
)
def test_in_no_stretch_of_time_go_more_messages_than_the_rate_and_one_chunk(
    rate: float, chunk: int, delays: list[float]
) -> None:
    pace, now, sent = Pace(rate), 100.0, list[float]()
    for delay in delays:
        now += delay + pace.pause_before(chunk, now=now)
        sent.append(now - delay)
    for first, begin in enumerate(sent):
        for last, end in enumerate(sent[first:], first):
            assert (last - first) * chunk <= rate * (end - begin) + 1e-6 * chunk


def test_time_that_was_lost_is_not_made_up_for() -> None:
    pace = Pace(10.0)
    assert pace.pause_before(10, now=0.0) == 0.0
    assert pace.pause_before(10, now=100.0) == 0.0
    assert pace.pause_before(10, now=100.25) == 0.75


@pytest.mark.parametrize(("rate", "messages"), [(0.1, 1), (9.0, 1), (1000.0, 100), (1e9, 500)])
def test_messages_go_out_ten_times_a_second_unless_they_are_few_or_very_many(rate: float, messages: int) -> None:
    assert ReplayOptions(rate=rate).chunk_messages == messages


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "say what to publish again"),
        (["--all", "--type", "order"], "say what to publish again"),
        (["--to-topic", "side"], "say what to publish again"),
        (["--all", "--name", "a b"], "'a b' is no name: use 1 to 100 of a-z A-Z 0-9 . _ -"),
        (["--all", "--name", ""], "'' is no name"),
        (["--since", "yesterday"], "'yesterday' is no time: write 2026-11-21T14:00"),
        (["--from-sequence", "0"], "0 is not in the range"),
        (["--all", "--rate", "0"], "0.0 is not in the range"),
    ],
)
def test_the_command_publishes_nothing_that_it_was_not_clearly_told_to(arguments: list[str], problem: str) -> None:
    refused = CliRunner().invoke(replay, [*arguments, "--why", "test"])
    assert refused.exit_code == 2
    assert problem in refused.stderr


def test_the_command_wants_to_know_why() -> None:
    refused = CliRunner().invoke(replay, ["--all", "--yes"])
    assert (refused.exit_code, "Missing option '--why'" in refused.stderr) == (2, True)
