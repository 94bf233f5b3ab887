"""Write messages with SQLAlchemy, Core or ORM, in the transaction of its connection or session."""

from __future__ import annotations

import re
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from sqlalchemy import ARRAY, Connection, LargeBinary, Text, bindparam, text
from sqlalchemy.orm import Session, SessionTransactionOrigin, scoped_session

from outbox_relay.errors import NoTransaction, TransactionError
from outbox_relay.sql import statement
from outbox_relay.writer.rows import MAX_MESSAGE_BYTES, Pending, Row, columns, encode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
    from uuid import UUID

    from sqlalchemy import TextClause
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

    from outbox_relay.writer.message import Message


class Outbox:
    """
    The outbox for SQLAlchemy with any of its PostgreSQL drivers; it holds no connection and may be shared.

    A session's changes are flushed before a message is inserted, so that the aggregate's row is locked before the
    number is drawn. The database's errors come as SQLAlchemy raises them.

    Args:
        schema: Where the outbox is; None leaves it to the connection's search_path.
        max_message_bytes: Largest message, with its key and headers; no more than message.max.bytes of the relay,
            which would park it.
    """

    def __init__(self, *, schema: str | None = None, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._statement = _text(statement("insert_messages", schema=schema).decode())
        self._max_message_bytes = max_message_bytes

    def write(self, session: Connection | Session, message: Message) -> UUID:
        """
        Insert *message* in the transaction of *session*, which begins if none is open, and give its id.

        Raises:
            InvalidMessage: It could never be published. Nothing was sent to the database.
            NoTransaction: The isolation level is AUTOCOMMIT.
            TransactionError: The session has written to another database in this transaction.
            TypeError: *session* is none of SQLAlchemy's.
        """
        return self.write_many(session, [message])[0]

    def write_many(self, session: Connection | Session, messages: Iterable[Message]) -> list[UUID]:
        """Insert *messages* in one round trip and in their order, all or none; otherwise as `write`."""
        return self._insert(session, encode(messages, max_message_bytes=self._max_message_bytes))

    async def write_async(self, session: AsyncConnection | AsyncSession, message: Message) -> UUID:
        """Do what `write` does, on an asynchronous connection or session."""
        return (await self.write_many_async(session, [message]))[0]

    async def write_many_async(
        self, session: AsyncConnection | AsyncSession, messages: Iterable[Message]
    ) -> list[UUID]:
        """Do what `write_many` does, on an asynchronous connection or session."""
        return await _asynchronous(session).run_sync(self.write_many, messages)

    @contextmanager
    def transaction(self, session: Connection | Session) -> Iterator[Pending]:
        """
        Begin a transaction, as `session.begin()` does, and insert what was written in it just before COMMIT.

        Numbers are drawn when every row that the block changes is locked, and others wait for them no longer than
        the COMMIT takes. If the block raises, nothing is inserted. If a transaction is open already, the block is a
        savepoint in it: messages are inserted when the block ends, and the transaction stays open. So begin it with
        `session.begin()`: of a session, a transaction that an earlier statement has begun is refused.

        Raises:
            TransactionError: No block is going to commit what is open, or the session is bound to several databases.
        """
        _check_block(session)
        with session.begin_nested() if session.in_transaction() else session.begin():
            _connection(session)  # refused before anything in the block is committed
            pending = Pending(max_message_bytes=self._max_message_bytes)
            yield pending
            self._insert(session, pending.end())

    @asynccontextmanager
    async def transaction_async(self, session: AsyncConnection | AsyncSession) -> AsyncIterator[Pending]:
        """Do what `transaction` does, on an asynchronous connection or session; writing to the block needs no await."""
        await _asynchronous(session).run_sync(_check_block)
        async with session.begin_nested() if session.in_transaction() else session.begin():
            await session.run_sync(_connection)
            pending = Pending(max_message_bytes=self._max_message_bytes)
            yield pending
            await session.run_sync(self._insert, pending.end())

    def _insert(self, session: Connection | Session, rows: Sequence[Row]) -> list[UUID]:
        if isinstance(session, Session):
            session.flush()
        connection = _connection(session)
        if rows:
            connection.execute(self._statement, columns(rows))
        return [row.message_id for row in rows]


def _connection(session: Connection | Session) -> Connection:
    _check_kind(session)
    connection = session.connection() if isinstance(session, Session) else session
    if isinstance(session, Session):
        _check_only(session, connection)
    if connection.connection.autocommit:
        raise NoTransaction(
            "the isolation level is AUTOCOMMIT, so a message would be committed apart from the change that it "
            "belongs to: write it on a connection with another level"
        )
    return connection


def _check_kind(session: object) -> None:
    if isinstance(session, Connection | Session):
        return
    if isinstance(session, scoped_session):
        raise TypeError("got a scoped_session, not a session: pass the one of this scope, which calling it gives")
    if hasattr(session, "run_sync"):
        raise TypeError(f"got an {type(session).__name__}: call the method whose name ends in _async, and await it")
    raise TypeError(
        f"got a {type(session).__module__}.{type(session).__qualname__}: pass a Session or a Connection of SQLAlchemy"
    )


def _asynchronous(session: AsyncConnection | AsyncSession) -> AsyncConnection | AsyncSession:
    """Give *session* if it is one; not by its class, for that is not to be had where greenlet is not installed."""
    if not hasattr(session, "run_sync"):
        raise TypeError(
            f"got a {type(session).__module__}.{type(session).__qualname__}: pass an AsyncSession or AsyncConnection "
            "of SQLAlchemy, or call the method without _async"
        )
    return session


def _check_block(session: Connection | Session) -> None:
    """Refuse a session whose transaction was begun by a statement: the end of a block in it commits nothing."""
    _check_kind(session)
    begun = session.get_transaction() if isinstance(session, Session) else None
    if begun is not None and begun.origin is SessionTransactionOrigin.AUTOBEGIN:
        raise TransactionError(
            "an earlier statement, perhaps a SELECT, has begun the session's transaction, and the end of this block "
            "would not commit it: commit it first, or put all of it into one `with session.begin():`"
        )


def _check_only(session: Session, connection: Connection) -> None:
    """Refuse a session that has a transaction in another database, which could be committed without this one."""
    begun = session.get_transaction()
    others = {of for of, *_ in begun._connections.values()} - {connection} if begun else set()  # noqa: SLF001
    if others:
        raise TransactionError(
            "the session is bound to several databases and has a transaction in each, so a message could be committed "
            "without the change that it belongs to: flush, and pass the connection of the change, "
            "session.connection(bind_arguments={'mapper': ...})"
        )


def _text(query: str) -> TextClause:
    types = {"payload_bytes": ARRAY(LargeBinary)}
    parameters = [bindparam(name, type_=types.get(name, ARRAY(Text))) for name in Row._fields]
    return text(re.sub(r"%\((\w+)\)s", r":\1", query)).bindparams(*parameters)
