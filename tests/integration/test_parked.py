"""What an operator can do to parked messages, as a login with that role only, and what the relays claim afterwards."""

from __future__ import annotations

import json
import threading
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from psycopg import errors
from psycopg.conninfo import make_conninfo

from outbox_relay import database as relay_database
from outbox_relay.errors import DatabaseConflict, InvalidMessage, OperationRefused, SchemaMismatch
from outbox_relay.operate.parked import MOST_COUNTED, Change, Note, ParkedKey, ParkedMessages, Selection, Skipped
from outbox_relay.relay.claim import ClaimOptions, Floors, claim
from outbox_relay.relay.failures import BEHIND_PARKED
from outbox_relay.relay.settle import Parked, Settlement, settle
from tests.fixtures.outbox import insert
from tests.fixtures.postgres import both_layouts, login
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from tests.fixtures.postgres import Database

pytestmark = [pytest.mark.every_postgres, both_layouts]

TOO_LARGE = "MSG_SIZE_TOO_LARGE: 1,200,000 bytes"
BEHIND = BEHIND_PARKED.text
SHARD_OF = {"1": 1, "2": 2, "7": 13}  # of the type "order"
MAX_BYTES = 1_000_000


@pytest.fixture
def operator_login(database: Database) -> Iterator[str]:
    with login(database, group="outbox_operator") as name:
        yield name


@pytest.fixture
def operator(database: Database, operator_login: str) -> Iterator[ParkedMessages]:
    """The operations, with nothing but the grants of an operator, and a default that would hide what relays do."""
    dsn = make_conninfo(
        database.server.dsn(database.name, user=operator_login),
        options="-c default_transaction_isolation=serializable",
    )
    with closing(relay_database.connect(dsn, application_name="operator")) as connection:
        yield ParkedMessages(connection, schema="public", lock_timeout=30)


@pytest.fixture
def writer(database: Database) -> Iterator[Connection]:
    with database.connect(autocommit=True) as connection:
        yield connection


@pytest.fixture
def lane(database: Database, relay_login: str) -> Iterator[Connection]:
    dsn = database.server.dsn(database.name, user=relay_login)
    with closing(relay_database.connect(dsn, application_name="lane")) as connection:
        yield connection


def park(writer: Connection, *, reasons: dict[int, str]) -> None:
    """Park messages by their numbers."""
    for number, reason in reasons.items():
        writer.execute(
            "UPDATE outbox SET parked_at = now(), parked_reason = %s WHERE sequence_no = %s", [reason, number]
        )


def park_a_key(writer: Connection, key: str = "7") -> None:
    """Three messages of one key: the first is guilty, two wait behind it."""
    first, second, third = insert(writer, key, key, key)
    park(writer, reasons={first: TOO_LARGE, second: BEHIND, third: BEHIND})


def claimable(lane: Connection, *, floors: Floors | None = None) -> list[tuple[int, bool]]:
    """What a relay would claim now: each number, and whether it is behind a parked one."""
    batch = claim(lane, options=ClaimOptions(), through=10**6, floors=floors or Floors())
    lane.rollback()
    return [(message.sequence_no, message.is_behind_parked) for message in batch.messages]


def generations(writer: Connection) -> dict[int, int]:
    return dict(writer.execute("SELECT shard, generation FROM outbox_shard WHERE generation > 0").fetchall())


def audit(writer: Connection) -> list[tuple[object, ...]]:
    query = "SELECT action, outbox_id, operator, why, content IS NOT NULL FROM outbox_audit ORDER BY id"
    return writer.execute(query).fetchall()


def test_the_list_has_the_guilty_messages_oldest_first_and_how_many_wait(
    operator: ParkedMessages, writer: Connection
) -> None:
    park_a_key(writer, "7")
    park_a_key(writer, "1")
    insert(writer, "2")
    lines = [(each.id, each.aggregate_id, each.is_guilty, each.waiting) for each in operator.find(Selection())]
    assert lines == [(1, "7", True, 2), (4, "1", True, 2)]


def test_the_list_has_those_that_wait_when_asked(operator: ParkedMessages, writer: Connection) -> None:
    park_a_key(writer)
    lines = [(each.id, each.is_guilty, each.reason) for each in operator.find(Selection(), with_waiting=True)]
    assert lines == [(1, True, TOO_LARGE), (2, False, BEHIND), (3, False, BEHIND)]


