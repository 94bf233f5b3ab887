"""How failpoints are written down, when they are due, and that none costs anything while it is not armed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from outbox_relay.relay.failpoints import DISARMED, Action, Failpoint, Failpoints, Point, parse_failpoints

VISITS = 1_000
PAGE = Path(__file__).parents[2] / "docs" / "faults.md"

Reached = list[tuple[Point, Action]]


def armed(text: str, *, reached: Reached) -> Failpoints:
    return Failpoints(parse_failpoints(text), tell=lambda point, action: reached.append((point, action)))


def visits_at_which_it_fails(text: str) -> list[int]:
    failpoints = armed(text, reached=[])
    failed = []
    for visit in range(1, VISITS + 1):
        try:
            failpoints.reach("before_claim")
        except RuntimeError:
            failed.append(visit)
    return failed


def test_every_action_is_read_with_the_time_at_which_it_is_due() -> None:
    text = "before_claim=kill, after_claim=stop@3,after_produce=raise@12.5%,after_report=sleep:0.5@10%:7,"
    assert parse_failpoints(text) == {
        "before_claim": Failpoint("kill"),
        "after_claim": Failpoint("stop", visit=3),
        "after_produce": Failpoint("raise", chance=0.125),
        "after_report": Failpoint("sleep", seconds=0.5, chance=0.1, seed=7),
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("kill", "'kill' is no failpoint: write POINT=ACTION, POINT=ACTION@N or POINT=ACTION@P%:SEED"),
        (
            "after_claim=kill@0",
            "'after_claim=kill@0' is no failpoint: write POINT=ACTION, POINT=ACTION@N or POINT=ACTION@P%:SEED",
        ),
        ("after_claim=kill@150%", "'after_claim=kill@150%' is likelier than certain: write @100% at most"),
        (
            "lunch=kill",
            (
                "there is no failpoint 'lunch': use one of before_claim, after_claim, after_read, after_produce,"
                " after_report, before_settle, before_record, after_commit"
            ),
        ),
        ("after_claim=die", "'after_claim=die' does nothing known: use kill, stop, raise or sleep:SECONDS"),
        ("after_claim=sleep", "'after_claim=sleep' does nothing known: use kill, stop, raise or sleep:SECONDS"),
        ("after_claim=kill:5", "'after_claim=kill:5' does nothing known: use kill, stop, raise or sleep:SECONDS"),
        ("after_claim=kill,after_claim=stop", "'after_claim' is given twice: leave one"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_remedy(text: str, problem: str) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 -- the text is compared below
        parse_failpoints(text)
    assert str(refusal.value) == problem


def test_a_failpoint_is_due_at_each_visit_unless_told_otherwise() -> None:
    assert visits_at_which_it_fails("before_claim=raise") == list(range(1, VISITS + 1))


def test_a_failpoint_is_due_at_the_visit_that_is_named_and_no_other() -> None:
    assert visits_at_which_it_fails("before_claim=raise@3") == [3]


def test_chance_strikes_about_as_often_as_asked_for_and_by_its_seed() -> None:
    failed = visits_at_which_it_fails("before_claim=raise@10%:1")
    assert VISITS / 20 < len(failed) < VISITS / 5
    assert visits_at_which_it_fails("before_claim=raise@10%:1") == failed
    assert visits_at_which_it_fails("before_claim=raise@10%:2") != failed


def test_a_point_does_nothing_at_another_one() -> None:
    reached: Reached = []
    armed("after_claim=raise", reached=reached).reach("before_claim")
    assert reached == []


def test_what_happens_is_told_before_it_does() -> None:
    reached: Reached = []
    with pytest.raises(RuntimeError, match="failpoint after_claim"):
        armed("after_claim=raise", reached=reached).reach("after_claim")
    assert reached == [("after_claim", "raise")]


def test_a_call_is_left_as_it_is_where_nothing_is_armed() -> None:
    reports: list[int] = []
    assert DISARMED.after(reports.append, point="after_report") == reports.append


def test_an_armed_point_is_reached_behind_the_call() -> None:
    reports: list[int] = []
    take = armed("after_report=raise@2", reached=[]).after(reports.append, point="after_report")
    take(1)
    with pytest.raises(RuntimeError):
        take(2)
    assert reports == [1, 2]


def test_the_page_explains_every_point_and_action_with_an_example_that_can_be_read() -> None:
    section = PAGE.read_text(encoding="utf-8").split("## Failpoints\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)", section, re.MULTILINE) == [*get_args(Point), *get_args(Action)]
    [example] = re.findall(r"OUTBOX_RELAY_FAILPOINTS='(.+)'", section)
    assert parse_failpoints(example) == {
        "after_claim": Failpoint("kill", visit=3),
        "before_settle": Failpoint("sleep", seconds=0.5, chance=0.1, seed=42),
    }
