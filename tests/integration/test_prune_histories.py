"""Whatever happens in whatever order: pruning never removes what is still needed, and in the end all that is old."""

from __future__ import annotations

from contextlib import closing, suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from psycopg import errors

from outbox_relay import database as relay_database
from outbox_relay.errors import DatabaseConflict
from outbox_relay.relay.prune import (
    PruneOptions,
    first_kept_number,
    open_partition,
    prune_all,
    prune_unordered,
)
from tests.fixtures.marks import disagreeing_marks, mark, set_aside
from tests.fixtures.postgres import both_layouts
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Collection

    from tests.fixtures.postgres import Database

pytestmark = pytest.mark.slow

RETENTION_HOURS = 10
PERIOD_HOURS = 24  # of a partition
OPTIONS = PruneOptions(older_than_seconds=RETENTION_HOURS * 3600.0, messages=3, most_messages=5)
SOME = st.integers(0, 2**16)

INSERT = """
INSERT INTO outbox (aggregate_type, aggregate_id, event_type)
SELECT 'order', (%s + number)::text, 'placed' FROM generate_series(1, %s) AS number
RETURNING sequence_no
"""
INSERT_AT = """
INSERT INTO outbox (aggregate_type, aggregate_id, event_type, sequence_no)
OVERRIDING SYSTEM VALUE VALUES ('order', %s, 'placed', %s)
"""
GIVE_UP = """
INSERT INTO outbox_unordered (transaction_id, from_no)
SELECT %s::text::xid8, coalesce(max(through), 0) FROM outbox_published
"""
COLLECT = """
UPDATE outbox_unordered
SET to_no = (SELECT last_value FROM outbox_sequence_no_seq), collected_at = now()
WHERE collected_at IS NULL AND transaction_id = %s::text::xid8
"""
# Messages whose mark is old and below :before, unless somebody needs them.
DOOMED = """
SELECT outbox.sequence_no
FROM outbox
CROSS JOIN LATERAL (
    SELECT mark.through, mark.published_at
    FROM outbox_published AS mark
    WHERE mark.shard = outbox.shard AND mark.through >= outbox.sequence_no
    ORDER BY mark.through
    LIMIT 1
) AS settled
WHERE settled.published_at < now() - make_interval(hours => %s)
    AND settled.through < %s
    AND NOT EXISTS (SELECT FROM outbox_pending AS pending WHERE pending.sequence_no = outbox.sequence_no)
    AND NOT EXISTS (
        SELECT
        FROM outbox_unordered AS late
        WHERE late.transaction_id = outbox.transaction_id AND late.collected_at IS NULL
    )
"""
IS_PASSED = """
SELECT
FROM outbox
JOIN outbox_published AS mark ON mark.shard = outbox.shard AND mark.through >= outbox.sequence_no
WHERE outbox.sequence_no = %s
"""
# Instead of waiting, all that has happened is moved into the past.
AGE = "UPDATE outbox_published SET published_at = published_at - make_interval(hours => %s)"


