"""What only the inbox by number does: one mark per key, stale messages, unordered ones by their id."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from outbox_relay.consumer import Batch, Inbox, SequenceInbox
from tests.fixtures.messages import a_message

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from tests.fixtures.postgres import Database

pytestmark = pytest.mark.every_postgres

INBOX = SequenceInbox("billing")
MARKS = "SELECT key, sequence_no, previous_sequence_no FROM inbox_sequence ORDER BY key"


@pytest.fixture
def connection(inbox_database: Database, consumer_login: str) -> Iterator[Connection]:
    with inbox_database.connect(user=consumer_login) as connection:
        yield connection


def test_the_last_number_again_is_a_duplicate_and_a_lower_one_stale(connection: Connection) -> None:
    messages = [a_message(number) for number in (3, 5, 5, 4, 6)]
    assert INBOX.accept_many(connection, messages) == Batch(
        [messages[0], messages[1], messages[4]], [messages[2]], [messages[3]]
    )
    again = [a_message(number) for number in (3, 6, 7)]
    assert INBOX.accept_many(connection, again) == Batch([again[2]], [again[1]], [again[0]])


def test_one_row_per_key_is_all_that_is_kept(connection: Connection) -> None:
    INBOX.accept_many(connection, [a_message(number, key=str(number % 2)) for number in range(1, 101)])
    INBOX.accept_many(connection, [a_message(number, key=str(number % 2)) for number in (101, 98)])
    assert connection.execute(MARKS).fetchall() == [("0", 100, 100), ("1", 101, 99)]


def test_a_redelivery_never_lowers_a_mark(connection: Connection) -> None:
    for number in (5, 3):
        INBOX.accept(connection, a_message(number))
    assert connection.execute(MARKS).fetchall() == [("1", 5, 5)]


@pytest.mark.parametrize(
    "other",
    [{"source": "warehouse"}, {"topic": "all.events"}, {"partition": 1}, {"aggregate_type": "basket"}, {"key": "2"}],
    ids=str,
)
def test_numbers_count_within_one_source_topic_partition_type_and_key(
    connection: Connection, other: dict[str, object]
) -> None:
    INBOX.accept(connection, a_message(9))
    assert INBOX.accept(connection, replace(a_message(1), **other))  # type: ignore[arg-type]  # one of several by name


def test_keys_and_types_may_be_long_and_need_not_compress(connection: Connection) -> None:
    draw = random.Random(4711)  # noqa: S311 -- text that can be drawn again
    key, aggregate_type, source = ("".join(chr(draw.randrange(0x4E00, 0x9FFF)) for _ in range(3000)) for _ in range(3))
    messages = [
        replace(a_message(number), key=key + end, aggregate_type=aggregate_type, source=source)
        for number, end in ((1, "a"), (2, "a"), (1, "b"))
    ]
    assert INBOX.accept_many(connection, messages) == Batch(messages, [], [])
    assert INBOX.accept_many(connection, messages) == Batch([], messages[1:], messages[:1])


def test_where_type_ends_and_key_begins_tells_keys_apart(connection: Connection) -> None:
    messages = [
        replace(a_message(1), aggregate_type=aggregate_type, key=key)
        for aggregate_type, key in (("ab", "c"), ("a", "bc"), ('a","b', "c"), ("a", 'b","c'), ("", "abc"))
    ]
    assert INBOX.accept_many(connection, messages).fresh == messages


def test_an_unordered_message_is_known_by_its_id_and_moves_no_mark(connection: Connection) -> None:
    late, later = a_message(3, is_unordered=True), a_message(9, is_unordered=True)
    ordered = [a_message(number) for number in (5, 6)]
    messages = [ordered[0], late, later, late, ordered[1]]
    assert INBOX.accept_many(connection, messages) == Batch([ordered[0], late, later, ordered[1]], [late], [])
    assert INBOX.accept_many(connection, [late, later]) == Batch([], [late, later], [])
    assert connection.execute(MARKS).fetchall() == [("1", 6, 0)]


def test_a_batch_of_unordered_messages_alone_is_recorded(connection: Connection) -> None:
    late = a_message(3, is_unordered=True)
    assert [INBOX.accept(connection, late), INBOX.accept(connection, late)] == [True, False]


def test_ids_of_unordered_messages_are_those_of_the_inbox_of_the_same_name(connection: Connection) -> None:
    late = a_message(3, is_unordered=True)
    INBOX.accept(connection, late)
    assert not Inbox("billing").accept(connection, late)
