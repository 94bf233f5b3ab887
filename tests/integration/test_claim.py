"""The claim on every PostgreSQL: whose shards, which messages, how many, and what it reads for them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay import database as relay_database
from outbox_relay.errors import DatabaseConflict, DatabaseUnavailable
from outbox_relay.relay.claim import Batch, ClaimOptions, Floors, claim
from outbox_relay.relay.settle import Parked, Settlement, settle
from tests.fixtures.outbox import insert
from tests.fixtures.postgres import both_layouts
from tests.fixtures.proxy import TcpProxy
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg import Connection

    from outbox_relay.relay.message import Message
    from tests.fixtures.postgres import Database

pytestmark = [pytest.mark.every_postgres, both_layouts]

SHARD_OF = {"1": 1, "2": 2, "7": 13}  # of the type "order"
GATE = 4711  # an advisory lock
LONG_NUMBER = "1e131071"  # 12 bytes as jsonb, 131,072 as text


@pytest.fixture
def connect(database: Database, relay_login: str) -> Iterator[Callable[[], Connection]]:
    """Make connections as a relay's lanes do; they are closed after the test."""
    with ExitStack() as opened:
        yield lambda: opened.enter_context(
            relay_database.connect(database.server.dsn(database.name, user=relay_login), application_name="lane")
        )


@pytest.fixture
def lane(connect: Callable[[], Connection]) -> Connection:
    return connect()


@pytest.fixture
def writer(database: Database) -> Iterator[Connection]:
    with database.connect(autocommit=True) as connection:
        yield connection


def take(
    lane: Connection,
    *,
    through: int = 10**6,
    floors: Floors | None = None,
    held_types: tuple[str, ...] = (),
    options: ClaimOptions | None = None,
) -> Batch:
    return claim(
        lane, options=options or ClaimOptions(), through=through, floors=floors or Floors(), held_types=held_types
    )


def insert_json(writer: Connection, *keys: str, payload: str) -> None:
    """Insert messages with a payload that Python would write otherwise, or not at all."""
    for number in insert(writer, *keys):
        writer.execute("UPDATE outbox SET payload = %s WHERE sequence_no = %s", [payload, number])


def numbers(batch: Batch) -> list[int]:
    return [message.sequence_no for message in batch.messages]


def waits_for_another(lane: Connection) -> bool:
    batch = take(lane)
    lane.rollback()
    return bool(batch.waiting)


def publish(lane: Connection, *messages: Message) -> None:
    settle(lane, schema="public", settlement=Settlement(published=list(messages)), mode="mark")


def park(lane: Connection, *messages: Message) -> None:
    parked = [Parked(message, "test") for message in messages]
    settle(lane, schema="public", settlement=Settlement(parked=parked), mode="mark")


def test_a_claim_gives_whole_messages_in_sequence_order(lane: Connection, writer: Connection) -> None:
    created_at = "2001-09-09 01:46:40.123+00"
    insert(writer, "1", "2", "7", "1", payload={"n": 1}, headers={"traceparent": "00-a"}, created_at=created_at)
    batch = take(lane)
    assert numbers(batch) == [1, 2, 3, 4]
    [(message_id, size)] = writer.execute(
        """
        SELECT message_id::text, pg_column_size(payload) + pg_column_size(headers) FROM outbox WHERE sequence_no = 2
        """
    ).fetchall()
    assert batch.messages[1]._asdict() == {
        "id": 2,
        "sequence_no": 2,
        "shard": SHARD_OF["2"],
        "message_id": message_id,
        "aggregate_type": "order",
        "aggregate_id": "2",
        "event_type": "placed",
        "payload": '{"n": 1}',
        "payload_bytes": None,
        "headers": '{"traceparent": "00-a"}',
        "created_at_ms": 1_000_000_000_123,
        "stored_bytes": size,
        "is_unordered": False,
        "is_behind_parked": False,
    }


def test_bytes_and_tombstones_come_as_they_are(lane: Connection, writer: Connection) -> None:
    insert(writer, "1", payload_bytes=b"\x00\xff")
    insert(writer, "1")
    assert [message[7:9] for message in take(lane).messages] == [(None, b"\x00\xff"), (None, None)]


def test_no_message_beyond_the_horizon_is_taken(lane: Connection, writer: Connection) -> None:
    insert(writer, "1", "1", "2", "2")
    assert numbers(take(lane, through=3)) == [1, 2, 3]


