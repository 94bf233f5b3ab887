"""What reconciling finds where the marks do not fit the rows, what it repairs, and what it leaves alone."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, LiteralString, cast

import psycopg
import pytest
from psycopg import ClientCursor
from psycopg.conninfo import make_conninfo

from outbox_relay import database as relay_database
from outbox_relay.errors import DatabaseConflict, DatabaseUnavailable, SchemaMismatch
from outbox_relay.relay import reconcile as stage
from outbox_relay.relay.reconcile import (
    ALL,
    CHECK,
    FROM_THE_BEGINNING,
    THIN,
    Batch,
    ReconcileOptions,
    Reconciler,
    Repair,
    advance_batch,
    compare_batch,
    reconcile_through,
    repair,
    restart,
)
from outbox_relay.sql import numbers, statement
from tests.fixtures.marks import mark, set_aside
from tests.fixtures.postgres import both_layouts, login
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping

    from psycopg import Connection

    from outbox_relay.observe.telemetry import Telemetry
    from tests.fixtures.postgres import Database

OPTIONS = ReconcileOptions()
ROLES: list[LiteralString] = ["outbox_relay", "outbox_pruner"]
OLD = 100.0  # seconds, beyond the age at which marks are thinned
AT_ONCE = replace(THIN, older_than_seconds=0.0, slot_seconds=0.05)

COLUMNS = "aggregate_type, aggregate_id, event_type"


@pytest.fixture
def admin(database: Database) -> Iterator[Connection]:
    with database.connect(autocommit=True) as connection:
        yield connection


@pytest.fixture
def relay(database: Database) -> Iterator[Connection]:
    """A login with the grants of a relay and nothing else."""
    with relay_database.connect(database.relay_dsn, application_name="reconciler") as connection:
        yield connection


def write(connection: Connection, *keys: str) -> list[int]:
    """Insert a message for each key and return their numbers."""
    insert = f"INSERT INTO outbox ({COLUMNS}) VALUES ('order', %s, 'placed') RETURNING sequence_no"
    return [row[0] for key in keys for row in connection.execute(insert, [key]).fetchall()]


def write_at(connection: Connection, *at: int, key: str = "1", transaction_id: int | None = None) -> None:
    """Insert a message with each of these numbers, which the sequence would not give."""
    xid = "pg_current_xact_id()" if transaction_id is None else f"'{transaction_id}'"
    insert = f"INSERT INTO outbox ({COLUMNS}, sequence_no, transaction_id) OVERRIDING SYSTEM VALUE"
    for number in at:
        connection.execute(f"{insert} VALUES ('order', %s, 'placed', %s, {xid})", [key, number])


def leave_gaps(connection: Connection, count: int = 1) -> list[int]:
    """Draw numbers for which there are no messages, as a writer does that rolls back."""
    drawn = connection.execute("SELECT nextval('outbox_sequence_no_seq') FROM generate_series(1, %s)", [count])
    return [row[0] for row in drawn.fetchall()]


def shard_of(connection: Connection, key: str) -> int:
    [(shard,)] = connection.execute(
        "SELECT (hashtextextended('order:' || %s::text, 0) & 15)::smallint", [key]
    ).fetchall()
    return int(shard)


def compare_all(connection: Connection, options: ReconcileOptions = OPTIONS) -> list[Batch]:
    batches = []
    after = dict(FROM_THE_BEGINNING)
    while True:
        batch = compare_batch(connection, options=options, after=after)
        batches.append(batch)
        after |= batch.positions
        if batch.is_last:
            return batches


def repair_all(connection: Connection, options: ReconcileOptions = OPTIONS) -> list[Repair]:
    damaged = [interval for batch in compare_all(connection, options) for interval in batch.damaged]
    return [each for interval in damaged for each in repair(connection, interval, options=options)]


def advance_all(connection: Connection, *, of: stage.Stage, options: ReconcileOptions = OPTIONS) -> int:
    """Take the batches of a stage up to the last one, without damage; return how many messages were compared."""
    messages = 0
    while True:
        batch = advance_batch(connection, options=options, stage=of)
        assert batch is not None
        assert batch.damaged == []
        messages += batch.messages
        if batch.is_last:
            return messages


def are_marks_ahead(connection: Connection) -> bool:
    batch = advance_batch(connection, options=OPTIONS, stage=replace(CHECK, older_than_seconds=3600.0))
    assert batch is not None
    return batch.are_marks_ahead


def pending(connection: Connection) -> list[int]:
    """The numbers of the messages that were skipped and wait now."""
    rows = connection.execute(
        """
        SELECT sequence_no FROM outbox_pending
        WHERE state = 'waiting' AND reason_code = 'skipped' AND is_unordered
        ORDER BY sequence_no
        """
    ).fetchall()
    return [row[0] for row in rows]


def marks(connection: Connection) -> list[tuple[int, int]]:
    """Up to where each mark goes and how many messages it counts."""
    return connection.execute("SELECT through, messages FROM outbox_published ORDER BY through").fetchall()


def positions(connection: Connection) -> list[tuple[int, int]]:
    """How far each shard is compared, and thinned, where that is above 0."""
    return connection.execute(
        "SELECT checked_through, thinned_through FROM outbox_reconciled "
        "WHERE checked_through > 0 OR thinned_through > 0 ORDER BY shard"
    ).fetchall()


@pytest.mark.every_postgres
@both_layouts
@pytest.mark.parametrize("role", ROLES)
def test_messages_that_appeared_below_the_marks_are_published_after_all(
    database: Database, admin: Connection, role: LiteralString
) -> None:
    [low] = leave_gaps(admin)
    write(admin, "1", "2", "3")
    [inside] = leave_gaps(admin)
    write(admin, "1", "2", "3")
    mark(admin)
    [between] = leave_gaps(admin)
    write(admin, "1", "2", "3")
    mark(admin)
    write_at(admin, low, inside, between)
    write_at(admin, between + 1000)  # above the marks: it is nobody's business yet
    with (
        login(database, group=role) as name,
        closing(relay_database.connect(make_conninfo(database.dsn, user=name), application_name="test")) as connection,
    ):
        repairs = repair_all(connection)
        assert [each.messages for each in repairs] == [2, 1]
        assert not any(each.is_whole for each in repairs)
        assert repair_all(connection) == []
    assert pending(admin) == [low, inside, between]


@both_layouts
def test_what_is_exactly_as_the_marks_say_is_no_damage(admin: Connection, relay: Connection) -> None:
    for _ in range(3):
        write(admin, *map(str, range(20)))
        leave_gaps(admin, 3)
        mark(admin)
    assert sum(batch.messages for batch in compare_all(relay)) == 60
    assert repair_all(relay) == []


@both_layouts
def test_pending_messages_are_counted_by_their_marks(admin: Connection, relay: Connection) -> None:
    written = write(admin, *"1234567890")
    set_aside(admin, *written[:4])
    set_aside(admin, *written[4:6], state="waiting")
    mark(admin)
    admin.execute("DELETE FROM outbox_pending WHERE sequence_no = ANY (%s)", [written[:5]])  # published, or given up
    admin.execute("DELETE FROM outbox WHERE sequence_no = ANY (%s)", [written[:2]])
    assert repair_all(relay) == []


@both_layouts
@pytest.mark.parametrize("deleted", ["all", "all of some keys", "first", "last", "every other one"])
def test_messages_that_somebody_deleted_after_they_were_published_are_no_damage(
    admin: Connection, relay: Connection, deleted: str
) -> None:
    for _ in range(3):
        write(admin, *map(str, range(10)))
        mark(admin, age_seconds=OLD)
    conditions = {
        "all": "true",
        "all of some keys": "aggregate_id < '5'",
        "first": "sequence_no IN (SELECT min(sequence_no) FROM outbox GROUP BY shard)",
        "last": "sequence_no IN (SELECT max(sequence_no) FROM outbox GROUP BY shard)",
        "every other one": "sequence_no %% 2 = 0",
    }
    admin.execute(f"DELETE FROM outbox WHERE {conditions[deleted]}".replace("%%", "%"))
    before = marks(admin)
    assert repair_all(relay) == []
    assert marks(admin) == before
    advance_all(relay, of=CHECK)
    advance_all(relay, of=THIN)
    assert repair_all(relay) == []
    assert pending(admin) == []


@both_layouts
def test_a_message_deleted_and_another_skipped_do_not_hide_each_other(admin: Connection, relay: Connection) -> None:
    gap, *_ = leave_gaps(admin)
    written = write(admin, "1", "1", "1")
    mark(admin)
    admin.execute("DELETE FROM outbox WHERE sequence_no = %s", [written[1]])
    write_at(admin, gap)
    assert [each.is_whole for each in repair_all(relay)] == [False]
    assert pending(admin) == [gap]


@both_layouts
def test_all_of_an_interval_is_published_again_if_nobody_can_tell_what_was_skipped(
    admin: Connection, relay: Connection
) -> None:
    with psycopg.connect(admin.info.dsn) as writer:
        [early] = write(writer, "1")  # this transaction is older than the mark
        written = write(admin, "1", "1")
        mark(admin)
        write(admin, "1")
        mark(admin)
        writer.commit()
    [found] = repair_all(relay)
    assert (found.messages, found.is_whole) == (3, True)
    assert pending(admin) == [early, *written]
    assert repair_all(relay) == []


@both_layouts
def test_one_that_was_deleted_and_one_that_cannot_be_told_apart_are_found_by_the_checksum(
    admin: Connection, relay: Connection
) -> None:
    with psycopg.connect(admin.info.dsn) as writer:
        [early] = write(writer, "1")
        written = write(admin, "1", "1")
        mark(admin)
        writer.commit()
    admin.execute("DELETE FROM outbox WHERE sequence_no = %s", [written[0]])
    assert [each.is_whole for each in repair_all(relay)] == [True]
    assert pending(admin) == [early, written[1]]


@both_layouts
def test_messages_that_are_surely_skipped_are_found_among_any_number_of_deleted_ones(
    admin: Connection, relay: Connection
) -> None:
    gaps = leave_gaps(admin, 2)
    written = write(admin, *"11111")
    mark(admin)
    admin.execute("DELETE FROM outbox WHERE sequence_no = ANY (%s)", [written[1:]])
    write_at(admin, *gaps)
    [found] = repair_all(relay)
    assert (found.messages, found.is_whole) == (2, False)
    assert pending(admin) == gaps
    # Deleted later, and once more: what was repaired is counted now.
    admin.execute("DELETE FROM outbox_pending")
    admin.execute("DELETE FROM outbox WHERE sequence_no = %s", [gaps[0]])
    assert repair_all(relay) == []
    write_at(admin, written[2])
    assert [each.is_whole for each in repair_all(relay)] == [False]
    assert pending(admin) == [written[2]]


@both_layouts
def test_a_repair_leaves_pending_messages_as_they_are(admin: Connection, relay: Connection) -> None:
    [gap] = leave_gaps(admin)
    [parked, *_] = write(admin, "1", "1", "1")
    mark(admin)
    set_aside(admin, parked)
    write_at(admin, gap)
    [interval] = [each for batch in compare_all(relay) for each in batch.damaged]
    set_aside(admin, gap, reason_code="late")
    assert list(repair(relay, interval, options=OPTIONS)) == []
    rows = admin.execute("SELECT sequence_no, state, reason_code FROM outbox_pending ORDER BY sequence_no").fetchall()
    assert rows == [(gap, "parked", "late"), (parked, "parked", "MSG_SIZE_TOO_LARGE")]
    assert repair_all(relay) == []


@both_layouts
@pytest.mark.parametrize("is_collected", [False, True])
def test_messages_of_writers_that_were_given_up_on_are_no_damage(
    admin: Connection, relay: Connection, *, is_collected: bool
) -> None:
    first, *_ = write(admin, "1", "1")
    mark(admin)
    with psycopg.connect(admin.info.dsn) as writer:
        late = write(writer, "1", "2")
        [(xid,)] = writer.execute("SELECT pg_current_xact_id()::text").fetchall()
        admin.execute("INSERT INTO outbox_unordered (transaction_id, from_no) VALUES (%s, %s)", [xid, first + 1])
        write(admin, "1", "2")
        mark(admin)
        late += write(writer, "1")
        write(admin, "1", "2")
        mark(admin, age_seconds=OLD)
        writer.commit()
    if is_collected:
        set_aside(admin, *late, state="waiting", reason_code="late", is_unordered=True)
        admin.execute("UPDATE outbox_unordered SET to_no = %s, collected_at = now()", [late[-1]])
    assert repair_all(relay) == []
    advance_all(relay, of=CHECK)
    advance_all(relay, of=THIN)
    assert repair_all(relay) == []
    # Beyond the range of its numbers the same id is somebody else's, as after a restore.
    write_at(admin, late[-1] + 1000, transaction_id=int(xid))
    admin.execute("UPDATE outbox_unordered SET to_no = %s, collected_at = now()", [late[-1]])
    mark(admin)
    assert repair_all(relay) == []


@both_layouts
def test_what_is_skipped_beside_a_late_writer_is_found(admin: Connection, relay: Connection) -> None:
    [gap] = leave_gaps(admin)
    with psycopg.connect(admin.info.dsn) as writer:
        write(writer, "1")
        [(xid,)] = writer.execute("SELECT pg_current_xact_id()::text").fetchall()
        admin.execute("INSERT INTO outbox_unordered (transaction_id, from_no) VALUES (%s, 0)", [xid])
        written = write(admin, "1", "1")
        mark(admin)
        writer.commit()
    write_at(admin, gap)
    admin.execute("DELETE FROM outbox WHERE sequence_no = %s", [written[0]])
    assert [(each.messages, each.is_whole) for each in repair_all(relay)] == [(1, False)]
    assert pending(admin) == [gap]


@both_layouts
def test_numbers_that_a_session_had_cached_are_found(database: Database, admin: Connection, relay: Connection) -> None:
    admin.execute("ALTER SEQUENCE outbox_sequence_no_seq CACHE 10")
    with database.connect(autocommit=True) as one, database.connect(autocommit=True) as other:
        write(one, "1")
        write(other, "1", "2", "3")
        mark(admin)
        skipped = write(one, "1", "2")
        write(other, "1", "2", "3")
        mark(admin)
        skipped += write(one, "3", "1")
    assert {each.is_whole for each in repair_all(relay)} == {False}
    assert pending(admin) == skipped


@both_layouts
def test_a_mark_that_was_moved_too_far_is_found_as_long_as_messages_come_in_below_it(
    admin: Connection, relay: Connection
) -> None:
    write(admin, "1", "1")
    mark(admin)
    first = write(admin, "1", "1")
    admin.execute("UPDATE outbox_published SET through = 100000")
    assert [each.is_whole for each in repair_all(relay)] == [False]
    assert pending(admin) == first
    assert are_marks_ahead(relay)
    second = write(admin, "1")
    assert len(repair_all(relay)) == 1
    assert pending(admin) == first + second


@both_layouts
def test_a_mark_made_by_hand_that_counts_nothing_is_found(admin: Connection, relay: Connection) -> None:
    written = write(admin, "1", "1")
    admin.execute(
        "INSERT INTO outbox_published (shard, through, messages, checksum) VALUES (%s, 1000, 0, 0)",
        [shard_of(admin, "1")],
    )
    assert [each.is_whole for each in repair_all(relay)] == [True]
    assert pending(admin) == written


@both_layouts
@pytest.mark.parametrize("which", ["lowest", "inner", "newest", "all"])
def test_after_marks_were_deleted_nothing_is_skipped(admin: Connection, relay: Connection, which: str) -> None:
    written = []
    for _ in range(3):
        written.append(write(admin, "1", "1"))
        mark(admin)
    throughs = [through for through, _ in marks(admin)]
    chosen = {"lowest": throughs[:1], "inner": throughs[1:2], "newest": throughs[2:], "all": throughs}[which]
    admin.execute("DELETE FROM outbox_published WHERE through = ANY (%s)", [chosen])
    repairs = repair_all(relay)
    again = {"lowest": written[0] + written[1], "inner": written[1] + written[2]}.get(which, [])
    assert pending(admin) == again
    assert all(each.is_whole for each in repairs)
    left = admin.execute("SELECT max(through) FROM outbox_published").fetchone()
    assert left == ({"newest": throughs[1], "all": None}.get(which, throughs[2]),)  # lanes read what is above


@pytest.mark.parametrize("messages", [-5, -(2**63), 2**63 - 1])
def test_a_mark_with_an_absurd_count_stops_nobody(admin: Connection, relay: Connection, messages: int) -> None:
    for _ in range(4):
        write(admin, "1", "1")
        mark(admin, age_seconds=OLD)
    [(low, _), (high, _), *_] = marks(admin)
    admin.execute("UPDATE outbox_published SET messages = %s WHERE through IN (%s, %s)", [messages, low, high])
    repairs = repair_all(relay)
    assert [each.messages for each in repairs] == ([2, 2] if messages < 0 else [])
    advance_all(relay, of=CHECK)
    advance_all(relay, of=THIN)
    assert repair_all(relay) == []


@both_layouts
def test_a_sequence_that_went_back_while_no_relay_ran_is_found_once_it_has_passed_the_marks(
    admin: Connection, relay: Connection
) -> None:
    write(admin, *"11111111", "2")
    mark(admin)
    advance_all(relay, of=ALL)
    admin.execute("ALTER SEQUENCE outbox_sequence_no_seq RESTART")
    assert are_marks_ahead(relay)
    skipped = write(admin, *"22222222")
    leave_gaps(admin)
    write(admin, "1", "2")
    assert not are_marks_ahead(relay)
    advance_all(relay, of=CHECK)  # what was compared already is not looked at again by itself
    restart(relay, options=OPTIONS)
    batch = advance_batch(relay, options=OPTIONS, stage=ALL)
    assert batch is not None
    assert all(list(repair(relay, each, options=OPTIONS)) for each in batch.damaged)
    assert pending(admin) == skipped


@both_layouts
def test_a_message_that_took_the_number_of_a_deleted_one_is_found_by_a_thorough_look(
    admin: Connection, relay: Connection
) -> None:
    write(admin, "1", "1", "2")
    mark(admin)
    admin.execute("DELETE FROM outbox")
    admin.execute("ALTER SEQUENCE outbox_sequence_no_seq RESTART")
    skipped = write(admin, "1", "1")
    assert repair_all(relay) == []
    batch = compare_batch(relay, options=OPTIONS, after=FROM_THE_BEGINNING, is_thorough=True)
    assert [(each.damage, each.uncounted_messages) for each in batch.damaged] == [("some", 2)]
    assert [each.messages for each in repair(relay, batch.damaged[0], options=OPTIONS)] == [2]
    assert pending(admin) == skipped
    assert compare_batch(relay, options=OPTIONS, after=FROM_THE_BEGINNING, is_thorough=True).damaged == []


@both_layouts
def test_pruned_messages_are_no_damage(admin: Connection, relay: Connection) -> None:
    for _ in range(4):
        write(admin, *map(str, range(10)))
        mark(admin, age_seconds=OLD)
    # What retention does: rows and marks below a number go, in the middle of an interval too.
    admin.execute("DELETE FROM outbox WHERE sequence_no <= 25")
    admin.execute("DELETE FROM outbox_published WHERE through <= 20")
    assert repair_all(relay) == []
    advance_all(relay, of=CHECK)
    advance_all(relay, of=THIN)
    [gap] = leave_gaps(admin)
    write(admin, "1")
    mark(admin)
    write_at(admin, gap, 4)
    assert [each.messages for each in repair_all(relay)] == [1, 1]
    assert pending(admin) == [4, gap]


@both_layouts
def test_an_outbox_that_was_emptied_begins_anew(admin: Connection, relay: Connection) -> None:
    write(admin, "1", "2")
    mark(admin, age_seconds=OLD)
    advance_all(relay, of=CHECK)
    assert positions(admin) != []
    admin.execute("TRUNCATE outbox")
    assert repair_all(relay) == []
    admin.execute("ALTER SEQUENCE outbox_sequence_no_seq RESTART")
    [gap] = leave_gaps(admin)
    write(admin, "1", "2")
    mark(admin)
    write_at(admin, gap)
    batch = advance_batch(relay, options=OPTIONS, stage=ALL)
    assert batch is not None
    assert [each.uncounted_messages for each in batch.damaged] == [1]


def test_rows_of_another_cluster_are_not_taken_for_skipped_ones(admin: Connection, relay: Connection) -> None:
    gaps = leave_gaps(admin, 3)
    write_at(admin, *gaps, transaction_id=2**40)  # as a dump of a cluster with more transactions was restored
    mark(admin)
    admin.execute("DELETE FROM outbox WHERE sequence_no = %s", [gaps[1]])
    assert repair_all(relay) == []


@both_layouts
def test_a_long_interval_is_repaired_in_parts_each_of_which_is_final(admin: Connection, relay: Connection) -> None:
    written = write(admin, *["1"] * 10)
    admin.execute(
        "INSERT INTO outbox_published (shard, through, messages, checksum) VALUES (%s, 1000, 0, 0)",
        [shard_of(admin, "1")],
    )
    options = replace(OPTIONS, repaired_messages=3)
    [interval] = [each for batch in compare_all(relay) for each in batch.damaged]
    parts = cast("Generator[Repair]", repair(relay, interval, options=options))
    assert (next(parts).through, next(parts).through) == (written[2], written[5])
    parts.close()  # as a crash does
    assert pending(admin) == written[:6]
    assert marks(admin) == [(written[2], 3), (written[5], 3), (1000, 0)]

    admin.execute("DELETE FROM outbox_pending")
    assert [each.messages for each in repair_all(relay, options)] == [3, 1]
    assert pending(admin) == written[6:]
    assert marks(admin) == [(written[2], 3), (written[5], 3), (written[8], 3), (1000, 1)]
    assert repair_all(relay) == []


@both_layouts
@pytest.mark.parametrize("most", [1, 2, 3, 100])
def test_in_parts_too_only_what_is_surely_skipped_is_published_again(
    admin: Connection, relay: Connection, most: int
) -> None:
    written, gaps = [], []
    for _ in range(4):
        gaps += leave_gaps(admin)
        written += write(admin, "1", "1")
    mark(admin)
    admin.execute("DELETE FROM outbox WHERE sequence_no = ANY (%s)", [[written[0], written[5]]])
    write_at(admin, *gaps)
    repairs = repair_all(relay, replace(OPTIONS, repaired_messages=most))
    assert not any(each.is_whole for each in repairs)
    assert pending(admin) == gaps
    assert repair_all(relay) == []


def test_what_somebody_else_has_repaired_is_left_alone(admin: Connection, relay: Connection) -> None:
    [gap] = leave_gaps(admin)
    write(admin, "1")
    mark(admin)
    write_at(admin, gap)
    [interval] = [each for batch in compare_all(relay) for each in batch.damaged]
    assert [each.messages for each in repair(relay, interval, options=OPTIONS)] == [1]
    admin.execute("DELETE FROM outbox_pending")  # published meanwhile
    assert list(repair(relay, interval, options=OPTIONS)) == []
    assert pending(admin) == []


def test_what_was_thinned_or_pruned_since_it_was_looked_at_is_looked_at_again(
    admin: Connection, relay: Connection
) -> None:
    gap, *_ = leave_gaps(admin)
    for _ in range(4):
        write(admin, "1")
        mark(admin, age_seconds=OLD)
    write_at(admin, gap)
    [interval] = [each for batch in compare_all(relay) for each in batch.damaged]
    relay.execute(stage.begin_statement(OPTIONS))
    move(relay, "reconcile_thin", shard=interval.shard, through=marks(admin)[2][0])
    assert list(repair(relay, interval, options=OPTIONS)) == []
    assert [each.messages for each in repair_all(relay)] == [1]
    assert pending(admin) == [gap]


def move(connection: Connection, name: str, *, shard: int, through: int) -> None:
    """Thin the marks of a shard, or only move its position, without a look at them, and commit."""
    parameters = {"shards": [shard], "from_nos": [0], "throughs": [through], "slot_seconds": 1000.0}
    ClientCursor(connection).execute(statement(name, schema="public"), parameters)


@both_layouts
def test_each_mark_is_compared_once_when_it_is_old_enough(admin: Connection, relay: Connection) -> None:
    write(admin, "1", "1")
    mark(admin, age_seconds=30)
    written = write(admin, "1", "1", "1")
    mark(admin, age_seconds=20)
    write(admin, "1")
    mark(admin)
    assert advance_all(relay, of=CHECK) == 5
    assert positions(admin) == [(written[-1], 0)]
    assert advance_all(relay, of=CHECK) == 0


def test_the_age_of_a_mark_from_the_future_holds_up_nobody(admin: Connection, relay: Connection) -> None:
    write(admin, "1", "1")
    mark(admin, age_seconds=-3600)
    write(admin, "1")
    mark(admin, age_seconds=100)
    assert advance_all(relay, of=CHECK) == 3


@both_layouts
@pytest.mark.parametrize(("messages", "most_marks"), [(1, 1000), (5, 1000), (10_000, 1), (10_000, 2), (10_000, 1000)])
def test_a_round_goes_on_in_batches_until_everything_is_compared(
    admin: Connection, relay: Connection, messages: int, most_marks: int
) -> None:
    for _ in range(5):
        write(admin, *map(str, range(20)))
        mark(admin, age_seconds=OLD)
    options = replace(OPTIONS, messages=messages, marks=most_marks)
    assert sum(batch.messages for batch in compare_all(relay, options)) == 100
    assert advance_all(relay, of=CHECK, options=options) == 100
    assert 0 < advance_all(relay, of=THIN, options=options) < 100
    assert repair_all(relay) == []


@pytest.mark.every_postgres
@both_layouts
def test_thinning_leaves_one_mark_for_ten_seconds_and_the_newest_one(admin: Connection, relay: Connection) -> None:
    for number in range(60):
        write(admin, "1")
        mark(admin)
        admin.execute(
            "UPDATE outbox_published SET published_at = to_timestamp(1000000000 + %s) WHERE published_at > now() - "
            "interval '1 day'",
            [number / 2],
        )
    before = admin.execute(
        "SELECT sum(messages), bit_xor(checksum), max(before_xid::text::bigint) FROM outbox_published"
    )
    was = before.fetchall()
    assert advance_all(relay, of=THIN) == 59
    kept = admin.execute(
        "SELECT through, messages, checksum, extract(epoch FROM published_at)::float8 - 1000000000 "
        "FROM outbox_published ORDER BY through"
    ).fetchall()
    assert [(row[0], row[1], row[3]) for row in kept] == [(20, 20, 9.5), (40, 20, 19.5), (59, 19, 29.0), (60, 1, 29.5)]
    assert positions(admin) == [(0, 59)]
    after = admin.execute(
        "SELECT sum(messages), bit_xor(checksum), max(before_xid::text::bigint) FROM outbox_published"
    )
    assert after.fetchall() == was
    assert repair_all(relay) == []
    assert advance_all(relay, of=THIN) == 0


def test_marks_are_thinned_only_once_they_are_a_minute_old(admin: Connection, relay: Connection) -> None:
    for age in (85, 84, 83, 30, 29, 28, 0):
        write(admin, "1")
        mark(admin, age_seconds=age)
    advance_all(relay, of=THIN)
    assert len(marks(admin)) in {5, 6}  # their ten seconds may end between two of the old ones
    assert repair_all(relay) == []


@both_layouts
def test_thinning_compares_first_and_stops_before_damage(admin: Connection, relay: Connection) -> None:
    gap, *_ = leave_gaps(admin)
    for _ in range(4):
        write(admin, "1", "2")
        mark(admin, age_seconds=OLD)
    write_at(admin, gap)
    before = len(marks(admin))
    batch = advance_batch(relay, options=OPTIONS, stage=THIN)
    assert batch is not None
    assert [(each.shard, each.uncounted_messages) for each in batch.damaged] == [(shard_of(admin, "1"), 1)]
    assert len(marks(admin)) < before  # the other shard
    assert len(list(repair(relay, batch.damaged[0], options=OPTIONS))) == 1
    advance_all(relay, of=THIN)
    assert [count for _, count in marks(admin) if count > 1] != []
    assert repair_all(relay) == []


def test_damage_is_found_again_after_a_crash_between_the_look_and_the_repair(
    admin: Connection, relay: Connection
) -> None:
    gap, *_ = leave_gaps(admin)
    write(admin, "1")
    mark(admin, age_seconds=OLD)
    write_at(admin, gap)
    for _ in range(2):
        batch = advance_batch(relay, options=OPTIONS, stage=CHECK)
        assert batch is not None
        assert len(batch.damaged) == 1
    assert positions(admin) == []


def test_of_all_processes_one_moves_the_positions_on(database: Database, admin: Connection, relay: Connection) -> None:
    write(admin, "1")
    mark(admin, age_seconds=OLD)
    with relay_database.connect(database.relay_dsn, application_name="another") as other:
        other.execute(stage.begin_statement(OPTIONS))
        other.execute(statement("reconcile_positions", schema="public"))
        assert advance_batch(relay, options=OPTIONS, stage=CHECK) is None
        assert compare_batch(relay, options=OPTIONS, after=FROM_THE_BEGINNING).messages == 1  # that moves nothing
        other.rollback()
        assert advance_all(relay, of=CHECK) == 1


@both_layouts
def test_before_removal_one_shard_is_reconciled_up_to_a_number(admin: Connection, relay: Connection) -> None:
    gaps = []
    for _ in range(3):
        gaps += leave_gaps(admin)
        written = write(admin, "1", "2", "1", "2")
        mark(admin)
    write_at(admin, *gaps, key="1")
    write_at(admin, *gaps, key="2")
    shard = shard_of(admin, "1")
    assert shard != shard_of(admin, "2")
    inside = gaps[1] + 1
    reconciled = list(
        reconcile_through(relay, options=replace(OPTIONS, marks=1), after={shard: 0}, through={shard: inside})
    )
    assert [(each.shard, each.messages) for each in reconciled] == [(shard, 1), (shard, 1)]
    assert pending(admin) == gaps[:2]
    above = {shard: gaps[2] - 1}
    [(through,)] = admin.execute(
        "SELECT min(through) FROM outbox_published WHERE shard = %s AND through > %s", [shard, gaps[2]]
    ).fetchall()
    [third] = reconcile_through(relay, options=OPTIONS, after=above, through={shard: written[-1]})
    assert (third.through, third.messages) == (through, 1)


@pytest.mark.parametrize(
    "setting",
    [
        "default_transaction_isolation=serializable",
        "search_path=nowhere",
        "DateStyle=German,DMY",
        "enable_indexonlyscan=off",
        "plan_cache_mode=force_custom_plan",
    ],
)
def test_the_session_is_its_own_whatever_the_role_sets(database: Database, admin: Connection, setting: str) -> None:
    [gap] = leave_gaps(admin)
    write(admin, *map(str, range(40)))
    mark(admin, age_seconds=OLD)
    write(admin, "1")
    mark(admin)
    write_at(admin, gap)
    dsn = make_conninfo(database.relay_dsn, options=f"-c {setting}")
    with closing(relay_database.connect(dsn, application_name="reconciler")) as connection:
        assert [each.messages for each in repair_all(connection)] == [1]
        advance_all(connection, of=CHECK)
        assert advance_all(connection, of=THIN) > 0
    assert pending(admin) == [gap]


def test_a_policy_that_hides_messages_is_an_error(database: Database, admin: Connection) -> None:
    write(admin, "1")
    mark(admin)
    admin.execute("ALTER TABLE outbox ENABLE ROW LEVEL SECURITY")
    with (
        closing(relay_database.connect(database.relay_dsn, application_name="reconciler")) as connection,
        pytest.raises(SchemaMismatch, match="row-level security"),
    ):
        compare_batch(connection, options=OPTIONS, after=FROM_THE_BEGINNING)


@pytest.mark.every_postgres
@both_layouts
def test_rows_are_counted_from_the_primary_key_alone(admin: Connection, relay: Connection, layout: str) -> None:
    count = 1100 if layout == "partitioned" else 5000
    admin.execute(
        f"INSERT INTO outbox ({COLUMNS}) SELECT 'order', (number %% 100)::text, 'placed' FROM generate_series(1, %s) "
        "AS number",
        [count],
    )
    mark(admin, through=count // 2)
    mark(admin)
    relay.execute(stage.begin_statement(OPTIONS))
    explained = partial(_explain, relay)
    plan = explained(
        "reconcile_look",
        {
            "shards": numbers(range(16)),
            "positions": numbers([0] * 16),
            "older_than_seconds": 0.0,
            "slot_seconds": 0.001,
            "leaves_newest": False,
            "limit": 2**63 - 1,
            "marks": 1000,
            "messages": 10_000,
        },
    )
    scans = set(re.findall(r"(\w[\w ]* Scan)[\w ]* using (\w+) on (outbox\w*)", plan))
    of_rows = {(kind, table) for kind, _, table in scans if re.fullmatch(r"outbox(_p\d+)?", table)}
    assert {kind for kind, _ in of_rows} == {"Index Only Scan"}
    assert "Seq Scan" not in plan
    assert "Sort Key: outbox" not in plan


def _explain(connection: Connection, name: str, parameters: Mapping[str, object]) -> str:
    explain = b"EXPLAIN (ANALYZE, TIMING OFF, SUMMARY OFF) " + statement(name, schema="public")
    return "\n".join(row[0] for row in connection.execute(explain, parameters).fetchall())


@both_layouts
@pytest.mark.parametrize("are_thinning", [False, True])
def test_two_reconcilers_beside_writers_and_lanes_find_all_that_is_skipped(
    database: Database, admin: Connection, *, are_thinning: bool
) -> None:
    stop = threading.Event()
    options = replace(OPTIONS, messages=20, marks=3, repaired_messages=2)
    skipped: set[int] = set()

    def reconcile_until_stopped() -> int:
        found = 0
        with closing(relay_database.connect(database.relay_dsn, application_name="reconciler")) as connection:
            while not stop.is_set():
                found += sum(each.messages for each in repair_all(connection, options))
                if are_thinning:
                    advance_batch(connection, options=options, stage=AT_ONCE)
        return found

    with ThreadPoolExecutor(3) as threads:
        reconcilers = [threads.submit(reconcile_until_stopped) for _ in range(2)]
        try:
            for turn in range(60):
                gaps = leave_gaps(admin, 2)
                write(admin, *map(str, range(10)))
                _act_as_lane(database)
                if turn % 3 == 0:
                    write_at(admin, gaps[0], key=str(turn % 10))
                    skipped.add(gaps[0])
                if turn % 4 == 0:
                    admin.execute("DELETE FROM outbox WHERE sequence_no = %s", [gaps[1] + 1 + turn % 10])
            eventually(lambda: skipped <= set(pending(admin)))
        finally:
            stop.set()
        found = sum(each.result() for each in reconcilers)
    with closing(relay_database.connect(database.relay_dsn, application_name="reconciler")) as connection:
        assert repair_all(connection) == []
    assert found == len(pending(admin))
    if not are_thinning:  # then a message may appear between the look and the thinning, and nobody can tell which it is
        assert pending(admin) == sorted(skipped)


def _act_as_lane(database: Database) -> None:
    """Pass all messages with a mark for each shard, as a lane does: the shards are locked first."""
    with psycopg.connect(database.dsn) as lane:
        lane.execute("SELECT FROM outbox LIMIT 0")
        lane.execute("SELECT FROM outbox_shard ORDER BY shard FOR UPDATE")
        mark(lane)


class Listener:
    """Stands in for the telemetry."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.compared = 0
        self.repairs: list[Repair] = []
        self.failures: list[str] = []

    def batch_reconciled(self, messages: int, *, seconds: float) -> None:
        assert seconds > 0
        self.compared += messages

    def skipped_messages_found(self, found: Repair) -> None:
        self.repairs.append(found)

    def reconciling_failed(self, error: Exception) -> None:
        self.failures.append(str(error))

    def thread_failed(self, thread: str, error: Exception) -> None:
        self.failures.append(f"{thread}: {error}")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds without a pause between them."""
    monkeypatch.setattr(stage, "_ROUND_SECONDS", 0.01)
    monkeypatch.setattr(stage, "_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(stage, "_RESTART_SECONDS", 0.01)


def run_until(
    database: Database,
    is_done: Callable[[Listener], object],
    *,
    connect: Callable[[], Connection] | None = None,
    options: ReconcileOptions = OPTIONS,
) -> Listener:
    listener = Listener()
    reconciler = Reconciler(
        options=options,
        connect=connect or partial(relay_database.connect, database.relay_dsn, application_name="reconciler"),
        telemetry=cast("Telemetry", listener),
        stop=listener.stop,
    )
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(reconciler.run)
        try:
            eventually(lambda: is_done(listener))
        finally:
            listener.stop.set()
        running.result()
    return listener


@pytest.mark.usefixtures("quick")
def test_a_relay_compares_all_that_is_kept_when_it_starts(database: Database, admin: Connection) -> None:
    [gap] = leave_gaps(admin)
    for _ in range(4):
        write(admin, "1")
        mark(admin, age_seconds=OLD)
    run_until(database, lambda listener: listener.compared >= 4 + 3)
    write_at(admin, gap)
    listener = run_until(database, lambda _: pending(admin) == [gap])
    assert [(each.messages, each.is_whole, each.through) for each in listener.repairs] == [(1, False, gap + 3)]
    assert listener.failures == []


@pytest.mark.usefixtures("quick")
def test_while_marks_are_ahead_of_the_sequence_everything_is_compared_again_and_again(
    database: Database, admin: Connection
) -> None:
    write(admin, "1")
    mark(admin, age_seconds=OLD)
    admin.execute("UPDATE outbox_published SET through = 100")
    skipped: list[int] = []

    def is_found(_listener: Listener) -> bool:
        if pending(admin) == skipped and len(skipped) < 3:
            skipped.extend(write(admin, "1"))
        return pending(admin) == skipped and len(skipped) == 3

    run_until(database, is_found)


@pytest.mark.usefixtures("quick")
def test_a_shard_that_somebody_holds_does_not_keep_the_others_from_their_repair(
    database: Database, admin: Connection
) -> None:
    [gap] = leave_gaps(admin)
    write(admin, "1", "2")
    mark(admin, age_seconds=OLD)
    write_at(admin, gap, key="1")
    write_at(admin, gap, key="2")
    held, other = sorted([shard_of(admin, "1"), shard_of(admin, "2")])
    options = replace(OPTIONS, lock_timeout=0.05)
    with psycopg.connect(database.dsn) as holder:
        holder.execute("SELECT FROM outbox_shard WHERE shard = %s FOR UPDATE", [held])
        listener = run_until(database, lambda each: each.repairs and each.failures, options=options)
        assert [each.shard for each in listener.repairs] == [other]
    listener = run_until(database, lambda each: each.repairs, options=options)
    assert [each.shard for each in listener.repairs] == [held]


@pytest.mark.usefixtures("quick")
def test_the_thread_tells_what_failed_and_tries_again(database: Database, admin: Connection) -> None:
    write(admin, "1")
    mark(admin, age_seconds=OLD)
    failures: list[Exception] = [DatabaseUnavailable("away"), RuntimeError("unforeseen")]

    def connect() -> Connection:
        if failures:
            raise failures.pop(0)
        return relay_database.connect(database.relay_dsn, application_name="reconciler")

    listener = run_until(database, lambda each: each.compared, connect=connect)
    assert listener.failures == ["away", "reconcile: unforeseen"]


def test_a_truncation_waits_for_a_look_and_deadlocks_with_none(database: Database, admin: Connection) -> None:
    write(admin, "1")
    mark(admin, age_seconds=OLD)
    with (
        closing(relay_database.connect(database.relay_dsn, application_name="reconciler")) as relay,
        ThreadPoolExecutor(1) as threads,
    ):
        relay.execute(stage.begin_statement(OPTIONS))
        truncation = threads.submit(admin.execute, "TRUNCATE outbox")
        waiting = "SELECT FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock'"
        with database.connect(autocommit=True) as observer:
            eventually(lambda: observer.execute(waiting).fetchall())
        move(relay, "reconcile_advance", shard=shard_of(relay, "1"), through=1)
        truncation.result()
    assert positions(admin) == []
    assert marks(admin) == []


def test_a_table_that_is_locked_ends_a_look_by_its_time_out(database: Database) -> None:
    with psycopg.connect(database.dsn) as holder:
        holder.execute("LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE")
        with (
            closing(relay_database.connect(database.relay_dsn, application_name="reconciler")) as relay,
            pytest.raises(DatabaseConflict),
        ):
            compare_batch(relay, options=replace(OPTIONS, lock_timeout=0.01), after=FROM_THE_BEGINNING)
