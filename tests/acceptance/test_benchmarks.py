from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.__main__ import SCENARIOS, report
from benchmarks.bench import Bench
from benchmarks.plan import Plan
from benchmarks.report import Table, share, spread

if TYPE_CHECKING:
    from outbox_relay.sandbox.kafka import Kafka
    from outbox_relay.sandbox.postgres import PostgresServer

CHECKOUT = Path(__file__).parents[2]

TINY = Plan(
    repeat=1,
    drain_messages=20_000,
    drain_relays=((1, 1), (2, 2)),
    latency_rates=(100,),
    latency_seconds=2.0,
    warm_up_seconds=1.0,
    snapshot_messages=20_000,
    published_rows=(1_000, 25_000),
    claims=2,
    layout_messages=2_000,
    open_transactions=(0, 5),
    looks=5,
    idle_seconds=1.0,
    hour_seconds=6.0,
    size_messages=5_000,
    size_payload_bytes=(200,),
    inbox_messages=1_000,
    inbox_messages_singly=100,
    inbox_messages_kept=1_000,
)
HOUR = [str(minute) for minute in range(5, 65, 5)]


def rows_by_title(text: str) -> dict[str, list[list[str]]]:
    """The tables of a report, without their heads."""
    sections = text.split("\n## ")[1:]
    return {
        section.partition("\n")[0]: [
            line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")
        ][2:]
        for section in sections
    }


@pytest.mark.kafka
@pytest.mark.slow
def test_every_scenario_reports_each_of_its_cases_with_positive_figures(
    own_postgres: PostgresServer, kafka: Kafka
) -> None:
    tables = rows_by_title(report(Bench(own_postgres, kafka, TINY), SCENARIOS))

    assert {title: [row[0] for row in rows] for title, rows in tables.items()} == {
        "Limits": [
            "`produce()` in a loop with a delivery callback per message",
            "`COPY outbox TO STDOUT`",
            "`UPDATE outbox SET published_at` of 5,000 ids per transaction",
            "`DELETE FROM outbox` of 5,000 ids per transaction",
        ],
        "Drain of a backlog": ["mark, 1 x 1", "mark, 2 x 2", "delete, 1 x 1", "delete, 2 x 2"],
        "Latency from commit to consumer": ["100"],
        "Claims while a snapshot is held open": ["none", "held open"],
        "Claims beside published rows": ["1,000", "25,000"],
        "Layouts": ["plain", "9 partitions", "60 partitions"],
        "Looking for open writers": ["0", "5"],
        "Idle": ["never used", "drained"],
        "An hour with retention": HOUR,
        "The same hour beside an old snapshot": HOUR,
        "What a message takes of the database": ["200"],
        "Consuming each message once": [
            "none, 500",
            "`Inbox`, 500",
            "`SequenceInbox`, 500",
            "none, 1",
            "`Inbox`, 1",
            "`SequenceInbox`, 1",
        ],
        "What an inbox keeps": ["`Inbox`", "`SequenceInbox`"],
    }
    for title in ("An hour with retention", "The same hour beside an old snapshot"):
        # In one half second an index may round to nothing; in all of them nothing may be dead or old.
        columns = list(zip(*tables.pop(title), strict=True))[1:-3]
        assert all(any(map(is_positive, column)) for column in columns)
    tables["Idle"] = [[name, memory] for name, _, memory in tables["Idle"]]  # a second at rest may be no tick
    rows = [(title, row) for title, found in tables.items() for row in found if row[:2] != ["0", "0"]]
    assert [(title, row) for title, row in rows if not all(map(is_positive, row[1:]))] == []


def is_positive(cell: str) -> bool:
    """Whether the median in *cell*, the range behind it aside, has a digit that is not zero."""
    return re.search("[1-9]", cell.partition(" ")[0]) is not None


def test_an_unknown_scenario_is_refused_before_anything_starts() -> None:
    command = [sys.executable, "-m", "benchmarks", "drian"]
    refused = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.endswith("no such scenario: drian\n")


def test_a_figure_measured_once_has_no_range() -> None:
    assert spread([1234.5]) == "1,234"


def test_a_figure_measured_often_is_its_median_with_the_least_and_the_most() -> None:
    assert spread([3.0, 1.04, 2.0], digits=1) == "2.0 (1.0 - 3.0)"


def test_a_share_is_that_of_the_medians() -> None:
    assert share([1.0, 2.0, 90.0], of=[4.0, 4.0, 1.0]) == "50.0%"


def test_a_table_is_markdown_with_its_figures_to_the_right() -> None:
    table = Table("Speed", "By hand.", ("what", "km/h"), [("snail", "0.05")])
    assert table.markdown() == "## Speed\n\nBy hand.\n\n| what | km/h |\n| --- | ---: |\n| snail | 0.05 |\n"
