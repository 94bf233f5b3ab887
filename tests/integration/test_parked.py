"""What an operator can do to parked messages, as a login with that role only, and what is left for relays to do."""

from __future__ import annotations

import json
import random
import string
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import pytest
from psycopg import errors
from psycopg.conninfo import make_conninfo

from outbox_relay import database as relay_database
from outbox_relay.errors import DatabaseConflict, InvalidMessage, OperationRefused, SchemaMismatch
from outbox_relay.operate.parked import MOST_COUNTED, Change, Note, ParkedKey, ParkedMessages, Selection, Skipped
from tests.fixtures.marks import mark, set_aside
from tests.fixtures.outbox import insert
from tests.fixtures.postgres import both_layouts, login
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg import Connection

    from tests.fixtures.postgres import Database

pytestmark = [pytest.mark.every_postgres, both_layouts]

MAX_BYTES = 1_000_000
SHARD_OF_7 = 13  # of the type "order"
HASH_OF_7 = -6_811_029_746_667_169_779


@pytest.fixture
def operator_login(database: Database) -> Iterator[str]:
    with login(database, group="outbox_operator") as name:
        yield name


@contextmanager
def operations(database: Database, *, user: str, lock_timeout: float = 30.0) -> Iterator[ParkedMessages]:
    """The operations of one more session of *user*."""
    dsn = make_conninfo(
        database.server.dsn(database.name, user=user),
        options="-c default_transaction_isolation=serializable",  # a default that would hide what relays do
    )
    with closing(relay_database.connect(dsn, application_name="operator")) as connection:
        yield ParkedMessages(connection, schema="public", lock_timeout=lock_timeout, statement_timeout=30)


@pytest.fixture
def operator(database: Database, operator_login: str) -> Iterator[ParkedMessages]:
    """The operations, with nothing but the grants of an operator."""
    with operations(database, user=operator_login) as messages:
        yield messages


@pytest.fixture
def other_operator(database: Database, operator_login: str) -> Iterator[ParkedMessages]:
    """Somebody else, at the same time."""
    with operations(database, user=operator_login) as messages:
        yield messages


@pytest.fixture
def writer(database: Database) -> Iterator[Connection]:
    with database.connect(autocommit=True) as connection:
        yield connection


@pytest.fixture
def lane(database: Database, relay_login: str) -> Iterator[Connection]:
    """A relay's session; it holds what `hold` locks until it commits."""
    with closing(database.connect(user=relay_login)) as connection:
        yield connection


def hold(lane: Connection, shard: int) -> None:
    """Lock *shard* as a relay does while it publishes."""
    lane.execute("SELECT shard FROM outbox_shard WHERE shard = %s ORDER BY shard FOR UPDATE SKIP LOCKED", [shard])


def park_a_key(writer: Connection, key: str = "7", *, aggregate_type: str = "order") -> list[int]:
    """Three messages of one key: the first is guilty, the others stand behind it; give their numbers."""
    first, *others = insert(writer, key, key, key, aggregate_type=aggregate_type)
    set_aside(writer, first, reason="1,200,000 bytes")
    set_aside(writer, *others, reason_code="behind_parked", reason="an earlier message of the key is parked")
    mark(writer)
    return [first, *others]


def pending(writer: Connection) -> list[tuple[int, str]]:
    """Each pending message and what is said of it, the earliest first."""
    query = "SELECT sequence_no, state || ' ' || reason_code FROM outbox_pending ORDER BY sequence_no"
    return writer.execute(query).fetchall()


def parked(*numbers: int) -> list[tuple[int, str]]:
    """What `park_a_key` leaves, the first of three numbers being guilty."""
    return [
        (number, "parked behind_parked" if index % 3 else "parked MSG_SIZE_TOO_LARGE")
        for index, number in enumerate(numbers)
    ]


def waiting(*numbers: int) -> list[tuple[int, str]]:
    return [(number, "waiting released") for number in numbers]


def numbers_left(writer: Connection) -> list[int]:
    return [number for (number,) in writer.execute("SELECT sequence_no FROM outbox ORDER BY sequence_no")]


def audit(writer: Connection) -> list[tuple[object, ...]]:
    query = "SELECT action, sequence_no, operator, why, headers IS NOT NULL FROM outbox_audit ORDER BY id"
    return writer.execute(query).fetchall()


def delete(writer: Connection, *numbers: int) -> None:
    """What an administrator does who knows of no pending messages."""
    writer.execute("DELETE FROM outbox WHERE sequence_no = ANY(%s)", [list(numbers)])


def test_the_list_has_the_guilty_messages_oldest_first_and_how_many_stand_behind(
    operator: ParkedMessages, writer: Connection
) -> None:
    park_a_key(writer, "7")
    park_a_key(writer, "1")
    insert(writer, "2")
    lines = [(each.sequence_no, each.aggregate_id, each.is_guilty, each.behind) for each in operator.find(Selection())]
    assert lines == [(1, "7", True, 2), (4, "1", True, 2)]


