"""The inbox by message id: tells what has not been consumed before, in the transaction of its effects."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar, cast, get_args
from uuid import uuid5

from psycopg.pq import TransactionStatus

from outbox_relay.errors import TransactionError
from outbox_relay.queries import (
    Query,
    async_connection_of,
    connection_of,
    execute,
    execute_async,
    require_open,
    savepoint,
    savepoint_async,
)
from outbox_relay.sql import statement

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
    from datetime import timedelta
    from typing import Any
    from uuid import UUID

    from psycopg import AsyncConnection, Connection

    from outbox_relay.consumer.message import Message
    from outbox_relay.queries import AsyncSession, Queries, Session

R = TypeVar("R")
S = TypeVar("S", bound="Session")
A = TypeVar("A", bound="AsyncSession")

Replays: TypeAlias = Literal["ignore", "apply"]
"""What a replayed message is: one more delivery of the first one, or a message of its own, once for each replay."""


@dataclass(frozen=True, slots=True)
class Batch:
    """
    What became of the messages of one call, each list in the order of delivery.

    Attributes:
        fresh: Delivered for the first time; their effects belong into this transaction.
        duplicates: Consumed before.
        stale: Older than one of their key that was consumed before; only a `SequenceInbox` can tell.
    """

    fresh: list[Message] = field(default_factory=list)
    duplicates: list[Message] = field(default_factory=list)
    stale: list[Message] = field(default_factory=list)


class Accepting(ABC):
    """
    What both inboxes offer, on one decision of their own.

    Args:
        consumer: Who consumes. Several consumers share a table and do not see each other's rows.
        schema: Where the tables are; None leaves it to search_path.
        replays: Whether a replayed message is a duplicate of the first delivery, or has its effects once more.

    Raises:
        ValueError: *replays* is neither of the two.
    """

    def __init__(self, consumer: str, *, schema: str | None = None, replays: Replays = "ignore") -> None:
        if replays not in get_args(Replays):
            raise ValueError(f'replays is {replays!r}: give "ignore" or "apply"')
        self.consumer = consumer
        self.schema = schema
        self.replays = replays

    def accept(self, session: Session, message: Message) -> bool:
        """Record *message*; True when it was not consumed before and its effects are to happen now."""
        return bool(execute(session, self._accept([message])).fresh)

    async def accept_async(self, session: AsyncSession, message: Message) -> bool:
        """Do what `accept` does."""
        return bool((await execute_async(session, self._accept([message]))).fresh)

    def accept_many(self, session: Session, messages: Sequence[Message]) -> Batch:
        """Record *messages* in one round trip; of several deliveries of a message the first is fresh."""
        return execute(session, self._accept(messages))

    async def accept_many_async(self, session: AsyncSession, messages: Sequence[Message]) -> Batch:
        """Do what `accept_many` does."""
        return await execute_async(session, self._accept(messages))

    @abstractmethod
    def _accept(self, messages: Sequence[Message]) -> Queries[Batch]: ...


class Inbox(Accepting):
    """
    Tells a message's first delivery from the later ones by its id.

    Everything happens in the transaction of the *session* that is passed in, a psycopg connection or cursor, which the
    caller commits together with the effects: only then, and only if both are one transaction, has a message exactly
    one effect. A delivery whose twin is still open elsewhere waits for it, and is new if the twin rolls back. Under
    REPEATABLE READ and SERIALIZABLE it fails with 40001 instead: retry the whole transaction. The driver's errors pass
    through as they are. Each method has a twin for asyncio whose name ends in `_async`.

    Limits: a message is known as long as its row is, so prune no earlier than the last moment at which Kafka, a replay
    or an operator could deliver it again. Two calls in one transaction can deadlock with another such transaction;
    one call per transaction cannot. A database restored to an earlier point has forgotten what it consumed since.

    Args:
        consumer: Who consumes. Several consumers share a table and do not see each other's rows.
        schema: Where the table is; None leaves it to search_path.
        replays: "ignore": a replayed message is a duplicate if it was consumed before, and fresh if it was not.
            "apply": it is fresh once for each replay, whether or not it was consumed before; it is recorded under an id
            made from its own and the replay's name.

    Every method raises:
        NoTransaction: The connection is in autocommit mode and no transaction is open.
        SchemaMismatch: The inbox's migrations are not applied, or the role lacks `inbox_consumer`.
    """

    @contextmanager
    def once(self, session: Session, message: Message) -> Iterator[bool]:
        """
        Record *message* for the length of a block, and give what `accept` gives.

        A block that raises leaves neither the record nor its effects behind, even if the transaction goes on: it is a
        savepoint, and so three round trips.

        Raises:
            NoTransaction: No transaction is open, and the end of the block would not commit one.
        """
        require_open(connection_of(session))
        with savepoint(session):
            yield self.accept(session, message)

    @asynccontextmanager
    async def once_async(self, session: AsyncSession, message: Message) -> AsyncIterator[bool]:
        """Do what `once` does."""
        require_open(async_connection_of(session))
        async with savepoint_async(session):
            yield await self.accept_async(session, message)

    def process(self, session: S, message: Message, handler: Callable[[S, Message], R]) -> R:
        """
        Give the result of *handler*, which runs for the first delivery only and whose result later ones get.

        It is stored as JSON with the record, and comes as JSON gives it back every time: a tuple as a list. It is None
        if the first delivery was recorded without a result. A handler that raises leaves neither the record nor its
        effects behind, even if the transaction goes on: all of it is in a savepoint.

        Raises:
            TypeError, ValueError: The result is no JSON. Nothing of the handler is left behind either.
        """
        with savepoint(session):
            if self.accept(session, message):
                return cast("R", execute(session, self._store(message, handler(session, message))))
            return cast("R", execute(session, self._stored(message)))

    async def process_async(self, session: A, message: Message, handler: Callable[[A, Message], Awaitable[R]]) -> R:
        """Do what `process` does."""
        async with savepoint_async(session):
            if await self.accept_async(session, message):
                result = await handler(session, message)
                return cast("R", await execute_async(session, self._store(message, result)))
            return cast("R", await execute_async(session, self._stored(message)))

    def prune(self, session: Session, *, older_than: timedelta, limit: int = 10_000) -> int:
        """
        Remove up to *limit* of this consumer's records, oldest first, and give their number.

        Args:
            older_than: Since the message was consumed, by the database's clock.
            limit: Most rows to remove, and so the length of the transaction.
        """
        return execute(session, self._prune(older_than, limit=limit))

    async def prune_async(self, session: AsyncSession, *, older_than: timedelta, limit: int = 10_000) -> int:
        """Do what `prune` does."""
        return await execute_async(session, self._prune(older_than, limit=limit))

    def prune_all(self, connection: Connection[Any], *, older_than: timedelta, limit: int = 10_000) -> int:
        """
        Remove all of this consumer's records that are old enough, and give their number.

        Each *limit* of them go in a transaction of their own, which is committed here.

        Raises:
            TransactionError: A transaction is open, and would hold all of them.
        """
        _require_idle(connection_of(connection))
        total = 0
        while True:
            with connection.transaction():
                pruned = self.prune(connection, older_than=older_than, limit=limit)
            if not pruned:
                return total
            total += pruned

    async def prune_all_async(
        self, connection: AsyncConnection[Any], *, older_than: timedelta, limit: int = 10_000
    ) -> int:
        """Do what `prune_all` does."""
        _require_idle(async_connection_of(connection))
        total = 0
        while True:
            async with connection.transaction():
                pruned = await self.prune_async(connection, older_than=older_than, limit=limit)
            if not pruned:
                return total
            total += pruned

    def _accept(self, messages: Sequence[Message]) -> Queries[Batch]:
        unseen = yield from record(messages, consumer=self.consumer, schema=self.schema, replays=self.replays)
        batch = Batch()
        for message in messages:
            recorded_id = id_of(message, replays=self.replays)
            if recorded_id in unseen:
                unseen.remove(recorded_id)
                batch.fresh.append(message)
            else:
                batch.duplicates.append(message)
        return batch

    def _store(self, message: Message, result: object) -> Queries[object]:
        parameters = self._parameters(message) | {
            "created_at": message.created_at,
            "result": json.dumps(result, allow_nan=False),
        }
        [(stored,)] = yield Query(statement("inbox_store_result", schema=self.schema), parameters)
        return json.loads(stored)

    def _stored(self, message: Message) -> Queries[object]:
        rows = yield Query(statement("inbox_stored_result", schema=self.schema), self._parameters(message))
        return next((json.loads(stored) for (stored,) in rows if stored is not None), None)

    def _parameters(self, message: Message) -> dict[str, object]:
        return {"consumer": self.consumer, "message_id": id_of(message, replays=self.replays)}

    def _prune(self, older_than: timedelta, *, limit: int) -> Queries[int]:
        parameters = {"consumer": self.consumer, "older_than": older_than, "limit": limit}
        [(pruned,)] = yield Query(statement("inbox_prune", schema=self.schema), parameters)
        return cast("int", pruned)


def id_of(message: Message, *, replays: Replays) -> UUID:
    """Give the id that *message* is recorded under: of an applied replay one that no other replay gives."""
    if replays == "ignore" or message.replay is None:
        return message.message_id
    return uuid5(message.message_id, message.replay)


def record(messages: Sequence[Message], *, consumer: str, schema: str | None, replays: Replays) -> Queries[set[UUID]]:
    """Record *messages* by their ids, and give the ids that were not recorded before."""
    if not messages:
        return set()
    parameters = {
        "consumer": consumer,
        "message_ids": [id_of(message, replays=replays) for message in messages],
        "created_ats": [message.created_at for message in messages],
    }
    rows = yield Query(statement("inbox_record", schema=schema), parameters)
    return {message_id for (message_id,) in rows}


def _require_idle(connection: Connection[Any] | AsyncConnection[Any]) -> None:
    if connection.info.transaction_status is not TransactionStatus.IDLE:
        raise TransactionError("a transaction is open, and all that is pruned would be part of it: commit it first")
