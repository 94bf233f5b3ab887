"""What a lane reads on every PostgreSQL: which messages, how many, what it leaves out, and that it leaves no hole."""

from __future__ import annotations

import random
import string
from collections import defaultdict
from dataclasses import replace
from functools import reduce
from operator import xor
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outbox_relay import database as relay_database
from outbox_relay.relay.claim import Claim, ClaimOptions, claim_shards
from outbox_relay.relay.horizon import read_last_number, record_unordered
from outbox_relay.relay.marks import Marks
from outbox_relay.relay.read import Batch, Limits, read_messages, read_waiting
from outbox_relay.relay.settle import record_marks
from outbox_relay.relay.shards import SHARDS
from outbox_relay.relay.watch import Reached
from tests.fixtures.marks import mark, set_aside
from tests.fixtures.outbox import insert
from tests.fixtures.postgres import both_layouts

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from psycopg import Connection

    from tests.fixtures.postgres import Database

pytestmark = [pytest.mark.every_postgres, both_layouts]

ONE, TWO, SEVEN = 1, 2, 13  # the shards of these keys of the type "order"
LONG_NUMBER = "1e131071"  # 12 bytes as jsonb, 131,072 as text
GROWN_NUMBER = "1e16999"  # 17,000 as text


@pytest.fixture
def lane(database: Database, relay_login: str) -> Iterator[Connection]:
    dsn = database.server.dsn(database.name, user=relay_login)
    with relay_database.connect(dsn, application_name="lane") as connection:
        yield connection


@pytest.fixture
def writer(database: Database) -> Iterator[Connection]:
    with database.connect(autocommit=True) as connection:
        yield connection


def claim(lane: Connection) -> Claim:
    """Hold all shards, if there is any work."""
    return claim_shards(
        lane,
        options=ClaimOptions(),
        reached=Reached(*read_last_number(lane, schema="public")),
        candidates=range(SHARDS),
        most=SHARDS,
        takes_all=True,
        looks_for_waiting=True,
    )


def read(lane: Connection, claimed: Claim, *, through: int = 10**6, limits: Limits | None = None) -> Batch:
    return read_messages(lane, claimed, schema="public", through=through, limits=limits or Limits())


def waiting(
    lane: Connection, claimed: Claim, *, held_types: Collection[str] = (), limits: Limits | None = None
) -> Batch:
    return read_waiting(lane, claimed, schema="public", held_types=held_types, limits=limits or Limits())


def insert_json(writer: Connection, *keys: str, payload: str) -> None:
    """Insert messages with a payload that Python would write otherwise, or not at all."""
    for number in insert(writer, *keys):
        writer.execute("UPDATE outbox SET payload = %s WHERE sequence_no = %s", [payload, number])


def numbers(batch: Batch) -> list[int]:
    return [message.sequence_no for message in batch.messages]


def of_one_shard(claimed: Claim, shard: int = ONE) -> Claim:
    """The claim as if it held this shard alone: its part of the limits is the whole then."""
    only = [work for work in claimed.held if work.shard == shard]
    return replace(claimed, held=only, marks=Marks({shard: claimed.marks.through[shard]}))


def test_a_read_returns_whole_messages_in_sequence_order(lane: Connection, writer: Connection) -> None:
    created_at = "2001-09-09 01:46:40.123+00"
    insert(writer, "1", "2", "7", "1", payload={"n": 1}, headers={"traceparent": "00-a"}, created_at=created_at)
    batch = read(lane, claim(lane))
    assert (numbers(batch), batch.shards, batch.gone, batch.is_cut) == (
        [1, 2, 3, 4],
        frozenset({ONE, TWO, SEVEN}),
        [],
        False,
    )
    [(message_id, size)] = writer.execute(
        """
        SELECT message_id::text, pg_column_size(payload) + pg_column_size(headers) FROM outbox WHERE sequence_no = 2
        """
    ).fetchall()
    assert batch.messages[1]._asdict() == {
        "sequence_no": 2,
        "shard": TWO,
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
        "is_behind_waiting": False,
    }


def test_bytes_and_tombstones_come_as_they_are(lane: Connection, writer: Connection) -> None:
    insert(writer, "1", payload_bytes=b"\x00\xff")
    insert(writer, "1")
    messages = read(lane, claim(lane)).messages
    assert [(each.payload, each.payload_bytes) for each in messages] == [(None, b"\x00\xff"), (None, None)]