def test_a_line_has_what_the_relay_said(operator: ParkedMessages, writer: Connection) -> None:
    park_a_key(writer)
    [line] = operator.find(Selection())
    [(message_id, since)] = writer.execute(
        "SELECT message_id::text, since FROM outbox_message WHERE sequence_no = 1"
    ).fetchall()
    assert (line.message_id, line.since, line.shard) == (message_id, since, SHARD_OF_7)
    assert (line.aggregate_type, line.event_type) == ("order", "placed")
    assert (line.reason_code, line.reason) == ("MSG_SIZE_TOO_LARGE", "1,200,000 bytes")


def test_the_list_has_those_behind_when_asked(operator: ParkedMessages, writer: Connection) -> None:
    park_a_key(writer)
    lines = [(each.sequence_no, each.is_guilty, each.behind) for each in operator.find(Selection(), with_behind=True)]
    assert lines == [(1, True, 2), (2, False, 1), (3, False, 0)]


def test_what_waits_for_its_topic_is_not_parked(operator: ParkedMessages, writer: Connection) -> None:
    insert(writer, "7", "7")
    set_aside(writer, 1, state="waiting", reason_code="UNKNOWN_TOPIC_OR_PART", reason="no such topic")
    set_aside(writer, 2, reason="1,200,000 bytes")
    assert [(each.sequence_no, each.behind) for each in operator.find(Selection())] == [(2, 0)]
    with pytest.raises(OperationRefused, match=r"not parked.*1"):
        operator.skip([1], note=Note(why="spam"), release_rest=False, are_overtaken=False)
    operator.release(operator.keys(Selection()), note=Note(), are_overtaken=False)
    assert pending(writer) == [(1, "waiting UNKNOWN_TOPIC_OR_PART"), (2, "waiting released")]


def test_the_first_of_a_key_is_listed_although_the_guilty_one_is_gone(
    operator: ParkedMessages, writer: Connection
) -> None:
    park_a_key(writer)
    operator.skip([1], note=Note(why="spam"), release_rest=False, are_overtaken=False)
    assert [(each.sequence_no, each.is_guilty, each.behind) for each in operator.find(Selection())] == [(2, False, 1)]


def test_the_list_stops_at_its_limit(operator: ParkedMessages, writer: Connection) -> None:
    for key in ("1", "2", "7"):
        park_a_key(writer, key)
    assert [each.sequence_no for each in operator.find(Selection(), limit=2)] == [1, 4]


@pytest.mark.parametrize(
    ("selection", "found"),
    [
        (Selection(keys=[("order", "7")]), [1]),
        (Selection(keys=[("order", "7"), ("order", "2")]), [1, 2]),
        (Selection(keys=[("basket", "7")]), [3]),
        (Selection(aggregate_type="order"), [1, 2]),
        (Selection(reason="too_LARGE"), [1]),
        (Selection(reason="large: 1,200"), [1]),
        (Selection(reason="header%string"), [2, 3]),
        (Selection(aggregate_type="order", reason="header"), [2]),
        (Selection(reason="nothing of the kind"), []),
        (Selection(keys=[("order:7", "")]), []),
    ],
    ids=repr,
)
def test_a_selection_finds_what_all_of_it_applies_to(
    operator: ParkedMessages, writer: Connection, selection: Selection, found: list[int]
) -> None:
    insert(writer, "7", "2")
    insert(writer, "7", aggregate_type="basket")
    set_aside(writer, 1, reason="1,200,000 bytes")
    set_aside(writer, 2, 3, reason_code="unpublishable", reason="header is no string")
    assert [each.sequence_no for each in operator.find(selection)] == found
    assert len(operator.keys(selection)) == len(found)


def test_a_release_by_reason_takes_keys_of_which_any_message_has_it(
    operator: ParkedMessages, writer: Connection
) -> None:
    park_a_key(writer, "7")
    park_a_key(writer, "1")
    set_aside(writer, *insert(writer, "7"), reason_code="unpublishable", reason="header is no string")
    keys = operator.keys(Selection(reason="unpublishable"))
    assert [(key.aggregate_id, key.messages) for key in keys] == [("7", 4)]


def test_counting_those_behind_stops_at_its_limit(operator: ParkedMessages, writer: Connection) -> None:
    park_many(writer, MOST_COUNTED + 2)
    assert [each.behind for each in operator.find(Selection(), limit=1)] == [MOST_COUNTED]


def park_many(writer: Connection, messages: int) -> None:
    """Park as many of one key, the first as the guilty one."""
    writer.execute(
        """
        INSERT INTO outbox (aggregate_type, aggregate_id, event_type)
        SELECT 'order', '7', 'placed' FROM generate_series(1, %s)
        """,
        [messages],
    )
    set_aside(writer, 1)
    set_aside(writer, *range(2, messages + 1), reason_code="behind_parked")
    mark(writer)


