"""What people do to the tables by hand, and what relays do to them beside publishing."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from psycopg.errors import LockNotAvailable

from outbox_relay.errors import DatabaseConflict, DatabaseUnavailable
from outbox_relay.relay.reconcile import ReconcileOptions, advance_batch
from outbox_relay.relay.reconcile import Stage as ReconcilingStage
from tests.faults.nemesis.sessions import holding
from tests.faults.soak.stage import RECOVERY_SECONDS, DidNotFire, comes_true
from tests.fixtures.load import commit_messages, commit_with_number
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random
    from typing import LiteralString

    from tests.faults.soak.stage import Stage

AT_ONCE = ReconcilingStage(older_than_seconds=0.0, slot_seconds=2.0, thins=True)
THINNED_FOR_SECONDS = 5.0

DRAW_NUMBER = "SELECT nextval('outbox_sequence_no_seq')"
SELECT_MARKED = """
SELECT true
FROM outbox_published
WHERE through >= %s AND shard = (SELECT shard FROM outbox WHERE message_id = %s)
LIMIT 1
"""
COUNT_MARKS = "SELECT count(*) FROM outbox_published"
CHANGE_PUBLISHED = """
UPDATE outbox
SET payload = '{"changed": "by hand"}'
WHERE (shard, sequence_no) IN (
    SELECT shard, sequence_no
    FROM outbox_message
    WHERE state = 'published' AND published_at < now() - interval '1 second'
    ORDER BY sequence_no
    LIMIT 50
)
"""
DELETE_PUBLISHED = """
DELETE FROM outbox
WHERE (shard, sequence_no) IN (
    SELECT shard, sequence_no
    FROM outbox_message
    WHERE state = 'published' AND published_at < now() - interval '1 second'
    ORDER BY sequence_no DESC
    LIMIT 50
)
"""
REFUSE_UPDATES: LiteralString = """
SET LOCAL lock_timeout = '100ms';
CREATE OR REPLACE FUNCTION refuse_update() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'this table is append-only';
END $$;
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_trigger WHERE tgname = 'refuse_update') THEN
        CREATE TRIGGER refuse_update BEFORE UPDATE ON outbox FOR EACH ROW EXECUTE FUNCTION refuse_update();
    END IF;
END $$
"""
ALLOW_UPDATES: LiteralString = """
CREATE OR REPLACE FUNCTION refuse_update() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RETURN NEW;
END $$
"""


@contextmanager
def rows_held(stage: Stage, _chance: Random) -> Iterator[None]:
    """The newest messages, by somebody who takes no shard first: no relay notices, for it locks no message."""
    with holding(stage, "SELECT FROM outbox ORDER BY shard DESC, sequence_no DESC LIMIT 1000 FOR UPDATE"):
        yield


@contextmanager
def row_inserted_below_a_mark(stage: Stage, chance: Random) -> Iterator[None]:
    """The owner gives a message a number that the marks have passed: it is found and published after all."""
    key = chance.choice(stage.keys)
    with stage.pipeline.database.connect(autocommit=True) as owner:
        [(number,)] = owner.execute(DRAW_NUMBER).fetchall()
        [later] = commit_messages(owner, key)
        stage.writes.append(later)
        eventually(
            lambda: owner.execute(SELECT_MARKED, [number, later.message_id]).fetchone(),
            timeout=RECOVERY_SECONDS,
            message="its mark has not come so far",
        )
        stage.writes.append(commit_with_number(owner, key, number=number))
    stage.skipped += 1
    yield
    if not comes_true(lambda: stage.found_skipped >= stage.skipped, seconds=RECOVERY_SECONDS):
        raise DidNotFire


@contextmanager
def published_rows_changed(stage: Stage, _chance: Random) -> Iterator[None]:
    """By hand, which is their owner's right."""
    yield
    run(stage, CHANGE_PUBLISHED)


@contextmanager
def published_rows_deleted(stage: Stage, _chance: Random) -> Iterator[None]:
    """By hand: they are fewer than the marks say then, which is no alarm."""
    yield
    run(stage, DELETE_PUBLISHED)


@contextmanager
def updates_refused(stage: Stage, _chance: Random) -> Iterator[None]:
    """
    By a trigger; nobody but an operator who edits a message updates the table.

    The trigger stays, and its function lets updates pass again: that needs no lock, for which it might wait for long.
    """
    create(stage, REFUSE_UPDATES)
    yield
    create(stage, ALLOW_UPDATES)


@contextmanager
def marks_thinned(stage: Stage, _chance: Random) -> Iterator[None]:
    """As reconciling does after a minute, at once and for all marks but the newest."""
    with stage.pipeline.database.connect(autocommit=True) as owner:
        [(before,)] = owner.execute(COUNT_MARKS).fetchall()
        yield
        options = ReconcileOptions(lock_timeout=1.0)
        try:
            has_thinned = comes_true(
                lambda: advance_batch(owner, options=options, stage=AT_ONCE), seconds=THINNED_FOR_SECONDS
            )
            [(after,)] = owner.execute(COUNT_MARKS).fetchall()
        except (DatabaseConflict, DatabaseUnavailable) as error:
            raise DidNotFire from error
    if not has_thinned or after >= before:
        raise DidNotFire


def run(stage: Stage, statement: LiteralString) -> None:
    """Execute a statement that has to find rows."""
    with stage.pipeline.database.connect() as owner:
        owner.execute("SET LOCAL lock_timeout = '1s'")
        try:
            rows = owner.execute(statement).rowcount
        except LockNotAvailable as error:
            raise DidNotFire from error
    if not rows:
        raise DidNotFire


def create(stage: Stage, statement: LiteralString) -> None:
    """Execute a statement that may lock the table, as often as its lock is not to be had."""

    def is_done() -> bool:
        try:
            with stage.pipeline.database.connect(autocommit=True) as owner, owner.transaction():
                owner.execute(statement)
        except LockNotAvailable:
            return False
        return True

    eventually(is_done, timeout=2 * RECOVERY_SECONDS, message="the table could not be locked")


TABLES = (
    rows_held,
    row_inserted_below_a_mark,
    published_rows_changed,
    published_rows_deleted,
    updates_refused,
    marks_thinned,
)
