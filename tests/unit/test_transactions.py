"""The decisions about a transaction, apart from any server."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest

from outbox_relay.transactions import Outcome, Retry, Server, outcome_of, run_steps

if TYPE_CHECKING:
    from outbox_relay.transactions import Steps

SERVER = Server(system_identifier=7, timeline="00000001", statistics_began=Decimal(1))
CRASHED = replace(SERVER, statistics_began=Decimal(2))
PROMOTED = replace(SERVER, timeline="00000002")
STANDBY = replace(SERVER, timeline=None)
ANOTHER = replace(SERVER, system_identifier=8)


@pytest.mark.parametrize(
    ("status", "asked", "expected"),
    [
        ("committed", SERVER, "committed"),
        ("aborted", SERVER, "aborted"),
        ("in progress", SERVER, "undecided"),
        (None, SERVER, "unknown"),
        ("committed", CRASHED, "unknown"),
        ("aborted", CRASHED, "aborted"),
        ("in progress", CRASHED, "undecided"),
        ("committed", PROMOTED, "unknown"),
        ("aborted", PROMOTED, "unknown"),
        ("in progress", STANDBY, "unknown"),
        ("committed", STANDBY, "unknown"),
        ("aborted", ANOTHER, "unknown"),
    ],
)
def test_outcome_is_told_only_by_the_server_that_can_know_it(
    status: str | None, asked: Server, expected: Outcome
) -> None:
    assert outcome_of(status, asked=asked, committed_on=SERVER) == expected


def test_pauses_double_up_to_their_cap() -> None:
    retry = Retry(base_seconds=0.1, cap_seconds=0.5)
    assert [retry.pause_seconds(failures, fraction=1.0) for failures in (1, 2, 3, 4, 5000)] == [0.1, 0.2, 0.4, 0.5, 0.5]


def test_pause_is_the_given_part_of_the_longest() -> None:
    retry = Retry(base_seconds=0.1, cap_seconds=0.5)
    assert [retry.pause_seconds(2, fraction=fraction) for fraction in (0.0, 0.5)] == [0.0, 0.1]


def test_no_attempt_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="attempts is 0"):
        Retry(attempts=0)


def test_error_of_a_step_is_raised_where_it_was_yielded() -> None:
    def fail() -> object:
        raise KeyError("lost")

    def steps() -> Steps[str]:
        try:
            yield fail
        except KeyError as error:
            return f"caught {error}"
        return "nothing was raised"

    assert run_steps(steps()) == "caught 'lost'"