def test_nothing_at_or_below_a_mark_nor_above_the_horizon_is_read(lane: Connection, writer: Connection) -> None:
    insert(writer, "1", "2")
    mark(writer)
    insert(writer, "1", "2", "1")
    assert numbers(read(lane, claim(lane), through=4)) == [3, 4]


def test_a_read_goes_on_where_the_marks_of_the_stint_are(lane: Connection, writer: Connection) -> None:
    insert(writer, "1", "2", "1")
    claimed = claim(lane)
    claimed.marks.pass_over(read(lane, claimed).messages[:2])
    assert numbers(read(lane, claimed)) == [3]


def test_messages_that_are_committed_during_a_stint_are_read_by_it(lane: Connection, writer: Connection) -> None:
    insert(writer, "1")
    claimed = claim(lane)
    insert(writer, "2")
    assert numbers(read(lane, claimed)) == [1, 2]


def test_a_batch_has_its_messages_from_all_its_shards_in_equal_parts(lane: Connection, writer: Connection) -> None:
    insert(writer, *["1"] * 20, *["2"] * 20)
    claimed = claim(lane)
    assert numbers(read(lane, claimed, limits=Limits(messages=64))) == [1, 2, 3, 4, 21, 22, 23, 24]
    assert numbers(read(lane, claimed, limits=Limits(messages=65))) == [1, 2, 3, 4, 5, 21, 22, 23, 24, 25]


def test_every_shard_has_a_message_however_few_are_asked_for(lane: Connection, writer: Connection) -> None:
    insert(writer, "1", "1", "2", "2")
    assert numbers(read(lane, claim(lane), limits=Limits(messages=1))) == [1, 3]


def test_a_batch_of_one_shard_has_exactly_the_messages_asked_for(lane: Connection, writer: Connection) -> None:
    insert(writer, *["1"] * 20)
    assert numbers(read(lane, of_one_shard(claim(lane)), limits=Limits(messages=10))) == list(range(1, 11))


def test_a_batch_ends_behind_the_message_that_fills_its_bytes(lane: Connection, writer: Connection) -> None:
    insert(writer, *["1"] * 10, payload_bytes=bytes(1000))
    claimed = of_one_shard(claim(lane))
    size = read(lane, claimed).messages[0].stored_bytes
    assert numbers(read(lane, claimed, limits=Limits(stored_bytes=3 * size))) == [1, 2, 3]
    assert numbers(read(lane, claimed, limits=Limits(stored_bytes=3 * size + 1))) == [1, 2, 3, 4]


def test_every_shard_has_a_message_however_large(lane: Connection, writer: Connection) -> None:
    insert(writer, "1", "1", "2", "2", payload_bytes=bytes(1_000_000))
    assert numbers(read(lane, claim(lane), limits=Limits(stored_bytes=1024))) == [1, 3]


def test_a_large_message_in_the_middle_ends_the_batch_and_the_others_come_with_the_next(
    lane: Connection, writer: Connection
) -> None:
    insert(writer, *["1"] * 5)
    insert(writer, "1", payload_bytes=bytes(1_000_000))
    insert(writer, *["1"] * 5)
    claimed = of_one_shard(claim(lane))
    batch = read(lane, claimed, limits=Limits(stored_bytes=100_000))
    assert numbers(batch) == [1, 2, 3, 4, 5, 6]
    claimed.marks.pass_over(batch.messages)
    assert numbers(read(lane, claimed, limits=Limits(stored_bytes=100_000))) == [7, 8, 9, 10, 11]


def test_a_payload_beyond_the_readable_bytes_is_not_read(lane: Connection, writer: Connection) -> None:
    insert(writer, "1", payload_bytes=bytes(2000))
    insert(writer, "1", payload={"text": "x" * 2000})
    insert(writer, "1", payload_bytes=b"small")
    messages = read(lane, claim(lane), limits=Limits(readable_bytes=2000)).messages
    assert [(each.payload, each.payload_bytes, each.headers) for each in messages] == [
        (None, None, None),
        (None, None, None),
        (None, b"small", "{}"),
    ]
    assert messages[0].stored_bytes > 2000


def test_a_message_of_more_text_than_the_readable_bytes_is_not_read(lane: Connection, writer: Connection) -> None:
    insert_json(writer, "1", "2", payload=LONG_NUMBER)
    insert(writer, "7", headers={"repeated": "x" * 200_000})
    messages = read(lane, claim(lane), limits=Limits(readable_bytes=100_000)).messages
    assert [(message.payload, message.headers) for message in messages] == [(None, None)] * 3
    assert [message.stored_bytes for message in messages] == [131_072, 131_072, 200_016]


