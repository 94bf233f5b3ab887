"""What a survey sees of the database, what it may not see, and what it costs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, LiteralString, cast

import psycopg
import pytest

from outbox_relay import database as relay_database
from outbox_relay.errors import DatabaseConflict, DatabaseUnavailable, SchemaMismatch
from outbox_relay.relay.horizon import record_unordered
from outbox_relay.relay.survey import (
    Backlog,
    Head,
    SurveyOptions,
    Surveyor,
    Table,
    Upkeep,
    begin_statement,
    read_backlog,
    read_upkeep,
)
from outbox_relay.sql import statement
from tests.fixtures.marks import mark, set_aside
from tests.fixtures.outbox import insert
from tests.fixtures.postgres import both_layouts
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from psycopg import Connection

    from outbox_relay.observe.telemetry import Telemetry
    from tests.fixtures.postgres import Database

pytestmark = pytest.mark.every_postgres

OPTIONS = SurveyOptions(interval=0.01)

FILL = """
INSERT INTO outbox (aggregate_type, aggregate_id, event_type)
SELECT 'order', number %% 5000, 'placed'
FROM generate_series(1, %s) AS number
"""

MARK_ONE_BY_ONE = """
INSERT INTO outbox_published (shard, through, messages, checksum)
SELECT shard, sequence_no, 1, sequence_no
FROM outbox
ON CONFLICT DO NOTHING
"""

NO_BACKLOG = Backlog(
    [],
    unpublished_messages=0,
    waiting_messages=0,
    parked_messages=0,
    parked_keys=0,
    uncollected_writers=0,
    unreconciled_seconds=0.0,
)


@pytest.fixture
def admin(database: Database) -> Iterator[Connection]:
    with database.connect(autocommit=True) as connection:
        yield connection


@pytest.fixture
def surveyor(database: Database, relay_login: str) -> Iterator[Connection]:
    """A connection with the rights of a relay."""
    with closing(connect(database, user=relay_login)) as connection:
        yield connection


def connect(database: Database, **parameters: str) -> Connection:
    conninfo = psycopg.conninfo.make_conninfo(database.dsn, **parameters)
    return relay_database.connect(conninfo, application_name="outbox-relay survey")


def fill(connection: Connection, *, count: int) -> list[int]:
    """Insert *count* messages and return their numbers."""
    last_no = connection.execute("SELECT coalesce(max(sequence_no), 0) FROM outbox").fetchone()
    connection.execute(FILL, [count])
    query = "SELECT sequence_no FROM outbox WHERE sequence_no > %s ORDER BY sequence_no"
    return [number for (number,) in connection.execute(query, last_no).fetchall()]


def give_up(connection: Connection, writer: Connection) -> None:
    """Record the open transaction of *writer* as one that is not waited for."""
    [(xid,)] = writer.execute("SELECT pg_current_xact_id()::text").fetchall()
    record_unordered(connection, schema="public", xids=[int(xid)])


def places(heads: Iterable[Head]) -> list[tuple[int, str]]:
    return [(head.sequence_no, head.state) for head in sorted(heads, key=attrgetter("sequence_no"))]


@both_layouts
def test_an_empty_outbox_has_nothing_that_waits(surveyor: Connection) -> None:
    backlog = read_backlog(surveyor, options=OPTIONS)
    assert backlog == NO_BACKLOG
    assert (backlog.oldest_unpublished_seconds, backlog.oldest_waiting_seconds) == (0.0, 0.0)


@both_layouts
def test_the_first_message_of_each_shard_is_told_with_its_age(admin: Connection, surveyor: Connection) -> None:
    insert(admin, "1", created_at="now")
    admin.execute("UPDATE outbox SET created_at = now() - interval '90 seconds'")
    insert(admin, "1", "2")
    [(shard,)] = admin.execute("SELECT shard FROM outbox WHERE sequence_no = 3").fetchall()
    insert(admin, "2")
    mark(admin, shard=shard, through=3)
    backlog = read_backlog(surveyor, options=OPTIONS)
    shards: dict[int, int] = dict(admin.execute("SELECT sequence_no, shard FROM outbox").fetchall())
    assert {(head.shard, head.sequence_no, head.state, head.aggregate_type) for head in backlog.heads} == {
        (shards[1], 1, "unpublished", "order"),
        (shards[4], 4, "unpublished", "order"),
    }
    assert backlog.unpublished_messages == 3
    assert 90 <= backlog.oldest_unpublished_seconds < 120


@both_layouts
def test_a_message_that_waits_behind_its_mark_is_told_beside_the_next_one_of_its_shard(
    admin: Connection, surveyor: Connection
) -> None:
    insert(admin, "1", "1", "1", "1")
    set_aside(admin, 1, state="parked")
    set_aside(admin, 2, 3, state="waiting", age_seconds=90)
    mark(admin)
    insert(admin, "1")
    backlog = read_backlog(surveyor, options=OPTIONS)
    assert places(backlog.heads) == [(2, "waiting"), (5, "unpublished")]
    assert (backlog.unpublished_messages, backlog.waiting_messages, backlog.parked_messages) == (3, 2, 1)
    assert 90 <= backlog.oldest_waiting_seconds < 120
    assert backlog.oldest_unpublished_seconds < 90


@both_layouts
def test_of_each_type_the_first_message_that_waits_in_a_shard_is_told(admin: Connection, surveyor: Connection) -> None:
    for aggregate_type in ("order", "basket", "order", "parcel", "basket"):
        insert(admin, *map(str, range(100)), aggregate_type=aggregate_type)
    set_aside(admin, *range(1, 51), state="parked")
    set_aside(admin, *range(51, 501), state="waiting")
    mark(admin)
    firsts = admin.execute(
        "SELECT min(sequence_no) FROM outbox WHERE sequence_no > 50 GROUP BY shard, aggregate_type ORDER BY 1"
    ).fetchall()
    heads = read_backlog(surveyor, options=OPTIONS).heads
    assert places(heads) == [(number, "waiting") for (number,) in firsts]


def test_a_message_that_waits_and_was_deleted_is_as_old_as_its_entry(admin: Connection, surveyor: Connection) -> None:
    insert(admin, "1")
    set_aside(admin, 1, state="waiting", age_seconds=90)
    mark(admin)
    admin.execute("DELETE FROM outbox")
    [head] = read_backlog(surveyor, options=OPTIONS).heads
    assert (head.sequence_no, head.state) == (1, "waiting")
    assert 90 <= head.age_seconds < 120


def test_messages_of_a_shard_that_was_removed_wait(admin: Connection, surveyor: Connection) -> None:
    insert(admin, *map(str, range(100)))
    admin.execute("DELETE FROM outbox_shard")
    backlog = read_backlog(surveyor, options=OPTIONS)
    assert (backlog.unpublished_messages, len(backlog.heads)) == (100, 16)


@both_layouts
def test_messages_of_a_given_up_writer_count_once_they_have_been_collected(
    database: Database, admin: Connection, surveyor: Connection
) -> None:
    with database.connect() as writer:
        insert(writer, "1")
        give_up(admin, writer)
        insert(admin, "1")
        assert read_backlog(surveyor, options=OPTIONS).uncollected_writers == 0
        writer.commit()
    ended = read_backlog(surveyor, options=OPTIONS)
    assert (places(ended.heads), ended.unpublished_messages) == ([(2, "unpublished")], 1)
    assert ended.uncollected_writers == 1
    set_aside(admin, 1, state="waiting", reason_code="late", is_unordered=True)
    admin.execute("UPDATE outbox_unordered SET to_no = 2, collected_at = now()")
    collected = read_backlog(surveyor, options=OPTIONS)
    assert (places(collected.heads), collected.unpublished_messages) == ([(1, "waiting"), (2, "unpublished")], 2)
    assert collected.uncollected_writers == 0


def test_a_mark_is_unreconciled_until_somebody_has_compared_it_if_it_is_not_the_newest(
    admin: Connection, surveyor: Connection
) -> None:
    def unreconciled() -> float:
        return read_backlog(surveyor, options=OPTIONS).unreconciled_seconds

    for age_seconds in (90, 60, 30):
        insert(admin, "1")
        mark(admin, age_seconds=age_seconds)
    assert 90 <= unreconciled() < 120
    admin.execute("INSERT INTO outbox_reconciled (shard, checked_through) SELECT shard, 1 FROM outbox_shard")
    assert 60 <= unreconciled() < 90
    admin.execute("UPDATE outbox_reconciled SET checked_through = 2")
    assert unreconciled() == 0


def test_parked_keys_are_counted_once_however_many_messages_they_have(admin: Connection, surveyor: Connection) -> None:
    insert(admin, "1", "1", "1", "2", "3")
    insert(admin, "1", aggregate_type="basket")
    set_aside(admin, 1, 2, 3, 4, 6)
    mark(admin)
    backlog = read_backlog(surveyor, options=OPTIONS)
    assert (backlog.parked_messages, backlog.parked_keys, backlog.unpublished_messages) == (5, 3, 0)


def test_counting_stops_at_its_limit(admin: Connection, surveyor: Connection) -> None:
    set_aside(admin, *fill(admin, count=30), state="parked")
    set_aside(admin, *fill(admin, count=30), state="waiting")
    mark(admin)
    fill(admin, count=30)
    backlog = read_backlog(surveyor, options=SurveyOptions(messages=20))
    assert replace(backlog, heads=[], unreconciled_seconds=0.0) == replace(
        NO_BACKLOG, unpublished_messages=20, waiting_messages=20, parked_messages=20, parked_keys=20
    )


@pytest.mark.parametrize("policy", [None, "TO outbox_relay USING (aggregate_type = 'basket')"])
def test_messages_that_row_level_security_hides_are_no_empty_backlog(
    admin: Connection, surveyor: Connection, policy: LiteralString | None
) -> None:
    insert(admin, "1")
    admin.execute("ALTER TABLE outbox ENABLE ROW LEVEL SECURITY")
    if policy:
        admin.execute(f"CREATE POLICY hide ON outbox {policy}")
    with pytest.raises(SchemaMismatch, match="row-level security"):
        read_backlog(surveyor, options=OPTIONS)


@both_layouts
def test_tables_are_told_with_their_rows_and_sizes(admin: Connection, surveyor: Connection) -> None:
    fill(admin, count=2_000)
    admin.execute("DELETE FROM outbox WHERE sequence_no <= 500")

    def look() -> dict[str, Table]:
        admin.execute("SELECT")  # with which PostgreSQL tells what its session has counted
        return {table.name: table for table in read_upkeep(surveyor, options=OPTIONS).tables}

    eventually(lambda: (look()["outbox"].live_tuples, look()["outbox"].dead_tuples) == (1_500, 500))
    [(table_bytes, index_bytes)] = admin.execute(
        """
        SELECT sum(pg_table_size(part)), sum(pg_indexes_size(part))
        FROM (SELECT DISTINCT tableoid::regclass AS part FROM outbox) AS parts
        """
    ).fetchall()
    tables = look()
    assert tables["outbox"].table_bytes >= table_bytes > 0  # a partition without rows has a page or two
    assert tables["outbox"].index_bytes >= index_bytes > 0
    assert set(tables) == {
        *("outbox", "outbox_audit", "outbox_pending", "outbox_published", "outbox_reconciled", "outbox_shard"),
        "outbox_unordered",
    }


def test_the_plain_layout_has_no_partitions_ahead(surveyor: Connection) -> None:
    assert read_upkeep(surveyor, options=OPTIONS).partitions_ahead_seconds is None


@pytest.mark.parametrize("layout", ["partitioned"])
def test_partitions_last_for_the_time_of_the_open_one_and_of_those_ahead(
    admin: Connection, surveyor: Connection
) -> None:
    def ahead() -> float:
        seconds = read_upkeep(surveyor, options=OPTIONS).partitions_ahead_seconds
        assert seconds is not None
        return seconds

    admin.execute("UPDATE outbox_partition SET opened_at = now() - interval '6 hours' WHERE closed_at IS NULL")
    assert ahead() == pytest.approx(18 * 3_600, abs=60)
    admin.execute("INSERT INTO outbox_partition (number, first_no, open_for) VALUES (1000, 10000000, '2 days')")
    assert ahead() == pytest.approx(66 * 3_600, abs=60)
    admin.execute("UPDATE outbox_partition SET opened_at = now() - interval '4 days' WHERE closed_at IS NULL")
    assert ahead() < 0


def test_an_open_snapshot_shows_as_what_holds_vacuum_back(
    database: Database, admin: Connection, surveyor: Connection
) -> None:
    with database.connect() as reader:
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT FROM outbox_shard")
        for number in range(20):
            insert(admin, str(number))
        assert read_upkeep(surveyor, options=OPTIONS).oldest_xmin_age >= 20


def test_a_prepared_transaction_shows_with_its_age(own_database: Database) -> None:
    with own_database.connect() as writer, closing(connect(own_database)) as surveyor:
        assert read_upkeep(surveyor, options=OPTIONS).oldest_prepared_transaction_seconds == 0
        insert(writer, "1")
        writer.execute("PREPARE TRANSACTION 'forgotten'")
        writer.autocommit = True
        for number in range(20):
            insert(writer, str(number))
        upkeep = read_upkeep(surveyor, options=OPTIONS)
        writer.execute("ROLLBACK PREPARED 'forgotten'")
    assert upkeep.oldest_prepared_transaction_seconds > 0
    assert upkeep.oldest_xmin_age >= 20


def test_a_replication_slot_shows_as_what_holds_vacuum_back(own_database: Database) -> None:
    with own_database.connect(autocommit=True) as admin:
        admin.execute("ALTER SYSTEM SET wal_level = logical")
    own_database.server.restart()
    with own_database.connect(autocommit=True) as admin, closing(connect(own_database)) as surveyor:
        admin.execute("SELECT pg_create_logical_replication_slot('debezium', 'pgoutput')")
        for number in range(20):
            insert(admin, str(number))
        assert read_upkeep(surveyor, options=OPTIONS).oldest_xmin_age >= 20


def test_the_longest_transaction_is_unknown_to_a_role_that_may_not_see_those_of_others(
    database: Database, admin: Connection, relay_login: str
) -> None:
    with (
        database.connect() as other,
        closing(connect(database, user=relay_login)) as surveyor,
    ):
        other.execute("SELECT 1")
        assert read_upkeep(surveyor, options=OPTIONS).longest_transaction_seconds is None
        admin.execute(f'GRANT pg_read_all_stats TO "{relay_login}"')
        began = read_upkeep(surveyor, options=OPTIONS).longest_transaction_seconds
        assert began is not None
        assert began > 0


def test_a_survey_holds_no_snapshot_between_its_statements(admin: Connection, surveyor: Connection) -> None:
    surveyor.execute(begin_statement(OPTIONS))
    surveyor.execute(statement("survey_transactions", schema="public"))
    xids = admin.execute(
        "SELECT backend_xid, backend_xmin FROM pg_stat_activity WHERE pid = %s", [surveyor.info.backend_pid]
    ).fetchall()
    assert xids == [(None, None)]


def test_a_survey_gives_up_on_a_table_that_is_locked_and_can_look_again(
    database: Database, surveyor: Connection
) -> None:
    with database.connect() as owner:
        owner.execute("LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(DatabaseConflict):
            read_backlog(surveyor, options=SurveyOptions(lock_timeout=0.05))
        surveyor.rollback()
        owner.rollback()
        assert read_backlog(surveyor, options=OPTIONS).unpublished_messages == 0


LOOKS = ("backlog", "backlog_heads", "survey_tables", "survey_transactions")


def explained(connection: Connection) -> list[dict[str, object]]:
    """The plans of all statements of a survey, with what they really did."""
    plans = []
    for name in LOOKS:
        connection.execute(begin_statement(OPTIONS))
        explain = b"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + statement(name, schema="public")
        [([plan],)] = connection.execute(explain, {"most": OPTIONS.messages}).fetchall()
        connection.rollback()
        plans.append(cast("dict[str, object]", plan["Plan"]))
    return plans


def rows_read(node: dict[str, object], relation: str) -> int:
    """Rows of *relation* that the scans in *node* come upon, counted or not."""
    read = sum(rows_read(child, relation) for child in cast("list[dict[str, object]]", node.get("Plans", [])))
    if node.get("Relation Name") == relation:
        rows = [cast("float", node.get(name, 0)) for name in ("Actual Rows", "Rows Removed by Filter")]
        read += round(sum(rows) * cast("float", node["Actual Loops"]))
    return read


def pages_read(connection: Connection) -> int:
    """Pages that a survey looks at, in memory or not."""
    names = ("Shared Hit Blocks", "Shared Read Blocks")
    return sum(cast("int", plan[name]) for plan in explained(connection) for name in names)


def test_what_a_survey_reads_grows_neither_with_the_backlog_nor_with_what_is_published(
    admin: Connection, surveyor: Connection
) -> None:
    read = []
    for count in (20_000, 200_000):
        fill(admin, count=count)
        admin.execute(MARK_ONE_BY_ONE)
        fill(admin, count=count)
        admin.execute("VACUUM ANALYZE outbox, outbox_published")
        plans = explained(surveyor)
        read.append([sum(rows_read(plan, name) for plan in plans) for name in ("outbox", "outbox_published")])
    heads = 16
    assert read[0] == pytest.approx([OPTIONS.messages + heads, 3 * heads], abs=heads)  # rows of a loop are rounded
    assert read[1] == pytest.approx(read[0], abs=heads)


@both_layouts
def test_what_a_survey_reads_does_not_grow_with_what_is_dead(
    database: Database, admin: Connection, surveyor: Connection
) -> None:
    with database.connect() as report:
        report.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        report.execute("SELECT")
        pages = []
        for _ in range(2):
            fill(admin, count=5_000)
            admin.execute(MARK_ONE_BY_ONE)
            admin.execute("DELETE FROM outbox_published WHERE through % 100 <> 0")
            mark(admin)
            admin.execute("DELETE FROM outbox")
            insert(admin, "1")
            pages.append(pages_read(surveyor))
        few = 20  # for a level more of an index, or one more page of a catalog
        assert pages[1] < pages[0] + few


class Listener:
    """Stands in for the telemetry."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.backlogs: list[Backlog] = []
        self.upkeeps: list[Upkeep] = []
        self.failures: list[str] = []

    def backlog_surveyed(self, backlog: Backlog, *, until: float) -> None:
        assert until > 0
        self.backlogs.append(backlog)

    def upkeep_surveyed(self, upkeep: Upkeep, *, until: float) -> None:
        assert until > 0
        self.upkeeps.append(upkeep)

    def survey_failed(self, error: Exception) -> None:
        self.failures.append(str(error))

    def thread_failed(self, thread: str, error: Exception) -> None:
        self.failures.append(f"{thread}: {error}")


