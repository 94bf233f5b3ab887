"""Write messages into the outbox, in the caller's own transaction, with psycopg."""

from __future__ import annotations

from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from outbox_relay.queries import (
    Queries,
    Query,
    async_connection_of,
    connection_of,
    execute,
    execute_async,
    require_block,
)
from outbox_relay.sql import statement
from outbox_relay.writer.rows import MAX_MESSAGE_BYTES, Pending, columns, encode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
    from uuid import UUID

    from psycopg import AsyncConnection, Connection

    from outbox_relay.queries import AsyncSession, Session
    from outbox_relay.writer.message import Message
    from outbox_relay.writer.rows import Row


class Outbox:
    """
    The outbox of one schema; it holds no connection and may be shared by threads and tasks.

    A *session* is a psycopg connection or one of its cursors. What is written there is committed or rolled back
    together with everything else in its transaction. A message is in order with others of its key if the transaction
    has locked the aggregate's row before it writes.

    psycopg's own errors pass through, so that whoever owns the transaction can retry it by their SQLSTATE.

    Args:
        schema: Where the outbox is; None leaves it to the session's search_path.
        max_message_bytes: Largest message, with its key and headers; no more than message.max.bytes of the relay,
            which would park it.
    """

    def __init__(self, *, schema: str | None = None, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._statement = statement("insert_messages", schema=schema)
        self._max_message_bytes = max_message_bytes

    def write(self, session: Session, message: Message) -> UUID:
        """
        Insert *message* in the open transaction of *session* and give its id.

        Raises:
            InvalidMessage: It could never be published. Nothing was sent to the database.
            NoTransaction: The connection is in autocommit mode and no transaction is open.
            SchemaMismatch: The table or a privilege is missing.
        """
        return self.write_many(session, [message])[0]

    def write_many(self, session: Session, messages: Iterable[Message]) -> list[UUID]:
        """Insert *messages* in one round trip and in their order, all or none; otherwise as `write`."""
        return execute(session, self._insert(encode(messages, max_message_bytes=self._max_message_bytes)))

    async def write_async(self, session: AsyncSession, message: Message) -> UUID:
        """Do what `write` does, on an asynchronous connection or cursor."""
        return (await self.write_many_async(session, [message]))[0]

    async def write_many_async(self, session: AsyncSession, messages: Iterable[Message]) -> list[UUID]:
        """Do what `write_many` does, on an asynchronous connection or cursor."""
        return await execute_async(session, self._insert(encode(messages, max_message_bytes=self._max_message_bytes)))

    @contextmanager
    def transaction(self, connection: Connection[object]) -> Iterator[Pending]:
        """
        Open a transaction, as `connection.transaction()` does, and insert what was written in it just before COMMIT.

        Numbers are drawn when every row that the block changes is locked, and others wait for them no longer than
        the COMMIT takes. If the block raises, nothing is inserted. If a transaction is open already, the block is a
        savepoint in it: messages are inserted when the block ends, and the transaction stays open.

        Raises:
            TransactionError: An earlier statement has begun a transaction, and no block around this one will commit it.
        """
        require_block(connection_of(connection))
        with connection.transaction():
            pending = Pending(max_message_bytes=self._max_message_bytes)
            yield pending
            execute(connection, self._insert(pending.end()))

    @asynccontextmanager
    async def transaction_async(self, connection: AsyncConnection[object]) -> AsyncIterator[Pending]:
        """Do what `transaction` does, on an asynchronous connection; writing to the block needs no await."""
        require_block(async_connection_of(connection))
        async with connection.transaction():
            pending = Pending(max_message_bytes=self._max_message_bytes)
            yield pending
            await execute_async(connection, self._insert(pending.end()))

    def _insert(self, rows: Sequence[Row]) -> Queries[list[UUID]]:
        if rows:
            yield Query(self._statement, columns(rows), has_rows=False)
        return [row.message_id for row in rows]
