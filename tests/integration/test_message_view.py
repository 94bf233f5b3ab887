"""The view outbox_message tells of each message what the marks say of it, and finds one without reading the table."""

from __future__ import annotations

from typing import TYPE_CHECKING, LiteralString

import pytest
from psycopg.rows import dict_row

from tests.fixtures.marks import mark, set_aside
from tests.fixtures.outbox import insert
from tests.fixtures.postgres import both_layouts, login

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from psycopg import Connection

    from tests.fixtures.postgres import Database

pytestmark = pytest.mark.every_postgres

BY_SHARD_AND_NUMBER = """
SELECT * FROM outbox_message WHERE shard = hashtextextended('order:777', 0) & 15 AND sequence_no = 777
"""
BY_NUMBER = """
SELECT *
FROM outbox_message
WHERE sequence_no = 777 AND shard = ANY ('{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}')
"""
BY_KEY = """
SELECT *
FROM outbox_message
WHERE aggregate_type = 'order'
    AND aggregate_id = '4711'
    AND shard = hashtextextended('order:4711', 0) & 15
"""


@pytest.fixture
def admin(database: Database) -> Iterator[Connection]:
    with database.connect(autocommit=True) as connection:
        yield connection


def give_up(admin: Connection, number: int, *, from_no: int, collected_through: int | None = None) -> None:
    """Give up on the writer of message *number*, whose last one has the number 3; see the columns."""
    admin.execute(
        "INSERT INTO outbox_unordered (transaction_id, from_no, to_no, collected_through, collected_at)"
        " SELECT transaction_id, %(from_no)s, 3, %(through)s, CASE WHEN %(through)s::bigint = 3 THEN now() END"
        " FROM outbox WHERE sequence_no = %(number)s",
        {"number": number, "from_no": from_no, "through": collected_through},
    )


def look(connection: Connection, number: int) -> dict[str, Any]:
    """The message *number* as the view shows it."""
    with connection.cursor(row_factory=dict_row) as cursor:
        [row] = cursor.execute("SELECT * FROM outbox_message WHERE sequence_no = %s", [number]).fetchall()
    return row


def in_no_way(_admin: Connection) -> None:
    pass


def behind_a_mark_of_other_shards(admin: Connection) -> None:
    [(shard,)] = admin.execute("SELECT shard FROM outbox WHERE sequence_no = 2").fetchall()
    mark(admin, through=3, shard=(shard + 1) % 16)


def above_the_mark(admin: Connection) -> None:
    mark(admin, through=1)


def at_the_mark(admin: Connection) -> None:
    mark(admin, through=2)


def below_the_mark(admin: Connection) -> None:
    mark(admin, through=3)


def below_the_oldest_mark_that_is_kept(admin: Connection) -> None:
    mark(admin, through=3)
    admin.execute("UPDATE outbox_published SET messages = 0, checksum = 0")


def parked_below_the_mark(admin: Connection) -> None:
    mark(admin)
    set_aside(admin, 2, state="parked", reason_code="MSG_SIZE_TOO_LARGE", reason="too large")


def waiting_below_the_mark(admin: Connection) -> None:
    mark(admin)
    set_aside(admin, 2, state="waiting", reason_code="UNKNOWN_TOPIC", reason="no topic")


def parked_above_the_mark(admin: Connection) -> None:
    set_aside(admin, 2, state="parked", reason_code="INVALID_RECORD", reason="refused")


def of_a_late_writer(admin: Connection) -> None:
    give_up(admin, 2, from_no=1)
    mark(admin)


def of_a_late_writer_above_the_mark(admin: Connection) -> None:
    give_up(admin, 2, from_no=1)


def of_a_late_writer_and_collected(admin: Connection) -> None:
    give_up(admin, 2, from_no=1, collected_through=3)
    set_aside(admin, 2, state="waiting", reason_code="late", reason="collected", is_unordered=True)
    mark(admin)


def of_a_late_writer_and_collected_and_parked(admin: Connection) -> None:
    give_up(admin, 2, from_no=1, collected_through=3)
    set_aside(admin, 2, state="parked", reason_code="INVALID_RECORD", reason="refused", is_unordered=True)
    mark(admin)


def of_a_late_writer_and_collected_and_published(admin: Connection) -> None:
    give_up(admin, 2, from_no=1, collected_through=3)
    mark(admin)


def of_a_late_writer_and_published_while_others_are_being_collected(admin: Connection) -> None:
    give_up(admin, 2, from_no=1, collected_through=2)
    mark(admin)


def of_a_late_writer_while_earlier_ones_are_being_collected(admin: Connection) -> None:
    give_up(admin, 2, from_no=0, collected_through=1)
    mark(admin)


