"""The SQL of docs/textbook.md runs as it is printed, and says of messages in every state what the page says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, LiteralString

import pytest
from psycopg import errors

from tests.fixtures.guides import Guide
from tests.fixtures.marks import mark, set_aside
from tests.fixtures.outbox import insert
from tests.fixtures.postgres import both_layouts, login

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection
    from psycopg.rows import TupleRow

    from tests.fixtures.postgres import Database

pytestmark = pytest.mark.every_postgres

GUIDE = Guide(Path(__file__).parents[2] / "docs" / "textbook.md")


@dataclass(frozen=True, slots=True)
class States:
    """One message in each state, by number; all are of the key 1007."""

    published: int = 4708
    parked: int = 4709
    late: int = 4710
    waiting: int = 4711
    unpublished: int = 4712


AT = States()


@pytest.fixture
def admin(database: Database) -> Iterator[Connection]:
    with database.connect(autocommit=True) as connection:
        yield connection


@pytest.fixture
def operator(database: Database, admin: Connection) -> Iterator[Connection]:
    """An operator's session, with a message in each state."""
    admin.execute("SELECT setval('outbox_sequence_no_seq', 4707)")
    insert(admin, *["1007"] * 4, created_at="yesterday", payload={"n": 1}, headers={"tenant": "t1"})
    set_aside(admin, AT.parked, state="parked", reason_code="INVALID_RECORD", reason="refused")
    set_aside(admin, AT.waiting, state="waiting", reason_code="topic_held", reason="its topic is away")
    admin.execute(
        "INSERT INTO outbox_unordered (transaction_id, from_no)"
        " SELECT transaction_id, sequence_no - 1 FROM outbox WHERE sequence_no = %s",
        [AT.late],
    )
    mark(admin)
    insert(admin, "1007", created_at="yesterday")
    with login(database, group="outbox_operator") as name, database.connect(autocommit=True, user=name) as connection:
        yield connection


def results(connection: Connection, section: str, *, block: int = 0) -> list[list[TupleRow]]:
    """What each statement of a block prints."""
    executed = connection.execute(GUIDE.statements(section)[block].encode())
    return [result.fetchall() for result in executed.results() if result.description]


def test_each_statement_of_the_page_is_in_a_test_below() -> None:
    blocks = {section: len(GUIDE.statements(section)) for section in GUIDE.sections}
    assert {section: count for section, count in blocks.items() if count} == {
        "`WHERE id = ?`": 2,
        "`WHERE published_at IS NULL`": 2,
        "`WHERE published_at > ?`": 1,
        "`WHERE status = 'failed'`": 1,
        "What was done by hand": 1,
        "`DELETE` after publishing, and the archive table": 2,
    }


@both_layouts
def test_a_message_is_found_by_its_number_and_by_its_key(operator: Connection) -> None:
    [[message]] = results(operator, "`WHERE id = ?`")
    assert message[:1] == (AT.waiting,)
    [messages] = results(operator, "`WHERE id = ?`", block=1)
    assert [(number, state) for number, _, state, _ in messages] == [
        (AT.published, "published"),
        (AT.parked, "parked"),
        (AT.late, "waiting"),
        (AT.waiting, "waiting"),
        (AT.unpublished, "unpublished"),
    ]
    assert [number for number, _, _, published_at in messages if published_at] == [AT.published]


@both_layouts
def test_what_is_not_published_is_counted_with_its_age_and_listed(operator: Connection) -> None:
    above, pending = results(operator, "`WHERE published_at IS NULL`")
    [(unpublished, oldest_age)] = above
    assert (unpublished, oldest_age > timedelta(hours=1)) == (1, True)
    assert [row[:3] for row in pending] == [("parked", "INVALID_RECORD", 1), ("waiting", "topic_held", 1)]
    listed, counts = results(operator, "`WHERE published_at IS NULL`", block=1)
    assert [row[0] for row in listed] == [AT.parked, AT.late, AT.waiting, AT.unpublished]
    assert dict(counts) == {"parked": 1, "published": 1, "unpublished": 1, "waiting": 2}


@both_layouts
def test_marks_tell_when_and_how_many(admin: Connection, operator: Connection) -> None:
    admin.execute("UPDATE outbox_published SET published_at = now() - interval '2 hours'")
    mark(admin)
    marks, [(messages,)] = results(operator, "`WHERE published_at > ?`")
    assert [(through, count) for _, through, _, count in marks] == [(AT.unpublished, 1)]
    assert messages == 1


