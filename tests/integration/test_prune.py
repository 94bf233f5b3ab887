"""What pruning removes, what it leaves, and what it reads to find out."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, LiteralString, Self, cast

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay import database as relay_database
from outbox_relay.errors import DatabaseConflict, DatabaseUnavailable
from outbox_relay.operate.prune import Pruned, count_prunable, prune
from outbox_relay.relay import prune as stage
from outbox_relay.relay.prune import PrunedBatch, PruneOptions, prune_batch, prune_unordered
from outbox_relay.sql import statement
from tests.fixtures.postgres import both_layouts, login
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg import Connection

    from outbox_relay.observe.telemetry import Telemetry
    from tests.fixtures.postgres import Database

pytestmark = pytest.mark.every_postgres

DAYS = 86_400.0
ROLES: list[LiteralString] = ["outbox_pruner", "outbox_relay"]
OPTIONS = PruneOptions(older_than_seconds=7 * DAYS, messages=100)

INSERT = """
INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload, created_at, published_at, parked_at)
SELECT
    'order',
    number % 1000,
    'placed',
    '{"n": 1}',
    now() - %(created)s * interval '1 day',
    now() - %(published)s * interval '1 day',
    now() - %(parked)s * interval '1 day'
FROM generate_series(1, %(count)s) AS number
RETURNING id
""".replace("number %", "number %%")


@pytest.fixture
def admin(database: Database) -> Iterator[Connection]:
    with database.connect(autocommit=True) as connection:
        yield connection


@pytest.fixture
def pruner(database: Database) -> Iterator[Connection]:
    """A login with the grants of a pruner and nothing else."""
    with logged_in(database, "outbox_pruner") as connection:
        yield connection


@contextmanager
def logged_in(database: Database, group: LiteralString) -> Iterator[Connection]:
    with login(database, group=group) as name:
        dsn = make_conninfo(database.dsn, user=name)
        with closing(relay_database.connect(dsn, application_name="pruner")) as connection:
            yield connection


def add(
    admin: Connection,
    count: int = 1,
    *,
    created: float = 10,
    published: float | None = None,
    parked: float | None = None,
) -> list[int]:
    """Insert messages that were created, published and parked so many days ago, or never; give their ids."""
    ages = {"count": count, "created": created, "published": published, "parked": parked}
    return [row[0] for row in admin.execute(INSERT, ages).fetchall()]


def ids(admin: Connection) -> list[int]:
    return [row[0] for row in admin.execute("SELECT id FROM outbox ORDER BY id").fetchall()]


def prune_all(pruner: Connection, options: PruneOptions = OPTIONS) -> int:
    return prune(pruner, options=options, on_batch=lambda _removed: None).messages


@both_layouts
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("messages", [1, 2, 100])
def test_only_what_was_published_longer_ago_than_it_is_kept_is_removed(
    database: Database, admin: Connection, role: LiteralString, messages: int
) -> None:
    unpublished = add(admin, 2, created=30)
    add(admin, 3, created=30, published=8)
    parked = add(admin, 2, created=30, parked=20)
    add(admin, 3, published=7.01)
    published_late = add(admin, 2, created=30, published=6.99)
    neither_nor = add(admin, created=30, published=20, parked=20)
    add(admin, published=9)
    young = add(admin, 2, created=6.5, published=6.4) + add(admin, created=0)
    with logged_in(database, role) as connection:
        removed = prune_all(connection, replace(OPTIONS, messages=messages))
    assert removed == 7
    assert ids(admin) == unpublished + parked + published_late + neither_nor + young


@both_layouts
def test_a_dry_run_counts_what_would_be_removed_and_removes_nothing(admin: Connection, pruner: Connection) -> None:
    add(admin, 250, published=8)
    add(admin, 250, created=1, published=1)
    before = ids(admin)
    assert count_prunable(pruner, options=OPTIONS, on_batch=lambda _found: None) == 250
    assert ids(admin) == before


def test_progress_is_told_after_each_batch(admin: Connection, pruner: Connection) -> None:
    add(admin, 250, published=8)
    told: list[int] = []
    assert prune(pruner, options=OPTIONS, on_batch=told.append) == Pruned(messages=250, unordered=0)
    assert told == [100, 200, 250]


@both_layouts
def test_the_walk_passes_by_any_number_of_messages_that_stay(admin: Connection, pruner: Connection) -> None:
    add(admin, 350, created=30, parked=20)
    add(admin, 350, created=30)
    add(admin, 350, created=30, published=1)
    add(admin, 5, published=8)
    assert prune_all(pruner) == 5


@both_layouts
def test_a_date_that_a_writer_gave_does_not_stop_the_walk(admin: Connection, pruner: Connection) -> None:
    add(admin, 150, created=-3, parked=0)
    add(admin, 350, created=3, published=8)
    add(admin, 150, created=3000, published=8)
    assert prune_all(pruner) == 500


def test_the_walk_stops_at_the_first_recent_messages_and_goes_on_from_there(
    admin: Connection, pruner: Connection
) -> None:
    add(admin, 100, created=30, parked=20)
    add(admin, 150, published=8)
    recent = add(admin, 500, created=1, published=1)
    after, removed, steps = 0, [], 0
    while True:
        batch = prune_batch(pruner, options=OPTIONS, after=after)
        assert batch is not None
        after, steps = batch.after, steps + 1
        removed.append(batch.messages)
        if batch.is_last:
            break
    assert removed == [0, 100, 50, 0]
    assert after == recent[0] - 51
    assert prune_batch(pruner, options=OPTIONS, after=after) == PrunedBatch(messages=0, after=after, is_last=True)


def test_one_batch_at_the_edge_reads_no_more_than_its_messages(admin: Connection, pruner: Connection) -> None:
    admin.execute("ALTER TABLE outbox SET (autovacuum_enabled = off)")
    [first, *_] = add(admin, 500, published=8)
    admin.execute("ANALYZE outbox")  # the planner takes the table to be as small as this
    add(admin, 40_000, created=1, published=1)
    look = statement("prune_look", schema="public")
    looked, looked_far = (explained(pruner, look, after=first + number) for number in (399, 20_000))
    delete = statement("prune_delete", schema="public").replace(b"COMMIT", b"")
    deleted = explained(pruner, delete.replace(b";", b""), after=first - 1)
    for plan, rows in ((looked, 100), (looked_far, 100), (deleted, 500)):
        [scan] = [node for node in nodes(plan) if node.get("Relation Name") == "outbox" and "Plans" not in node]
        assert scan["Index Name"] == "outbox_pkey"
        assert scan["Actual Rows"] == rows
        assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 3 * rows  # type: ignore[operator]


def explained(pruner: Connection, query: bytes, *, after: int) -> dict[str, object]:
    """Run *query* as a batch does, and give its plan with what it read."""
    parameters = {
        "after": after,
        "before": 10**9,
        "through": after + 500,
        "messages": 100,
        "older_than_seconds": 7 * DAYS,
    }
    pruner.execute(stage.begin_statement(OPTIONS))
    explain = b"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) " + query
    [([found],)] = psycopg.ClientCursor(pruner).execute(explain, parameters).fetchall()
    pruner.rollback()
    plan = found["Plan"]
    assert isinstance(plan, dict)
    return plan


def nodes(root: dict[str, object]) -> Iterator[dict[str, object]]:
    yield root
    below = root.get("Plans", [])
    assert isinstance(below, list)
    for child in below:
        yield from nodes(child)


@both_layouts
def test_only_one_prunes_at_a_time_and_the_lock_dies_with_its_transaction(
    database: Database, admin: Connection, pruner: Connection
) -> None:
    add(admin, 5, published=8)
    with closing(relay_database.connect(database.dsn, application_name="other")) as other:
        other.execute("BEGIN")
        other.execute(statement("prune_lock", schema="public"))
        assert prune_batch(pruner, options=OPTIONS, after=0) is None
    eventually(lambda: prune_batch(pruner, options=OPTIONS, after=0) is not None)
    assert ids(admin) == []


def test_outboxes_of_other_schemas_are_pruned_at_the_same_time(
    database: Database, admin: Connection, pruner: Connection
) -> None:
    admin.execute("CREATE SCHEMA other CREATE TABLE outbox (id bigint)")
    with closing(relay_database.connect(database.dsn, application_name="other")) as other:
        other.execute("BEGIN")
        other.execute(statement("prune_lock", schema="other"))
        assert prune_batch(pruner, options=OPTIONS, after=0) is not None


@both_layouts
def test_pruners_side_by_side_remove_each_message_once(database: Database, admin: Connection) -> None:
    add(admin, 3_000, published=8)
    kept = add(admin, 50, created=30) + add(admin, 50, created=30, parked=9)

    def work(_number: int) -> int:
        with closing(relay_database.connect(database.dsn, application_name="pruner")) as connection:
            return prune_all(connection)

    with ThreadPoolExecutor(3) as threads:
        removed = list(threads.map(work, range(3)))
    assert sum(removed) == 3_000
    assert ids(admin) == kept


@both_layouts
def test_a_message_that_was_taken_back_meanwhile_stays(
    database: Database, admin: Connection, pruner: Connection
) -> None:
    """Who takes back a mark (to have the message published again) is waited for, and the row looked at anew."""
    [taken_back, _] = add(admin, 2, published=8)
    with database.connect() as operator, ThreadPoolExecutor(1) as threads:
        operator.execute("UPDATE outbox SET published_at = NULL WHERE id = %s", [taken_back])
        pruning = threads.submit(prune_all, pruner, OPTIONS)
        eventually(lambda: admin.execute("SELECT FROM pg_locks WHERE NOT granted").fetchall())
        operator.commit()
        assert pruning.result() == 1
    assert ids(admin) == [taken_back]


@both_layouts
def test_a_lock_of_somebody_else_is_waited_for_no_longer_than_agreed(
    database: Database, admin: Connection, pruner: Connection
) -> None:
    kept = add(admin, 2, published=8)
    with database.connect() as operator:
        operator.execute("LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(DatabaseConflict):
            prune_batch(pruner, options=replace(OPTIONS, lock_timeout=0.01), after=0)
    assert ids(admin) == kept


@both_layouts
def test_writers_do_not_wait_for_a_batch(database: Database, admin: Connection, pruner: Connection) -> None:
    add(admin, 5, published=8)
    pruner.execute(stage.begin_statement(OPTIONS))
    pruner.execute("DELETE FROM outbox WHERE id <= 5")
    with database.connect() as writer:
        writer.execute("SET lock_timeout = 100")
        writer.execute("INSERT INTO outbox (aggregate_type, aggregate_id, event_type) VALUES ('order', '1', 'placed')")
        writer.commit()
    pruner.rollback()


@pytest.fixture
def overtaken(database: Database, admin: Connection) -> Iterator[Overtaken]:
    with Overtaken(database, admin) as transactions:
        yield transactions


class Overtaken:
    """Transactions that were given up on 8 days ago, each with one message."""

    def __init__(self, database: Database, admin: Connection) -> None:
        self._database = database
        self._admin = admin
        self.writer = database.connect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.writer.close()

    def begin(self, *, recorded_days_ago: float = 8) -> int:
        """Insert a message in a transaction that stays open, and record it as overtaken; give its id."""
        [(xid,)] = self.writer.execute(
            "INSERT INTO outbox (aggregate_type, aggregate_id, event_type) VALUES ('order', '1', 'placed')"
            " RETURNING transaction_id::text"
        ).fetchall()
        self._admin.execute(
            "INSERT INTO outbox_unordered VALUES (%s::text::xid8, now() - %s * interval '1 day')",
            [xid, recorded_days_ago],
        )
        return int(xid)

    def commit(self, *, state: str = "published_at = now()") -> None:
        """End the transaction, and bring its message into *state*."""
        self.writer.commit()
        self._admin.execute(f"UPDATE outbox SET {state} WHERE id = (SELECT max(id) FROM outbox)".encode())

    def recorded(self) -> list[int]:
        found = self._admin.execute(
            "SELECT transaction_id::text FROM outbox_unordered ORDER BY outbox_unordered.transaction_id"
        )
        return [int(row[0]) for row in found.fetchall()]


@both_layouts
@pytest.mark.parametrize("role", ROLES)
def test_the_record_of_an_overtaken_transaction_stays_while_a_message_needs_it(
    database: Database, overtaken: Overtaken, role: LiteralString
) -> None:
    overtaken.begin()
    overtaken.commit()
    unpublished = overtaken.begin()
    overtaken.commit(state="published_at = NULL")
    parked = overtaken.begin()
    overtaken.commit(state="parked_at = now()")
    young = overtaken.begin(recorded_days_ago=6)
    overtaken.commit()
    running = overtaken.begin()
    with logged_in(database, role) as pruner:
        assert prune_unordered(pruner, options=OPTIONS) == 1
        assert overtaken.recorded() == [unpublished, parked, young, running]


@both_layouts
def test_the_record_of_a_prepared_transaction_stays(own_database: Database) -> None:
    with own_database.connect(autocommit=True) as admin, Overtaken(own_database, admin) as overtaken:
        xid = overtaken.begin()
        overtaken.writer.execute("PREPARE TRANSACTION 'forgotten'")
        assert prune_unordered(admin, options=OPTIONS) == 0
        assert overtaken.recorded() == [xid]
        admin.execute("COMMIT PREPARED 'forgotten'")
        assert prune_unordered(admin, options=OPTIONS) == 0
        admin.execute("UPDATE outbox SET published_at = now()")
        assert prune_unordered(admin, options=OPTIONS) == 1


@both_layouts
def test_records_stay_while_too_many_messages_are_open_to_be_searched(
    admin: Connection, pruner: Connection, overtaken: Overtaken, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_MOST_OPEN_MESSAGES", 10)
    xid = overtaken.begin()
    overtaken.commit()
    add(admin, 5, created=0)
    add(admin, 6, created=0, parked=0)
    assert prune_unordered(pruner, options=OPTIONS) == 0
    assert overtaken.recorded() == [xid]
    admin.execute("DELETE FROM outbox WHERE id = (SELECT max(id) FROM outbox)")
    assert prune_unordered(pruner, options=OPTIONS) == 1


class Listener:
    """Stands in for the telemetry, and stops the thread after the first batch that satisfies."""

    def __init__(self, *, stop_after: int = 0) -> None:
        self.stop = threading.Event()
        self.told: list[int | str] = []
        self._stop_after = stop_after

    def beat(self, _thread: str) -> None: ...

    def batch_pruned(self, messages: int, *, seconds: float) -> None:
        assert seconds > 0
        self.told += [messages] if messages else []
        if messages == self._stop_after:
            self.stop.set()

    def pruning_failed(self, error: Exception) -> None:
        self.told.append(str(error))

    def thread_failed(self, thread: str, error: Exception) -> None:
        self.told.append(f"{thread}: {error}")


def thread_of(listener: Listener, connect: Callable[[], Connection], options: PruneOptions = OPTIONS) -> stage.Pruner:
    telemetry = cast("Telemetry", listener)
    return stage.Pruner(options=options, connect=connect, telemetry=telemetry, stop=listener.stop)


def test_stopping_ends_the_thread_between_two_batches(database: Database, admin: Connection) -> None:
    add(admin, 1_000, published=8)
    listener = Listener(stop_after=100)
    thread_of(listener, partial(relay_database.connect, database.dsn, application_name="pruner")).run()
    assert listener.told == [100]
    assert len(ids(admin)) == 900


def test_what_was_released_behind_the_walk_goes_with_the_next_lap(database: Database, admin: Connection) -> None:
    [parked] = add(admin, created=30, parked=20)
    add(admin, 150, published=8)
    listener = Listener()
    options = replace(OPTIONS, older_than_seconds=0.2)
    pruner = thread_of(listener, partial(relay_database.connect, database.dsn, application_name="pruner"), options)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(pruner.run)
        eventually(lambda: ids(admin) == [parked])
        admin.execute("UPDATE outbox SET parked_at = NULL, published_at = now() - interval '1 day'")
        eventually(lambda: ids(admin) == [])
        listener.stop.set()
        running.result()
    assert listener.told == [99, 51, 1]


def test_the_thread_tells_what_failed_and_tries_again(database: Database, admin: Connection) -> None:
    add(admin, 7, published=8)
    failures: list[Exception] = [DatabaseUnavailable("away"), RuntimeError("unforeseen")]

    def connect() -> Connection:
        if failures:
            raise failures.pop(0)
        return relay_database.connect(database.dsn, application_name="pruner")

    listener = Listener(stop_after=7)
    thread_of(listener, connect, replace(OPTIONS, older_than_seconds=0.01)).run()
    assert listener.told == ["away", "prune: unforeseen", 7]