def of_a_writer_that_was_given_up_on_later(admin: Connection) -> None:
    mark(admin)
    give_up(admin, 2, from_no=2)


@pytest.mark.parametrize(
    ("settle", "expected"),
    [
        (in_no_way, ("unpublished", None, None)),
        (behind_a_mark_of_other_shards, ("unpublished", None, None)),
        (above_the_mark, ("unpublished", None, None)),
        (at_the_mark, ("published", None, None)),
        (below_the_mark, ("published", None, None)),
        (below_the_oldest_mark_that_is_kept, ("published", None, None)),
        (parked_below_the_mark, ("parked", "MSG_SIZE_TOO_LARGE", "too large")),
        (waiting_below_the_mark, ("waiting", "UNKNOWN_TOPIC", "no topic")),
        (parked_above_the_mark, ("parked", "INVALID_RECORD", "refused")),
        (of_a_late_writer, ("waiting", "late", None)),
        (of_a_late_writer_above_the_mark, ("waiting", "late", None)),
        (of_a_late_writer_and_collected, ("waiting", "late", "collected")),
        (of_a_late_writer_and_collected_and_parked, ("parked", "INVALID_RECORD", "refused")),
        (of_a_late_writer_and_collected_and_published, ("published", None, None)),
        (of_a_late_writer_and_published_while_others_are_being_collected, ("published", None, None)),
        (of_a_late_writer_while_earlier_ones_are_being_collected, ("waiting", "late", None)),
        (of_a_writer_that_was_given_up_on_later, ("published", None, None)),
    ],
)
def test_the_state_of_a_message_is_what_the_marks_say(
    admin: Connection, settle: Callable[[Connection], None], expected: tuple[str, str | None, str | None]
) -> None:
    insert(admin, "1", "1", "1")
    settle(admin)
    row = look(admin, 2)
    assert (row["state"], row["reason_code"], row["reason"]) == expected
    assert (row["published_at"] is not None) == (row["state"] == "published")
    assert (row["since"] is not None) == (row["state"] in {"waiting", "parked"})
    assert admin.execute("SELECT count(*) FROM outbox_message").fetchall() == [(3,)]


@both_layouts
def test_a_message_was_published_when_the_first_mark_at_or_above_it_was_written(admin: Connection) -> None:
    insert(admin, *["1"] * 4)
    mark(admin, through=1, age_seconds=3_000)
    mark(admin, through=3, age_seconds=2_000)
    mark(admin, through=4, age_seconds=1_000)
    times = [time for (time,) in admin.execute("SELECT published_at FROM outbox_published ORDER BY through")]
    expected = [times[0], times[1], times[1], times[2]]
    assert [look(admin, number)["published_at"] for number in (1, 2, 3, 4)] == expected


def test_a_message_waits_or_is_parked_since_it_was_set_aside_or_its_writer_was_given_up_on(admin: Connection) -> None:
    insert(admin, "1", "1")
    set_aside(admin, 1)
    give_up(admin, 2, from_no=1)
    times = admin.execute("SELECT since, recorded_at FROM outbox_pending, outbox_unordered").fetchall()
    assert [(look(admin, 1)["since"], look(admin, 2)["since"])] == times


@pytest.mark.parametrize("role", ["outbox_relay", "outbox_pruner", "outbox_operator"])
def test_who_may_read_messages_may_read_the_view(database: Database, admin: Connection, role: LiteralString) -> None:
    insert(admin, "1")
    with login(database, group=role) as name, database.connect(user=name) as connection:
        assert look(connection, 1)["state"] == "unpublished"


def rows_scanned(node: dict[str, Any]) -> int:
    """How many rows the plan below *node* has read from tables without an index."""
    own = node["Actual Rows"] + node.get("Rows Removed by Filter", 0) if node["Node Type"] == "Seq Scan" else 0
    return int(own * node["Actual Loops"]) + sum(map(rows_scanned, node.get("Plans", [])))


@both_layouts
@pytest.mark.parametrize("query", [BY_SHARD_AND_NUMBER, BY_NUMBER, BY_KEY], ids=["shard and number", "number", "key"])
def test_a_number_or_a_key_is_found_by_index(admin: Connection, query: LiteralString) -> None:
    admin.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, event_type)"
        " SELECT 'order', number::text, 'placed' FROM generate_series(1, 20000) AS number"
    )
    for through in range(1_000, 20_001, 1_000):
        mark(admin, through=through)
    set_aside(admin, *range(5_000, 8_000))
    admin.execute("VACUUM ANALYZE")
    [(explained,)] = admin.execute("EXPLAIN (ANALYZE, FORMAT JSON) " + query).fetchall()
    plan = explained[0]["Plan"]
    assert plan["Actual Rows"] == 1
    assert rows_scanned(plan) < 1_000  # of partitions so small that their indexes are larger