class Histories(RuleBasedStateMachine):
    """
    The model is what may not be removed: every committed message that is not published, or not long enough ago.

    Attributes:
        late: Messages of a transaction that is still open.
        unpublished: Above the marks.
        pending: Passed by the marks and set aside, or of a writer that was given up on.
        drawn: Numbers that somebody uses later.
        appeared: Messages that were inserted below the marks.
        hours_since_mark: Of each message that a mark has passed.
    """

    database: Database

    def __init__(self) -> None:
        super().__init__()
        self.admin = relay_database.connect(self.database.dsn, application_name="admin")
        self.admin.execute("TRUNCATE outbox")
        self.pruner = relay_database.connect(self.database.dsn, application_name="pruner")
        self.late_writer = self.database.connect()
        self.after: dict[int, int] = {}
        self.late: list[int] = []
        self.given_up: str | None = None
        self.uncollected: dict[str, list[int]] = {}
        self.unpublished: set[int] = set()
        self.pending: set[int] = set()
        self.drawn: list[int] = []
        self.appeared: set[int] = set()
        self.hours_since_mark: dict[int, int] = {}
        self.is_tampered = False

    def teardown(self) -> None:
        with closing(self.admin), closing(self.pruner), closing(self.late_writer):
            self.commit_late()
            self.collect()
            self.publish_all()
            self.leave()
            self.age(hours=RETENTION_HOURS + PERIOD_HOURS)
            self.prune(is_new_lap=True)
            self.prune(is_new_lap=True)
            self.what_is_needed_is_there()
            assert self.rows() == self.pending
            assert disagreeing_marks(self.admin) == []

    def publish_all(self) -> None:
        mark(self.admin)
        self.hours_since_mark.update(dict.fromkeys(self.unpublished, 0))
        self.unpublished.clear()

    def leave(self) -> None:
        """Do what has to come before everything may go."""

    @rule(count=st.integers(1, 7), key=SOME)
    def write(self, count: int, key: int) -> None:
        self.unpublished.update(row[0] for row in self.admin.execute(INSERT, [key, count]))

    @rule(count=st.integers(1, 3), key=SOME)
    def write_late(self, count: int, key: int) -> None:
        self.late += [row[0] for row in self.late_writer.execute(INSERT, [key, count])]

    @precondition(lambda self: self.late and self.given_up is None)
    @rule()
    def give_up(self) -> None:
        [(xid,)] = self.late_writer.execute("SELECT pg_current_xact_id()::text").fetchall()
        self.admin.execute(GIVE_UP, [xid])
        self.given_up = xid

    @rule()
    def commit_late(self) -> None:
        self.late_writer.commit()
        if self.given_up is None:
            self.unpublished.update(self.late)
        else:
            self.uncollected[self.given_up] = self.late
            self.pending.update(self.late)
        self.late, self.given_up = [], None

    @precondition(lambda self: self.late)
    @rule()
    def take_back_late(self) -> None:
        self.late_writer.rollback()
        if self.given_up is not None:
            self.uncollected[self.given_up] = []
        self.late, self.given_up = [], None

    @rule()
    def collect(self) -> None:
        for xid, numbers in self.uncollected.items():
            with self.admin.transaction():
                set_aside(self.admin, *numbers, state="waiting", is_unordered=True)
                self.admin.execute(COLLECT, [xid])
        self.uncollected.clear()

    @precondition(lambda self: self.unpublished)
    @rule(number=SOME, aside=st.lists(SOME, max_size=2), late_hours=st.integers(0, 2))
    def publish(self, number: int, aside: list[int], late_hours: int) -> None:
        """Move all marks to some number below the horizon, and set some of the messages aside."""
        through = self.choose(self.unpublished, number)
        if self.late and self.given_up is None:
            through = min(through, min(self.late) - 1)
        passed = {message for message in self.unpublished if message <= through}
        mark(self.admin, through=through)
        set_aside_now = {self.choose(passed, each) for each in aside if passed}
        set_aside(self.admin, *set_aside_now)
        self.unpublished -= passed
        self.pending |= set_aside_now
        self.hours_since_mark.update(dict.fromkeys(passed, 0))
        if late_hours:
            self.age_marks(late_hours)

    @precondition(lambda self: self.pending)
    @rule(number=SOME)
    def publish_pending(self, number: int) -> None:
        chosen = self.choose(self.pending, number)
        removed = self.admin.execute("DELETE FROM outbox_pending WHERE sequence_no = %s", [chosen]).rowcount
        if removed:  # not before it is collected
            self.pending.remove(chosen)

    @precondition(lambda self: self.hours_since_mark)
    @rule(number=SOME)
    def delete_published(self, number: int) -> None:
        """As somebody may who tidies up by hand."""
        chosen = self.choose(self.hours_since_mark, number)
        if chosen not in self.pending:
            self.admin.execute("DELETE FROM outbox WHERE sequence_no = %s", [chosen])
            self.hours_since_mark.pop(chosen)
            self.is_tampered = True

    @rule()
    def draw(self) -> None:
        """As a session does that takes several numbers at once, to use them later."""
        [(number,)] = self.admin.execute("SELECT nextval('outbox_sequence_no_seq')").fetchall()
        self.drawn.append(number)

    @precondition(lambda self: self.drawn)
    @rule(key=SOME)
    def use_drawn(self, key: int) -> None:
        """Insert a message behind the marks, perhaps; where its partition is gone, it is refused."""
        number = self.drawn.pop(0)
        with suppress(errors.CheckViolation):
            self.admin.execute(INSERT_AT, [str(key), number])
            is_passed = self.admin.execute(IS_PASSED, [number]).fetchall()
            (self.appeared if is_passed else self.unpublished).add(number)
            self.is_tampered = True

    @precondition(lambda self: not self.late)  # what is not committed cannot be moved into the past
    @rule(hours=st.integers(1, RETENTION_HOURS))
    def age(self, hours: int) -> None:
        self.age_marks(hours)

    def age_marks(self, hours: int) -> None:
        self.admin.execute(AGE, [hours])
        self.hours_since_mark = {number: since + hours for number, since in self.hours_since_mark.items()}

    @rule(is_new_lap=st.booleans())
    def prune(self, *, is_new_lap: bool = False) -> None:
        if is_new_lap:
            self.after.clear()
        before = first_kept_number(self.pruner, options=OPTIONS)
        for batch in prune_all(self.pruner, options=OPTIONS, after=self.after, on_repair=lambda _repair: None):
            assert batch is not None
            self.after |= batch.pruned
        prune_unordered(self.pruner, options=OPTIONS)
        self.take_in_repairs()
        if is_new_lap:
            assert self.admin.execute(DOOMED, [RETENTION_HOURS, before]).fetchall() == []

    def take_in_repairs(self) -> None:
        """What was skipped is pending now, and perhaps all of its interval with it."""
        pending = {row[0] for row in self.admin.execute("SELECT sequence_no FROM outbox_pending")}
        self.appeared -= pending
        self.pending |= pending & self.rows()

    @invariant()
    def what_is_needed_is_there(self) -> None:
        young = {number for number, since in self.hours_since_mark.items() if since < RETENTION_HOURS}
        assert self.unpublished | self.pending | self.appeared | young <= self.rows()

    @invariant()
    def marks_and_rows_agree(self) -> None:
        assert self.is_tampered or disagreeing_marks(self.admin) == []

    def rows(self) -> set[int]:
        return {row[0] for row in self.admin.execute("SELECT sequence_no FROM outbox")}

    @staticmethod
    def choose(among: Collection[int], number: int) -> int:
        return sorted(among)[number % len(among)]


