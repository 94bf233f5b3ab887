"""What pruning removes, what it leaves, and what it reads to find out."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, LiteralString, Self, cast

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay import database as relay_database
from outbox_relay.errors import DatabaseConflict, DatabaseUnavailable, SchemaMismatch
from outbox_relay.operate.prune import Pruned, count_prunable, prune
from outbox_relay.relay import prune as stage
from outbox_relay.relay.prune import PrunedBatch, PruneOptions, prune_batch, prune_unordered
from outbox_relay.sql import numbers, statement
from tests.fixtures.marks import disagreeing_marks, mark, set_aside
from tests.fixtures.postgres import both_layouts, login
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg import Connection

    from outbox_relay.observe.telemetry import Telemetry
    from outbox_relay.relay.reconcile import Repair
    from tests.fixtures.postgres import Database

pytestmark = pytest.mark.every_postgres

DAY = 86_400.0
OPTIONS = PruneOptions(older_than_seconds=7 * DAY, messages=100, most_messages=100)

INSERT = """
INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload, created_at)
SELECT 'order', number::text, 'placed', '{"n": 1}', %(created_at)s::timestamptz
FROM generate_series(1, %(count)s) AS number
RETURNING sequence_no
"""
INSERT_AT = """
INSERT INTO outbox (aggregate_type, aggregate_id, event_type, sequence_no)
OVERRIDING SYSTEM VALUE VALUES ('order', '1', 'placed', %s)
RETURNING shard
"""


@pytest.fixture
def admin(database: Database) -> Iterator[Connection]:
    with database.connect(autocommit=True) as connection:
        yield connection


@pytest.fixture
def pruner(database: Database) -> Iterator[Connection]:
    """A login with the grants of a pruner and nothing else."""
    with login(database, group="outbox_pruner") as name:
        dsn = make_conninfo(database.dsn, user=name)
        with closing(relay_database.connect(dsn, application_name="pruner")) as connection:
            yield connection


def write(admin: Connection, count: int = 1, *, created_at: str = "now") -> list[int]:
    """Insert messages of as many keys, above all others, and give their numbers."""
    return [row[0] for row in admin.execute(INSERT, {"count": count, "created_at": created_at}).fetchall()]


def publish(admin: Connection, count: int = 1, *, days_ago: float) -> list[int]:
    """Insert messages and write the marks that settle them and all below, so many days ago."""
    written = write(admin, count)
    mark(admin, age_seconds=days_ago * DAY)
    return written


def left(admin: Connection) -> list[int]:
    return [row[0] for row in admin.execute("SELECT sequence_no FROM outbox ORDER BY sequence_no").fetchall()]


def marks(admin: Connection, shard: int) -> list[tuple[int, int]]:
    """The marks of a shard: up to which number, and how many messages they count."""
    query = "SELECT through, messages FROM outbox_published WHERE shard = %s ORDER BY through"
    return admin.execute(query, [shard]).fetchall()


def newest_marks(admin: Connection) -> dict[int, int]:
    return dict(admin.execute("SELECT shard, max(through) FROM outbox_published GROUP BY shard").fetchall())


def prune_all(pruner: Connection, options: PruneOptions = OPTIONS) -> int:
    return prune(pruner, options=options, on_batch=lambda _removed: None).messages


@both_layouts
@pytest.mark.parametrize("messages", [1, 2, 100])
def test_only_what_was_published_longer_ago_than_it_is_kept_is_removed(
    admin: Connection, pruner: Connection, messages: int
) -> None:
    write(admin, 3)
    parked, waiting = write(admin, 2), write(admin, 2)
    mark(admin, age_seconds=30 * DAY)
    set_aside(admin, *parked, state="parked", age_seconds=30 * DAY)
    set_aside(admin, *waiting, state="waiting", age_seconds=30 * DAY)
    publish(admin, 20, days_ago=7.01)
    young = publish(admin, 20, days_ago=6.99)
    unpublished = write(admin, 2, created_at="2001-01-01")
    expected = newest_marks(admin)
    removed = prune_all(pruner, replace(OPTIONS, messages=messages, most_messages=messages))
    assert removed == 23
    assert left(admin) == parked + waiting + young + unpublished
    assert newest_marks(admin) == expected
    assert disagreeing_marks(admin) == []


@both_layouts
def test_of_marks_that_are_old_the_newest_one_stays_and_counts_what_is_left(
    admin: Connection, pruner: Connection
) -> None:
    parked = write(admin, 40)[::2]
    mark(admin, age_seconds=10 * DAY)
    set_aside(admin, *parked)
    publish(admin, 40, days_ago=9)
    publish(admin, 40, days_ago=8)
    last = newest_marks(admin)
    assert prune_all(pruner) == 100
    kept: dict[int, int] = dict(admin.execute("SELECT shard, count(*) FROM outbox GROUP BY shard").fetchall())
    assert {shard: marks(admin, shard) for shard in last} == {
        shard: [(through, kept.get(shard, 0))] for shard, through in last.items()
    }
    assert prune_all(pruner) == 0


@both_layouts
def test_a_dry_run_counts_what_would_be_removed_and_removes_nothing(admin: Connection, pruner: Connection) -> None:
    parked, _ = write(admin, 2), write(admin, 8)
    mark(admin, age_seconds=8 * DAY)
    set_aside(admin, *parked)
    publish(admin, 240, days_ago=8)
    publish(admin, 250, days_ago=1)
    write(admin, 5)
    before = left(admin)
    assert count_prunable(pruner, options=OPTIONS, on_batch=lambda _found: None) == 248
    assert left(admin) == before


def test_progress_is_told_after_each_batch(admin: Connection, pruner: Connection) -> None:
    for _ in range(25):
        publish(admin, 10, days_ago=8)
    told: list[int] = []
    assert prune(pruner, options=OPTIONS, on_batch=told.append) == Pruned(messages=250, unordered=0)
    assert told == sorted(told)
    assert len(told) >= 3
    assert told[-1] == 250


@both_layouts
def test_the_walk_passes_by_any_number_of_messages_that_stay(admin: Connection, pruner: Connection) -> None:
    parked, waiting = write(admin, 350), write(admin, 350)
    mark(admin, age_seconds=30 * DAY)
    set_aside(admin, *parked, state="parked")
    set_aside(admin, *waiting, state="waiting")
    publish(admin, 5, days_ago=8)
    assert prune_all(pruner) == 5
    assert left(admin) == parked + waiting
    assert disagreeing_marks(admin) == []


@both_layouts
@pytest.mark.parametrize("created_at", ["1971-01-01", "2999-01-01"])
def test_a_date_that_a_writer_gave_says_nothing(admin: Connection, pruner: Connection, created_at: str) -> None:
    write(admin, 50, created_at=created_at)
    mark(admin, age_seconds=8 * DAY)
    young = write(admin, 50, created_at=created_at)
    mark(admin, age_seconds=6 * DAY)
    assert prune_all(pruner) == 50
    assert left(admin) == young


def test_a_mark_that_a_clock_dated_into_the_past_does_not_expose_those_before_it(
    admin: Connection, pruner: Connection
) -> None:
    young = publish(admin, 50, days_ago=6)
    misdated = publish(admin, 50, days_ago=9999)
    assert prune_all(pruner) == 0
    assert left(admin) == young + misdated


@both_layouts
def test_a_shard_that_is_idle_or_stands_still_does_not_hold_the_others_back(
    admin: Connection, pruner: Connection
) -> None:
    publish(admin, 20, days_ago=20)
    written = write(admin, 200)
    [standing] = admin.execute("SELECT shard FROM outbox WHERE sequence_no = %s", [written[0]]).fetchone() or []
    for shard in range(16):
        if shard != standing:
            mark(admin, shard=shard, through=written[-1], age_seconds=8 * DAY)
    kept = admin.execute(
        "SELECT sequence_no FROM outbox WHERE shard = %s AND sequence_no >= %s ORDER BY 1", [standing, written[0]]
    ).fetchall()
    prune_all(pruner)
    assert left(admin) == [number for (number,) in kept]


def test_the_walk_stops_at_the_first_young_mark_and_goes_on_from_there(admin: Connection, pruner: Connection) -> None:
    for _ in range(5):
        publish(admin, 50, days_ago=8)
    young = publish(admin, 500, days_ago=1)
    after: dict[int, int] = {}
    removed = []
    while True:
        batch = prune_batch(pruner, options=OPTIONS, after=after)
        assert batch is not None
        if batch.is_last:
            break
        after |= batch.pruned
        removed.append(batch.messages)
        assert disagreeing_marks(admin) == []
    assert sum(removed) == 250
    assert max(removed) <= 100
    assert set(after.values()) <= {50, 100, 150, 200, 250}
    assert left(admin) == young
    assert prune_batch(pruner, options=OPTIONS, after=after) == PrunedBatch(0, is_last=True)


@both_layouts
def test_a_mark_that_counted_more_than_a_batch_takes_is_pruned_in_parts(admin: Connection, pruner: Connection) -> None:
    key = "the same key, the same shard"
    admin.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, event_type) SELECT 'order', %s, 'placed'"
        " FROM generate_series(1, 1000)",
        [key],
    )
    mark(admin, age_seconds=8 * DAY)
    set_aside(admin, 3, 450, 1000)
    young = publish(admin, days_ago=1)
    after: dict[int, int] = {}
    removed = []
    while True:
        batch = prune_batch(pruner, options=OPTIONS, after=after)
        assert batch is not None
        if batch.is_last:
            break
        after |= batch.pruned
        removed.append(batch.messages)
        assert disagreeing_marks(admin) == []
    assert removed == [99, 100, 100, 100, 99, 100, 100, 100, 100, 99]
    assert left(admin) == [3, 450, 1000, *young]


def test_one_batch_reads_no_more_than_its_messages(admin: Connection, pruner: Connection) -> None:
    admin.execute("ALTER TABLE outbox SET (autovacuum_enabled = off)")
    admin.execute("ALTER TABLE outbox_published SET (autovacuum_enabled = off)")
    publish(admin, 500, days_ago=8)
    admin.execute("ANALYZE outbox, outbox_published")  # the planner takes the tables to be as small as this
    for _ in range(20):
        publish(admin, 400, days_ago=8)
    for _ in range(80):
        publish(admin, 400, days_ago=1)
    ranges: dict[str, object] = {
        "shards": "{3,4}",
        "after_nos": "{500,500}",
        "until_nos": "{900,900}",
        "throughs": "{900,900}",
    }
    for name, parameters, most_blocks in (
        ("prune_look", {"shards": "{}", "after_nos": "{}", "before": 10**9, "messages": 100}, 250),
        ("prune_delete", ranges | {"are_reconciled": "{0,0}"}, 500),
        ("prune_count", ranges | {"before": 10**9}, 250),
    ):
        plan = explained(pruner, name, parameters)
        assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < most_blocks  # type: ignore[operator]
        for scan in nodes(plan):
            if scan.get("Relation Name") == "outbox" and "Plans" not in scan:
                assert scan["Index Name"] == "outbox_pkey"
                assert scan["Actual Rows"] < 100  # type: ignore[operator]


def test_an_old_snapshot_makes_no_batch_dearer(database: Database, admin: Connection, pruner: Connection) -> None:
    """It keeps every row and mark that is removed; who begins at the lowest number has to pass them by."""
    for _ in range(40):
        publish(admin, 100, days_ago=8)
    with database.connect() as dump:
        dump.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        dump.execute("SELECT FROM outbox LIMIT 1")
        after: dict[int, int] = {}
        while (batch := prune_batch(pruner, options=OPTIONS, after=after)) is not None and not batch.is_last:
            after |= batch.pruned
        publish(admin, 100, days_ago=8)
        places: dict[str, object] = {"shards": numbers(after), "after_nos": numbers(after.values())}
        plan = explained(pruner, "prune_look", places | {"before": 10**9, "messages": 100})
        assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 250  # type: ignore[operator]
        ends = {
            "until_nos": numbers([4100] * 16),
            "throughs": numbers([4100] * 16),
            "are_reconciled": numbers([0] * 16),
        }
        plan = explained(pruner, "prune_delete", places | ends)
        assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 1500  # type: ignore[operator]
    assert left(admin) == list(range(4001, 4101))


def explained(pruner: Connection, name: str, parameters: dict[str, object]) -> dict[str, object]:
    """Run a statement as a batch does, and give its plan with what it read."""
    query = statement(name, schema="public").removesuffix(b";\nCOMMIT")
    pruner.execute(stage.begin_statement(OPTIONS))
    explain = b"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) " + query
    rows = psycopg.ClientCursor(pruner).execute(explain, parameters | {"older_than_seconds": 7 * DAY}).fetchall()
    pruner.rollback()
    [([found],)] = rows
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
    publish(admin, 5, days_ago=8)
    with closing(relay_database.connect(database.dsn, application_name="other")) as other:
        other.execute("BEGIN")
        other.execute(statement("prune_lock", schema="public"))
        assert prune_batch(pruner, options=OPTIONS, after={}) is None
    eventually(lambda: prune_batch(pruner, options=OPTIONS, after={}) is not None)
    assert left(admin) == []


def test_outboxes_of_other_schemas_are_pruned_at_the_same_time(
    database: Database, admin: Connection, pruner: Connection
) -> None:
    admin.execute("CREATE SCHEMA other CREATE TABLE outbox (sequence_no bigint)")
    with closing(relay_database.connect(database.dsn, application_name="other")) as other:
        other.execute("BEGIN")
        other.execute(statement("prune_lock", schema="other"))
        assert prune_batch(pruner, options=OPTIONS, after={}) is not None


@both_layouts
def test_pruners_side_by_side_remove_each_message_once(database: Database, admin: Connection) -> None:
    parked, _ = write(admin, 50), write(admin, 500)
    mark(admin, age_seconds=9 * DAY)
    set_aside(admin, *parked)
    for _ in range(25):
        publish(admin, 100, days_ago=8)
    unpublished = write(admin, 50)

    def work(_number: int) -> int:
        with closing(relay_database.connect(database.dsn, application_name="pruner")) as connection:
            return prune_all(connection)

    with ThreadPoolExecutor(3) as threads:
        removed = list(threads.map(work, range(3)))
    assert sum(removed) == 3_000
    assert left(admin) == parked + unpublished
    assert disagreeing_marks(admin) == []


@both_layouts
def test_a_message_that_no_mark_counted_is_published_instead_of_removed(admin: Connection, pruner: Connection) -> None:
    """As with a session that drew a number long ago and uses it after the marks have passed it."""
    publish(admin, 20, days_ago=9)
    admin.execute("SELECT nextval('outbox_sequence_no_seq') FROM generate_series(1, 3)")
    publish(admin, 20, days_ago=8)
    [(shard,)] = admin.execute(INSERT_AT, [22]).fetchall()
    others = admin.execute("SELECT count(*) FROM outbox WHERE shard <> %s", [shard]).fetchone()
    pruned = prune(pruner, options=OPTIONS, on_batch=lambda _removed: None)
    assert pruned.skipped >= 1
    assert others is not None
    assert pruned.messages + pruned.skipped == 41
    assert pruned.messages >= others[0]
    waiting = admin.execute("SELECT sequence_no FROM outbox_pending WHERE state = 'waiting' ORDER BY 1").fetchall()
    assert [(number,) for number in left(admin)] == waiting
    assert 22 in left(admin)
    assert disagreeing_marks(admin) == []


def test_a_message_that_appears_below_all_marks_that_are_left_is_published_too(
    admin: Connection, pruner: Connection
) -> None:
    admin.execute("SELECT nextval('outbox_sequence_no_seq') FROM generate_series(1, 3)")
    publish(admin, 40, days_ago=8)
    assert prune_all(pruner) == 40
    admin.execute(INSERT_AT, [2])
    assert prune(pruner, options=OPTIONS, on_batch=lambda _removed: None) == Pruned(0, unordered=0, skipped=1)
    assert admin.execute("SELECT sequence_no, state FROM outbox_pending").fetchall() == [(2, "waiting")]


@both_layouts
def test_messages_that_somebody_has_deleted_are_no_obstacle(admin: Connection, pruner: Connection) -> None:
    publish(admin, 100, days_ago=9)
    publish(admin, 100, days_ago=8)
    young = publish(admin, 10, days_ago=1)
    admin.execute("DELETE FROM outbox WHERE sequence_no % 7 = 0 AND sequence_no <= 200")
    pruned = prune(pruner, options=OPTIONS, on_batch=lambda _removed: None)
    assert (pruned.messages, pruned.skipped) == (200 - 200 // 7, 0)
    assert left(admin) == young
    assert disagreeing_marks(admin) == []


@both_layouts
def test_a_lock_of_somebody_else_is_waited_for_no_longer_than_agreed(
    database: Database, admin: Connection, pruner: Connection
) -> None:
    kept = publish(admin, 2, days_ago=8)
    with database.connect() as operator:
        operator.execute("LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(DatabaseConflict):
            prune_batch(pruner, options=replace(OPTIONS, lock_timeout=0.01), after={})
    assert left(admin) == kept


@both_layouts
def test_writers_do_not_wait_for_a_batch(database: Database, admin: Connection, pruner: Connection) -> None:
    publish(admin, 5, days_ago=8)
    pruner.execute(stage.begin_statement(OPTIONS))
    pruner.execute("DELETE FROM outbox WHERE sequence_no <= 5")
    with database.connect() as writer:
        writer.execute("SET lock_timeout = 100")
        writer.execute("INSERT INTO outbox (aggregate_type, aggregate_id, event_type) VALUES ('order', '1', 'placed')")
        writer.commit()
    pruner.rollback()


def test_a_lane_that_holds_a_shard_and_moves_its_mark_is_not_waited_for(
    database: Database, admin: Connection, pruner: Connection
) -> None:
    publish(admin, 50, days_ago=8)
    written = write(admin, 50)
    with database.connect() as lane:
        lane.execute("SELECT FROM outbox_shard FOR UPDATE")
        mark(lane)
        assert prune_all(pruner, replace(OPTIONS, lock_timeout=0.01)) == 50
        lane.commit()
    assert left(admin) == written
    assert disagreeing_marks(admin) == []


def test_an_outbox_that_is_emptied_meanwhile_deadlocks_with_nobody(
    database: Database, admin: Connection, pruner: Connection
) -> None:
    publish(admin, 50, days_ago=8)
    with database.connect() as operator, ThreadPoolExecutor(1) as threads:
        operator.execute("TRUNCATE outbox")
        pruning = threads.submit(prune_all, pruner, OPTIONS)
        eventually(lambda: admin.execute("SELECT FROM pg_locks WHERE NOT granted").fetchall())
        operator.commit()
        assert pruning.result() == 0
    assert (left(admin), newest_marks(admin)) == ([], {})


@pytest.mark.parametrize("command", ["TRUNCATE outbox", "TRUNCATE outbox RESTART IDENTITY"])
def test_after_an_outbox_was_emptied_the_next_lap_begins_with_the_new_messages(
    database: Database, admin: Connection, monkeypatch: pytest.MonkeyPatch, command: LiteralString
) -> None:
    monkeypatch.setattr(stage, "_LAP_SECONDS", 0.0)
    monkeypatch.setattr(stage, "_SHORTEST_PAUSE_SECONDS", 0.0)
    publish(admin, 50, days_ago=8)
    listener = Listener()
    options = replace(OPTIONS, older_than_seconds=0.01)
    pruner = thread_of(listener, partial(relay_database.connect, database.dsn, application_name="pruner"), options)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(pruner.run)
        eventually(lambda: left(admin) == [])
        admin.execute(command)
        publish(admin, 40, days_ago=8)
        eventually(lambda: left(admin) == [])
        listener.stop.set()
        running.result()
    assert sum(cast("list[int]", listener.told)) == 90


def test_a_policy_that_hides_messages_is_an_error_and_nothing_is_removed(admin: Connection, pruner: Connection) -> None:
    kept = publish(admin, 5, days_ago=8)
    admin.execute("ALTER TABLE outbox ENABLE ROW LEVEL SECURITY")
    with pytest.raises((SchemaMismatch, psycopg.Error), match="row-level security"):
        prune_batch(pruner, options=OPTIONS, after={})
    assert left(admin) == kept


@pytest.fixture
def given_up(database: Database, admin: Connection) -> Iterator[GivenUp]:
    with GivenUp(database, admin) as writer:
        yield writer


class GivenUp:
    """A writer that was given up on: newer messages overtake those of its open transaction."""

    def __init__(self, database: Database, admin: Connection) -> None:
        self._admin = admin
        self.connection = database.connect()
        self.numbers: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.connection.close()

    def write(self, count: int = 3) -> list[int]:
        """Insert messages in the open transaction, the first time with a record of it."""
        newest = max(newest_marks(self._admin).values(), default=0)
        written = write(self.connection, count)
        self.numbers += written
        [(xid,)] = self.connection.execute("SELECT pg_current_xact_id()::text").fetchall()
        self._admin.execute(
            "INSERT INTO outbox_unordered (transaction_id, from_no) VALUES (%s::text::xid8, %s) ON CONFLICT DO NOTHING",
            [xid, newest],
        )
        return written

    def collect(self) -> None:
        """Do to its messages what a relay does once the transaction has ended."""
        with self._admin.transaction():
            set_aside(self._admin, *self.numbers, state="waiting", reason_code="late", is_unordered=True)
            self._admin.execute(
                "UPDATE outbox_unordered SET collected_at = now(), to_no = (SELECT max(sequence_no) FROM outbox)"
            )


def records(admin: Connection) -> int:
    [(count,)] = admin.execute("SELECT count(*) FROM outbox_unordered").fetchall()
    return int(count)


def test_others_go_while_a_writer_that_was_given_up_on_is_still_open(
    admin: Connection, pruner: Connection, given_up: GivenUp
) -> None:
    publish(admin, 20, days_ago=30)
    late = given_up.write(5)
    publish(admin, 20, days_ago=20)
    assert (prune_all(pruner), left(admin), records(admin)) == (40, [], 1)
    given_up.connection.commit()
    assert (prune_all(pruner), left(admin), records(admin)) == (0, late, 1)


@both_layouts
def test_messages_of_a_writer_that_was_given_up_on_stay_until_they_are_published(
    admin: Connection, pruner: Connection, given_up: GivenUp
) -> None:
    publish(admin, 20, days_ago=30)
    late = given_up.write(5)
    publish(admin, 20, days_ago=20)
    given_up.connection.commit()
    assert (prune_all(pruner), left(admin), records(admin)) == (40, late, 1)
    given_up.collect()
    assert (prune_all(pruner), left(admin), records(admin)) == (0, late, 1)
    admin.execute("DELETE FROM outbox_pending WHERE sequence_no <> %s", [late[2]])
    assert prune(pruner, options=OPTIONS, on_batch=lambda _removed: None) == Pruned(4, unordered=0)
    assert (left(admin), disagreeing_marks(admin)) == ([late[2]], [])
    admin.execute("DELETE FROM outbox_pending")
    assert prune(pruner, options=OPTIONS, on_batch=lambda _removed: None) == Pruned(1, unordered=1)
    assert (left(admin), disagreeing_marks(admin), records(admin)) == ([], [], 0)


@both_layouts
def test_the_record_of_a_writer_stays_while_its_messages_are_too_young_to_go(
    admin: Connection, pruner: Connection, given_up: GivenUp
) -> None:
    publish(admin, 20, days_ago=30)
    given_up.write(5)
    publish(admin, 20, days_ago=20)
    given_up.connection.commit()
    given_up.collect()
    admin.execute("DELETE FROM outbox_pending")
    mark(admin, through=40, age_seconds=5 * DAY)
    admin.execute("UPDATE outbox_published SET published_at = now() - interval '5 days' WHERE through > 20")
    assert prune(pruner, options=OPTIONS, on_batch=lambda _removed: None) == Pruned(20, unordered=0)
    assert disagreeing_marks(admin) == []
    admin.execute("UPDATE outbox_published SET published_at = now() - interval '8 days'")
    assert prune(pruner, options=OPTIONS, on_batch=lambda _removed: None) == Pruned(25, unordered=1)


@both_layouts
def test_the_record_of_a_writer_that_wrote_nothing_goes(
    admin: Connection, pruner: Connection, given_up: GivenUp
) -> None:
    publish(admin, 20, days_ago=20)
    given_up.write(5)
    publish(admin, 20, days_ago=8)
    given_up.connection.rollback()
    assert prune_unordered(pruner, options=OPTIONS) == 0
    given_up.collect()
    assert prune_unordered(pruner, options=OPTIONS) == 0  # among the numbers that it may have are those of others
    assert prune(pruner, options=OPTIONS, on_batch=lambda _removed: None) == Pruned(40, unordered=1)


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

    def skipped_messages_found(self, repair: Repair) -> None:
        self.told.append(f"{repair.messages} skipped")

    def pruning_failed(self, error: Exception) -> None:
        self.told.append(str(error))

    def thread_failed(self, thread: str, error: Exception) -> None:
        self.told.append(f"{thread}: {error}")


def thread_of(listener: Listener, connect: Callable[[], Connection], options: PruneOptions = OPTIONS) -> stage.Pruner:
    telemetry = cast("Telemetry", listener)
    return stage.Pruner(options=options, connect=connect, telemetry=telemetry, stop=listener.stop)


def test_stopping_ends_the_thread_between_two_batches(database: Database, admin: Connection) -> None:
    for _ in range(10):
        publish(admin, 100, days_ago=8)
    listener = Listener(stop_after=100)
    thread_of(listener, partial(relay_database.connect, database.dsn, application_name="pruner")).run()
    assert listener.told == [100]
    assert len(left(admin)) == 900


def test_batches_grow_while_there_is_more(database: Database, admin: Connection) -> None:
    for _ in range(15):
        publish(admin, 100, days_ago=8)
    listener = Listener(stop_after=400)
    options = replace(OPTIONS, messages=100, most_messages=400)
    thread_of(listener, partial(relay_database.connect, database.dsn, application_name="pruner"), options).run()
    assert listener.told == [100, 200, 400]


def test_what_was_released_behind_the_walk_goes_with_the_next_lap(
    database: Database, admin: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_SHORTEST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(stage, "_LAP_SECONDS", 0.2)
    parked = publish(admin, 1, days_ago=30)
    set_aside(admin, *parked)
    publish(admin, 50, days_ago=8)
    listener = Listener()
    options = replace(OPTIONS, older_than_seconds=0.01)
    pruner = thread_of(listener, partial(relay_database.connect, database.dsn, application_name="pruner"), options)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(pruner.run)
        eventually(lambda: left(admin) == parked)
        admin.execute("DELETE FROM outbox_pending")
        eventually(lambda: left(admin) == [])
        listener.stop.set()
        running.result()
    assert listener.told == [50, 1]
    assert disagreeing_marks(admin) == []


def test_the_thread_tells_what_failed_and_what_was_skipped_and_tries_again(
    database: Database, admin: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_SHORTEST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(stage, "_ROUND_SECONDS", 0.1)
    admin.execute("SELECT nextval('outbox_sequence_no_seq')")
    publish(admin, 7, days_ago=8)
    [(shard,)] = admin.execute(INSERT_AT, [1]).fetchall()
    [(others,)] = admin.execute("SELECT count(*) FROM outbox WHERE shard <> %s", [shard]).fetchall()
    failures: list[Exception] = [DatabaseUnavailable("away"), RuntimeError("unforeseen")]

    def connect() -> Connection:
        if failures:
            raise failures.pop(0)
        return relay_database.connect(database.dsn, application_name="pruner")

    listener = Listener(stop_after=others)
    thread_of(listener, connect, replace(OPTIONS, older_than_seconds=0.01)).run()
    assert listener.told == ["away", "prune: unforeseen", "1 skipped", others]
