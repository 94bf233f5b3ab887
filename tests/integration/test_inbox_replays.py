"""What both inboxes make of replayed messages: ignored as deliveries like any other, or applied once per replay."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Literal

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay.consumer import Batch, Inbox, SequenceInbox
from tests.fixtures.messages import a_message

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from outbox_relay.consumer import Message
    from tests.fixtures.postgres import Database

pytestmark = pytest.mark.every_postgres

AnyInbox = type[Inbox] | type[SequenceInbox]
by_both = pytest.mark.parametrize("kind", [Inbox, SequenceInbox], ids=["by id", "by number"])

FIRST, SECOND, THIRD = (a_message(number) for number in (1, 2, 3))
MARKS = "SELECT key, sequence_no FROM inbox_sequence"


def again(message: Message, *, replay: str = "r1", is_unordered: bool = False) -> Message:
    return a_message(message.sequence_no, replay=replay, is_unordered=is_unordered)


@pytest.fixture
def connection(inbox_database: Database, consumer_login: str) -> Iterator[Connection]:
    with inbox_database.connect(user=consumer_login) as connection:
        yield connection


@by_both
def test_a_replay_of_what_was_consumed_is_ignored_unless_it_is_to_be_applied(
    connection: Connection, kind: AnyInbox
) -> None:
    ignoring, applying = kind("ignoring"), kind("applying", replays="apply")
    for inbox, effects in ((ignoring, 0), (applying, 3)):
        assert len(inbox.accept_many(connection, [FIRST, SECOND, THIRD]).fresh) == 3
        replayed = inbox.accept_many(connection, [again(FIRST), again(SECOND), again(THIRD)])
        assert len(replayed.fresh) == effects


@by_both
def test_an_applied_replay_has_one_effect_for_each_name_however_often_it_comes(
    connection: Connection, kind: AnyInbox
) -> None:
    inbox = kind("billing", replays="apply")
    assert inbox.accept(connection, FIRST)
    names = ["r1", "r1", "r2", "r1", "r2", "r3"]
    assert [inbox.accept(connection, again(FIRST, replay=name)) for name in names] == [
        *(True, False, True, False, False, True)
    ]
    assert not inbox.accept(connection, FIRST)


@by_both
@pytest.mark.parametrize("replays", ["ignore", "apply"])
def test_first_deliveries_and_replays_in_one_batch(
    connection: Connection, kind: AnyInbox, replays: Literal["ignore", "apply"]
) -> None:
    inbox = kind("billing", replays=replays)
    inbox.accept_many(connection, [FIRST, SECOND])
    messages = [again(FIRST), THIRD, again(FIRST), again(THIRD, replay="r2"), SECOND, again(SECOND)]
    batch = inbox.accept_many(connection, messages)
    fresh = [0, 1, 3, 5] if replays == "apply" else [1]
    assert batch.fresh == [messages[index] for index in fresh]
    assert len(batch.duplicates) + len(batch.stale) == len(messages) - len(batch.fresh)


@by_both
def test_an_ignored_replay_of_what_was_never_consumed_is_consumed_once(connection: Connection, kind: AnyInbox) -> None:
    inbox = kind("billing")
    assert [inbox.accept(connection, message) for message in (again(FIRST), FIRST, again(FIRST, replay="r2"))] == [
        *(True, False, False)
    ]


@by_both
def test_an_applied_replay_says_nothing_about_the_first_delivery(connection: Connection, kind: AnyInbox) -> None:
    inbox = kind("billing", replays="apply")
    assert [inbox.accept(connection, message) for message in (again(FIRST), FIRST)] == [True, True]


@by_both
def test_asyncio_applies_replays_too(inbox_database: Database, consumer_login: str, kind: AnyInbox) -> None:
    inbox = kind("billing", replays="apply")

    async def consume() -> list[bool]:
        dsn = make_conninfo(inbox_database.dsn, user=consumer_login)
        async with await psycopg.AsyncConnection.connect(dsn) as connection:
            return [await inbox.accept_async(connection, message) for message in (FIRST, again(FIRST), again(FIRST))]

    assert asyncio.run(consume()) == [True, True, False]


def test_an_applied_replay_moves_no_mark_whatever_its_number(connection: Connection) -> None:
    inbox = SequenceInbox("billing", replays="apply")
    inbox.accept(connection, SECOND)
    assert inbox.accept_many(connection, [again(FIRST), again(THIRD)]).fresh == [again(FIRST), again(THIRD)]
    assert connection.execute(MARKS).fetchall() == [("1", 2)]
    assert inbox.accept(connection, THIRD)


def test_an_ignored_replay_is_stale_below_the_mark_and_raises_it_above(connection: Connection) -> None:
    inbox = SequenceInbox("billing")
    inbox.accept(connection, SECOND)
    replayed = [again(FIRST), again(SECOND), again(THIRD)]
    assert inbox.accept_many(connection, replayed) == Batch([replayed[2]], [replayed[1]], [replayed[0]])
    assert connection.execute(MARKS).fetchall() == [("1", 3)]


@pytest.mark.parametrize("kind", [Inbox, SequenceInbox])
def test_an_unordered_message_is_replayed_like_any_other(connection: Connection, kind: AnyInbox) -> None:
    late = a_message(1, is_unordered=True)
    replayed = again(late, is_unordered=True)
    ignoring, applying = kind("ignoring"), kind("applying", replays="apply")
    assert [ignoring.accept(connection, message) for message in (late, replayed)] == [True, False]
    assert [applying.accept(connection, message) for message in (late, replayed, replayed, late)] == [
        *(True, True, False, False)
    ]


def test_each_replay_keeps_the_result_of_its_own(connection: Connection) -> None:
    inbox = Inbox("billing", replays="apply")
    results = iter(["first", "of r1", "of r2"])
    deliveries = [FIRST, again(FIRST), FIRST, again(FIRST), again(FIRST, replay="r2"), again(FIRST)]
    assert [inbox.process(connection, message, lambda *_: next(results)) for message in deliveries] == [
        *("first", "of r1", "first", "of r1", "of r2", "of r1")
    ]


def test_a_block_of_an_applied_replay_that_fails_leaves_no_record(connection: Connection) -> None:
    inbox = Inbox("billing", replays="apply")

    def fail() -> None:
        with connection.transaction(), inbox.once(connection, again(FIRST)):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert inbox.accept(connection, again(FIRST))
