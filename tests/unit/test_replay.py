"""What a replay sends together and again, how fast it goes, and when the command refuses to begin."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from outbox_relay.cli.replay import replay
from outbox_relay.operate.replay import Pace, ReplayOptions, readable, unacknowledged
from outbox_relay.relay.failures import WITHDRAWN
from tests.fixtures.outbox import message

OUTCOMES = st.lists(st.tuples(st.sampled_from("abc"), st.booleans()))


@given(OUTCOMES)
def test_what_is_sent_again_is_of_each_key_all_from_the_first_message_that_was_not_acknowledged(
    sent: list[tuple[str, bool]],
) -> None:
    messages = [message(number, key) for number, (key, _) in enumerate(sent)]
    rest = unacknowledged(messages, [None if is_acknowledged else WITHDRAWN for _, is_acknowledged in sent])
    for key in "abc":
        outcomes = [is_acknowledged for each, is_acknowledged in sent if each == key]
        first = outcomes.index(False) if False in outcomes else len(outcomes)
        of_key = [each for each in messages if each.aggregate_id == key]
        assert [each for each in rest if each.aggregate_id == key] == of_key[first:]
    assert rest == sorted(rest)


def test_a_list_ends_before_a_message_whose_contents_were_withheld_although_they_may_be_read() -> None:
    messages = [message(1), message(2, stored_bytes=101)._replace(headers=None), message(3)._replace(headers=None)]
    assert readable([*messages, message(4)], readable_bytes=100) == messages[:2]
    assert readable(messages[:2], readable_bytes=100) == messages[:2]


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
