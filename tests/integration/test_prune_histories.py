"""Whatever happens in whatever order: pruning never removes what is still needed, and in the end all that is old."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from outbox_relay import database as relay_database
from outbox_relay.relay.prune import PruneOptions, prune_batch

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
WHERE published_at < clock_timestamp() - make_interval(hours => %s) AND parked_at IS NULL
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
        self.late: list[int] = []
        self.unpublished: set[int] = set()
        self.parked: set[int] = set()
        self.hours_since_published: dict[int, int] = {}

    def teardown(self) -> None:
        with closing(self.admin), closing(self.pruner), closing(self.late_writer):
            self.commit_late()
            self.age(hours=RETENTION_HOURS)
            self.after = 0
            self.prune_round()
            assert self.admin.execute(SELECT_DOOMED, [RETENTION_HOURS]).fetchall() == []
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
        self.admin.execute(AGE, {"hours": hours})
        self.hours_since_published = {
            published: since + hours for published, since in self.hours_since_published.items()
        }

    @rule(is_new_lap=st.booleans())
    def prune_round(self, *, is_new_lap: bool = False) -> None:
        self.after = 0 if is_new_lap else self.after
        while True:
            batch = prune_batch(self.pruner, options=OPTIONS, after=self.after)
            assert batch is not None
            assert batch.after >= self.after
            self.after = batch.after
            if batch.is_last:
                break
        if is_new_lap:
            assert self.admin.execute(SELECT_DOOMED, [RETENTION_HOURS]).fetchall() == []

    @invariant()
    def what_is_needed_is_there(self) -> None:
        young = {row for row, since in self.hours_since_published.items() if since < RETENTION_HOURS}
        assert self.unpublished | self.parked | young <= self.rows()

    def rows(self) -> set[int]:
        return {row[0] for row in self.admin.execute("SELECT id FROM outbox")}

    @staticmethod
    def choose(among: set[int], number: int) -> int:
        return sorted(among)[number % len(among)]


def test_no_history_loses_a_message_or_keeps_one_for_ever(database: Database) -> None:
    class OfThisDatabase(Histories):
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