def test_ten_thousand_messages_of_one_key_are_listed_released_and_recorded(
    operator: ParkedMessages, writer: Connection
) -> None:
    park_many(writer, 10_000)
    assert [each.sequence_no for each in operator.find(Selection(), limit=100)] == [1]
    [key] = operator.keys_of([1])
    assert operator.release([key], note=Note(why="widened"), are_overtaken=False) == [key]
    assert key.messages == 10_000
    assert writer.execute("SELECT state, count(*) FROM outbox_pending GROUP BY state").fetchall() == [
        ("waiting", 10_000)
    ]
    assert writer.execute("SELECT count(DISTINCT sequence_no) FROM outbox_audit").fetchall() == [(10_000,)]


def test_ten_thousand_guilty_messages_of_one_key_are_released_by_reason(
    operator: ParkedMessages, writer: Connection
) -> None:
    """As on_poison = skip leaves them."""
    park_many(writer, 10_000)
    writer.execute("UPDATE outbox_pending SET reason_code = 'MSG_SIZE_TOO_LARGE'")
    assert len(operator.find(Selection(), limit=100)) == 100
    [key] = operator.release(operator.keys(Selection(reason="TOO_LARGE")), note=Note(), are_overtaken=True)
    assert key.messages == 10_000


def incompressible(length: int) -> str:
    """A text that takes its length in an index, and more than an index entry may have."""
    chance = random.Random(length)  # noqa: S311 -- no secret
    return "".join(chance.choices(string.ascii_letters + string.digits, k=length))


@pytest.mark.parametrize("length", [3_000, 100_000])
def test_a_key_of_any_length_is_listed_shown_edited_skipped_and_released(
    operator: ParkedMessages, writer: Connection, length: int
) -> None:
    key, aggregate_type = incompressible(length), incompressible(length - 1)
    park_a_key(writer, key, aggregate_type=aggregate_type)
    [line] = operator.find(Selection(keys=[(aggregate_type, key)]))
    assert (line.sequence_no, line.aggregate_type, line.aggregate_id, line.behind) == (1, aggregate_type, key, 2)
    assert json.loads(operator.show(1)["aggregate_id"]) == key
    operator.edit(2, change=Change(headers={"attempt": "2"}), max_message_bytes=MAX_BYTES, note=Note())
    skipped = operator.skip([1], note=Note(why="spam"), release_rest=True, are_overtaken=False)
    assert [(each.aggregate_type, each.aggregate_id, each.messages) for each in skipped.released] == [
        (aggregate_type, key, 2)
    ]
    assert pending(writer) == waiting(2, 3)
    assert {each[:2] for each in audit(writer)} == {("edit", 2), ("skip", 1), ("release", 2), ("release", 3)}


def test_show_gives_a_json_payload_digit_by_digit(operator: ParkedMessages, writer: Connection) -> None:
    payload = '{"total": 12345678901234567890.1230}'
    writer.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload, headers)"
        """ VALUES ('order', '1', 'placed', %s, '{"attempt": "3"}')""",
        [payload],
    )
    set_aside(writer, 1, reason="1,200,000 bytes")
    shown = operator.show(1)
    assert (shown["payload"], shown["payload_base64"], shown["headers"]) == (payload, "null", '{"attempt": "3"}')
    assert (shown["sequence_no"], shown["reason_code"]) == ("1", '"MSG_SIZE_TOO_LARGE"')
    assert (shown["reason"], shown["is_unordered"]) == ('"1,200,000 bytes"', "false")


def test_show_gives_bytes_in_base64(operator: ParkedMessages, writer: Connection) -> None:
    insert(writer, "1", payload_bytes=b"\0" * 60)
    set_aside(writer, 1)
    assert operator.show(1)["payload_base64"] == '"' + "A" * 80 + '"'


def test_an_edit_replaces_the_payload_and_keeps_id_number_and_place(
    operator: ParkedMessages, writer: Connection
) -> None:
    insert(writer, "7", payload_bytes=b"long", headers={"attempt": "1", "tenant": "a"})
    set_aside(writer, 1)
    kept = "SELECT message_id, sequence_no, aggregate_id, created_at, state, since, reason, shard FROM outbox_message"
    before = writer.execute(kept).fetchall()
    change = Change(payload=b'{"total": 1}', headers={"attempt": "2"}, removed_headers=["tenant"])
    operator.edit(1, change=change, max_message_bytes=MAX_BYTES, note=Note("ada", "shrunk"))
    after = writer.execute("SELECT payload, payload_bytes, headers FROM outbox").fetchall()
    assert after == [({"total": 1}, None, {"attempt": "2"})]
    assert writer.execute(kept).fetchall() == before
    assert audit(writer) == [("edit", 1, "ada", "shrunk", True)]
    recorded = writer.execute("SELECT payload, payload_bytes, headers, parked_reason FROM outbox_audit").fetchall()
    assert recorded == [(None, b"long", {"attempt": "1", "tenant": "a"}, "MSG_SIZE_TOO_LARGE: too large")]


