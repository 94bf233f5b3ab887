"""What a survey sees of the database, what it may not see, and what it costs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, cast

import psycopg
import pytest

from outbox_relay import database as relay_database
from outbox_relay.errors import DatabaseConflict, DatabaseUnavailable
from outbox_relay.relay.survey import (
    Backlog,
    SurveyOptions,
    Surveyor,
    Table,
    Upkeep,
    begin_statement,
    read_backlog,
    read_upkeep,
)
from outbox_relay.sql import statement
from tests.fixtures.outbox import insert
from tests.fixtures.postgres import both_layouts
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg import Connection

    from outbox_relay.observe.telemetry import Telemetry
    from tests.fixtures.postgres import Database

pytestmark = pytest.mark.every_postgres

OPTIONS = SurveyOptions(interval=0.01)

FILL = """
INSERT INTO outbox (aggregate_type, aggregate_id, event_type, published_at, parked_at)
SELECT
    'order',
    number %% 5000,
    'placed',
    CASE WHEN %(state)s = 'published' THEN now() END,
    CASE WHEN %(state)s = 'parked' THEN now() END
FROM generate_series(1, %(count)s) AS number
"""


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


def fill(connection: Connection, *, count: int, state: str = "unpublished") -> None:
    connection.execute(FILL, {"count": count, "state": state})


def test_an_empty_outbox_has_nothing_that_waits(surveyor: Connection) -> None:
    backlog = read_backlog(surveyor, options=OPTIONS)
    assert backlog == Backlog([], unpublished_messages=0, parked_messages=0, parked_keys=0)
    assert backlog.oldest_unpublished_seconds == 0.0


@both_layouts
def test_the_first_message_of_each_shard_is_told_with_its_age(admin: Connection, surveyor: Connection) -> None:
    insert(admin, "1", created_at="now")
    admin.execute("UPDATE outbox SET created_at = now() - interval '90 seconds'")
    insert(admin, "1", "2", "7")
    admin.execute("UPDATE outbox SET published_at = now() WHERE aggregate_id = '7'")
    backlog = read_backlog(surveyor, options=OPTIONS)
    shards: dict[int, int] = dict(admin.execute("SELECT sequence_no, shard FROM outbox").fetchall())
    assert sorted((head.shard, head.sequence_no, head.aggregate_type) for head in backlog.heads) == sorted(
        [(shards[1], 1, "order"), (shards[3], 3, "order")]
    )
    assert backlog.unpublished_messages == 3
    assert 90 <= backlog.oldest_unpublished_seconds < 120


def test_parked_keys_are_counted_once_however_many_messages_they_have(admin: Connection, surveyor: Connection) -> None:
    insert(admin, "1", "1", "1", "2", "3")
    insert(admin, "1", aggregate_type="basket")
    admin.execute("UPDATE outbox SET parked_at = now() WHERE aggregate_id <> '3'")
    backlog = read_backlog(surveyor, options=OPTIONS)
    assert (backlog.parked_messages, backlog.parked_keys, backlog.unpublished_messages) == (5, 3, 1)


def test_counting_stops_at_its_limit(admin: Connection, surveyor: Connection) -> None:
    fill(admin, count=30)
    fill(admin, count=30, state="parked")
    backlog = read_backlog(surveyor, options=SurveyOptions(messages=20))
    assert (backlog.unpublished_messages, backlog.parked_messages, backlog.parked_keys) == (20, 20, 20)


@both_layouts
def test_tables_are_told_with_their_rows_and_sizes(admin: Connection, surveyor: Connection) -> None:
    fill(admin, count=2_000, state="published")
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
    assert set(tables) == {"outbox", "outbox_audit", "outbox_shard", "outbox_unordered"}


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
    admin.execute("INSERT INTO outbox_partition (number, first_id, open_for) VALUES (1000, 10000000, '2 days')")
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


def messages_read(connection: Connection, *statements: str) -> int:
    """Messages that the scans of the statements come upon, counted or not."""
    return sum(_messages_of(_plan(connection, name)) for name in statements)


def _plan(connection: Connection, name: str) -> dict[str, object]:
    connection.execute(begin_statement(OPTIONS))
    explained = b"EXPLAIN (ANALYZE, FORMAT JSON) " + statement(name, schema="public")
    [([plan],)] = connection.execute(explained, {"most": OPTIONS.messages}).fetchall()
    connection.rollback()
    return cast("dict[str, object]", plan["Plan"])


def _messages_of(node: dict[str, object]) -> int:
    read = sum(map(_messages_of, cast("list[dict[str, object]]", node.get("Plans", []))))
    if node.get("Relation Name") == "outbox":
        rows = [cast("float", node.get(name, 0)) for name in ("Actual Rows", "Rows Removed by Filter")]
        read += round(sum(rows) * cast("float", node["Actual Loops"]))
    return read


def test_what_a_survey_reads_grows_neither_with_the_backlog_nor_with_what_is_published(
    admin: Connection, surveyor: Connection
) -> None:
    read = []
    for count in (20_000, 200_000):
        for state in ("published", "unpublished", "parked"):
            fill(admin, count=count, state=state)
        admin.execute("VACUUM ANALYZE outbox")
        read.append(messages_read(surveyor, "backlog", "backlog_heads", "survey_tables", "survey_transactions"))
    heads, counted, keys = 16, 2 * OPTIONS.messages, 5_000
    assert read[0] == read[1] < 1.01 * (heads + counted + keys)


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