def test_an_empty_claim_leaves_no_transaction_open(lane: Connection) -> None:
    batch = take(lane)
    assert (batch.messages, batch.drained, batch.waiting) == ([], list(range(16)), [])
    assert not lane.info.transaction_status


def test_published_and_parked_messages_are_not_taken(lane: Connection, writer: Connection) -> None:
    insert(writer, "1", "1", "1")
    writer.execute("UPDATE outbox SET published_at = now() WHERE sequence_no = 1")
    writer.execute("UPDATE outbox SET parked_at = now() WHERE sequence_no = 3")
    assert numbers(take(lane)) == [2]


def test_shards_of_another_lane_are_skipped_and_reported_until_it_ends(
    connect: Callable[[], Connection], writer: Connection
) -> None:
    insert(writer, "1", "2", "2", "7")
    first, second = connect(), connect()
    assert numbers(take(first, options=ClaimOptions(shards=2))) == [1, 2, 3]
    batch = take(second)
    assert (numbers(batch), batch.waiting) == ([4], [SHARD_OF["1"], SHARD_OF["2"]])
    second.rollback()
    first.close()  # as when its process is killed
    eventually(lambda: not waits_for_another(second))
    assert numbers(take(second)) == [1, 2, 3, 4]


def test_a_claim_prefers_the_shards_whose_messages_are_oldest(lane: Connection, writer: Connection) -> None:
    insert(writer, "7", "1", "2")
    batch = take(lane, options=ClaimOptions(shards=1))
    assert (numbers(batch), batch.waiting) == ([1], [SHARD_OF["1"], SHARD_OF["2"]])


@pytest.fixture
def late(database: Database, connect: Callable[[], Connection]) -> Connection:
    """
    A lane whose claims stop between their snapshot and their first lock while somebody holds the advisory lock GATE.

    A row security policy is what a claim evaluates first on a row of outbox_shard, so it can be made to wait there.
    """
    lane = connect()
    [(pid,)] = lane.execute("SELECT pg_backend_pid()").fetchall()
    lane.rollback()
    with database.connect(autocommit=True) as admin:
        admin.execute("ALTER TABLE outbox_shard ENABLE ROW LEVEL SECURITY")
        admin.execute(
            f"""
            CREATE POLICY gate ON outbox_shard
            USING (pg_backend_pid() <> {pid} OR pg_advisory_xact_lock_shared({GATE}) IS NOT NULL)
            """
        )
    return lane


@contextmanager
def stalled_claim(database: Database, late: Connection) -> Iterator[Callable[[], Batch]]:
    """Begin a claim that has its snapshot and no lock yet; what is yielded lets it go on and gives its batch."""
    with database.connect(autocommit=True) as keeper, ThreadPoolExecutor(1) as thread:
        keeper.execute("SELECT pg_advisory_lock(%s)", [GATE])
        claimed = thread.submit(take, late, options=ClaimOptions(lock_timeout=20))
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'advisory' AND datname = current_database()"
        eventually(lambda: keeper.execute(waiting).fetchall() == [(1,)], message="the claim did not stall")

        def let_go() -> Batch:
            keeper.execute("SELECT pg_advisory_unlock(%s)", [GATE])
            return claimed.result(20)

        yield let_go


def test_a_snapshot_older_than_the_lock_does_not_give_what_was_marked_since(
    database: Database, late: Connection, connect: Callable[[], Connection], writer: Connection
) -> None:
    insert(writer, "1", "1", "1")
    other = connect()
    held = take(other)
    with stalled_claim(database, late) as let_go:
        publish(other, *held.messages[:2])
        assert numbers(let_go()) == [3]


def test_a_snapshot_older_than_the_lock_does_not_give_what_was_deleted_since(
    database: Database, late: Connection, connect: Callable[[], Connection], writer: Connection
) -> None:
    insert(writer, "1", "1")
    other = connect()
    held = take(other)
    with stalled_claim(database, late) as let_go:
        settle(other, schema="public", settlement=Settlement(published=held.messages[:1]), mode="delete")
        assert numbers(let_go()) == [2]


