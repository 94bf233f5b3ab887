from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

from benchmarks.__main__ import SCENARIOS, run
from benchmarks.bench import Bench
from benchmarks.drain import FIGURES as DRAIN
from benchmarks.installation import installed_revision, this_checkout
from benchmarks.latency import LATENCY, TAKEN
from benchmarks.plan import Plan
from benchmarks.report import Figure, Table, by_case, share, spread
from benchmarks.usage import Use, process_seconds, tree_seconds
from benchmarks.versions import compare
from tests.fixtures.parts import missing_part
from tests.fixtures.waiting import eventually
from tests.fixtures.wheels import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Iterable

    from outbox_relay.sandbox.kafka import KafkaCluster
    from outbox_relay.sandbox.postgres import PostgresServer

TINY = Plan(
    repeat=1,
    drain_messages=20_000,
    drain_relays=((1, 1), (2, 2)),
    latency_rates=(100,),
    latency_seconds=2.0,
    warm_up_seconds=1.0,
    snapshot_seconds=6.0,
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
TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")
HOUR = [str(minute) for minute in range(5, 65, 5)]
DEAD_ROWS = {"Drain of a backlog": 6, "What steady traffic takes": 4, "A snapshot that is held open": 5}


def rows_by_title(text: str) -> dict[str, list[list[str]]]:
    """The tables of a report, without their heads."""
    sections = text.split("\n## ")[1:]
    return {
        section.partition("\n")[0]: [
            line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")
        ][2:]
        for section in sections
    }


@pytest.fixture
def bench(own_postgres: PostgresServer, own_kafka: KafkaCluster) -> Bench:
    """Servers of the test's own, since what all their processes take is counted."""
    return Bench(own_postgres, own_kafka, TINY)


def markdown(tables: Iterable[Table]) -> str:
    return "\n".join(["", *(table.markdown() for table in tables)])


@pytest.mark.kafka
@pytest.mark.slow
def test_every_scenario_reports_each_of_its_cases_with_positive_figures(bench: Bench) -> None:
    tables = rows_by_title(markdown(run(bench, SCENARIOS)))

    assert {title: [row[0] for row in rows] for title, rows in tables.items()} == {
        "Limits": [
            "`produce()` in a loop with a delivery callback per message",
            "`COPY outbox TO STDOUT`",
            "the read of a relay, batch after batch in one transaction",
            "one transaction with 16 marks for 5,000 messages",
        ],
        "Drain of a backlog": ["1 x 1", "2 x 2"],
        "Latency from commit to consumer": ["100"],
        "What steady traffic takes": ["100"],
        "A snapshot that is held open": ["none", "held open"],
        "Batches beside published messages": ["1,000", "25,000"],
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
    tables["Idle"] = [[name, memory] for name, _, _, memory in tables["Idle"]]  # a second at rest may be no tick
    for title, place in DEAD_ROWS.items():
        tables[title] = [row[:place] + row[place + 1 :] for row in tables[title]]  # there may be none, as it should be
    rows = [(title, row) for title, found in tables.items() for row in found if row[:2] != ["0", "0"]]
    assert [(title, row) for title, row in rows if not all(map(is_positive, row[1:]))] == []


def is_positive(cell: str) -> bool:
    """Whether the median in *cell*, the range behind it aside, has a digit that is not zero."""
    return re.search("[1-9]", cell.partition(" ")[0]) is not None


@pytest.mark.kafka
@pytest.mark.slow
def test_a_comparison_has_every_figure_of_both_installations(bench: Bench) -> None:
    tables = compare(bench, replace(this_checkout(), name="before"))

    drain_heads = [figure.head for figure in DRAIN]
    latency_heads = [figure.head for figure in (*LATENCY, *TAKEN)]
    assert {table.title: [row[0] for row in table.rows] for table in tables} == {
        "Drain of 20,000 messages, 1 x 2 lanes": drain_heads,
        "Drain of 20,000 messages, 2 x 2 lanes": drain_heads,
        "100 transactions a second": latency_heads,
    }
    assert {table.columns for table in tables} == {("figure", "before", "checkout", "ratio")}
    assert all(is_positive(cell) for table in tables for cell in table.rows[0][1:])


@pytest.mark.slow
def test_a_revision_does_not_run_the_code_of_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (CHECKOUT / ".git").exists():
        pytest.skip("these files are in no git repository")
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    try:
        with installed_revision("HEAD") as installed:
            *python, dash_m, module = installed.program
            code = f"import {module}; print({module}.__file__)"
            told = subprocess.run([*python, "-c", code], capture_output=True, text=True, check=False, cwd=CHECKOUT)
            version = subprocess.run(installed.command("--version"), capture_output=True, text=True, check=False)
    except subprocess.CalledProcessError as error:
        if "--require-hashes" not in error.cmd:
            raise
        missing_part(f"the package index cannot be reached: {error}")
    assert (dash_m, told.stderr, version.stderr, version.returncode) == ("-m", "", "", 0)
    assert not Path(told.stdout).is_relative_to(CHECKOUT)


def test_the_processor_time_of_a_server_includes_its_sessions_that_have_ended(own_postgres: PostgresServer) -> None:
    before = tree_seconds(own_postgres.pid)
    with psycopg.connect(own_postgres.dsn()) as session:
        session.execute("SELECT count(*) FROM generate_series(1, 1000000)")
        pid = session.info.backend_pid
        taken = process_seconds(pid)
    eventually(lambda: not Path(f"/proc/{pid}").exists())
    assert tree_seconds(own_postgres.pid) - before >= taken - 2 * TICK_SECONDS


def test_an_unknown_scenario_is_refused_before_anything_starts() -> None:
    command = [sys.executable, "-m", "benchmarks", "drian"]
    refused = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.endswith("no such scenario: drian\n")


def test_a_comparison_takes_no_scenarios() -> None:
    command = [sys.executable, "-m", "benchmarks", "drain", "--against", "HEAD"]
    refused = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.endswith("--against has scenarios of its own: name none\n")


def test_a_figure_measured_once_has_no_range() -> None:
    assert spread([1234.5]) == "1,234"


def test_a_figure_measured_often_is_its_median_with_the_least_and_the_most() -> None:
    assert spread([3.0, 1.04, 2.0], digits=1) == "2.0 (1.0 - 3.0)"


def test_a_share_is_that_of_the_medians() -> None:
    assert share([1.0, 2.0, 90.0], of=[4.0, 4.0, 1.0]) == "50.0%"


def test_a_table_is_markdown_with_its_figures_to_the_right() -> None:
    table = Table("Speed", "By hand.", ("what", "km/h"), [("snail", "0.05")])
    assert table.markdown() == "## Speed\n\nBy hand.\n\n| what | km/h |\n| --- | ---: |\n| snail | 0.05 |\n"


def test_a_figure_is_found_in_what_a_sample_consists_of() -> None:
    @dataclass
    class Sample:
        use: Use

    samples = [Sample(Use(1.0, 2.0, 3.0, 4.0, marks)) for marks in (5.0, 7.0, 6.0)]
    table = by_case("Use", "", case="rate", figures=[Figure("marks", "use.marks", digits=1)], samples={"10": samples})
    assert (table.columns, table.rows) == (("rate", "marks"), [("10", "6.0 (5.0 - 7.0)")])


def test_use_beyond_another_is_the_difference_of_each_part() -> None:
    assert Use(9.0, 8.0, 7.0, 6.0, 5.0).beyond(Use(1.0, 2.0, 3.0, 4.0, 5.0)) == Use(8.0, 6.0, 4.0, 2.0, 0.0)
