"""Partitions are opened in time without anybody waiting, and dropped only when nobody needs anything in them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, LiteralString, cast

import psycopg
import pytest
from psycopg import errors
from psycopg.conninfo import make_conninfo

from outbox_relay import database as relay_database
from outbox_relay.errors import DatabaseConflict, SchemaMismatch
from outbox_relay.operate import migrate
from outbox_relay.operate import prune as command
from outbox_relay.operate.prune import Pruned, count_prunable, prune
from outbox_relay.relay.prune import PrunedBatch, PruneOptions, Pruner, first_kept_id, open_partition, prune_partition
from outbox_relay.sql import statement
from tests.fixtures.outbox import insert
from tests.fixtures.postgres import login
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from outbox_relay.observe.telemetry import Telemetry
    from tests.fixtures.postgres import Database

pytestmark = pytest.mark.every_postgres

WIDTH = 100_000_000_000
OPTIONS = PruneOptions(older_than_seconds=7 * 86_400.0, messages=100)
PLACES = "SELECT tableoid::regclass::text, count(*) FROM outbox GROUP BY 1 ORDER BY 1"


@pytest.fixture
def admin(database: Database) -> Iterator[Connection]:
    """The owner of an outbox whose partition 0 is open."""
    with database.connect(autocommit=True) as connection:
        migrate.apply(connection, schema="public", line="partitioned")
        yield connection


@pytest.fixture
def pruner(database: Database, admin: Connection) -> Iterator[Connection]:
    """A login with the grants of a pruner and nothing else."""
    assert admin.autocommit
    with login(database, group="outbox_pruner") as name:
        dsn = make_conninfo(database.dsn, user=name)
        with closing(relay_database.connect(dsn, application_name="pruner")) as connection:
            yield connection


def partitions(admin: Connection) -> dict[int, str]:
    """The state of each partition that is there, as the register has it; register and catalog agree."""
    rows = admin.execute(
        """
        SELECT
            number,
            CASE WHEN closed_at IS NOT NULL THEN 'closed' WHEN opened_at IS NOT NULL THEN 'open' ELSE 'ahead' END
        FROM outbox_partition
        ORDER BY number
        """
    ).fetchall()
    attached = admin.execute(
        "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'outbox'::regclass ORDER BY inhrelid"
    ).fetchall()
    assert {name for (name,) in attached} == {f"outbox_p{number}" for number, _ in rows}
    return dict(rows)


def places(admin: Connection) -> dict[str, int]:
    """How many messages are in which partition."""
    return dict(admin.execute(PLACES).fetchall())


def let_time_pass(admin: Connection, *, days: int) -> None:
    """Move all that has happened into the past."""
    for table, columns in (
        ("outbox", ("created_at", "published_at")),
        ("outbox_partition", ("opened_at", "closed_at")),
    ):
        moved = ", ".join(f"{column} = {column} - interval '{days} days'" for column in columns)
        admin.execute(f"UPDATE {table} SET {moved}".encode())


def somebody_waits(admin: Connection) -> bool:
    return admin.execute("SELECT FROM pg_locks WHERE NOT granted").fetchone() is not None


def next_day(admin: Connection, pruner: Connection) -> None:
    let_time_pass(admin, days=1)
    open_partition(pruner, options=OPTIONS)


def prune_all(pruner: Connection) -> Pruned:
    return prune(pruner, options=OPTIONS, on_batch=lambda _removed: None)


def test_a_partition_is_open_for_its_time_and_two_lie_ahead(admin: Connection, pruner: Connection) -> None:
    assert partitions(admin) == {0: "open", 1: "ahead", 2: "ahead"}
    open_partition(pruner, options=OPTIONS)
    insert(admin, "1")
    assert (partitions(admin), places(admin)) == ({0: "open", 1: "ahead", 2: "ahead"}, {"outbox_p0": 1})
    next_day(admin, pruner)
    open_partition(pruner, options=OPTIONS)
    insert(admin, "1")
    assert partitions(admin) == {0: "closed", 1: "open", 2: "ahead", 3: "ahead"}
    assert places(admin) == {"outbox_p0": 1, "outbox_p1": 1}
    assert admin.execute("SELECT max(id), max(sequence_no) FROM outbox").fetchall() == [(WIDTH, 2)]


def test_nobody_fails_when_no_partition_is_opened_for_long(admin: Connection, pruner: Connection) -> None:
    let_time_pass(admin, days=1000)
    insert(admin, "1")
    open_partition(pruner, options=OPTIONS)
    insert(admin, "1")
    assert places(admin) == {"outbox_p0": 1, "outbox_p1": 1}


def test_ids_that_run_over_find_the_partition_ahead_and_opening_never_moves_them_back(
    admin: Connection, pruner: Connection
) -> None:
    admin.execute("SELECT setval('outbox_id_seq', %s)", [WIDTH + 5])
    insert(admin, "1")
    next_day(admin, pruner)
    insert(admin, "1")
    assert admin.execute("SELECT array_agg(id ORDER BY id) FROM outbox").fetchall() == [([WIDTH + 6, WIDTH + 7],)]


def test_the_period_of_the_newest_partition_goes_on(admin: Connection, pruner: Connection) -> None:
    admin.execute("UPDATE outbox_partition SET open_for = '6 hours'")
    next_day(admin, pruner)
    periods = admin.execute("SELECT array_agg(DISTINCT open_for::text) FROM outbox_partition").fetchall()
    assert periods == [(["06:00:00"],)]


def test_open_writers_are_not_waited_for_and_their_messages_stay_where_they_are(
    database: Database, admin: Connection, pruner: Connection
) -> None:
    with database.connect() as writer:
        insert(writer, "1")
        next_day(admin, pruner)
        insert(writer, "1")
        writer.commit()
    assert places(admin) == {"outbox_p0": 1, "outbox_p1": 1}


def test_no_partition_is_opened_that_an_older_transaction_may_not_know(
    database: Database, admin: Connection, pruner: Connection
) -> None:
    """Else the last insert finds no partition: who holds the lock on the outbox hears of none that was made since."""
    with database.connect() as writer:
        for _ in range(4):
            insert(writer, "1")
            next_day(admin, pruner)
        assert partitions(admin) == {0: "closed", 1: "closed", 2: "open", 3: "ahead", 4: "ahead"}
        writer.commit()
    open_partition(pruner, options=OPTIONS)
    assert partitions(admin) == {0: "closed", 1: "closed", 2: "closed", 3: "open", 4: "ahead", 5: "ahead"}
    assert places(admin) == {"outbox_p0": 1, "outbox_p1": 1, "outbox_p2": 2}


def test_an_opening_that_is_rolled_back_is_made_good_by_the_next_one(admin: Connection, pruner: Connection) -> None:
    let_time_pass(admin, days=1)
    pruner.execute("BEGIN")
    pruner.execute("SELECT outbox_open_partition()")
    pruner.execute("ROLLBACK")
    insert(admin, "1")
    open_partition(pruner, options=OPTIONS)
    insert(admin, "1")
    assert partitions(admin) == {0: "closed", 1: "open", 2: "ahead", 3: "ahead"}
    assert places(admin) == {"outbox_p1": 2}


def test_of_many_that_open_at_once_one_does(database: Database, admin: Connection) -> None:
    let_time_pass(admin, days=1)

    def open_one(_number: int) -> None:
        with closing(relay_database.connect(database.dsn, application_name="pruner")) as connection:
            open_partition(connection, options=OPTIONS)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(open_one, range(6)))
    assert partitions(admin) == {0: "closed", 1: "open", 2: "ahead", 3: "ahead"}


def test_a_partition_goes_as_a_whole_when_all_in_it_is_old(admin: Connection, pruner: Connection) -> None:
    insert(admin, "1", "2", "3")
    admin.execute("UPDATE outbox SET published_at = now()")
    next_day(admin, pruner)
    kept = insert(admin, "4")
    let_time_pass(admin, days=6)
    assert prune_all(pruner).messages == 0
    let_time_pass(admin, days=1)
    assert count_prunable(pruner, options=OPTIONS, on_batch=lambda _found: None) == 3
    assert prune_all(pruner).messages == 3
    assert 0 not in partitions(admin)
    assert admin.execute("SELECT sequence_no FROM outbox").fetchall() == [(number,) for number in kept]


@pytest.mark.parametrize(
    "state",
    [
        "published_at = NULL",
        "published_at = NULL, parked_at = now()",
        "parked_at = now()",
        "published_at = now() - interval '6.9 days'",
    ],
    ids=["unpublished", "parked", "parked although published", "published late"],
)
def test_what_is_still_needed_keeps_its_partition_and_the_rest_goes_by_rows(
    admin: Connection, pruner: Connection, state: LiteralString
) -> None:
    insert(admin, "1", "2", "3")
    next_day(admin, pruner)
    admin.execute("UPDATE outbox SET published_at = now()")
    let_time_pass(admin, days=8)
    admin.execute(f"UPDATE outbox SET {state} WHERE id = 2".encode())
    assert prune_partition(pruner, options=OPTIONS) == PrunedBatch(messages=0, after=0, is_last=True)
    assert places(admin) == {"outbox_p0": 3}
    assert prune_all(pruner).messages == 2
    assert admin.execute("SELECT id FROM outbox").fetchall() == [(2,)]
    assert min(partitions(admin)) == 0
    admin.execute("UPDATE outbox SET published_at = now() - interval '8 days', parked_at = NULL")
    assert prune_all(pruner).messages == 1
    assert 0 not in partitions(admin)


def test_a_younger_partition_goes_although_an_older_one_stays(admin: Connection, pruner: Connection) -> None:
    [parked] = insert(admin, "1")
    next_day(admin, pruner)
    insert(admin, "2")
    next_day(admin, pruner)
    admin.execute("UPDATE outbox SET published_at = now()")
    admin.execute("UPDATE outbox SET published_at = NULL, parked_at = now() WHERE sequence_no = %s", [parked])
    let_time_pass(admin, days=8)
    assert prune_all(pruner).messages == 1
    assert {0, 2, 3} <= partitions(admin).keys()
    assert 1 not in partitions(admin)


def test_no_row_of_a_partition_that_is_still_kept_is_removed_by_itself(admin: Connection, pruner: Connection) -> None:
    insert(admin, "1")
    admin.execute("UPDATE outbox SET published_at = now()")
    let_time_pass(admin, days=8)
    assert first_kept_id(pruner, options=OPTIONS) == 0
    assert prune_all(pruner).messages == 0
    assert sum(places(admin).values()) == 1


def test_a_writer_with_an_open_transaction_in_the_partition_keeps_it(
    database: Database, admin: Connection, pruner: Connection
) -> None:
    with database.connect() as writer:
        insert(writer, "1")
        next_day(admin, pruner)
        let_time_pass(admin, days=8)
        with pytest.raises(DatabaseConflict):
            prune_partition(pruner, options=OPTIONS)
        pruner.rollback()
        writer.commit()
    dropped = prune_partition(pruner, options=OPTIONS)
    assert dropped is not None
    assert dropped.is_last
    assert places(admin) == {"outbox_p0": 1}


def test_who_takes_back_a_mark_during_the_look_is_waited_for(
    database: Database, admin: Connection, pruner: Connection
) -> None:
    insert(admin, "1", "2")
    admin.execute("UPDATE outbox SET published_at = now()")
    next_day(admin, pruner)
    let_time_pass(admin, days=8)
    admin.execute("ALTER FUNCTION outbox_drop_partition SET lock_timeout = '30s'")
    with database.connect() as operator, ThreadPoolExecutor(1) as threads:
        operator.execute("UPDATE outbox SET published_at = NULL WHERE id = 1")
        pruning = threads.submit(prune_partition, pruner, options=OPTIONS)
        eventually(lambda: admin.execute("SELECT FROM pg_locks WHERE NOT granted").fetchall())
        operator.commit()
        dropped = pruning.result()
    assert dropped is not None
    assert (dropped.messages, dropped.is_last) == (0, True)
    assert places(admin) == {"outbox_p0": 2}


def test_a_snapshot_older_than_the_lock_is_refused(admin: Connection, pruner: Connection) -> None:
    assert admin.autocommit
    pruner.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    with pytest.raises(errors.InvalidTransactionState, match="read committed transactions only"):
        pruner.execute("SELECT outbox_drop_partition('1 day')")
    pruner.rollback()


@pytest.fixture
def _old_partition(admin: Connection, pruner: Connection) -> None:
    """Partition 0 is closed, and its one message is old enough."""
    insert(admin, "1")
    admin.execute("UPDATE outbox SET published_at = now()")
    next_day(admin, pruner)
    let_time_pass(admin, days=8)


@pytest.mark.usefixtures("_old_partition")
def test_a_reader_is_waited_for_no_longer_than_half_a_second_and_writers_get_through(
    database: Database, pruner: Connection
) -> None:
    with database.connect() as reader, database.connect() as writer:
        reader.execute("SELECT FROM outbox")
        writer.execute("SET lock_timeout = '5s'")
        with ThreadPoolExecutor(1) as threads:
            pruning = threads.submit(prune_partition, pruner, options=OPTIONS)
            insert(writer, "2")
            assert isinstance(pruning.exception(), DatabaseConflict)
        writer.commit()
    pruner.rollback()
    assert prune_all(pruner).messages == 1


@pytest.mark.usefixtures("_old_partition")
def test_a_prune_tries_again_while_a_reader_is_in_the_way(
    database: Database, admin: Connection, pruner: Connection
) -> None:
    with database.connect() as reader, ThreadPoolExecutor(1) as threads:
        reader.execute("SELECT FROM outbox")
        pruning = threads.submit(prune_all, pruner)
        for is_waiting in (True, False):  # it waits for the reader, and has given up once
            eventually(lambda: somebody_waits(admin) == is_waiting)  # noqa: B023 -- at once
        reader.rollback()
        assert pruning.result().messages == 1


@pytest.mark.usefixtures("_old_partition")
def test_a_prune_ends_when_what_is_in_the_way_stays(
    monkeypatch: pytest.MonkeyPatch, database: Database, pruner: Connection
) -> None:
    monkeypatch.setattr(command, "_ATTEMPTS", 2)
    with database.connect() as reader:
        reader.execute("SELECT FROM outbox")
        with pytest.raises(DatabaseConflict, match="lock timeout"):
            prune_all(pruner)
    pruner.rollback()
    assert prune_all(pruner).messages == 1


@pytest.mark.parametrize("group", ["outbox_writer", "outbox_operator"])
def test_only_relays_and_pruners_may_open_and_drop(database: Database, admin: Connection, group: LiteralString) -> None:
    assert admin.autocommit
    with login(database, group=group) as name, database.connect(user=name, autocommit=True) as session:
        for call in ("outbox_open_partition()", "outbox_drop_partition('1 day')"):
            with pytest.raises(errors.InsufficientPrivilege):
                session.execute(f"SELECT {call}".encode())


def test_a_role_without_the_right_is_told_so(database: Database, admin: Connection) -> None:
    assert admin.autocommit
    with login(database, group="outbox_operator") as name:
        dsn = make_conninfo(database.dsn, user=name)
        with (
            closing(relay_database.connect(dsn, application_name="pruner")) as session,
            pytest.raises(SchemaMismatch, match="permission denied for function outbox_open_partition"),
        ):
            open_partition(session, options=OPTIONS)


def test_whoever_names_ids_opens_their_partitions_only(admin: Connection, pruner: Connection) -> None:
    for _ in range(3):
        insert(admin, *"1234")
        next_day(admin, pruner)
    settle, by_ids = (statement(name, schema="public").split(b";")[0] for name in ("settle_mark", "prune_delete"))
    ids = "{" + ",".join(str(WIDTH + number) for number in range(4)) + "}"
    bounds = {"after": WIDTH, "through": WIDTH + 3, "older_than_seconds": 1.0}
    for query, parameters in ((settle, {"ids": ids}), (by_ids, bounds)):
        explained = psycopg.ClientCursor(admin).execute(b"EXPLAIN " + query, parameters).fetchall()
        text = "\n".join(line for (line,) in explained)
        assert "outbox_p1" in text
        assert not any(f"outbox_p{number}" in text for number in (0, 2, 3, 4))


class Listener:
    """Stands in for the telemetry and stops the thread when enough messages are gone."""

    def __init__(self, *, until: int) -> None:
        self.stop = threading.Event()
        self.told: list[int | str] = []
        self._left = until

    def beat(self, _thread: str) -> None: ...

    def batch_pruned(self, messages: int, *, seconds: float) -> None:
        assert seconds > 0
        self.told += [messages] if messages else []
        self._left -= messages
        if self._left == 0:
            self.stop.set()

    def pruning_failed(self, error: Exception) -> None:
        self.told.append(str(error))

    def thread_failed(self, thread: str, error: Exception) -> None:
        self.told.append(f"{thread}: {error}")


def test_the_thread_of_a_relay_opens_drops_and_removes(database: Database, admin: Connection) -> None:
    """Partition 1 is dropped; partition 0 is pinned by a parked message and loses the others by rows."""
    with closing(relay_database.connect(database.dsn, application_name="pruner")) as connection:
        insert(admin, *"12345")
        next_day(admin, connection)
        insert(admin, *"123")
        next_day(admin, connection)
        admin.execute("UPDATE outbox SET published_at = now()")
        admin.execute("UPDATE outbox SET published_at = NULL, parked_at = now() WHERE id = 3")
        let_time_pass(admin, days=8)
    listener = Listener(until=7)
    with login(database, group="outbox_relay") as name:
        dsn = make_conninfo(database.dsn, user=name)
        Pruner(
            options=replace(OPTIONS, messages=2),
            connect=lambda: relay_database.connect(dsn, application_name="pruner"),
            telemetry=cast("Telemetry", listener),
            stop=listener.stop,
        ).run()
    assert listener.told == [3, 2, 1, 1]
    assert partitions(admin) == {0: "closed", 2: "closed", 3: "open", 4: "ahead", 5: "ahead"}
    assert admin.execute("SELECT id FROM outbox").fetchall() == [(3,)]
