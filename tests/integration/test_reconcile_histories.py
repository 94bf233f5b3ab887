"""Whatever happens in whatever order: no message stays skipped, and nobody is told of one where none was."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import reduce
from operator import xor
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from outbox_relay import database as relay_database
from outbox_relay.relay.reconcile import (
    ALL,
    FROM_THE_BEGINNING,
    THIN,
    ReconcileOptions,
    advance_batch,
    compare_batch,
    repair,
    restart,
)
from tests.fixtures.marks import mark, set_aside
from tests.fixtures.postgres import both_layouts

if TYPE_CHECKING:
    from tests.fixtures.postgres import Database

pytestmark = pytest.mark.slow

OPTIONS = ReconcileOptions(messages=6, marks=3, repaired_messages=2)
SOME = st.integers(0, 2**16)
THIN_NOW = replace(THIN, older_than_seconds=0.0)
EARLIER = 3  # the id of a transaction that is older than any mark

INSERT = """
INSERT INTO outbox (aggregate_type, aggregate_id, event_type)
VALUES ('order', '1', 'placed')
RETURNING sequence_no
"""
INSERT_AT = """
INSERT INTO outbox (aggregate_type, aggregate_id, event_type, sequence_no, transaction_id)
OVERRIDING SYSTEM VALUE
VALUES ('order', '1', 'placed', %s, coalesce(%s::text::xid8, pg_current_xact_id()))
"""
INTERVALS = "SELECT lag(through, 1, 0::bigint) OVER (ORDER BY through), through FROM outbox_published ORDER BY through"


class Histories(RuleBasedStateMachine):
    """
    The model is which numbers the marks have passed: the messages that they counted, those that they skipped, and gaps.

    All messages are of one key, so of one shard.
    """

    database: Database

    def __init__(self) -> None:
        super().__init__()
        self.admin = relay_database.connect(self.database.dsn, application_name="admin")
        self.admin.execute("TRUNCATE outbox")
        self.relay = relay_database.connect(self.database.relay_dsn, application_name="reconciler")
        self.gaps: set[int] = set()
        self.above: set[int] = set()
        self.counted: set[int] = set()
        self.skipped: set[int] = set()
        self.deleted: set[int] = set()
        self.forgotten: set[int] = set()

    def teardown(self) -> None:
        with closing(self.admin), closing(self.relay):
            self.reconcile_all()

    @rule(count=st.integers(1, 5))
    def write(self, count: int) -> None:
        self.above.update(self.admin.execute(INSERT).fetchall()[0][0] for _ in range(count))

    @rule(count=st.integers(1, 5))
    def leave_gaps(self, count: int) -> None:
        drawn = "SELECT nextval('outbox_sequence_no_seq') FROM generate_series(1, %s)"
        self.gaps.update(row[0] for row in self.admin.execute(drawn, [count]).fetchall())

    @precondition(lambda self: self.above)
    @rule(number=SOME, are_parked=st.booleans())
    def pass_with_a_mark(self, number: int, *, are_parked: bool) -> None:
        """As a lane does, up to some message; what it could not send is pending then."""
        through = self.choose(self.above, number)
        passed = {each for each in self.above if each <= through}
        if are_parked:
            set_aside(self.admin, *passed)
        mark(self.admin, through=through, age_seconds=100)
        self.above -= passed
        self.counted |= passed

    @rule(number=SOME, is_earlier=st.booleans())
    def skip(self, number: int, *, is_earlier: bool) -> None:
        """Let a message appear below the marks, of a transaction that is older than them or not."""
        [(newest,)] = self.admin.execute("SELECT coalesce(max(through), 0) FROM outbox_published").fetchall()
        below = {each for each in self.gaps if each <= newest}
        if below:
            skipped = self.choose(below, number)
            self.admin.execute(INSERT_AT, [skipped, EARLIER if is_earlier else None])
            self.gaps.remove(skipped)
            self.skipped.add(skipped)

    @precondition(lambda self: self.counted)
    @rule(number=SOME)
    def delete_published(self, number: int) -> None:
        chosen = self.choose(self.counted, number)
        self.admin.execute("DELETE FROM outbox WHERE sequence_no = %s", [chosen])
        self.counted.remove(chosen)
        self.deleted.add(chosen)

    @rule()
    def publish_pending(self) -> None:
        self.admin.execute("DELETE FROM outbox_pending")

    @rule(number=SOME)
    def prune(self, number: int) -> None:
        """Remove the rows of the lowest intervals and all but the last of their marks, as retention does."""
        if self.skipped:
            return
        throughs = [row[1] for row in self.admin.execute(INTERVALS).fetchall()]
        if throughs:
            through = throughs[number % len(throughs)]
            self.admin.execute("DELETE FROM outbox WHERE sequence_no <= %s", [through])
            self.admin.execute("DELETE FROM outbox_published WHERE through < %s", [through])
            self.admin.execute("UPDATE outbox_published SET messages = 0, checksum = 0 WHERE through = %s", [through])
            self.counted = {each for each in self.counted if each > through}
            self.deleted = {each for each in self.deleted if each > through}

    @rule()
    def thin(self) -> None:
        while (batch := advance_batch(self.relay, options=OPTIONS, stage=THIN_NOW)) is not None:
            assert self.skipped or not batch.damaged
            if batch.damaged or batch.is_last:
                break

    @rule()
    def restart(self) -> None:
        restart(self.relay, options=OPTIONS)

    @rule()
    def check(self) -> None:
        """Reconcile what is new, as the thread does."""
        is_last = False
        while not is_last:
            batch = advance_batch(self.relay, options=OPTIONS, stage=ALL)
            assert batch is not None
            assert self.skipped or not batch.damaged
            for interval in batch.damaged:
                assert any(interval.from_no < each <= interval.through for each in self.skipped)
                self.repair(interval.from_no, interval.through, list(repair(self.relay, interval, options=OPTIONS)))
            is_last = batch.is_last and not batch.damaged

    @rule()
    def reconcile_all(self) -> None:
        """Reconcile everything; only what nobody can find stays skipped, and a second time there is nothing to do."""
        hidden = self.hidden()
        self.forgotten.clear()
        self.repair_all()
        assert self.skipped | self.forgotten == hidden
        assert self.repair_all() == 0

    def repair_all(self) -> int:
        found = 0
        after = dict(FROM_THE_BEGINNING)
        while True:
            batch = compare_batch(self.relay, options=OPTIONS, after=after)
            for interval in batch.damaged:
                repairs = list(repair(self.relay, interval, options=OPTIONS))
                found += sum(each.messages for each in repairs)
                self.repair(interval.from_no, interval.through, repairs)
            after |= batch.positions
            if batch.is_last:
                return found

    def repair(self, from_no: int, through: int, repairs: object) -> None:
        """Note that the mark counts all that the interval holds now: what is pending, and what nobody could find."""
        assert repairs
        pending = {row[0] for row in self.admin.execute("SELECT sequence_no FROM outbox_pending").fetchall()}
        inside = {each for each in self.skipped if from_no < each <= through}
        assert inside & pending
        self.forgotten |= inside - pending
        self.skipped -= inside
        self.counted |= inside
        self.deleted = {each for each in self.deleted if not from_no < each <= through}

    def hidden(self) -> set[int]:
        """What is skipped and cannot be found, because messages were deleted in the same interval."""
        hidden = set()
        for from_no, through in self.admin.execute(INTERVALS).fetchall():
            skipped = {each for each in self.skipped if from_no < each <= through}
            deleted = {each for each in self.deleted if from_no < each <= through}
            uncounted = self.uncounted(through) & skipped
            doubtful = skipped - uncounted
            same = len(deleted) == len(skipped) and reduce(xor, deleted, 0) == reduce(xor, skipped, 0)
            if same:
                hidden |= skipped
            elif len(deleted) > len(doubtful) or (
                len(deleted) == len(doubtful) and reduce(xor, deleted, 0) == reduce(xor, doubtful, 0)
            ):
                hidden |= doubtful
        return hidden

    def uncounted(self, through: int) -> set[int]:
        newer = """
        SELECT sequence_no
        FROM outbox
        WHERE transaction_id >= (SELECT before_xid FROM outbox_published WHERE through = %s)
        """
        return {row[0] for row in self.admin.execute(newer, [through]).fetchall()}

    @staticmethod
    def choose(among: set[int], number: int) -> int:
        return sorted(among)[number % len(among)]


@both_layouts
def test_no_history_leaves_a_message_skipped_or_raises_a_false_alarm(database: Database) -> None:
    class OfThisDatabase(Histories):
        pass

    OfThisDatabase.database = database
    run_state_machine_as_test(
        OfThisDatabase,
        settings=settings(
            max_examples=40,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