def test_messages_that_take_far_more_bytes_as_text_come_one_by_one(lane: Connection, writer: Connection) -> None:
    insert(writer, "1")
    insert_json(writer, "1", "1", "2", payload=LONG_NUMBER)
    insert(writer, "1")
    claimed = claim(lane)
    for found, has_more in [([1, 4], True), ([2], True), ([3, 5], False)]:
        batch = read(lane, claimed)
        assert (numbers(batch), batch.is_cut, batch.may_have_more(Limits(), shards=SHARDS)) == (
            found,
            has_more,
            has_more,
        )
        assert {len(message.payload or "") for message in batch.messages} <= {0, 131_072}
        claimed.marks.pass_over(batch.messages)


def test_with_no_readable_byte_a_message_that_can_be_written_out_is_left_for_the_next_read(
    lane: Connection, writer: Connection
) -> None:
    insert(writer, "1", payload={"n": 1})
    claimed = claim(lane)
    batch = read(lane, claimed, limits=Limits(messages=1, shards=1, readable_bytes=0))
    assert (batch.messages, batch.is_cut, batch.shards) == ([], True, frozenset({ONE}))
    assert numbers(read(lane, claimed)) == [1]


def test_with_no_readable_byte_no_message_is_passed_that_was_not_tested(lane: Connection, writer: Connection) -> None:
    insert(writer, "1", "1", "2")
    claimed = claim(lane)
    batch = read(lane, claimed, limits=Limits(messages=2 * SHARDS, readable_bytes=0))
    assert (batch.messages, batch.shards) == ([], frozenset({ONE, TWO}))


def test_later_messages_of_a_key_say_what_of_it_is_pending(lane: Connection, writer: Connection) -> None:
    parked, waits, both, _ = insert(writer, "1", "2", "7", "7")
    mark(writer)
    set_aside(writer, parked, both, state="parked")
    set_aside(writer, waits, both + 1, state="waiting")
    insert(writer, "1", "2", "7", "4")
    insert(writer, "1", aggregate_type="basket")
    messages = read(lane, claim(lane)).messages
    assert [(each.sequence_no, each.is_behind_parked, each.is_behind_waiting) for each in messages] == [
        (5, True, False),
        (6, False, True),
        (7, True, True),
        (8, False, False),
        (9, False, False),
    ]


def test_no_message_is_behind_an_unordered_one_or_a_later_one(lane: Connection, writer: Connection) -> None:
    late, later, last = insert(writer, "1", "1", "1")
    set_aside(writer, late, state="parked", is_unordered=True)
    set_aside(writer, last, state="waiting")
    message = read(lane, claim(lane)).messages[1]
    assert (message.sequence_no, message.is_behind_parked, message.is_behind_waiting) == (later, False, False)


@pytest.mark.parametrize("state", ["parked", "waiting"])
def test_a_key_that_no_index_could_hold_is_held_back_like_any_other(
    lane: Connection, writer: Connection, state: str
) -> None:
    chance = random.Random(0)  # noqa: S311 -- no secret
    key = "".join(chance.choices(string.printable, k=100_000))
    [number] = insert(writer, key)
    mark(writer)
    set_aside(writer, number, state="parked" if state == "parked" else "waiting")
    insert(writer, key, key + "x")
    claimed = claim(lane)
    messages = read(lane, claimed).messages
    assert [(each.aggregate_id, each.is_behind_parked, each.is_behind_waiting) for each in messages] == [
        (key, state == "parked", state == "waiting"),
        (key + "x", False, False),
    ]
    assert [each.aggregate_id for each in waiting(lane, claimed).messages] == ([key] if state == "waiting" else [])


UNORDERED = """
INSERT INTO outbox_unordered (transaction_id, from_no, to_no, collected_at)
SELECT transaction_id, %(from_no)s, %(to_no)s, CASE WHEN %(to_no)s::bigint IS NOT NULL THEN now() END
FROM outbox WHERE sequence_no = %(of)s
"""