def test_the_first_of_a_key_is_listed_although_the_guilty_one_is_gone(
    operator: ParkedMessages, writer: Connection
) -> None:
    park_a_key(writer)
    operator.skip([1], note=Note(why="spam"), release_rest=False, are_overtaken=False)
    assert [(each.id, each.is_guilty, each.waiting) for each in operator.find(Selection())] == [(2, False, 1)]


def test_the_list_stops_at_its_limit(operator: ParkedMessages, writer: Connection) -> None:
    for key in ("1", "2", "7"):
        park_a_key(writer, key)
    assert [each.id for each in operator.find(Selection(), limit=2)] == [1, 4]


@pytest.mark.parametrize(
    ("selection", "found"),
    [
        (Selection(keys=[("order", "7")]), [1]),
        (Selection(keys=[("order", "7"), ("order", "2")]), [1, 2]),
        (Selection(keys=[("basket", "7")]), [3]),
        (Selection(aggregate_type="order"), [1, 2]),
        (Selection(reason="too_LARGE"), [1]),
        (Selection(reason="header%string"), [2, 3]),
        (Selection(aggregate_type="order", reason="header"), [2]),
        (Selection(reason="nothing of the kind"), []),
    ],
    ids=repr,
)
def test_a_selection_finds_what_all_of_it_applies_to(
    operator: ParkedMessages, writer: Connection, selection: Selection, found: list[int]
) -> None:
    insert(writer, "7", "2")
    insert(writer, "7", aggregate_type="basket")
    park(writer, reasons={1: TOO_LARGE, 2: "header is no string", 3: "header is no string"})
    assert [each.id for each in operator.find(selection)] == found


def test_counting_those_that_wait_stops_at_its_limit(operator: ParkedMessages, writer: Connection) -> None:
    writer.execute(
        """
        INSERT INTO outbox (aggregate_type, aggregate_id, event_type)
        SELECT 'order', '1', 'placed' FROM generate_series(1, %s)
        """,
        [MOST_COUNTED + 2],
    )
    writer.execute("UPDATE outbox SET parked_at = now(), parked_reason = %s", [BEHIND])
    park(writer, reasons={1: TOO_LARGE})
    assert [each.waiting for each in operator.find(Selection())] == [MOST_COUNTED]


def test_show_gives_a_json_payload_digit_by_digit(operator: ParkedMessages, writer: Connection) -> None:
    payload = '{"total": 12345678901234567890.1230}'
    writer.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload, headers)"
        """ VALUES ('order', '1', 'placed', %s, '{"attempt": "3"}')""",
        [payload],
    )
    park(writer, reasons={1: TOO_LARGE})
    shown = operator.show(1)
    assert (shown["payload"], shown["payload_base64"], shown["headers"]) == (payload, "null", '{"attempt": "3"}')
    assert (shown["sequence_no"], shown["parked_reason"]) == ("1", json.dumps(TOO_LARGE))


def test_show_gives_bytes_in_base64(operator: ParkedMessages, writer: Connection) -> None:
    insert(writer, "1", payload_bytes=b"\0" * 60)
    park(writer, reasons={1: TOO_LARGE})
    assert operator.show(1)["payload_base64"] == '"' + "A" * 80 + '"'


def test_an_edit_replaces_the_payload_and_keeps_id_number_and_place(
    operator: ParkedMessages, writer: Connection
) -> None:
    insert(writer, "7", payload_bytes=b"long", headers={"attempt": "1", "tenant": "a"})
    park(writer, reasons={1: TOO_LARGE})
    kept = "SELECT message_id, sequence_no, aggregate_id, created_at, parked_at, parked_reason FROM outbox"
    before = writer.execute(kept).fetchall()
    change = Change(payload=b'{"total": 1}', headers={"attempt": "2"}, removed_headers=["tenant"])
    operator.edit(1, change=change, max_message_bytes=MAX_BYTES, note=Note("ada", "shrunk"))
    after = writer.execute("SELECT payload, payload_bytes, headers FROM outbox").fetchall()
    assert after == [({"total": 1}, None, {"attempt": "2"})]
    assert writer.execute(kept).fetchall() == before
    assert audit(writer) == [("edit", 1, "ada", "shrunk", True)]


