"""Faults of PostgreSQL, and sessions in it that hold what relays need."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from psycopg.errors import LockNotAvailable

from tests.faults.nemesis.sessions import ended, holding
from tests.faults.soak.stage import noticed
from tests.fixtures.load import insert_messages
from tests.fixtures.pipeline import TERMINATE_RELAYS
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

    from tests.faults.soak.stage import Stage


@contextmanager
def postgres_restarted(stage: Stage, _chance: Random) -> Iterator[None]:
    stage.server.stop("fast")
    yield
    stage.server.start()


@contextmanager
def postgres_crashed(stage: Stage, _chance: Random) -> Iterator[None]:
    stage.server.stop("immediate")
    yield
    stage.server.start()


@contextmanager
def postgres_killed(stage: Stage, _chance: Random) -> Iterator[None]:
    stage.server.kill()
    yield
    stage.server.start()


@contextmanager
def relays_sessions_terminated(stage: Stage, _chance: Random) -> Iterator[None]:
    with ended(stage.pipeline.database, TERMINATE_RELAYS):
        yield


@contextmanager
def shards_held(stage: Stage, _chance: Random) -> Iterator[None]:
    with holding(stage, "SELECT FROM outbox_shard ORDER BY shard FOR UPDATE"):
        yield


@contextmanager
def table_locked(stage: Stage, _chance: Random) -> Iterator[None]:
    """
    As by a migration, which does not wait for its lock for long and tries again.

    Without a time-out nobody might ever go on: a writer with two sessions can hold the table with one and, with the
    other, wait behind the lock. PostgreSQL sees no deadlock in that.
    """
    with ExitStack() as held:
        eventually(lambda: locks_table(stage, held), message="the table could not be locked")
        yield


@contextmanager
def snapshot_held(stage: Stage, _chance: Random) -> Iterator[None]:
    with holding(stage, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM outbox_shard"):
        yield


@contextmanager
def writer_left_open(stage: Stage, _chance: Random) -> Iterator[None]:
    with stage.pipeline.database.connect() as writer, noticed(stage, "writer_given_up"):
        writes = insert_messages(writer, *stage.keys)
        yield
    stage.committed(writes)


@contextmanager
def transaction_prepared(stage: Stage, chance: Random) -> Iterator[None]:
    gid = f"forgotten-{chance.randrange(2**32)}"
    with stage.pipeline.database.connect(autocommit=True) as writer:
        writer.execute("BEGIN")
        writes = insert_messages(writer, *stage.keys)
        writer.execute(f"PREPARE TRANSACTION '{gid}'")
        try:
            with noticed(stage, "writer_given_up"):
                yield
        finally:
            writer.execute(f"COMMIT PREPARED '{gid}'")
            stage.committed(writes)


def locks_table(stage: Stage, held: ExitStack) -> bool:
    """Whether the table could be locked within a tenth of a second; it is until *held* is left."""
    try:
        held.enter_context(
            holding(stage, "SET LOCAL lock_timeout = '100ms'; LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE")
        )
    except LockNotAvailable:
        return False
    return True


POSTGRES = (
    postgres_restarted,
    postgres_crashed,
    postgres_killed,
    relays_sessions_terminated,
    shards_held,
    table_locked,
    snapshot_held,
    writer_left_open,
    transaction_prepared,
)
