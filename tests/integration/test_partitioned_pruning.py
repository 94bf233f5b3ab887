"""Partitions are opened in time without anybody waiting, and dropped only when nobody needs anything in them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, LiteralString, cast

import pytest
from psycopg import errors
from psycopg.conninfo import make_conninfo

from outbox_relay import database as relay_database
from outbox_relay.errors import DatabaseConflict, SchemaMismatch
from outbox_relay.operate import migrate
from outbox_relay.operate import prune as command
from outbox_relay.operate.prune import Pruned, count_prunable, prune
from outbox_relay.relay.prune import (
    PrunedBatch,
    PruneOptions,
    Pruner,
    drop_partition,
    first_kept_number,
    open_partition,
)
from tests.fixtures.marks import disagreeing_marks, mark, set_aside
from tests.fixtures.outbox import insert
from tests.fixtures.postgres import login
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from outbox_relay.observe.telemetry import Telemetry
    from outbox_relay.relay.reconcile import Repair
    from tests.fixtures.postgres import Database

pytestmark = pytest.mark.every_postgres

WIDTH = 100_000_000_000
OPTIONS = PruneOptions(older_than_seconds=7 * 86_400.0, messages=100)
NONE_TO_DROP = PrunedBatch(0, is_last=True)
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
        ("outbox_published", ("published_at",)),
        ("outbox_partition", ("opened_at", "closed_at")),
    ):
        moved = ", ".join(f"{column} = {column} - interval '{days} days'" for column in columns)
        admin.execute(f"UPDATE {table} SET {moved}".encode())


def numbers(admin: Connection) -> list[int]:
    return [row[0] for row in admin.execute("SELECT sequence_no FROM outbox ORDER BY sequence_no").fetchall()]


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
    assert numbers(admin) == [1, WIDTH]


def test_nobody_fails_when_no_partition_is_opened_for_long(admin: Connection, pruner: Connection) -> None:
    let_time_pass(admin, days=1000)
    insert(admin, "1")
    open_partition(pruner, options=OPTIONS)
    insert(admin, "1")
    assert places(admin) == {"outbox_p0": 1, "outbox_p1": 1}


def test_numbers_that_run_over_find_the_partition_ahead_and_opening_never_moves_them_back(
    admin: Connection, pruner: Connection
) -> None:
    admin.execute("SELECT setval('outbox_sequence_no_seq', %s)", [WIDTH + 5])
    insert(admin, "1")
    next_day(admin, pruner)
    insert(admin, "1")
    assert numbers(admin) == [WIDTH + 6, WIDTH + 7]


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
    mark(admin)
    next_day(admin, pruner)
    kept = insert(admin, "4")
    mark(admin)
    let_time_pass(admin, days=5)
    assert prune_all(pruner).messages == 0
    let_time_pass(admin, days=1)
    assert prune_all(pruner).messages == 0  # published longer ago, but not closed for longer
    let_time_pass(admin, days=1)
    mark(admin, through=kept[0])
    assert count_prunable(pruner, options=OPTIONS, on_batch=lambda _found: None) == 3
    assert prune_all(pruner).messages == 3
    assert 0 not in partitions(admin)
    assert numbers(admin) == kept
    assert disagreeing_marks(admin) == []


def test_what_is_published_late_keeps_its_partition_and_all_others_in_it(admin: Connection, pruner: Connection) -> None:
    insert(admin, "1", "2", "3")
    mark(admin, through=2)
    next_day(admin, pruner)
    let_time_pass(admin, days=1)
    mark(admin, through=3)
    let_time_pass(admin, days=6)
    assert prune_all(pruner).messages == 0
    assert numbers(admin) == [1, 2, 3]
    let_time_pass(admin, days=1)
    assert prune_all(pruner).messages == 3
    assert 0 not in partitions(admin)


@pytest.mark.parametrize("state", ["unpublished", "published late"])
def test_what_stays_young_for_longer_than_a_period_lets_the_others_go_by_rows(
    admin: Connection, pruner: Connection, state: LiteralString
) -> None:
    insert(admin, "1", "1", "1")
    mark(admin, through=2)
    next_day(admin, pruner)
    let_time_pass(admin, days=8)
    if state == "published late":
        mark(admin)
    assert prune_all(pruner).messages == 2
    assert (numbers(admin), min(partitions(admin))) == ([3], 0)
    assert disagreeing_marks(admin) == []


@pytest.mark.parametrize("state", ["parked", "waiting"])
def test_what_is_pending_keeps_its_partition_and_the_rest_goes_by_rows(
    admin: Connection, pruner: Connection, state: Literal["parked", "waiting"]
) -> None:
    insert(admin, "1", "2", "3")
    mark(admin)
    set_aside(admin, 2, state=state)
    next_day(admin, pruner)
    let_time_pass(admin, days=8)
    assert drop_partition(pruner, options=OPTIONS) == NONE_TO_DROP
    assert places(admin) == {"outbox_p0": 3}
    assert prune_all(pruner).messages == 2
    assert (numbers(admin), min(partitions(admin)), disagreeing_marks(admin)) == ([2], 0, [])
    admin.execute("DELETE FROM outbox_pending")
    assert prune_all(pruner).messages == 1
    assert (numbers(admin), disagreeing_marks(admin)) == ([], [])
    assert 0 not in partitions(admin)


def test_a_pending_record_whose_message_is_gone_keeps_no_partition(admin: Connection, pruner: Connection) -> None:
    insert(admin, "1", "2", "3")
    mark(admin)
    set_aside(admin, 2)
    admin.execute("DELETE FROM outbox WHERE sequence_no = 2")
    next_day(admin, pruner)
    let_time_pass(admin, days=8)
    assert prune_all(pruner) == Pruned(2, unordered=0)
    assert 0 not in partitions(admin)


def test_a_partition_that_was_detached_is_not_dropped(admin: Connection, pruner: Connection) -> None:
    insert(admin, "1", "2")
    next_day(admin, pruner)
    let_time_pass(admin, days=8)
    admin.execute("ALTER TABLE outbox DETACH PARTITION outbox_p0")
    assert prune_all(pruner).messages == 0
    admin.execute(f"ALTER TABLE outbox ATTACH PARTITION outbox_p0 FOR VALUES FROM (MINVALUE) TO ({WIDTH})".encode())
    assert numbers(admin) == [1, 2]


def test_a_younger_partition_goes_although_an_older_one_stays(admin: Connection, pruner: Connection) -> None:
    [parked] = insert(admin, "1")
    next_day(admin, pruner)
    insert(admin, "2")
    mark(admin)
    set_aside(admin, parked)
    next_day(admin, pruner)
    let_time_pass(admin, days=8)
    assert prune_all(pruner).messages == 1
    assert {0, 2, 3} <= partitions(admin).keys()
    assert 1 not in partitions(admin)
    assert disagreeing_marks(admin) == []


def test_a_mark_over_two_partitions_counts_what_is_left_when_one_of_them_is_dropped(
    admin: Connection, pruner: Connection
) -> None:
    insert(admin, "1", "1", "2")
    next_day(admin, pruner)
    kept = insert(admin, "1", "2", "2")
    mark(admin)
    let_time_pass(admin, days=8)
    assert drop_partition(pruner, options=OPTIONS) == PrunedBatch(3)
    assert (numbers(admin), disagreeing_marks(admin)) == (kept, [])


def test_no_row_of_a_partition_that_is_still_kept_is_removed_by_itself(admin: Connection, pruner: Connection) -> None:
    insert(admin, "1")
    mark(admin)
    let_time_pass(admin, days=8)
    assert first_kept_number(pruner, options=OPTIONS) == 0
    assert prune_all(pruner).messages == 0
    assert sum(places(admin).values()) == 1


def test_a_partition_with_a_message_that_no_mark_counted_stays_until_that_is_published(
    admin: Connection, pruner: Connection
) -> None:
    admin.execute("SELECT nextval('outbox_sequence_no_seq') FROM generate_series(1, 3)")
    insert(admin, *(str(key) for key in range(40)))
    mark(admin)
    admin.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, event_type, sequence_no)"
        " OVERRIDING SYSTEM VALUE VALUES ('order', '1', 'placed', 2)"
    )
    next_day(admin, pruner)
    let_time_pass(admin, days=8)
    refused = drop_partition(pruner, options=OPTIONS)
    assert refused is not None
    assert (refused.messages, list(refused.disagreed)) == (0, [shard_of(admin, 2)])
    pruned = prune_all(pruner)
    assert (pruned.messages + pruned.skipped, pruned.skipped) == (41, 1)
    assert admin.execute("SELECT sequence_no, state FROM outbox_pending").fetchall() == [(2, "waiting")]
    assert numbers(admin) == [2]
    admin.execute("DELETE FROM outbox_pending")
    assert prune_all(pruner).messages == 1
    assert 0 not in partitions(admin)


def test_a_partition_is_counted_from_its_index_alone(admin: Connection, pruner: Connection) -> None:
    admin.execute(INSERT_MANY, [20_000])
    mark(admin)
    insert(admin, "1")  # no mark counts it, so that the partition stays and can be asked what was read
    admin.execute("UPDATE outbox_published SET through = through + 1")
    next_day(admin, admin)
    let_time_pass(admin, days=8)
    admin.execute("VACUUM ANALYZE outbox")
    with pruner.transaction():
        refused = pruner.execute("SELECT count(*) FROM outbox_drop_partition('7 days', 0)").fetchone()
        assert refused == (1,)
        read = "SELECT seq_tup_read, idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'outbox_p0'"
        assert pruner.execute(read).fetchall() == [(0, 0)]


def shard_of(admin: Connection, number: int) -> int:
    [(shard,)] = admin.execute("SELECT shard FROM outbox WHERE sequence_no = %s", [number]).fetchall()
    return int(shard)


def test_messages_that_somebody_has_deleted_are_no_obstacle(admin: Connection, pruner: Connection) -> None:
    insert(admin, *(str(key) for key in range(40)))
    mark(admin)
    admin.execute("DELETE FROM outbox WHERE sequence_no % 7 = 0")
    next_day(admin, pruner)
    let_time_pass(admin, days=8)
    assert prune_all(pruner) == Pruned(35, unordered=0)
    assert 0 not in partitions(admin)
    assert disagreeing_marks(admin) == []


def test_a_writer_with_an_open_transaction_in_the_partition_keeps_it(
    database: Database, admin: Connection, pruner: Connection
) -> None:
    with database.connect() as writer:
        late = insert(writer, "1")
        insert(admin, "1")
        admin.execute("INSERT INTO outbox_unordered (transaction_id, from_no) SELECT %s::text::xid8, 0", [xid(writer)])
        mark(admin)
        next_day(admin, pruner)
        let_time_pass(admin, days=8)
        with pytest.raises(DatabaseConflict):
            drop_partition(pruner, options=OPTIONS)
        pruner.rollback()
        writer.commit()
    assert drop_partition(pruner, options=OPTIONS) == NONE_TO_DROP
    assert prune_all(pruner).messages == 1
    assert numbers(admin) == late


def xid(connection: Connection) -> str:
    [(xid,)] = connection.execute("SELECT pg_current_xact_id()::text").fetchall()
    return str(xid)


def test_a_writer_that_was_given_up_on_keeps_the_partitions_it_has_messages_in_until_they_are_published(
    database: Database, admin: Connection, pruner: Connection
) -> None:
    with database.connect() as writer:
        insert(admin, "1")
        mark(admin)
        next_day(admin, pruner)
        late = insert(writer, "1")
        insert(admin, "1")
        admin.execute("INSERT INTO outbox_unordered (transaction_id, from_no) SELECT %s::text::xid8, 1", [xid(writer)])
        mark(admin)
        next_day(admin, pruner)
        let_time_pass(admin, days=8)
        writer.commit()
    assert prune_all(pruner) == Pruned(2, unordered=0)
    assert (numbers(admin), min(partitions(admin))) == (late, 0)
    with admin.transaction():
        set_aside(admin, *late, state="waiting", is_unordered=True)
        admin.execute("UPDATE outbox_unordered SET collected_at = now(), to_no = %s", [2 * WIDTH])
    assert prune_all(pruner) == Pruned(0, unordered=0)
    assert (numbers(admin), min(partitions(admin))) == (late, 1)
    admin.execute("DELETE FROM outbox_pending")
    assert prune_all(pruner) == Pruned(1, unordered=1)
    assert (numbers(admin), disagreeing_marks(admin)) == ([], [])


def test_a_snapshot_older_than_the_lock_is_refused(admin: Connection, pruner: Connection) -> None:
    assert admin.autocommit
    pruner.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    with pytest.raises(errors.InvalidTransactionState, match="read committed transactions only"):
        pruner.execute("SELECT outbox_drop_partition('1 day', 0)")
    pruner.rollback()


@pytest.fixture
def _old_partition(admin: Connection, pruner: Connection) -> None:
    """Partition 0 is closed, and its one message is old enough."""
    insert(admin, "1")
    mark(admin)
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
            pruning = threads.submit(drop_partition, pruner, options=OPTIONS)
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


@pytest.mark.parametrize("group", ["outbox_writer", "outbox_relay", "outbox_operator"])
def test_only_pruners_may_open_and_drop(database: Database, admin: Connection, group: LiteralString) -> None:
    assert admin.autocommit
    with login(database, group=group) as name, database.connect(user=name, autocommit=True) as session:
        for call in ("outbox_open_partition()", "outbox_drop_partition('1 day', 0)"):
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


INSERT_MANY = """
INSERT INTO outbox (aggregate_type, aggregate_id, event_type)
SELECT 'order', key::text, 'placed' FROM generate_series(1, %s) AS key
"""
READ_ON = """
SELECT message.sequence_no
FROM outbox_shard
CROSS JOIN LATERAL (
    SELECT coalesce(max(mark.through), 0) AS through FROM outbox_published AS mark WHERE mark.shard = outbox_shard.shard
) AS newest
CROSS JOIN LATERAL (
    SELECT outbox.sequence_no
    FROM outbox
    WHERE outbox.shard = outbox_shard.shard AND outbox.sequence_no > newest.through
    ORDER BY outbox.sequence_no
    LIMIT 3
) AS message
"""


@pytest.mark.parametrize("plan", ["force_custom_plan", "force_generic_plan"])
def test_whoever_reads_on_from_the_marks_opens_the_partitions_from_there_on_and_sorts_nothing(
    admin: Connection, pruner: Connection, plan: LiteralString
) -> None:
    for _ in range(4):
        admin.execute(INSERT_MANY, [500])
        next_day(admin, pruner)
    mark(admin, through=2 * WIDTH + 50)
    admin.execute("ANALYZE")
    admin.execute(f"SET plan_cache_mode = {plan}; PREPARE read_on AS {READ_ON}")
    [([explained],)] = admin.execute("EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) EXECUTE read_on").fetchall()
    read = [node for node in nodes(explained["Plan"]) if node.get("Relation Name", "").startswith("outbox_p")]
    scanned = {node["Relation Name"] for node in read if node["Actual Loops"]}
    assert scanned - {"outbox_published"} == {"outbox_p2"}
    assert {node["Index Name"] for node in read if node["Relation Name"] == "outbox_p2"} == {"outbox_p2_pkey"}
    [append] = [node for node in nodes(explained["Plan"]) if node["Node Type"] in ("Append", "Merge Append")]
    assert append["Node Type"] == "Append"
    above = [node for node in nodes(explained["Plan"]) if append in node.get("Plans", [])]
    assert [node["Node Type"] for node in above] == ["Limit"]


def nodes(root: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield root
    for child in root.get("Plans", []):
        yield from nodes(child)


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

    def skipped_messages_found(self, repair: Repair) -> None:
        self.told.append(f"{repair.messages} skipped")

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
        mark(admin)
        set_aside(admin, 3)
        let_time_pass(admin, days=8)
    listener = Listener(until=7)
    Pruner(
        options=replace(OPTIONS, messages=2, most_messages=2),
        connect=lambda: relay_database.connect(database.relay_dsn, application_name="pruner"),
        telemetry=cast("Telemetry", listener),
        stop=listener.stop,
    ).run()
    assert listener.told[0] == 3
    assert sum(cast("list[int]", listener.told)) == 7
    assert partitions(admin) == {0: "closed", 2: "closed", 3: "open", 4: "ahead", 5: "ahead"}
    assert (numbers(admin), disagreeing_marks(admin)) == ([3], [])