def test_a_shard_in_which_something_was_parked_since_the_snapshot_is_left_alone(
    database: Database, late: Connection, connect: Callable[[], Connection], writer: Connection
) -> None:
    insert(writer, "1", "1", "2")
    other = connect()
    held = take(other)
    with stalled_claim(database, late) as let_go:
        park(other, held.messages[0])
        batch = let_go()
    assert (numbers(batch), batch.waiting) == ([3], [SHARD_OF["1"]])
    late.rollback()
    assert [(m.sequence_no, m.is_behind_parked) for m in take(late).messages] == [(2, True), (3, False)]


def test_only_later_messages_of_a_parked_key_are_behind_it(lane: Connection, writer: Connection) -> None:
    insert(writer, "1", "1", "1", "2")
    insert(writer, "1", aggregate_type="basket")
    writer.execute("UPDATE outbox SET parked_at = now() WHERE sequence_no = 2")
    batch = take(lane)
    assert [(m.sequence_no, m.is_behind_parked) for m in batch.messages] == [
        (1, False),
        (3, True),
        (4, False),
        (5, False),
    ]


def test_messages_of_recorded_transactions_are_unordered(lane: Connection, writer: Connection) -> None:
    insert(writer, "1", "1")
    writer.execute("INSERT INTO outbox_unordered SELECT transaction_id FROM outbox WHERE sequence_no = 2")
    assert [(m.sequence_no, m.is_unordered) for m in take(lane).messages] == [(1, False), (2, True)]


def test_nothing_at_or_below_a_floor_is_read_and_forgetting_it_finds_late_messages(
    lane: Connection, writer: Connection
) -> None:
    insert(writer, "1", "1", "2")
    floors = Floors()
    floors.remember(SHARD_OF["1"], generation=0, settled_through=1)
    assert numbers(take(lane, floors=floors)) == [2, 3]
    lane.rollback()
    floors.forget()
    assert numbers(take(lane, floors=floors)) == [1, 2, 3]


def test_a_floor_of_another_generation_does_not_hide_released_messages(
    connect: Callable[[], Connection], writer: Connection
) -> None:
    insert(writer, "1", "1")
    lane, other = connect(), connect()
    held = take(other)
    park(other, *held.messages)
    writer.execute("UPDATE outbox SET parked_at = NULL, parked_reason = NULL")
    floors = Floors()
    floors.remember(SHARD_OF["1"], generation=0, settled_through=2)
    batch = take(lane, floors=floors)
    assert (numbers(batch), batch.generations[SHARD_OF["1"]]) == ([1, 2], 1)


def test_held_types_are_left_out_and_hide_nothing_behind_them(lane: Connection, writer: Connection) -> None:
    insert(writer, "1", aggregate_type="basket")
    insert(writer, "1", "1")
    batch = take(lane, held_types=("basket", "bill"))
    assert (numbers(batch), batch.waiting) == ([2, 3], [])


def test_a_batch_has_its_messages_from_all_its_shards_in_equal_parts(lane: Connection, writer: Connection) -> None:
    insert(writer, *["1"] * 20, *["2"] * 20, *["7"] * 20)
    batch = take(lane, options=ClaimOptions(messages=10))
    assert numbers(batch) == [1, 2, 3, 4, 21, 22, 23, 24, 41, 42, 43, 44]


def test_a_batch_of_one_shard_has_exactly_the_messages_asked_for(lane: Connection, writer: Connection) -> None:
    insert(writer, *["1"] * 20)
    assert numbers(take(lane, options=ClaimOptions(messages=10))) == list(range(1, 11))


def test_a_batch_ends_behind_the_message_that_fills_its_bytes(lane: Connection, writer: Connection) -> None:
    insert(writer, *["1"] * 10, payload_bytes=bytes(1000))
    size = take(lane).messages[0].stored_bytes
    lane.rollback()
    assert numbers(take(lane, options=ClaimOptions(stored_bytes=3 * size))) == [1, 2, 3]
    lane.rollback()
    assert numbers(take(lane, options=ClaimOptions(stored_bytes=3 * size + 1))) == [1, 2, 3, 4]


def test_every_shard_gives_a_message_however_large(lane: Connection, writer: Connection) -> None:
    insert(writer, "1", "1", "2", "2", payload_bytes=bytes(1_000_000))
    assert numbers(take(lane, options=ClaimOptions(stored_bytes=1000))) == [1, 3]


