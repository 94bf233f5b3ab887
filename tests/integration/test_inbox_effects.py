"""
One effect per message, judged from the balances of the consumer's database.

Every fault is met once by each inbox and once by a consumer that accepts everything, where the judge must see
the damage.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Barrier
from typing import TYPE_CHECKING

import pytest
from psycopg import errors

from outbox_relay.consumer import Batch, Inbox, SequenceInbox
from tests.fixtures.messages import a_message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from psycopg import Connection

    from outbox_relay.consumer import Message
    from tests.fixtures.postgres import Database

    Connect = Callable[[], Connection]

MESSAGES = [a_message(number, key=str(number % 7)) for number in range(1, 201)]
BATCH = 50


class AcceptsAll:
    """A consumer without an inbox."""

    def accept_many(self, _connection: Connection, messages: Sequence[Message]) -> Batch:
        return Batch(fresh=list(messages))


AnyInbox = Inbox | SequenceInbox | AcceptsAll


@pytest.fixture
def connect(inbox_database: Database, consumer_login: str) -> Iterator[Connect]:
    with inbox_database.connect(autocommit=True) as owner:
        owner.execute("CREATE TABLE account (id text PRIMARY KEY, balance bigint NOT NULL)")
        owner.execute("INSERT INTO account SELECT number::text, 0 FROM generate_series(0, 6) AS number")
        owner.execute(f'GRANT SELECT, UPDATE ON account TO "{consumer_login}"')
        yield lambda: inbox_database.connect(user=consumer_login)


def consume(connection: Connection, inbox: AnyInbox, messages: Sequence[Message]) -> None:
    """One transaction as an application has it."""
    with connection.transaction():
        fresh = inbox.accept_many(connection, messages).fresh
        for message in sorted(fresh, key=lambda message: message.key):  # accounts are locked in one order
            update = "UPDATE account SET balance = balance + %s WHERE id = %s"
            connection.execute(update, [message.sequence_no, message.key])


def consume_all(connection: Connection, inbox: AnyInbox, messages: Sequence[Message]) -> None:
    for start in range(0, len(messages), BATCH):
        consume(connection, inbox, messages[start : start + BATCH])


def redeliver_everything(connect: Connect, inbox: AnyInbox) -> None:
    for _ in range(3):
        with connect() as connection:
            consume_all(connection, inbox, MESSAGES)


def run_twins(connect: Connect, inbox: AnyInbox) -> None:
    together = Barrier(2)

    def run() -> None:
        with connect() as connection:
            together.wait(timeout=30)
            consume_all(connection, inbox, MESSAGES)

    with ThreadPoolExecutor(2) as pool:
        for twin in [pool.submit(run), pool.submit(run)]:
            twin.result(timeout=60)


def wake_a_zombie(connect: Connect, inbox: AnyInbox) -> None:
    """A relay that was paused publishes what it had in hand once more, after newer messages of the keys."""
    with connect() as connection:
        consume_all(connection, inbox, MESSAGES[:120])
        consume_all(connection, inbox, MESSAGES[60:90])
        consume_all(connection, inbox, MESSAGES[110:])


def fail_in_mid_batch(connect: Connect, inbox: AnyInbox) -> None:
    """A batch fails behind its effects and is taken again; the one before it, whose offset was not committed, too."""
    with connect() as connection:
        consume(connection, inbox, MESSAGES[:BATCH])
        with suppress(errors.DivisionByZero), connection.transaction():
            consume(connection, inbox, MESSAGES[BATCH : 2 * BATCH])
            connection.execute("SELECT 1 / 0")
        consume_all(connection, inbox, MESSAGES)


def balances(connect: Connect) -> dict[str, int]:
    with connect() as connection:
        return dict(connection.execute("SELECT id, balance FROM account").fetchall())


def one_effect_each() -> dict[str, int]:
    expected: Counter[str] = Counter()
    for message in MESSAGES:
        expected[message.key] += message.sequence_no
    return expected


faults = pytest.mark.parametrize("meet", [redeliver_everything, run_twins, wake_a_zombie, fail_in_mid_batch])


@faults
@pytest.mark.parametrize("inbox", [Inbox("billing"), SequenceInbox("billing")], ids=["by id", "by number"])
def test_each_message_has_one_effect(
    connect: Connect, inbox: AnyInbox, meet: Callable[[Connect, AnyInbox], None]
) -> None:
    meet(connect, inbox)
    assert balances(connect) == one_effect_each()


@faults
def test_without_an_inbox_the_same_faults_change_the_balances(
    connect: Connect, meet: Callable[[Connect, AnyInbox], None]
) -> None:
    meet(connect, AcceptsAll())
    assert balances(connect) != one_effect_each()