def test_an_edit_of_headers_leaves_the_payload(operator: ParkedMessages, writer: Connection) -> None:
    insert(writer, "7", payload={"total": 1}, headers={"attempt": 3})
    set_aside(writer, 1, reason_code="unpublishable", reason="header is no string")
    operator.edit(1, change=Change(headers={"attempt": "3"}), max_message_bytes=MAX_BYTES, note=Note())
    assert writer.execute("SELECT payload, headers FROM outbox").fetchall() == [({"total": 1}, {"attempt": "3"})]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (Change(payload=b"{"), "cannot be stored"),
        (Change(payload=b'"\xff"'), "cannot be stored"),
        (Change(payload=b'"\\u0000"'), "cannot be stored"),
        (Change(payload_bytes=bytes(MAX_BYTES), headers={"attempt": "3"}), "max_message_bytes"),
        (Change(headers={"source": "x"}), "choose another name"),
        (Change(removed_headers=["tenant"]), "give a str"),
    ],
    ids=["no json", "no utf-8", "nul", "too large", "reserved", "still bad"],
)
def test_an_edit_that_could_not_be_published_changes_nothing(
    operator: ParkedMessages, writer: Connection, change: Change, words: str
) -> None:
    insert(writer, "7", payload={"total": 1}, headers={"attempt": 3, "tenant": "a"})
    set_aside(writer, 1, reason_code="unpublishable", reason="header is no string")
    before = writer.execute("SELECT * FROM outbox").fetchall()
    with pytest.raises(InvalidMessage, match=words):
        operator.edit(1, change=change, max_message_bytes=MAX_BYTES, note=Note())
    assert writer.execute("SELECT * FROM outbox").fetchall() == before
    assert audit(writer) == []


def test_a_release_lets_the_whole_key_wait_to_be_sent_in_order(operator: ParkedMessages, writer: Connection) -> None:
    park_a_key(writer)
    keys = operator.keys_of([1])
    assert keys == [ParkedKey(SHARD_OF_7, HASH_OF_7, "order", "7", 3)]
    assert operator.release(keys, note=Note("ada", "topic widened"), are_overtaken=False) == keys
    assert pending(writer) == waiting(1, 2, 3)
    assert audit(writer) == [("release", number, "ada", "topic widened", False) for number in (1, 2, 3)]
    reasons = writer.execute("SELECT DISTINCT parked_reason FROM outbox_audit ORDER BY 1").fetchall()
    assert reasons == [
        ("MSG_SIZE_TOO_LARGE: 1,200,000 bytes",),
        ("behind_parked: an earlier message of the key is parked",),
    ]


def test_a_released_message_says_since_when_it_waits(operator: ParkedMessages, writer: Connection) -> None:
    insert(writer, "7")
    set_aside(writer, 1, age_seconds=3600)
    operator.release(operator.keys_of([1]), note=Note(), are_overtaken=False)
    query = "SELECT state, reason, since > now() - interval '1 minute' FROM outbox_message"
    assert writer.execute(query).fetchall() == [("waiting", "an operator released it", True)]


def test_a_release_leaves_the_other_keys_of_the_shard_parked(operator: ParkedMessages, writer: Connection) -> None:
    park_a_key(writer)
    [neighbour] = writer.execute(
        "SELECT n::text FROM generate_series(8, 1000) AS n WHERE hashtextextended('order:' || n, 0) & 15 = %s LIMIT 1",
        [SHARD_OF_7],
    ).fetchall()
    park_a_key(writer, *neighbour)
    operator.release(operator.keys_of([1]), note=Note(), are_overtaken=False)
    assert pending(writer) == waiting(1, 2, 3) + parked(4, 5, 6)


def test_a_message_behind_a_parked_one_is_not_released_alone(operator: ParkedMessages, writer: Connection) -> None:
    park_a_key(writer)
    with pytest.raises(OperationRefused, match=r"behind parked message 1 of its key.*--key order 7"):
        operator.keys_of([3])
    assert operator.keys_of([3, 2, 1]) == [ParkedKey(SHARD_OF_7, HASH_OF_7, "order", "7", 3)]


@pytest.mark.parametrize("number", [1, 99, 2**63 - 1], ids=["published", "absent", "the largest"])
def test_a_message_that_is_not_parked_is_refused(operator: ParkedMessages, writer: Connection, number: int) -> None:
    insert(writer, "7")
    mark(writer)
    note = Note()
    with pytest.raises(OperationRefused, match=f"not parked.*{number}"):
        operator.show(number)
    with pytest.raises(OperationRefused, match=f"not parked.*{number}"):
        operator.edit(number, change=Change(headers={"a": "b"}), max_message_bytes=MAX_BYTES, note=note)
    with pytest.raises(OperationRefused, match=f"not parked.*{number}"):
        operator.keys_of([number])
    with pytest.raises(OperationRefused, match=f"not parked.*{number}"):
        operator.skip([number], note=note, release_rest=True, are_overtaken=False)
    assert (audit(writer), numbers_left(writer)) == ([], [1])


