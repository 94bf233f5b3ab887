"""Whatever the caller's connection brings, the libraries' own queries are right on it, and it stays as it was."""

from __future__ import annotations

import asyncio
import inspect
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from psycopg import AsyncConnection, Connection

from outbox_relay.consumer import Inbox, SequenceInbox
from outbox_relay.consumer.kafka import Offsets
from outbox_relay.consumer.kafka.offsets import Partition, Step
from outbox_relay.idempotency import IdempotencyKeys
from outbox_relay.transactions import transact, transact_async
from outbox_relay.writer import TOMBSTONE, Message, Outbox
from tests.fixtures.messages import a_message
from tests.fixtures.surroundings import Surroundings, surroundings

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fixtures.postgres import Database

    AnyConnection = Connection[Any] | AsyncConnection[Any]

HARD = "Ä€ß😀\\'\" NULL {1,2}"
NUMBERS = count(1)

KEYS = IdempotencyKeys(HARD)
OUTBOX = Outbox()


@pytest.mark.every_postgres
@pytest.mark.parametrize("kind", [Connection, AsyncConnection])
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(of=surroundings())
@example(of=Surroundings(adapters="text"))
@example(of=Surroundings(adapters="wrong", is_pipeline=True))
@example(of=Surroundings(settings={"client_encoding": "SQL_ASCII"}))
@example(of=Surroundings(settings={"client_encoding": "LATIN1"}, is_pipeline=True, savepoints=1))
@example(of=Surroundings(factory="ServerCursor", rows="scalar"))
def test_every_call_is_right_on_any_connection(
    whole_database: Database, kind: type[AnyConnection], of: Surroundings
) -> None:
    number = next(NUMBERS)

    async def tell() -> None:
        connection: AnyConnection = (
            psycopg.connect(whole_database.dsn)
            if kind is Connection
            else await AsyncConnection.connect(whole_database.dsn)
        )
        try:
            await of.apply(connection)
            await Story(connection, of, number).tell()
        finally:
            await done(connection.close())

    asyncio.run(tell())
    with whole_database.connect() as admin:
        assert_stored(admin, number)


async def done(given: Any) -> Any:  # noqa: ANN401 -- whatever a method of either kind gives
    return await given if inspect.isawaitable(given) else given


