"""What people do to the tables while relays work: nothing waits for a lock, is skipped or alarms without a cause."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, LiteralString

import pytest
from psycopg.errors import LockNotAvailable

from outbox_relay.errors import DatabaseConflict
from outbox_relay.relay.reconcile import ReconcileOptions, Stage, advance_batch
from outbox_relay.sandbox.history import Outcome
from outbox_relay.sandbox.judge import judge
from tests.fixtures.load import Plan, commit_messages, commit_with_number, insert_messages
from tests.fixtures.pipeline import flaws
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from outbox_relay.sandbox.history import Write
    from tests.fixtures.load import Load
    from tests.fixtures.pipeline import Pipeline
    from tests.fixtures.postgres import Database

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

PLAN = Plan(writers=4, bulk_rows=50, longest_pause=0.05)
ROUNDS = 3
RECONCILING_SECONDS = 40.0
THIN_AT_ONCE = Stage(older_than_seconds=0.0, slot_seconds=0.5, thins=True)
THINNINGS = 10

SELECT_IS_CHECKED = """
SELECT coalesce(bool_and(coalesce(reconciled.checked_through, 0) >= newest.through), true)
FROM (SELECT shard, max(through) AS through FROM outbox_published GROUP BY shard) AS newest
LEFT JOIN outbox_reconciled AS reconciled USING (shard)
"""
REFUSE_UPDATES: LiteralString = """
CREATE FUNCTION refuse_update() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'this table is append-only';
END $$;
CREATE TRIGGER refuse_update BEFORE UPDATE ON outbox FOR EACH ROW EXECUTE FUNCTION refuse_update();
"""


def execute(database: Database, statement: LiteralString) -> None:
    with database.connect() as owner:
        owner.execute(statement)


def await_reconciled(pipeline: Pipeline) -> None:
    """Wait until all marks have been compared with the rows."""
    with pipeline.database.connect(autocommit=True) as reader:
        eventually(
            lambda: reader.execute(SELECT_IS_CHECKED).fetchone() == (True,),
            timeout=RECONCILING_SECONDS,
            message="the marks are not compared",
        )


def await_records(pipeline: Pipeline, count: int) -> None:
    eventually(
        lambda: len(pipeline.records()) >= count,
        timeout=RECONCILING_SECONDS,
        message=f"{count} messages did not arrive",
    )


@pytest.mark.parametrize("statement", ["TRUNCATE outbox", "TRUNCATE outbox RESTART IDENTITY"])
def test_a_table_that_is_emptied_under_load_has_all_published_that_is_written_afterwards(
    pipeline: Pipeline, statement: LiteralString
) -> None:
    with pipeline.relays(2) as relays:
        with pipeline.load(PLAN) as load:
            for _ in range(ROUNDS):
                load.await_more(300)
                truncate(pipeline.database, statement)
            load.await_more(300)
        pipeline.await_settled()
        for relay in relays:
            assert relay.events_named("thread_failed", "skipped_messages_found") == []
    history = pipeline.history(load.writes)
    committed = {write.message_id for write in load.writes if write.outcome is Outcome.COMMITTED}
    assert {record.message_id for record in history.records} <= committed
    kept = {row.message_id for row in history.rows}
    assert len(kept) > 100
    since = replace(
        history,
        writes=[write for write in history.writes if write.message_id in kept],
        records=[record for record in history.records if record.message_id in kept],
    )
    assert flaws(judge(since)) == {}


def truncate(database: Database, statement: LiteralString) -> None:
    """
    Empty the table, between two transactions of those that use it.

    Its lock is not waited for long: a writer with two sessions can hold the table with one and wait with the other.
    """

    def is_empty() -> bool:
        try:
            execute(database, f"SET LOCAL lock_timeout = '200ms'; {statement}")
        except LockNotAvailable:
            return False
        return True

    eventually(is_empty, message="the table could not be emptied")


@pytest.mark.parametrize(
    "statement",
    ["ALTER SEQUENCE outbox_sequence_no_seq RESTART WITH 1", "SELECT setval('outbox_sequence_no_seq', 1, false)"],
)
def test_a_sequence_that_goes_back_is_refused_and_what_stands_below_the_marks_is_published_in_the_end(
    pipeline: Pipeline, statement: LiteralString
) -> None:
    with pipeline.relays(1) as [relay], pipeline.database.connect() as writer:
        writes = commit_messages(writer, *["order-1", "order-2", "payment-1"] * 7)
        pipeline.await_settled()
        writer.execute("DELETE FROM outbox")  # as retention does
        writer.execute(statement)
        writer.commit()
        writes += commit_messages(writer, *["order-1", "payment-1"] * 4)
        reason = str(relay.wait_for_event("database_lost")["reason"])
        [remedy] = re.findall(r"SELECT setval\(.*?\)(?=$|;)", reason)
        writer.execute(remedy.encode())
        writes += commit_messages(writer, "order-1", "order-2", "payment-1")
        found = relay.wait_for_event("skipped_messages_found", timeout=RECONCILING_SECONDS)
        assert found["is_whole"] is False
        await_records(pipeline, len(writes))
        pipeline.await_settled()
    history = replace(pipeline.history(writes), rows_are_kept=False)
    assert flaws(judge(history)) == {"given_up": 8}


def test_a_row_that_appears_below_marks_that_were_compared_already_is_found_by_the_next_relay(
    pipeline: Pipeline,
) -> None:
    with pipeline.database.connect() as writer:
        with pipeline.relays(1):
            writes = commit_messages(writer, "order-1")
            insert_messages(writer, "order-1")
            writer.rollback()
            writes += commit_messages(writer, "order-1")
            pipeline.await_settled()
            await_reconciled(pipeline)
        writes.append(commit_with_number(writer, "order-1", number=2))
        with pipeline.relays(1) as [relay]:
            found = relay.wait_for_event("skipped_messages_found", timeout=RECONCILING_SECONDS)
            await_records(pipeline, len(writes))
            pipeline.await_settled()
    assert (found["messages"], found["is_whole"]) == (1, False)
    assert flaws(pipeline.judge(writes)) == {"given_up": 1}


def test_a_row_that_is_deleted_or_changed_by_hand_is_published_as_it_is_then_and_never_alarms(
    pipeline: Pipeline,
) -> None:
    with pipeline.relays(2) as relays, pipeline.database.connect() as writer:
        with pipeline.database.connect() as blocker:
            blocker.execute("SELECT FROM outbox_shard FOR UPDATE")
            writes = commit_messages(writer, *["order-1"] * 5)
            writer.execute("DELETE FROM outbox WHERE sequence_no = 2")
            writer.execute("UPDATE outbox SET event_type = 'changed' WHERE sequence_no = 3")
            writer.commit()
        pipeline.await_settled()
        writer.execute("DELETE FROM outbox WHERE sequence_no = 1")
        writer.execute("UPDATE outbox SET event_type = 'changed' WHERE sequence_no = 4")
        writer.commit()
        writes += commit_messages(writer, "order-1")
        pipeline.await_settled()
        await_reconciled(pipeline)
        for relay in relays:
            assert relay.events_named("skipped_messages_found", "reconciling_failed") == []
    verdict = judge(replace(pipeline.history(writes), rows_are_kept=False))
    deleted, changed = writes[1].message_id, writes[2].message_id
    assert (verdict.lost, verdict.corrupted) == ((deleted,), (changed,))
    assert flaws(verdict) == {"lost": 1, "corrupted": 1}


def test_nothing_is_noticed_of_a_trigger_that_refuses_updates(pipeline: Pipeline) -> None:
    execute(pipeline.database, REFUSE_UPDATES)
    with pipeline.relays(2) as relays:
        with pipeline.load(PLAN) as load:
            load.await_more(500)
        pipeline.await_settled()
        for relay in relays:
            assert relay.events_named("database_lost", "claim_conflicted", "thread_failed") == []
    assert flaws(pipeline.judge(load.writes)) == {}


@pytest.mark.parametrize("table", ["outbox", "outbox_published", "outbox_pending"])
def test_a_rule_that_does_something_else_instead_is_named_and_waited_for(
    pipeline: Pipeline, table: LiteralString
) -> None:
    with pipeline.relays(1) as [relay], pipeline.database.connect() as writer:
        with pipeline.database.connect() as blocker:
            blocker.execute("SELECT FROM outbox_shard FOR UPDATE")
            writes = commit_messages(writer, "order-1", "order-1")
            execute(pipeline.database, f"CREATE RULE nothing AS ON DELETE TO {table} DO INSTEAD NOTHING")
            reason = str(relay.wait_for_event("database_lost")["reason"])
        assert f"DROP RULE nothing ON public.{table}" in reason
        execute(pipeline.database, f"DROP RULE nothing ON {table}")
        relay.wait_for_event("database_recovered")
        pipeline.await_settled()
    assert flaws(pipeline.judge(writes)) == {}


def test_marks_that_are_thinned_all_the_time_say_the_same(pipeline: Pipeline) -> None:
    with pipeline.relays(2) as relays:
        with pipeline.load(PLAN) as load, thinning(pipeline.database) as thinned:
            eventually(lambda: len(thinned) >= THINNINGS, message="no marks were thinned")
            load.await_more(500)
        pipeline.await_settled()
        await_reconciled(pipeline)
        for relay in relays:
            assert relay.events_named("skipped_messages_found", "claim_conflicted", "thread_failed") == []
    assert flaws(pipeline.judge(load.writes)) == {}


@contextmanager
def thinning(database: Database) -> Iterator[Sequence[int]]:
    """Thin the marks all the time; give the numbers of messages whose marks were compared for it."""
    thinned: list[int] = []
    is_over = threading.Event()

    def thin() -> None:
        with database.connect(autocommit=True) as owner:
            while not is_over.wait(0.05):
                try:
                    batch = advance_batch(owner, options=ReconcileOptions(), stage=THIN_AT_ONCE)
                except DatabaseConflict:
                    owner.rollback()
                else:
                    thinned.extend([batch.messages] if batch and batch.messages else [])

    with ThreadPoolExecutor(1) as thread:
        thinner = thread.submit(thin)
        try:
            yield thinned
        finally:
            is_over.set()
        thinner.result()


def test_messages_that_are_kept_for_a_second_are_published_once_and_are_gone(pipeline: Pipeline) -> None:
    with pipeline.relays(2, retention=1) as relays:
        with pipeline.load(PLAN) as load:
            load.await_more(1_000)
            await_removal(pipeline, load)
        pipeline.await_settled()
        eventually(lambda: pipeline.rows() == [], timeout=RECONCILING_SECONDS, message="messages are kept")
        for relay in relays:
            assert relay.events_named("skipped_messages_found", "pruning_failed", "thread_failed") == []
    assert flaws(judge(replace(pipeline.history(load.writes), rows_are_kept=False))) == {}


def await_removal(pipeline: Pipeline, load: Load) -> None:
    """Wait until messages are removed while others are written."""

    def are_removed() -> bool:
        kept = {row.message_id for row in pipeline.rows()}
        return any(write.outcome is Outcome.COMMITTED and write.message_id not in kept for write in first)

    first: list[Write] = load.writes
    eventually(are_removed, timeout=RECONCILING_SECONDS, message="nothing is removed")