@pytest.mark.parametrize(
    ("given_up", "expected"),
    [
        ((0, None), [4]),
        ((2, None), [1, 2, 4]),
        ((0, 2), [3, 4, 5]),
        ((2, 3), [1, 2, 4, 5]),
        ((0, 100), [4]),
        ((5, None), [1, 2, 3, 4, 5]),
    ],
)
def test_messages_of_a_writer_that_was_given_up_on_are_left_out_within_the_range_of_its_numbers(
    database: Database, lane: Connection, writer: Connection, given_up: tuple[int, int | None], expected: list[int]
) -> None:
    with database.connect() as slow_writer:  # of 1, 2, 3 and 5
        insert(slow_writer, "1", "1", "1")
        insert(writer, "1")
        insert(slow_writer, "1")
    from_no, to_no = given_up
    writer.execute(UNORDERED, {"from_no": from_no, "to_no": to_no, "of": 1})
    assert numbers(read(lane, claim(lane))) == expected


def test_the_oldest_waiting_messages_are_read_in_sequence_order(lane: Connection, writer: Connection) -> None:
    numbers_of_all = insert(writer, "1", "2", "7", "1", "2")
    mark(writer)
    set_aside(writer, *numbers_of_all[:4], state="waiting")
    set_aside(writer, numbers_of_all[4], state="parked")
    assert numbers(waiting(lane, claim(lane))) == [1, 2, 3, 4]


def test_each_type_in_each_shard_has_an_equal_part_of_the_messages_that_wait(
    lane: Connection, writer: Connection
) -> None:
    set_aside(writer, *insert(writer, "1", "1", "1", "2", "2", "2"), state="waiting")
    set_aside(writer, *insert(writer, "1", "1", "1", aggregate_type="basket"), state="waiting")
    mark(writer)
    insert(writer, "7")
    claimed = claim(lane)
    assert numbers(waiting(lane, claimed, limits=Limits(messages=6))) == [1, 2, 4, 5, 7, 8]
    assert numbers(waiting(lane, claimed, held_types=["basket"], limits=Limits(messages=6))) == [1, 2, 3, 4, 5, 6]


def test_only_messages_of_the_held_shards_are_read_of_those_that_wait(lane: Connection, writer: Connection) -> None:
    set_aside(writer, *insert(writer, "1", "2"), state="waiting")
    mark(writer)
    assert numbers(waiting(lane, of_one_shard(claim(lane), TWO))) == [2]


def test_messages_of_a_topic_that_is_away_go_on_waiting_and_hide_no_other(lane: Connection, writer: Connection) -> None:
    insert(writer, *["1"] * 5, aggregate_type="basket")
    set_aside(writer, *range(1, 6), *insert(writer, "1"), state="waiting")
    mark(writer)
    batch = waiting(lane, claim(lane), held_types=["basket", "bill"], limits=Limits(messages=1))
    assert numbers(batch) == [6]


def test_a_waiting_message_behind_a_parked_one_of_its_key_says_so_unless_it_is_unordered(
    lane: Connection, writer: Connection
) -> None:
    parked, behind, late, other = insert(writer, "1", "1", "1", "2")
    mark(writer)
    set_aside(writer, parked, state="parked")
    set_aside(writer, behind, other, state="waiting")
    set_aside(writer, late, state="waiting", is_unordered=True)
    messages = waiting(lane, claim(lane)).messages
    assert [(each.sequence_no, each.is_behind_parked, each.is_unordered) for each in messages] == [
        (behind, True, False),
        (late, False, True),
        (other, False, False),
    ]


def test_a_waiting_message_is_not_behind_a_parked_one_that_is_unordered(lane: Connection, writer: Connection) -> None:
    late, behind = insert(writer, "1", "1")
    mark(writer)
    set_aside(writer, late, state="parked", is_unordered=True)
    set_aside(writer, behind, state="waiting")
    assert [each.is_behind_parked for each in waiting(lane, claim(lane)).messages] == [False]


def test_a_waiting_message_that_somebody_has_deleted_comes_apart_and_hides_no_other(
    lane: Connection, writer: Connection
) -> None:
    set_aside(writer, *insert(writer, "1", "1", "1"), state="waiting")
    mark(writer)
    writer.execute("DELETE FROM outbox WHERE sequence_no IN (1, 2)")
    batch = waiting(lane, claim(lane))
    assert (numbers(batch), [(each.shard, each.sequence_no) for each in batch.gone]) == ([3], [(ONE, 1), (ONE, 2)])


def test_waiting_messages_are_bounded_by_their_bytes_and_one_always_comes(lane: Connection, writer: Connection) -> None:
    set_aside(writer, *insert(writer, "1", "1", "2", payload_bytes=bytes(10_000)), state="waiting")
    mark(writer)
    claimed = claim(lane)
    assert numbers(waiting(lane, claimed, limits=Limits(stored_bytes=1024))) == [1]
    assert numbers(waiting(lane, claimed, limits=Limits(stored_bytes=10_100))) == [1, 2]