class Story:
    """Calls everything that is public, through the methods for its kind of connection."""

    def __init__(self, connection: AnyConnection, of: Surroundings, number: int) -> None:
        self.connection = connection
        self.of = of
        self.number = number
        self.is_async = isinstance(connection, AsyncConnection)

    async def tell(self) -> None:
        settings_before = self.reported()
        async with AsyncExitStack() as opened:
            if self.of.is_pipeline:
                await self.enter(opened, self.connection.pipeline())
            await self.enter(opened, self.connection.transaction())
            for _ in range(self.of.savepoints):
                await self.enter(opened, self.connection.transaction())
            await self.consume()
            await self.answer()
            await self.write()
        assert self.reported() == settings_before
        if self.of.is_pipeline:
            async with AsyncExitStack() as opened:
                await self.enter(opened, self.connection.pipeline())
                await self.transact()
        await self.transact()
        assert await self.call(Inbox(HARD), "prune_all", older_than=timedelta(days=1)) == 0
        assert self.reported() == settings_before

    def reported(self) -> list[str | None]:
        names = ("client_encoding", "DateStyle", "IntervalStyle", "TimeZone", "standard_conforming_strings")
        return [self.connection.info.parameter_status(name) for name in names]

    async def call(self, target: object, name: str, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        method = getattr(target, name + "_async" * self.is_async)
        return await done(method(self.connection, *arguments, **options))

    async def enter(self, opened: AsyncExitStack, manager: Any) -> Any:  # noqa: ANN401
        return await opened.enter_async_context(manager) if self.is_async else opened.enter_context(manager)

    def work(self, result: object) -> Callable[..., object]:
        if not self.is_async:
            return lambda *_: result

        async def give(*_: object) -> object:
            return result

        return give

    async def consume(self) -> None:
        for inbox in (Inbox(HARD), SequenceInbox(f"{HARD}2")):
            first = replace(a_message(self.number * 10, key=HARD + "x" * 3000), source=HARD)
            second = replace(a_message(self.number * 10 + 1, key=HARD), aggregate_type=HARD, source=HARD)
            third = replace(a_message(self.number * 10 + 2, is_unordered=True), source=HARD)
            assert await self.call(inbox, "accept", first) is True
            assert await self.call(inbox, "accept", first) is False
            batch = await self.call(inbox, "accept_many", [first, second, third, second])
            assert (batch.fresh, batch.duplicates) == ([second, third], [first, second])
        message = a_message(self.number * 10 + 3, replay=HARD)
        by_replay = Inbox(HARD, replays="apply")
        for expected in (True, False):
            async with AsyncExitStack() as opened:
                once = getattr(by_replay, "once" + "_async" * self.is_async)
                assert await self.enter(opened, once(self.connection, message)) is expected
        result = [HARD, None, 1.5, {"ü": True}]
        for _ in range(2):
            given = await self.call(Inbox(HARD), "process", message, self.work(result))
            assert given == result
        assert await self.call(Inbox(HARD), "prune", older_than=timedelta(days=1)) == 0
        if not self.is_async:
            partition, never = Partition(HARD, self.number), Partition(HARD, -self.number)
            offsets = Offsets(HARD)
            session: Any = self.connection
            assert offsets.move(session, {partition: Step(None, 5)}) == set()
            assert offsets.move(session, {partition: Step(4, 6)}) == {partition}
            assert offsets.move(session, {partition: Step(5, 7)}) == set()
            assert offsets.read(session, [partition, never]) == {partition: 7}

    async def answer(self) -> None:
        for _ in range(2):
            given = await self.call(KEYS, "answer", f"{HARD}{self.number}", self.work({HARD: 1}), fingerprint=HARD)
            assert given == {HARD: 1}
        assert await self.call(KEYS, "prune") == 0

    async def write(self) -> None:
        messages = [self.message(payload=HARD), self.message(payload=TOMBSTONE), self.message(payload_bytes=b"\0\xff")]
        assert await self.call(OUTBOX, "write_many", messages) == [message.message_id for message in messages]
        async with AsyncExitStack() as opened:
            block = getattr(OUTBOX, "transaction" + "_async" * self.is_async)(self.connection)
            pending = await self.enter(opened, block)
            pending.write(self.message(payload=[HARD]))

    def message(self, **fields: Any) -> Message:  # noqa: ANN401 -- the fields of a message
        return Message(
            aggregate_type=f"order{self.number}", aggregate_id=HARD, event_type=HARD, headers={"h": HARD}, **fields
        )

    async def transact(self) -> None:
        message = self.message(payload=HARD)
        if isinstance(self.connection, AsyncConnection):
            given = await transact_async(self.connection, lambda inner: OUTBOX.write_async(inner, message))
        else:
            given = transact(self.connection, lambda inner: OUTBOX.write(inner, message))
        assert given == message.message_id


def assert_stored(admin: Connection[Any], number: int) -> None:
    rows = admin.execute(
        "SELECT aggregate_id, event_type, headers ->> 'h', payload, payload_bytes FROM outbox"
        " WHERE aggregate_type = %s ORDER BY sequence_no LIMIT 5",
        [f"order{number}"],
    ).fetchall()
    assert rows == [
        (HARD, HARD, HARD, HARD, None),
        (HARD, HARD, HARD, None, None),
        (HARD, HARD, HARD, None, b"\0\xff"),
        (HARD, HARD, HARD, [HARD], None),
        (HARD, HARD, HARD, HARD, None),
    ]