def test_released_messages_that_were_overtaken_are_unordered(operator: ParkedMessages, writer: Connection) -> None:
    insert(writer, "7", "1", "2")
    set_aside(writer, 1, 2)
    set_aside(writer, 3, is_unordered=True)
    operator.release(operator.keys_of([1]), note=Note(), are_overtaken=True)
    operator.release(operator.keys_of([2, 3]), note=Note(), are_overtaken=False)
    query = "SELECT is_unordered FROM outbox_pending ORDER BY sequence_no"
    assert [is_unordered for (is_unordered,) in writer.execute(query)] == [True, False, True]


def test_two_keys_with_one_hash_are_listed_counted_and_released_apart(
    operator: ParkedMessages, writer: Connection
) -> None:
    """A type may have a colon in it, so that two keys give the same text to hash."""
    park_a_key(writer, "c", aggregate_type="a:b")
    park_a_key(writer, "b:c", aggregate_type="a")
    assert writer.execute("SELECT count(DISTINCT key_hash) FROM outbox_pending").fetchall() == [(1,)]
    assert [(each.sequence_no, each.behind) for each in operator.find(Selection())] == [(1, 2), (4, 2)]
    released = operator.release(operator.keys_of([4]), note=Note(), are_overtaken=False)
    assert [(key.aggregate_type, key.aggregate_id, key.messages) for key in released] == [("a", "b:c", 3)]
    assert pending(writer) == parked(1, 2, 3) + waiting(4, 5, 6)
    skipped = operator.skip([1], note=Note(why="spam"), release_rest=True, are_overtaken=False)
    assert [(key.aggregate_id, key.messages) for key in skipped.released] == [("c", 2)]


def test_two_keys_of_one_type_with_one_hash_are_told_apart_by_their_texts(
    operator: ParkedMessages, writer: Connection
) -> None:
    """No such pair is known, so the hash is written over."""
    park_a_key(writer, "7")
    neighbour = "SELECT n::text FROM generate_series(8, 1000) AS n WHERE hashtextextended('order:' || n, 0) & 15 = %s"
    [other, *_] = writer.execute(neighbour, [SHARD_OF_7]).fetchall()
    park_a_key(writer, *other)
    writer.execute("UPDATE outbox_pending SET key_hash = %s", [HASH_OF_7])
    assert [(each.sequence_no, each.behind) for each in operator.find(Selection())] == [(1, 2), (4, 2)]
    assert [(key.aggregate_id, key.messages) for key in operator.keys_of([4])] == [(*other, 3)]
    operator.release(operator.keys(Selection(keys=[("order", "7")])), note=Note(), are_overtaken=False)
    assert pending(writer) == waiting(1, 2, 3) + parked(4, 5, 6)


def test_a_skip_moves_the_message_to_the_audit_table_and_leaves_the_rest_parked(
    operator: ParkedMessages, writer: Connection
) -> None:
    insert(writer, "7", payload={"total": 1.50}, headers={"tenant": "a"})
    park_a_key(writer)
    set_aside(writer, 1)
    columns = "sequence_no, message_id, aggregate_type, aggregate_id, event_type, payload, payload_bytes, headers"
    [row] = writer.execute(f"SELECT {columns}, created_at FROM outbox WHERE sequence_no = 1").fetchall()
    skipped = operator.skip([1], note=Note("ada", "test order"), release_rest=False, are_overtaken=False)
    assert skipped == Skipped([1], [], [], [ParkedKey(SHARD_OF_7, HASH_OF_7, "order", "7", 3)])
    assert (numbers_left(writer), pending(writer)) == ([2, 3, 4], parked(2, 3, 4))
    assert audit(writer) == [("skip", 1, "ada", "test order", True)]
    assert writer.execute(f"SELECT {columns}, created_at FROM outbox_audit").fetchall() == [row]


def test_a_skip_can_release_the_rest_of_its_keys(operator: ParkedMessages, writer: Connection) -> None:
    park_a_key(writer, "7")
    park_a_key(writer, "1")
    skipped = operator.skip([1, 4], note=Note(why="spam"), release_rest=True, are_overtaken=False)
    assert sorted(skipped.numbers) == [1, 4]
    assert [(key.shard, key.aggregate_id, key.messages) for key in skipped.released] == [(1, "1", 2), (13, "7", 2)]
    assert skipped.left == []
    assert pending(writer) == waiting(2, 3, 5, 6)


def test_a_skip_leaves_nothing_pending_of_what_it_took(operator: ParkedMessages, writer: Connection) -> None:
    numbers = park_a_key(writer)
    operator.skip(numbers, note=Note(why="spam"), release_rest=False, are_overtaken=False)
    assert (numbers_left(writer), pending(writer)) == ([], [])


def test_the_record_has_the_login_and_an_operator_cannot_name_another(
    operator: ParkedMessages, writer: Connection, database: Database, operator_login: str
) -> None:
    park_a_key(writer)
    operator.release(operator.keys_of([1]), note=Note(), are_overtaken=False)
    assert writer.execute("SELECT DISTINCT session_role FROM outbox_audit").fetchall() == [(operator_login,)]
    with database.connect(user=operator_login) as session, pytest.raises(errors.InsufficientPrivilege):
        session.execute("UPDATE outbox_audit SET session_role = 'somebody'")