class PartitionedHistories(Histories):
    """The same with partitions that are opened and dropped; by rows goes only what is left in those that are due."""

    def __init__(self) -> None:
        super().__init__()
        self.admin.execute("ALTER FUNCTION outbox_drop_partition SET lock_timeout = '10ms'")
        self.open_next()

    def leave(self) -> None:
        eventually(self.leave_partition)

    def leave_partition(self) -> bool:
        """Open another partition than the one with the newest message; not while an older transaction runs."""
        self.open_next()
        in_open = """
            SELECT FROM outbox
            WHERE sequence_no >= (SELECT min(first_no) FROM outbox_partition WHERE closed_at IS NULL)
        """
        return not self.admin.execute(in_open).fetchall()

    @rule()
    def open_next(self) -> None:
        self.admin.execute("UPDATE outbox_partition SET opened_at = opened_at - open_for")
        open_partition(self.admin, options=OPTIONS)

    def age_marks(self, hours: int) -> None:
        self.admin.execute("UPDATE outbox_partition SET closed_at = closed_at - make_interval(hours => %s)", [hours])
        super().age_marks(hours)

    @rule(is_new_lap=st.booleans())
    def prune(self, *, is_new_lap: bool = False) -> None:
        while True:
            try:
                super().prune(is_new_lap=is_new_lap)
            except DatabaseConflict:  # autovacuum, or a writer: until it commits it keeps every partition
                self.pruner.rollback()
                self.take_in_repairs()
                if self.late:
                    return
            else:
                return


@both_layouts
def test_no_history_loses_a_message_or_keeps_one_for_ever(database: Database, layout: str) -> None:
    class OfThisDatabase(Histories if layout == "outbox" else PartitionedHistories):  # type: ignore[misc]  # chosen here
        pass

    OfThisDatabase.database = database
    run_state_machine_as_test(
        OfThisDatabase,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
