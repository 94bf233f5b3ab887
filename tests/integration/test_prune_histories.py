"""Whatever happens in whatever order: pruning never removes what is still needed, and in the end all that is old."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from outbox_relay import database as relay_database
from outbox_relay.errors import DatabaseConflict
from outbox_relay.relay.prune import PruneOptions, first_kept_id, open_partition, prune_batch, prune_partition
from tests.fixtures.postgres import both_layouts
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from tests.fixtures.postgres import Database

pytestmark = pytest.mark.slow

RETENTION_HOURS = 10
OPTIONS = PruneOptions(older_than_seconds=RETENTION_HOURS * 3600.0, messages=3)
SOME = st.integers(0, 2**16)

INSERT = """
INSERT INTO outbox (aggregate_type, aggregate_id, event_type)
SELECT 'order', '1', 'placed' FROM generate_series(1, %s)
RETURNING id
"""
SELECT_DOOMED = """
SELECT id FROM outbox
WHERE published_at < clock_timestamp() - make_interval(hours => %s) AND parked_at IS NULL AND id < %s
"""
# Instead of waiting, all that has happened is moved into the past.
AGE = """
UPDATE outbox
SET created_at = created_at - make_interval(hours => %(hours)s),
    published_at = published_at - make_interval(hours => %(hours)s)
"""


class Histories(RuleBasedStateMachine):
    """The model is what may not be removed: every committed message that is not published, or not long enough ago."""

    database: Database

    def __init__(self) -> None:
        super().__init__()
        self.admin = relay_database.connect(self.database.dsn, application_name="admin")
        self.admin.execute("TRUNCATE outbox")
        self.pruner = relay_database.connect(self.database.dsn, application_name="pruner")
        self.late_writer = self.database.connect()
        self.after = 0
        self.before = 2**62
        self.late: list[int] = []
        self.unpublished: set[int] = set()
        self.parked: set[int] = set()
        self.hours_since_published: dict[int, int] = {}

    def teardown(self) -> None:
        with closing(self.admin), closing(self.pruner), closing(self.late_writer):
            self.commit_late()
            self.age(hours=RETENTION_HOURS)
            self.prune_round(is_new_lap=True)
            self.what_is_needed_is_there()
            assert self.rows() == self.unpublished | self.parked

    @rule(count=st.integers(1, 7))
    def write(self, count: int) -> None:
        self.unpublished.update(row[0] for row in self.admin.execute(INSERT, [count]))

    @rule(count=st.integers(1, 3))
    def write_late(self, count: int) -> None:
        self.late += [row[0] for row in self.late_writer.execute(INSERT, [count])]

    @rule()
    def commit_late(self) -> None:
        self.late_writer.commit()
        self.unpublished.update(self.late)
        self.late.clear()

    @precondition(lambda self: self.unpublished)
    @rule(chosen=st.lists(SOME, min_size=1, max_size=6))
    def publish(self, chosen: list[int]) -> None:
        ids = {self.choose(self.unpublished, number) for number in chosen}
        self.admin.execute("UPDATE outbox SET published_at = now() WHERE id = ANY (%s)", [list(ids)])
        self.unpublished -= ids
        self.hours_since_published.update(dict.fromkeys(ids, 0))

    @precondition(lambda self: self.unpublished)
    @rule(number=SOME)
    def park(self, number: int) -> None:
        parked = self.choose(self.unpublished, number)
        self.admin.execute("UPDATE outbox SET parked_at = now() WHERE id = %s", [parked])
        self.unpublished.remove(parked)
        self.parked.add(parked)

    @precondition(lambda self: self.parked)
    @rule(number=SOME)
    def release(self, number: int) -> None:
        released = self.choose(self.parked, number)
        self.admin.execute("UPDATE outbox SET parked_at = NULL WHERE id = %s", [released])
        self.parked.remove(released)
        self.unpublished.add(released)

    @precondition(lambda self: not self.late)  # what is not committed cannot be moved into the past
    @rule(hours=st.integers(1, RETENTION_HOURS))
    def age(self, hours: int) -> None:
        self.age_messages(hours)

    def age_messages(self, hours: int) -> None:
        self.admin.execute(AGE, {"hours": hours})
        self.hours_since_published = {
            published: since + hours for published, since in self.hours_since_published.items()
        }

    @rule(is_new_lap=st.booleans())
    def prune_round(self, *, is_new_lap: bool = False) -> None:
        if is_new_lap:
            self.begin_lap()
        while True:
            batch = prune_batch(self.pruner, options=OPTIONS, after=self.after, before=self.before)
            assert batch is not None
            assert batch.after >= self.after
            self.after = batch.after
            if batch.is_last:
                break
        if is_new_lap:
            assert self.admin.execute(SELECT_DOOMED, [RETENTION_HOURS, self.before]).fetchall() == []

    def begin_lap(self) -> None:
        self.after = 0

    @invariant()
    def what_is_needed_is_there(self) -> None:
        young = {row for row, since in self.hours_since_published.items() if since < RETENTION_HOURS}
        assert self.unpublished | self.parked | young <= self.rows()

    def rows(self) -> set[int]:
        return {row[0] for row in self.admin.execute("SELECT id FROM outbox")}

    @staticmethod
    def choose(among: set[int], number: int) -> int:
        return sorted(among)[number % len(among)]


class PartitionedHistories(Histories):
    """The same with partitions that are opened and dropped; by rows goes only what is left in those that are due."""

    def __init__(self) -> None:
        super().__init__()
        self.admin.execute("ALTER FUNCTION outbox_drop_partition SET lock_timeout = '10ms'")
        self.open_next()
        self.before = 0

    def teardown(self) -> None:
        self.commit_late()
        eventually(self.leave_partition)
        super().teardown()

    def leave_partition(self) -> bool:
        """Open another partition than the one with the newest message; not while an older transaction runs."""
        self.open_next()
        in_open = "SELECT FROM outbox WHERE id >= (SELECT min(first_id) FROM outbox_partition WHERE closed_at IS NULL)"
        return not self.admin.execute(in_open).fetchall()

    @rule()
    def open_next(self) -> None:
        self.admin.execute("UPDATE outbox_partition SET opened_at = opened_at - open_for")
        open_partition(self.admin, options=OPTIONS)

    @precondition(lambda self: not self.late)
    @rule(hours=st.integers(1, RETENTION_HOURS))
    def age(self, hours: int) -> None:
        self.admin.execute("UPDATE outbox_partition SET closed_at = closed_at - make_interval(hours => %s)", [hours])
        self.age_messages(hours)

    def begin_lap(self) -> None:
        self.after = 0
        self.before = first_kept_id(self.pruner, options=OPTIONS)
        is_last = False
        while not is_last:
            try:
                batch = prune_partition(self.pruner, options=OPTIONS)
            except DatabaseConflict:  # autovacuum, or a writer: until it commits it keeps every partition
                self.pruner.rollback()
                is_last = bool(self.late)
            else:
                assert batch is not None
                is_last = batch.is_last


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