@contextmanager
def surveying(
    listener: Listener, connect: Callable[[], Connection], options: SurveyOptions = OPTIONS
) -> Iterator[None]:
    telemetry = cast("Telemetry", listener)
    thread = Surveyor(options=options, connect=connect, telemetry=telemetry, stop=listener.stop)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(thread.run)
        try:
            yield
        finally:
            listener.stop.set()
        running.result()


def test_the_thread_tells_what_it_finds_again_and_again(database: Database, admin: Connection) -> None:
    listener = Listener()
    with surveying(listener, partial(connect, database)):
        eventually(lambda: len(listener.backlogs) > 1)
        insert(admin, "1")
        eventually(lambda: listener.backlogs[-1].unpublished_messages == 1)
    assert listener.upkeeps
    assert listener.failures == []


def test_the_thread_tells_what_failed_and_tries_again(database: Database) -> None:
    failures: list[Exception] = [DatabaseUnavailable("away"), RuntimeError("unforeseen")]

    def connect_at_last() -> Connection:
        if failures:
            raise failures.pop(0)
        return connect(database)

    listener = Listener()
    with surveying(listener, connect_at_last):
        eventually(lambda: listener.backlogs)
    assert listener.failures == ["away", "survey: unforeseen"]


def test_a_survey_that_takes_too_long_is_told_and_the_next_one_comes(database: Database) -> None:
    listener = Listener()
    options = SurveyOptions(interval=0.01, lock_timeout=0.05)
    with database.connect() as owner, surveying(listener, partial(connect, database), options):
        eventually(lambda: listener.backlogs)
        owner.execute("LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE")
        eventually(lambda: len(listener.failures) > 1)
        seen = len(listener.backlogs)
        owner.rollback()
        eventually(lambda: len(listener.backlogs) > seen + 1)
    assert all("lock timeout" in failure for failure in listener.failures)
