"""Faults of PostgreSQL, and sessions in it that hold what relays need."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.faults.nemesis.sessions import holding
from tests.faults.soak.stage import DidNotFire, comes_true
from tests.fixtures.load import insert_messages

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

    from tests.faults.soak.stage import Stage

TERMINATE = """
SELECT count(pg_terminate_backend(pid))
FROM pg_stat_activity
WHERE datname = current_database() AND application_name LIKE 'outbox-relay %'
"""


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
    with stage.pipeline.database.connect(autocommit=True) as admin:
        [(terminated,)] = admin.execute(TERMINATE).fetchall()
    yield
    if not terminated:
        raise DidNotFire


@contextmanager
def shards_held(stage: Stage, _chance: Random) -> Iterator[None]:
    with holding(stage, "SELECT FROM outbox_shard ORDER BY shard FOR UPDATE"):
        yield


@contextmanager
def table_locked(stage: Stage, _chance: Random) -> Iterator[None]:
    """As a migration by hand does that does not mind its time-outs."""
    with holding(stage, "LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE"):
        yield


@contextmanager
def snapshot_held(stage: Stage, _chance: Random) -> Iterator[None]:
    with holding(stage, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM outbox_shard"):
        yield


@contextmanager
def rows_held(stage: Stage, _chance: Random) -> Iterator[None]:
    """Rows that a relay claims next, by somebody who takes no shard first: it waits, and tries again."""
    conflicts = stage.count("claim_conflicted")
    with holding(stage, "LOCK TABLE outbox_shard IN EXCLUSIVE MODE") as connection:
        connection.execute("SELECT FROM outbox WHERE published_at IS NULL AND parked_at IS NULL FOR UPDATE")
        yield
        is_noticed = comes_true(lambda: stage.count("claim_conflicted") > conflicts)
    if not is_noticed:
        raise DidNotFire


@contextmanager
def writer_left_open(stage: Stage, _chance: Random) -> Iterator[None]:
    given_up = stage.count("writer_given_up")
    with stage.pipeline.database.connect() as writer:
        writes = insert_messages(writer, *stage.keys)
        yield
        is_noticed = comes_true(lambda: stage.count("writer_given_up") > given_up)
        writer.commit()
    stage.committed(writes)
    if not is_noticed:
        raise DidNotFire


@contextmanager
def transaction_prepared(stage: Stage, chance: Random) -> Iterator[None]:
    given_up, gid = stage.count("writer_given_up"), f"forgotten-{chance.randrange(2**32)}"
    with stage.pipeline.database.connect(autocommit=True) as writer:
        writer.execute("BEGIN")
        writes = insert_messages(writer, *stage.keys)
        writer.execute(f"PREPARE TRANSACTION '{gid}'")
        yield
        is_noticed = comes_true(lambda: stage.count("writer_given_up") > given_up)
        writer.execute(f"COMMIT PREPARED '{gid}'")
    stage.committed(writes)
    if not is_noticed:
        raise DidNotFire


POSTGRES = (
    postgres_restarted,
    postgres_crashed,
    postgres_killed,
    relays_sessions_terminated,
    shards_held,
    rows_held,
    table_locked,
    snapshot_held,
    writer_left_open,
    transaction_prepared,
)