def test_an_edit_of_headers_leaves_the_payload(operator: ParkedMessages, writer: Connection) -> None:
    insert(writer, "7", payload={"total": 1}, headers={"attempt": 3})
    park(writer, reasons={1: "header is no string"})
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
    park(writer, reasons={1: "header is no string"})
    before = writer.execute("SELECT * FROM outbox").fetchall()
    with pytest.raises(InvalidMessage, match=words):
        operator.edit(1, change=change, max_message_bytes=MAX_BYTES, note=Note())
    assert writer.execute("SELECT * FROM outbox").fetchall() == before
    assert audit(writer) == []


def test_a_release_makes_the_whole_key_claimable_before_its_newer_messages(
    operator: ParkedMessages, writer: Connection, lane: Connection
) -> None:
    park_a_key(writer)
    insert(writer, "7")
    assert claimable(lane) == [(4, True)]
    keys = operator.keys_of([1])
    assert keys == [ParkedKey(13, "order", "7", 3)]
    assert operator.release(keys, note=Note("ada", "topic widened"), are_overtaken=False) == keys
    assert claimable(lane) == [(1, False), (2, False), (3, False), (4, False)]
    assert audit(writer) == [("release", number, "ada", "topic widened", False) for number in (1, 2, 3)]


def test_a_release_renews_only_its_own_shards_so_that_relays_forget_their_floors(
    operator: ParkedMessages, writer: Connection, lane: Connection
) -> None:
    park_a_key(writer, "7")
    park_a_key(writer, "1")
    floors = Floors()
    for shard in range(16):
        floors.remember(shard, generation=0, settled_through=6)
    assert claimable(lane, floors=floors) == []
    operator.release(operator.keys(Selection(keys=[("order", "7")])), note=Note(), are_overtaken=False)
    assert generations(writer) == {SHARD_OF["7"]: 1}
    assert claimable(lane, floors=floors) == [(1, False), (2, False), (3, False)]


def test_a_message_behind_a_parked_one_is_not_released_alone(operator: ParkedMessages, writer: Connection) -> None:
    park_a_key(writer)
    with pytest.raises(OperationRefused, match=r"behind parked message 1 of its key.*--key order 7"):
        operator.keys_of([3])
    assert operator.keys_of([3, 2, 1]) == [ParkedKey(13, "order", "7", 3)]


@pytest.mark.parametrize("number", [1, 99], ids=["published", "absent"])
def test_a_message_that_is_not_parked_is_refused(operator: ParkedMessages, writer: Connection, number: int) -> None:
    insert(writer, "7")
    note = Note()
    with pytest.raises(OperationRefused, match=f"not parked.*{number}"):
        operator.show(number)
    with pytest.raises(OperationRefused, match=f"not parked.*{number}"):
        operator.edit(number, change=Change(headers={"a": "b"}), max_message_bytes=MAX_BYTES, note=note)
    with pytest.raises(OperationRefused, match=f"not parked.*{number}"):
        operator.keys_of([number])
    with pytest.raises(OperationRefused, match=f"not parked.*{number}"):
        operator.skip([number], note=note, release_rest=True, are_overtaken=False)
    assert audit(writer) == []


def test_a_release_of_messages_that_were_overtaken_marks_them_unordered(
    operator: ParkedMessages, writer: Connection, lane: Connection
) -> None:
    insert(writer, "7", "1")
    park(writer, reasons={1: TOO_LARGE, 2: TOO_LARGE})
    operator.release(operator.keys_of([1]), note=Note(), are_overtaken=True)
    operator.release(operator.keys_of([2]), note=Note(), are_overtaken=False)
    batch = claim(lane, options=ClaimOptions(), through=10, floors=Floors())
    lane.rollback()
    assert [message.is_unordered for message in batch.messages] == [True, False]


def test_a_skip_moves_the_row_to_the_audit_table_and_leaves_the_rest_parked(
    operator: ParkedMessages, writer: Connection, lane: Connection
) -> None:
    park_a_key(writer)
    [(row,)] = writer.execute("SELECT to_jsonb(outbox) FROM outbox WHERE id = 1")
    skipped = operator.skip([1], note=Note("ada", "test order"), release_rest=False, are_overtaken=False)
    assert skipped == Skipped([1], [], [ParkedKey(13, "order", "7", 2)])
    assert writer.execute("SELECT id FROM outbox ORDER BY id").fetchall() == [(2,), (3,)]
    assert audit(writer) == [("skip", 1, "ada", "test order", True)]
    assert writer.execute("SELECT content FROM outbox_audit").fetchall() == [(row,)]
    insert(writer, "7")
    assert claimable(lane) == [(4, True)]