def test_a_large_message_in_the_middle_ends_the_batch_and_comes_with_the_next(
    lane: Connection, writer: Connection
) -> None:
    insert(writer, *["1"] * 5)
    insert(writer, "1", payload_bytes=bytes(1_000_000))
    insert(writer, *["1"] * 5)
    options = ClaimOptions(stored_bytes=100_000)
    batch = take(lane, options=options)
    assert numbers(batch) == [1, 2, 3, 4, 5, 6]
    publish(lane, *batch.messages)
    assert numbers(take(lane, options=options)) == [7, 8, 9, 10, 11]


def test_a_payload_beyond_the_readable_bytes_is_not_read(lane: Connection, writer: Connection) -> None:
    insert(writer, "1", payload_bytes=bytes(2000))
    insert(writer, "1", payload={"text": "x" * 2000})
    insert(writer, "1", payload_bytes=b"small")
    batch = take(lane, options=ClaimOptions(readable_bytes=2000))
    assert [message[7:9] for message in batch.messages] == [(None, None), (None, None), (None, b"small")]
    assert batch.messages[0].stored_bytes > 2000


def test_a_message_of_more_text_than_the_readable_bytes_is_not_read(lane: Connection, writer: Connection) -> None:
    insert_json(writer, "1", "2", payload=LONG_NUMBER)
    insert(writer, "7", headers={"repeated": "x" * 200_000})
    batch = take(lane, options=ClaimOptions(readable_bytes=100_000))
    assert [(message.payload, message.headers) for message in batch.messages] == [(None, None)] * 3
    assert [message.stored_bytes for message in batch.messages] == [131_072, 131_072, 200_016]


def test_messages_that_take_far_more_bytes_as_text_come_one_by_one(lane: Connection, writer: Connection) -> None:
    insert(writer, "1")
    insert_json(writer, "1", "1", "2", payload=LONG_NUMBER)
    insert(writer, "1")
    expected = [([1, 4], True), ([2], True), ([3, 5], False)]
    for given, has_more in expected:
        batch = take(lane)
        assert (numbers(batch), batch.may_have_more(ClaimOptions())) == (given, has_more)
        assert {len(message.payload or "") for message in batch.messages} <= {0, 131_072}
        publish(lane, *batch.messages)


def test_with_no_readable_byte_a_message_that_can_be_written_out_is_left_for_the_next_claim(
    lane: Connection, writer: Connection
) -> None:
    insert(writer, "1", payload={"n": 1})
    options = ClaimOptions(messages=1, shards=1, readable_bytes=0)
    batch = take(lane, options=options)
    assert (batch.messages, batch.may_have_more(options)) == ([], True)
    assert numbers(take(lane)) == [1]


def test_a_message_that_somebody_else_locks_ends_in_a_conflict_after_the_lock_timeout(
    database: Database, lane: Connection, writer: Connection
) -> None:
    insert(writer, "1", "1")
    with database.connect() as operator:
        operator.execute("SELECT FROM outbox WHERE sequence_no = 2 FOR UPDATE")
        with pytest.raises(DatabaseConflict, match="lock timeout"):
            take(lane, options=ClaimOptions(lock_timeout=0.05))
    lane.rollback()
    assert numbers(take(lane)) == [1, 2]


def test_a_claim_that_is_cut_off_is_unavailable_and_takes_nothing(
    database: Database, connect: Callable[[], Connection], writer: Connection
) -> None:
    insert(writer, "1")
    with TcpProxy("127.0.0.1", database.server.port) as proxy:
        dsn = make_conninfo(database.dsn, port=proxy.port)
        with relay_database.connect(dsn, application_name="lane") as cut_off:
            proxy.cut_before(b"SKIP LOCKED")
            with pytest.raises(DatabaseUnavailable):
                take(cut_off)
        assert proxy.fired == {"cut_before": 1}
    assert numbers(take(connect())) == [1]


def test_settings_of_the_claim_end_with_its_transaction(lane: Connection, writer: Connection) -> None:
    insert(writer, "1")
    names = "jit", "plan_cache_mode", "synchronous_commit", "lock_timeout", "idle_in_transaction_session_timeout"
    show = "SELECT " + ", ".join(f"current_setting('{name}')" for name in names)
    before = lane.execute(show).fetchone()
    lane.rollback()
    take(lane)
    assert lane.execute(show).fetchone() == ("off", "force_generic_plan", "off", "2s", "30s")
    lane.rollback()
    assert lane.execute(show).fetchone() == before