@both_layouts
def test_what_has_failed_is_shown_with_its_reason(operator: Connection) -> None:
    [[(number, aggregate_type, aggregate_id, since, *reason)]] = results(operator, "`WHERE status = 'failed'`")
    assert (number, aggregate_type, aggregate_id, reason) == (AT.parked, "order", "1007", ["INVALID_RECORD", "refused"])
    assert since is not None


@both_layouts
def test_a_message_is_sent_as_a_new_one(admin: Connection, operator: Connection) -> None:
    results(admin, "What was done by hand")
    rows = operator.execute(
        "SELECT payload, headers, message_id FROM outbox WHERE sequence_no IN (4711, 4713) ORDER BY sequence_no"
    ).fetchall()
    assert rows[0][:2] == rows[1][:2] == ({"n": 1}, {"tenant": "t1"})
    assert rows[0][2] != rows[1][2]


@both_layouts
@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO outbox_published (shard, through, messages, checksum) VALUES (0, 1, 1, 1)",
        "UPDATE outbox_published SET through = through + 1",
        "DELETE FROM outbox_published",
        "INSERT INTO outbox_pending SELECT * FROM outbox_pending",
        "UPDATE outbox_pending SET sequence_no = 1",
        "UPDATE outbox SET aggregate_id = '1008'",
        "TRUNCATE outbox",
    ],
)
def test_an_operator_cannot_say_by_hand_that_a_message_is_published(
    operator: Connection, statement: LiteralString
) -> None:
    with pytest.raises(errors.InsufficientPrivilege):
        operator.execute(statement)


@both_layouts
def test_an_operator_may_delete_messages_and_change_what_they_say(operator: Connection) -> None:
    operator.execute("UPDATE outbox SET payload = '{\"n\": 2}', headers = '{}' WHERE sequence_no = 4712")
    operator.execute("DELETE FROM outbox WHERE sequence_no IN (4708, 4711)")
    left = operator.execute("SELECT sequence_no, state FROM outbox_message ORDER BY sequence_no").fetchall()
    assert left == [(AT.parked, "parked"), (AT.late, "waiting"), (AT.unpublished, "unpublished")]


@both_layouts
def test_nobody_inserts_a_number_of_his_own(admin: Connection) -> None:
    with pytest.raises(errors.GeneratedAlways):
        admin.execute(
            "INSERT INTO outbox (sequence_no, aggregate_type, aggregate_id, event_type) VALUES (1, 'order', '1', 'e')"
        )


@both_layouts
@pytest.mark.usefixtures("operator")
def test_an_archive_gets_each_message_once_when_it_is_published(admin: Connection) -> None:
    section = "`DELETE` after publishing, and the archive table"
    results(admin, section)
    results(admin, section, block=1)
    admin.execute("DELETE FROM outbox_pending WHERE sequence_no = %s", [AT.waiting])
    results(admin, section, block=1)
    archived = admin.execute("SELECT sequence_no FROM outbox_archive ORDER BY sequence_no").fetchall()
    assert archived == [(AT.published,), (AT.waiting,)]


def rows_read(node: dict[str, Any]) -> int:
    """How many messages the plan below *node* looks at."""
    own = 0.0
    if re.fullmatch(r"outbox(_p\d+)?", node.get("Relation Name", "")):
        own = (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
    return int(own) + sum(map(rows_read, node.get("Plans", [])))


@both_layouts
def test_unpublished_messages_are_counted_without_reading_the_published_ones(admin: Connection) -> None:
    insert_many = (
        "INSERT INTO outbox (aggregate_type, aggregate_id, event_type)"
        " SELECT 'order', number::text, 'placed' FROM generate_series(1, %s) AS number"
    )
    admin.execute(insert_many, [20_000])
    mark(admin)
    admin.execute("VACUUM ANALYZE")
    admin.execute(insert_many, [10])
    [count, _] = GUIDE.statements("`WHERE published_at IS NULL`")[0].split(";\n\n")
    assert admin.execute(count.encode()).fetchall()[0][0] == 10
    [(explained,)] = admin.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {count}".encode()).fetchall()
    assert rows_read(explained[0]["Plan"]) < 100