def test_waiting_messages_that_take_far_more_bytes_as_text_end_the_batch_in_their_shard(
    lane: Connection, writer: Connection
) -> None:
    insert(writer, "1")
    insert_json(writer, "1", payload=LONG_NUMBER)
    insert(writer, "1", "2")
    set_aside(writer, 1, 2, 3, 4, state="waiting")
    mark(writer)
    batch = waiting(lane, claim(lane))
    assert (numbers(batch), batch.is_cut) == ([1, 4], True)


class Row(NamedTuple):
    """A message that a test writes; *is_late*: by a writer that was given up on."""

    key: str
    contents: tuple[str | None, bytes | None]
    is_late: bool


CONTENTS: list[tuple[str | None, bytes | None]] = [
    (None, None),
    ('{"n": 1}', None),
    (None, bytes(3_000)),
    (None, bytes(30_000)),  # beyond the readable bytes
    (LONG_NUMBER, None),  # likewise, but only as text
    (GROWN_NUMBER, None),
    (f"[{GROWN_NUMBER}, 1]", None),
]
READABLE_BYTES = 20_000

all_rows = st.lists(
    st.builds(
        Row,
        key=st.sampled_from(["1", "2", "7", "1", "4"]),
        contents=st.sampled_from(CONTENTS[:2] * 4 + CONTENTS),
        is_late=st.sampled_from([False, False, False, True]),
    ),
    min_size=1,
    max_size=25,
)
all_limits = st.lists(
    st.builds(
        Limits,
        messages=st.sampled_from([1, 16, 32, 100]),
        stored_bytes=st.sampled_from([1024, 20_000, 10**6]),
        readable_bytes=st.just(READABLE_BYTES),
    ),
    min_size=1,
    max_size=5,
)


def write(database: Database, rows: Sequence[Row]) -> None:
    """Write *rows* in their order, those of the late writer in one transaction, which is given up on first of all."""
    statement = """
        INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload, payload_bytes)
        VALUES ('order', %s, 'placed', %s, %s)
    """
    with database.connect(autocommit=True) as prompt, database.connect() as late:
        [(xid,)] = late.execute("SELECT pg_current_xact_id()::text").fetchall()
        record_unordered(prompt, schema="public", xids=[int(xid)])
        for row in rows:
            (late if row.is_late else prompt).execute(statement, [row.key, *row.contents])


def drain(lane: Connection, all_limits: Sequence[Limits]) -> dict[int, list[int]]:
    """Read batch after batch with these limits, a stint for each round of them; return the numbers by shard."""
    found: dict[int, list[int]] = defaultdict(list)
    claimed = claim(lane)
    while claimed.held:
        for limits in all_limits:
            batch = read(lane, claimed, limits=limits)
            for message in batch.messages:
                found[message.shard].append(message.sequence_no)
                is_withheld = message.headers is None
                assert is_withheld == (message.stored_bytes > READABLE_BYTES)
            claimed.marks.pass_over(batch.messages)
            for work in claimed.held:
                if work.shard not in batch.shards:
                    claimed.marks.pass_nothing(work.shard, through=10**6)
        assert record_marks(lane, claimed.marks, schema="public")
        claimed = claim(lane)
    return dict(found)


def test_whatever_is_read_at_once_every_message_comes_once_and_marks_count_them(
    database: Database, lane: Connection, writer: Connection
) -> None:
    @settings(max_examples=25, deadline=None)
    @given(all_rows, all_limits)
    def check(rows: list[Row], all_limits: list[Limits]) -> None:
        writer.execute("TRUNCATE outbox")
        write(database, rows)
        expected: dict[int, list[int]] = defaultdict(list)
        for number, shard in writer.execute(
            """
            SELECT sequence_no, shard FROM outbox
            WHERE transaction_id NOT IN (SELECT transaction_id FROM outbox_unordered)
            ORDER BY sequence_no
            """
        ):
            expected[shard].append(number)
        assert drain(lane, all_limits) == expected
        marks = writer.execute("SELECT shard, sum(messages), bit_xor(checksum) FROM outbox_published GROUP BY 1")
        assert {shard: counted for shard, *counted in marks if counted[0]} == {
            shard: [len(passed), reduce(xor, passed)] for shard, passed in expected.items()
        }

    check()