def test_a_message_that_was_deleted_from_the_outbox_is_listed_without_its_key(
    operator: ParkedMessages, writer: Connection
) -> None:
    park_a_key(writer)
    delete(writer, 1)
    for selection in (Selection(), Selection(aggregate_type="order"), Selection(keys=[("order", "7")])):
        [line] = operator.find(selection)
        assert (line.sequence_no, line.message_id, line.aggregate_type, line.aggregate_id, line.behind) == (
            (1, None, "order", None, 2)
        )
    shown = operator.show(1)
    assert (shown["message_id"], shown["aggregate_type"], shown["reason"]) == ("null", '"order"', '"1,200,000 bytes"')


def test_a_message_that_was_deleted_from_the_outbox_cannot_be_edited(
    operator: ParkedMessages, writer: Connection
) -> None:
    park_a_key(writer)
    delete(writer, 1)
    with pytest.raises(OperationRefused, match="message 1 was deleted from the outbox: only skip and release"):
        operator.edit(1, change=Change(headers={"a": "b"}), max_message_bytes=MAX_BYTES, note=Note())


def test_a_skip_takes_a_message_that_was_deleted_from_the_outbox(operator: ParkedMessages, writer: Connection) -> None:
    park_a_key(writer)
    delete(writer, 1)
    skipped = operator.skip([1, 2], note=Note(why="gone"), release_rest=False, are_overtaken=False)
    assert (skipped.numbers, skipped.deleted) == ([1, 2], [1])
    assert (numbers_left(writer), pending(writer)) == ([3], [(3, "parked behind_parked")])
    recorded = "SELECT action, sequence_no, message_id IS NULL, aggregate_type, aggregate_id FROM outbox_audit"
    assert writer.execute(f"{recorded} ORDER BY id").fetchall() == [
        ("skip", 1, True, "order", None),
        ("skip", 2, False, "order", "7"),
    ]


@pytest.mark.parametrize("gone", [[1], [2], [3], [1, 2, 3]], ids=str)
def test_a_release_of_a_key_frees_it_of_messages_that_were_deleted_from_the_outbox(
    operator: ParkedMessages, writer: Connection, gone: list[int]
) -> None:
    """Such a row can never be sent, and would hold up the key for ever."""
    park_a_key(writer)
    delete(writer, *gone)
    left = [number for number in (1, 2, 3) if number not in gone]
    keys = operator.keys(Selection(keys=[("order", "7")]))
    assert {key.aggregate_id: key.messages for key in keys} == (
        {None: len(gone), "7": len(left)} if left else {None: len(gone)}
    )
    assert sorted(operator.release(keys, note=Note(), are_overtaken=False), key=str) == sorted(keys, key=str)
    assert pending(writer) == waiting(*left)
    recorded = "SELECT sequence_no FROM outbox_audit WHERE action = 'release' AND message_id IS NULL ORDER BY id"
    assert [number for (number,) in writer.execute(recorded)] == gone


def test_a_release_of_what_was_deleted_alone_leaves_the_rest_of_its_key_parked(
    operator: ParkedMessages, writer: Connection
) -> None:
    park_a_key(writer)
    delete(writer, 1)
    operator.release(operator.keys_of([1]), note=Note(), are_overtaken=False)
    assert pending(writer) == [(2, "parked behind_parked"), (3, "parked behind_parked")]


def test_a_message_behind_a_deleted_one_is_released_with_it_only(operator: ParkedMessages, writer: Connection) -> None:
    park_a_key(writer)
    delete(writer, 1)
    with pytest.raises(OperationRefused, match="message 2 stands behind parked message 1"):
        operator.keys_of([2])
    operator.release(operator.keys_of([1, 2]), note=Note(), are_overtaken=False)
    assert pending(writer) == waiting(2, 3)


def test_a_truncate_leaves_nothing_parked(operator: ParkedMessages, writer: Connection) -> None:
    park_a_key(writer)
    writer.execute("TRUNCATE outbox")
    assert operator.find(Selection()) == []