def test_a_skip_can_release_the_rest_of_its_keys(
    operator: ParkedMessages, writer: Connection, lane: Connection
) -> None:
    park_a_key(writer, "7")
    park_a_key(writer, "1")
    skipped = operator.skip([1, 4], note=Note(why="spam"), release_rest=True, are_overtaken=False)
    assert skipped == Skipped([4, 1], [ParkedKey(1, "order", "1", 2), ParkedKey(13, "order", "7", 2)], [])
    assert claimable(lane) == [(2, False), (3, False), (5, False), (6, False)]


def test_a_skip_of_all_that_was_parked_lets_the_key_flow(
    operator: ParkedMessages, writer: Connection, lane: Connection
) -> None:
    insert(writer, "7", "7")
    park(writer, reasons={1: TOO_LARGE})
    assert claimable(lane) == [(2, True)]
    operator.skip([1], note=Note(why="spam"), release_rest=False, are_overtaken=False)
    assert (claimable(lane), generations(writer)) == ([(2, False)], {SHARD_OF["7"]: 1})


def test_the_record_has_the_login_and_an_operator_cannot_name_another(
    operator: ParkedMessages, writer: Connection, database: Database, operator_login: str
) -> None:
    park_a_key(writer)
    operator.release(operator.keys_of([1]), note=Note(), are_overtaken=False)
    assert writer.execute("SELECT DISTINCT session_role FROM outbox_audit").fetchall() == [(operator_login,)]
    with database.connect(user=operator_login) as session, pytest.raises(errors.InsufficientPrivilege):
        session.execute("UPDATE outbox_audit SET session_role = 'somebody'")


def test_a_shard_that_a_relay_holds_is_waited_for_and_what_it_parks_is_released_too(
    operator: ParkedMessages, writer: Connection, lane: Connection
) -> None:
    """The relay parks the newcomer while the release waits, so the release must look again once it has the shard."""
    park_a_key(writer)
    insert(writer, "7")
    keys = operator.keys_of([1])
    [newcomer] = claim(lane, options=ClaimOptions(), through=10, floors=Floors()).messages
    releasing = threading.Thread(target=operator.release, args=[keys], kwargs={"note": Note(), "are_overtaken": False})
    releasing.start()
    eventually(lambda: waits_for_lock(writer), message="the release does not wait")
    settle(lane, schema="public", settlement=Settlement(parked=[Parked(newcomer, BEHIND)]), mode="mark")
    releasing.join(30)
    assert claimable(lane) == [(1, False), (2, False), (3, False), (4, False)]


def waits_for_lock(writer: Connection) -> bool:
    query = "SELECT FROM pg_stat_activity WHERE application_name = 'operator' AND wait_event_type = 'Lock'"
    return writer.execute(query).fetchone() is not None


def test_a_shard_that_is_never_let_go_is_a_conflict_and_other_shards_stay_done(
    database: Database, writer: Connection, lane: Connection
) -> None:
    park_a_key(writer, "7")
    park_a_key(writer, "1")
    insert(writer, "7")
    claim(lane, options=ClaimOptions(), through=10, floors=Floors())
    with closing(relay_database.connect(database.dsn, application_name="operator")) as connection:
        impatient = ParkedMessages(connection, schema="public", lock_timeout=0.05)
        with pytest.raises(DatabaseConflict, match=r"held shard 13 for 0\.05 s"):
            impatient.release(impatient.keys(Selection()), note=Note(), are_overtaken=False)
    lane.rollback()
    assert claimable(lane) == [(4, False), (5, False), (6, False), (7, True)]


def test_the_role_of_the_relay_may_not_do_what_operators_do(database: Database, relay_login: str) -> None:
    with database.connect(autocommit=True) as writer:
        park_a_key(writer)
    dsn = database.server.dsn(database.name, user=relay_login)
    with closing(relay_database.connect(dsn, application_name="operator")) as connection:
        relay = ParkedMessages(connection, schema="public", lock_timeout=1)
        with pytest.raises(SchemaMismatch, match="outbox_audit"):
            relay.release(relay.keys_of([1]), note=Note(), are_overtaken=False)
