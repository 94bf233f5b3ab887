"""Whoever is cancelled, wherever: an effect is there as a whole or not at all, and the pool serves on."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool

from outbox_relay.consumer import Inbox, SequenceInbox
from outbox_relay.idempotency import AsyncRequest, IdempotencyKeys
from outbox_relay.transactions import transact_async
from outbox_relay.writer import Message, Outbox
from tests.fixtures.interrupting import WAYS, Way, interrupted
from tests.fixtures.messages import a_message

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from tests.fixtures.postgres import Database

    Pool = AsyncConnectionPool[AsyncConnection[Any]]
    Work = Callable[[Pool, int], Coroutine[Any, Any, object]]

KEYS = IdempotencyKeys("charges")
OUTBOX = Outbox()
INBOX = Inbox("billing")


async def effect(connection: AsyncConnection[Any], number: int) -> None:
    """Write both halves of an effect."""
    for half in ("first", "second"):
        await connection.execute("INSERT INTO effect VALUES (%s, %s)", [number, half])


async def in_transact(pool: Pool, number: int) -> None:
    await transact_async(pool, lambda connection: effect(connection, number))


async def in_transact_of_a_connection(pool: Pool, number: int) -> None:
    async with pool.connection() as connection:
        await transact_async(connection, lambda inner: effect(inner, number))


async def in_nested_transact(pool: Pool, number: int) -> None:
    async with pool.connection() as connection, connection.transaction():
        await transact_async(connection, lambda inner: effect(inner, number))


async def in_transact_of_an_opened_connection(pool: Pool, number: int) -> None:
    await transact_async(lambda: AsyncConnection.connect(str(pool.conninfo)), lambda inner: effect(inner, number))


async def in_once(pool: Pool, number: int) -> None:
    message = a_message(number)
    async with pool.connection() as connection, connection.transaction(), INBOX.once_async(connection, message):
        await effect(connection, number)


async def in_process(pool: Pool, number: int) -> None:
    async def handle(connection: AsyncConnection[Any], _message: object) -> int:
        await effect(connection, number)
        return number

    async with pool.connection() as connection:
        await INBOX.process_async(connection, a_message(number), handle)


async def in_accept(pool: Pool, number: int) -> None:
    async with pool.connection() as connection:
        await SequenceInbox("billing").accept_many_async(connection, [a_message(number), a_message(1, replay="r")])
        await effect(connection, number)


async def in_answer(pool: Pool, number: int) -> None:
    async def charge(connection: AsyncConnection[Any]) -> int:
        await effect(connection, number)
        return number

    async with pool.connection() as connection:
        await KEYS.answer_async(connection, str(number), charge, fingerprint="f")


async def in_answer_in_steps(pool: Pool, number: int) -> None:
    async def charge(request: AsyncRequest[AsyncConnection[Any]]) -> int:
        await request.step("charge", lambda connection: effect(connection, number))
        return number

    await KEYS.answer_in_steps_async(pool, str(number), charge, fingerprint="f")


async def in_a_block_of_the_outbox(pool: Pool, number: int) -> None:
    async with pool.connection() as connection, OUTBOX.transaction_async(connection) as pending:
        await effect(connection, number)
        pending.write(Message(aggregate_type="order", aggregate_id=str(number), event_type="placed"))


async def in_pruning(pool: Pool, _number: int) -> None:
    async with pool.connection() as connection:
        await INBOX.prune_all_async(connection, older_than=timedelta(days=1))
        await INBOX.prune_async(connection, older_than=timedelta(days=1))
        await KEYS.prune_async(connection)


ALL: tuple[Work, ...] = (
    in_transact,
    in_transact_of_a_connection,
    in_transact_of_an_opened_connection,
    in_nested_transact,
    in_once,
    in_process,
    in_accept,
    in_answer,
    in_answer_in_steps,
    in_a_block_of_the_outbox,
    in_pruning,
)


@pytest.fixture
def effects(whole_database: Database) -> Database:
    with whole_database.connect(autocommit=True) as admin:
        admin.execute("CREATE TABLE effect (number integer, half text)")
    return whole_database


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("work", ALL, ids=lambda work: work.__name__)
def test_any_await_may_be_cancelled(effects: Database, work: Work, way: Way) -> None:
    async def cancel_everywhere() -> int:
        async with AsyncConnectionPool(effects.dsn, min_size=2, max_size=2, timeout=20) as pool:
            await pool.wait()
            at = 1
            while await interrupted(lambda: work(pool, at), at=at, way=way):  # noqa: B023 -- called at once
                at += 1
            await asyncio.gather(*(in_transact(pool, 1000 + number) for number in range(100)))
            assert pool.get_stats()["pool_available"] == 2
            return at

    awaits = asyncio.run(cancel_everywhere())
    assert awaits > 3
    with effects.connect() as connection:
        halves = Counter(number for (number,) in connection.execute("SELECT number FROM effect"))
    assert set(halves.values()) == {2}
    assert {number for number in halves if number >= 1000} == set(range(1000, 1100))


def test_a_connection_of_ones_own_is_whole_or_closed(effects: Database) -> None:
    """Of a connection that nobody replaces, too: what is not closed takes the next transaction."""

    async def cancel_everywhere() -> None:
        for way in WAYS:
            at = 1
            is_left = True
            while is_left:
                async with await AsyncConnection.connect(effects.dsn) as connection:
                    is_left = await interrupted(
                        lambda: transact_async(connection, lambda inner: effect(inner, at)),  # noqa: B023 -- called at once
                        at=at,
                        way=way,
                    )
                    if not connection.closed:
                        assert connection.info.transaction_status is psycopg.pq.TransactionStatus.IDLE
                        await transact_async(connection, lambda inner: effect(inner, 1000))
                at += 1

    asyncio.run(cancel_everywhere())