def test_messages_that_a_policy_hides_are_not_taken_for_deleted(operator: ParkedMessages, writer: Connection) -> None:
    park_a_key(writer)
    writer.execute("ALTER TABLE outbox ENABLE ROW LEVEL SECURITY")
    attempts: list[Callable[[], object]] = [
        lambda: operator.find(Selection()),
        lambda: operator.keys(Selection()),
        lambda: operator.skip([1], note=Note(why="spam"), release_rest=False, are_overtaken=False),
        lambda: operator.release([ParkedKey(SHARD_OF_7, HASH_OF_7, "order", "7", 3)], note=Note(), are_overtaken=False),
    ]
    for attempt in attempts:
        with pytest.raises(SchemaMismatch, match="row-level security policy"):
            attempt()
    assert (pending(writer), audit(writer)) == (parked(1, 2, 3), [])


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def await_waiting(writer: Connection, sessions: int) -> None:
    """Return once so many sessions wait for a lock."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    eventually(
        lambda: writer.execute(query).fetchall() == [(sessions,)], message=f"not {sessions} sessions wait for a lock"
    )


def test_a_shard_that_a_relay_holds_is_waited_for_and_what_it_parks_is_released_too(
    operator: ParkedMessages, writer: Connection, lane: Connection, threads: ThreadPoolExecutor
) -> None:
    """The relay parks the newcomer while the release waits, so the release must look again once it has the shard."""
    park_a_key(writer)
    insert(writer, "7")
    keys = operator.keys_of([1])
    hold(lane, SHARD_OF_7)
    releasing = threads.submit(operator.release, keys, note=Note(), are_overtaken=False)
    await_waiting(writer, 1)
    set_aside(lane, 4, reason_code="behind_parked")
    lane.commit()
    assert [key.messages for key in releasing.result()] == [4]
    assert pending(writer) == waiting(1, 2, 3, 4)


def test_a_shard_that_is_never_let_go_is_a_conflict_and_other_shards_stay_done(
    database: Database, operator_login: str, writer: Connection, lane: Connection
) -> None:
    park_a_key(writer, "7")
    park_a_key(writer, "1")
    hold(lane, SHARD_OF_7)
    with (
        operations(database, user=operator_login, lock_timeout=0.05) as impatient,
        pytest.raises(DatabaseConflict, match=r"held shard 13 for 0\.05 s"),
    ):
        impatient.release(impatient.keys(Selection()), note=Note(), are_overtaken=False)
    assert pending(writer) == parked(1, 2, 3) + waiting(4, 5, 6)


def test_of_two_operators_at_once_one_releases_a_key_and_the_other_finds_nothing_left(
    operator: ParkedMessages,
    other_operator: ParkedMessages,
    writer: Connection,
    lane: Connection,
    threads: ThreadPoolExecutor,
) -> None:
    park_a_key(writer)
    keys = operator.keys_of([1])
    hold(lane, SHARD_OF_7)
    first = threads.submit(operator.release, keys, note=Note("ada"), are_overtaken=False)
    await_waiting(writer, 1)
    second = threads.submit(other_operator.release, keys, note=Note("ben"), are_overtaken=True)
    await_waiting(writer, 2)
    lane.commit()
    assert (first.result(), second.result()) == (keys, [])
    assert pending(writer) == waiting(1, 2, 3)
    assert {each[2] for each in audit(writer)} == {"ada"}
    assert writer.execute("SELECT bool_or(is_unordered) FROM outbox_pending").fetchall() == [(False,)]


def test_a_message_that_is_being_released_is_not_skipped(
    operator: ParkedMessages,
    other_operator: ParkedMessages,
    writer: Connection,
    lane: Connection,
    threads: ThreadPoolExecutor,
) -> None:
    park_a_key(writer)
    hold(lane, SHARD_OF_7)
    releasing = threads.submit(operator.release, operator.keys_of([1]), note=Note(), are_overtaken=False)
    await_waiting(writer, 1)
    skipping = threads.submit(
        other_operator.skip, [1, 2], note=Note(why="spam"), release_rest=True, are_overtaken=False
    )
    await_waiting(writer, 2)
    lane.commit()
    assert [key.messages for key in releasing.result()] == [3]
    with pytest.raises(OperationRefused, match="not parked, or not any more: 1, 2"):
        skipping.result()
    assert (numbers_left(writer), pending(writer)) == ([1, 2, 3], waiting(1, 2, 3))
    assert {each[0] for each in audit(writer)} == {"release"}


def test_a_message_that_is_being_skipped_is_not_released_and_the_rest_of_its_key_is(
    operator: ParkedMessages,
    other_operator: ParkedMessages,
    writer: Connection,
    lane: Connection,
    threads: ThreadPoolExecutor,
) -> None:
    park_a_key(writer)
    keys = operator.keys_of([1])
    hold(lane, SHARD_OF_7)
    skipping = threads.submit(operator.skip, [1], note=Note(why="spam"), release_rest=False, are_overtaken=False)
    await_waiting(writer, 1)
    releasing = threads.submit(other_operator.release, keys, note=Note(), are_overtaken=False)
    await_waiting(writer, 2)
    lane.commit()
    assert skipping.result().numbers == [1]
    assert [key.messages for key in releasing.result()] == [2]
    assert (numbers_left(writer), pending(writer)) == ([2, 3], waiting(2, 3))


def test_a_message_that_is_edited_twice_at_once_keeps_both_records(
    operator: ParkedMessages,
    other_operator: ParkedMessages,
    writer: Connection,
    lane: Connection,
    threads: ThreadPoolExecutor,
) -> None:
    insert(writer, "7", headers={"edits": "0"})
    set_aside(writer, 1)
    hold(lane, SHARD_OF_7)
    edits = []
    for index, each in enumerate((operator, other_operator), start=1):
        change = Change(headers={"edits": str(index)})
        edits.append(threads.submit(each.edit, 1, change=change, max_message_bytes=MAX_BYTES, note=Note()))
        await_waiting(writer, index)
    lane.commit()
    for edit in edits:
        edit.result()
    assert writer.execute("SELECT headers FROM outbox").fetchall() == [({"edits": "2"},)]
    recorded = writer.execute("SELECT headers FROM outbox_audit ORDER BY id").fetchall()
    assert recorded == [({"edits": "0"},), ({"edits": "1"},)]


def test_a_truncate_waits_for_a_release_and_cannot_deadlock_with_it(
    operator: ParkedMessages,
    database: Database,
    writer: Connection,
    lane: Connection,
    threads: ThreadPoolExecutor,
) -> None:
    """Its trigger empties the tables of which the release holds rows."""
    park_a_key(writer)
    hold(lane, SHARD_OF_7)
    keys = operator.keys_of([1])
    releasing = threads.submit(operator.release, keys, note=Note(), are_overtaken=False)
    await_waiting(writer, 1)
    truncating = threads.submit(writer.execute, "TRUNCATE outbox")
    with database.connect(autocommit=True) as spectator:
        await_waiting(spectator, 2)
    lane.commit()
    assert releasing.result() == keys
    truncating.result()
    assert (numbers_left(writer), pending(writer)) == ([], [])


def test_each_command_has_time_outs_of_its_own_whatever_the_role_sets(
    database: Database, operator_login: str, writer: Connection, threads: ThreadPoolExecutor
) -> None:
    park_a_key(writer)
    for setting in ("statement_timeout = '1s'", "lock_timeout = '10ms'", "enable_indexscan = off"):
        writer.execute(f"ALTER ROLE {operator_login} SET {setting}")
    with database.connect() as holder, operations(database, user=operator_login) as operator:
        holder.execute("LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE")
        listing = threads.submit(operator.find, Selection())
        eventually(lambda: waits_for_long(writer), message="it does not wait for two seconds")
        holder.commit()
        assert [each.sequence_no for each in listing.result()] == [1]
        hold(holder, SHARD_OF_7)
        releasing = threads.submit(operator.release, operator.keys(Selection()), note=Note(), are_overtaken=False)
        eventually(lambda: waits_for_long(writer), message="it does not wait for two seconds")
        holder.commit()
        assert [key.messages for key in releasing.result()] == [3]


HOSTILE_SETTINGS = (
    "datestyle = 'German, DMY'",
    "bytea_output = 'escape'",
    "search_path = ''",
    "timezone = 'Asia/Kathmandu'",
    "standard_conforming_strings = off",
    "quote_all_identifiers = on",
)


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_message_in_any_script_is_handled_whatever_the_role_sets(
    database: Database, operator_login: str, writer: Connection, encoding: str
) -> None:
    insert(writer, "€ \\ ключ", payload={"price": "5 €"}, headers={"unit": "€"})
    set_aside(writer, 1, reason="5 € \\ are too much")
    for setting in (f"client_encoding = {encoding}", *HOSTILE_SETTINGS):
        writer.execute(f"ALTER ROLE {operator_login} SET {setting}")
    with operations(database, user=operator_login) as operator:
        [line] = operator.find(Selection(keys=[("order", "€ \\ ключ")], reason="5 €"))
        assert line.reason == "5 € \\ are too much"
        assert json.loads(operator.show(1)["payload"]) == {"price": "5 €"}
        change = Change(payload_bytes="6 €".encode())
        operator.edit(1, change=change, max_message_bytes=MAX_BYTES, note=Note("Zoë", "5 € \\"))
        operator.release(operator.keys_of([1]), note=Note(), are_overtaken=False)
    assert writer.execute("SELECT payload_bytes, headers FROM outbox").fetchall() == [("6 €".encode(), {"unit": "€"})]
    assert pending(writer) == waiting(1)
    recorded = writer.execute("SELECT operator, why, aggregate_id FROM outbox_audit ORDER BY id LIMIT 1").fetchall()
    assert recorded == [("Zoë", "5 € \\", "€ \\ ключ")]


def waits_for_long(writer: Connection) -> bool:
    query = """
        SELECT
        FROM pg_stat_activity
        WHERE application_name = 'operator'
            AND wait_event_type = 'Lock'
            AND clock_timestamp() - query_start > interval '2 seconds'
    """
    return writer.execute(query).fetchone() is not None


def test_the_role_of_the_relay_may_not_do_what_operators_do(database: Database, relay_login: str) -> None:
    with database.connect(autocommit=True) as writer:
        park_a_key(writer)
    with operations(database, user=relay_login) as relay:
        keys = relay.keys_of([1])
        with pytest.raises(SchemaMismatch, match="outbox_audit"):
            relay.release(keys, note=Note(), are_overtaken=False)
