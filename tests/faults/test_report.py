"""The report of a soak attributes duplicates, recoveries and latencies to the faults that struck."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outbox_relay.sandbox.history import History, Outcome, Record, Row, State, Write, digest
from tests.faults.soak.report import FaultCount, lines, report_of
from tests.faults.soak.run import Incident, Soak
from tests.faults.soak.schedule import Step

if TYPE_CHECKING:
    from outbox_relay.sandbox.judge import Verdict

KILL = Incident(Step(("kill",), 1.0, 0.0, 0), fired=("kill",), began_at=10.0, healed_at=11.0, recovered_at=13.0)
CUT_AND_MISS = Incident(
    Step(("cut", "miss"), 1.0, 0.0, 0), fired=("cut",), began_at=20.0, healed_at=21.0, recovered_at=None
)


def write(name: str, *, at: float) -> Write:
    return Write(name, "key", digest(name.encode()), Outcome.COMMITTED, at)


def record(name: str, *, offset: int, at: float) -> Record:
    return Record("topic", 0, offset, "key", name, int(name), False, digest(name.encode()), at)  # noqa: FBT003 -- in order


def soak_of(writes: list[Write], records: list[Record]) -> Soak:
    rows = [Row(each.message_id, each.key, int(each.message_id), State.PUBLISHED) for each in writes]
    history = History(writes, rows, records)
    return Soak([KILL, CUT_AND_MISS], oldest_transaction_seconds=2.5, skipped=2, found_skipped=3, history=history)


SOAK = soak_of(
    [write("1", at=5.0), write("2", at=12.0), write("3", at=14.0), write("4", at=30.0)],
    [
        record("1", offset=0, at=5.5),
        record("1", offset=1, at=10.5),
        record("2", offset=2, at=13.0),
        record("3", offset=3, at=14.25),
        record("3", offset=4, at=22.0),
        record("4", offset=5, at=32.0),
        record("4", offset=6, at=33.0),
    ],
)
REPORT = report_of(SOAK, seed=7, seconds=60)


def test_duplicates_and_recoveries_belong_to_the_fault_that_struck_last() -> None:
    assert REPORT.faults == {
        "kill": FaultCount(struck=1, fired=1, recovery_seconds=[2.0], duplicates=1),
        "cut": FaultCount(struck=1, fired=1, recovery_seconds=[], duplicates=2),
        "miss": FaultCount(struck=1, fired=0, recovery_seconds=[], duplicates=0),
    }


def test_a_fault_that_left_no_sign_and_one_without_a_recovery_are_named() -> None:
    assert (REPORT.never_fired, REPORT.not_recovered) == (["miss"], ["cut + miss"])


def test_latencies_are_told_apart_by_what_happened_at_the_commit() -> None:
    assert REPORT.latency_seconds == {"undisturbed": [0.5], "during a fault": [1.0], "just after it": [0.25, 2.0]}


def test_the_report_has_the_verdict_and_each_fault_on_a_line() -> None:
    verdict: Verdict = REPORT.verdict
    text = list(lines(REPORT))
    assert "Seed 7, 60 s of faults." in text
    assert f"| duplicated | {len(verdict.duplicated)} |" in text
    assert "| `kill` | 1 | 1 | 2.00 s | 2.00 s | 1 |" in text
    assert "| `miss` | 1 | 0 | - | - | 0 |" in text
    assert "Skipped on purpose: 2; found by reconciling: 3." in text
