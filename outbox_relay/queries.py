"""
Database work of the libraries, written once and executed on synchronous and asynchronous connections alike.

The connection is the caller's, with adapters, cursors, row factories and an encoding that suit the caller's queries.
None of them reaches the queries that are executed here.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar, overload

from psycopg import AsyncConnection, AsyncCursor, Connection, Cursor, errors, postgres
from psycopg.adapt import AdaptersMap, Loader
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg.rows import TupleRow, tuple_row
from psycopg.types import TypesRegistry
from psycopg.types.array import ListBinaryDumper

from outbox_relay.errors import NoTransaction, SchemaMismatch, TransactionError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from typing import Any

    from psycopg.abc import Buffer

    AnyConnection = Connection[Any] | AsyncConnection[Any]
    Session = Connection[Any] | Cursor[Any]
    AsyncSession = AsyncConnection[Any] | AsyncCursor[Any]

T = TypeVar("T")


class _TextLoader(Loader):
    """Loads text as UTF-8, which it is here; psycopg's own gives bytes where the client's encoding is SQL_ASCII."""

    def load(self, data: Buffer) -> str:
        return bytes(data).decode()


def _own_adapters() -> AdaptersMap:
    """
    Make psycopg's adapters as they come, whatever was registered since in `psycopg.adapters`.

    Arrays are sent in binary: with `standard_conforming_strings` off, psycopg's text for an array of bytes is read as
    other bytes.
    """
    types = TypesRegistry()
    postgres.register_default_types(types)
    adapters = AdaptersMap(types=types)
    postgres.register_default_adapters(adapters)
    adapters.register_dumper(list, ListBinaryDumper)
    adapters.register_loader("text", _TextLoader)
    return adapters


_ADAPTERS = _own_adapters()


class _OwnCursor(Cursor[TupleRow]):
    """A cursor that adapts values by our own map."""

    @property
    def adapters(self) -> AdaptersMap:
        return _ADAPTERS


class _OwnAsyncCursor(AsyncCursor[TupleRow]):
    """The same on an asynchronous connection."""

    @property
    def adapters(self) -> AdaptersMap:
        return _ADAPTERS


@overload
def own_cursor(connection: Connection[Any]) -> Cursor[TupleRow]: ...
@overload
def own_cursor(connection: AsyncConnection[Any]) -> AsyncCursor[TupleRow]: ...
@overload
def own_cursor(connection: AnyConnection) -> Cursor[TupleRow] | AsyncCursor[TupleRow]: ...
def own_cursor(connection: AnyConnection) -> Cursor[TupleRow] | AsyncCursor[TupleRow]:
    """Open a cursor that binds parameters on the server and gives tuples, whatever the connection's own cursors do."""
    if isinstance(connection, Connection):
        return _OwnCursor(connection, row_factory=tuple_row)
    return _OwnAsyncCursor(connection, row_factory=tuple_row)


@dataclass(frozen=True, slots=True)
class Query:
    """
    One statement with its named parameters.

    `has_rows` is told, not seen: in pipeline mode nothing has come back yet, and no rows would look like none found.
    """

    text: bytes
    parameters: Mapping[str, object] = field(default_factory=dict)
    has_rows: bool = True


Queries = Generator[Query, list[TupleRow], T]
"""
Work that yields queries, is sent the rows of each as tuples, and returns its result.

A generator knows nothing of connections, so there is one of it where there would be a pair of functions with and
without `await`.
"""


def execute(session: Session, queries: Queries[T]) -> T:
    """
    Execute *queries* in the open transaction of *session*, a connection or one of its cursors, and give their result.

    The driver's own errors pass through, so that whoever owns the transaction can retry it by their SQLSTATE.

    Raises:
        NoTransaction: The connection is in autocommit mode and no transaction is open.
        SchemaMismatch: A table, a column or a privilege is missing.
    """
    connection = connection_of(session)
    with _schema_errors(), own_cursor(connection) as cursor:
        if connection.autocommit:
            sync(connection)
        require_transaction(connection)
        queries, encodes = _in_utf8(connection, queries)
        rows: list[TupleRow] | None = None
        while True:
            try:
                query = next(queries) if rows is None else queries.send(rows)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]  # a generator's value is untyped here
            cursor.execute(query.text, query.parameters)
            rows = cursor.fetchall() if query.has_rows else []
            if encodes:
                sync(connection)


async def execute_async(session: AsyncSession, queries: Queries[T]) -> T:
    """Do what `execute` does, on an asynchronous connection or one of its cursors."""
    connection = async_connection_of(session)
    with _schema_errors():
        async with own_cursor(connection) as cursor:
            if connection.autocommit:
                await sync_async(connection)
            require_transaction(connection)
            queries, encodes = _in_utf8(connection, queries)
            rows: list[TupleRow] | None = None
            while True:
                try:
                    query = next(queries) if rows is None else queries.send(rows)
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]  # a generator's value is untyped here
                await cursor.execute(query.text, query.parameters)
                rows = await cursor.fetchall() if query.has_rows else []
                if encodes:
                    await sync_async(connection)


def connection_of(session: object) -> Connection[Any]:
    """
    Give the connection that *session* is, or belongs to.

    Raises:
        TypeError: It is nothing of psycopg's, or asynchronous.
    """
    if isinstance(session, Cursor):
        return session.connection
    if isinstance(session, Connection):
        return session
    raise TypeError(_misfit(session, wanted="a psycopg.Connection or one of its cursors"))


def async_connection_of(session: object) -> AsyncConnection[Any]:
    """Do what `connection_of` does, of an asynchronous session."""
    if isinstance(session, AsyncCursor):
        return session.connection
    if isinstance(session, AsyncConnection):
        return session
    raise TypeError(_misfit(session, wanted="a psycopg.AsyncConnection or one of its cursors"))


def _misfit(session: object, *, wanted: str) -> str:
    kind = type(session)
    told = f"got a {kind.__module__}.{kind.__qualname__}, not {wanted}"
    match session:
        case Connection() | Cursor():
            return f"{told}: call the method without _async"
        case AsyncConnection() | AsyncCursor():
            return f"{told}: call the method whose name ends in _async, and await it"
    if hasattr(session, "getconn"):
        return f"{told}: take a connection from the pool, as in `with pool.connection() as connection:`"
    if kind.__module__.startswith("sqlalchemy."):
        return (
            f"{told}: write messages with outbox_relay.writer.sqlalchemy, and for the others pass the driver's own, "
            "session.connection().connection.driver_connection, on an engine whose URL begins with postgresql+psycopg://"
        )
    if kind.__module__.startswith("django."):
        return f"{told}: write messages with outbox_relay.writer.django, and for the others pass connection.connection"
    return f"{told}: other drivers are not supported, but SQLAlchemy's in outbox_relay.writer.sqlalchemy"


def require_transaction(connection: AnyConnection) -> None:
    """
    Return when what is executed next on *connection* is part of a transaction that somebody will commit.

    Raises:
        NoTransaction: The connection is in autocommit mode and no transaction is open.
    """
    if connection.autocommit and connection.info.transaction_status is TransactionStatus.IDLE:
        raise NoTransaction(
            "the connection is in autocommit mode and no transaction is open, so this would be committed apart from "
            "the change that it belongs to: put both into one `with connection.transaction():`"
        )


def require_open(connection: AnyConnection) -> None:
    """
    Return when a transaction is open on *connection*, for a block that ends without committing anything.

    Raises:
        NoTransaction: None is.
    """
    if connection.info.transaction_status is TransactionStatus.IDLE:
        raise NoTransaction(
            "no transaction is open, and the end of this block would not commit one: put it, with the change that it "
            "belongs to, into a `with connection.transaction():`"
        )


def require_block(connection: AnyConnection) -> None:
    """
    Return when a block on *connection* is committed at its end, or is part of one that is.

    Raises:
        TransactionError: A statement has opened a transaction that no block will commit.
    """
    is_open = connection.info.transaction_status is not TransactionStatus.IDLE
    has_block = getattr(connection, "_num_transactions", 1)  # psycopg tells nobody else
    if is_open and not connection.autocommit and not has_block:
        raise TransactionError(
            "a transaction is open that no block will commit: an earlier statement, perhaps a SELECT, has begun it. "
            "Commit it first, or put all of it into one `with connection.transaction():`"
        )


@contextmanager
def savepoint(session: Session) -> Iterator[None]:
    """
    Undo what a block did if it raises, even if the transaction of *session* goes on and is committed.

    That transaction is opened if this is its beginning, for the driver would commit at the end of an outermost block.

    Raises:
        NoTransaction: The connection is in autocommit mode and no transaction is open.
    """
    connection = connection_of(session)
    execute(session, _begin(connection))
    with connection.transaction():
        yield


@asynccontextmanager
async def savepoint_async(session: AsyncSession) -> AsyncIterator[None]:
    """Do what `savepoint` does, on an asynchronous connection or one of its cursors."""
    connection = async_connection_of(session)
    await execute_async(session, _begin(connection))
    async with connection.transaction():
        yield


def _begin(connection: AnyConnection) -> Queries[None]:
    if connection.info.transaction_status is TransactionStatus.IDLE:
        yield Query(b"SELECT", has_rows=False)


def sync(connection: Connection[Any]) -> None:
    """
    Let all that was sent in a pipeline be carried out.

    Only then does the driver know whether a transaction is open, and what the server has set.
    """
    if _is_pipeline(connection):
        with connection.pipeline() as pipeline:
            pipeline.sync()


async def sync_async(connection: AsyncConnection[Any]) -> None:
    """Do what `sync` does, on an asynchronous connection."""
    if _is_pipeline(connection):
        async with connection.pipeline() as pipeline:
            await pipeline.sync()


def _is_pipeline(connection: AnyConnection) -> bool:
    return connection.pgconn.pipeline_status != PipelineStatus.OFF


def _in_utf8(connection: AnyConnection, queries: Queries[T]) -> tuple[Queries[T], bool]:
    """Give *queries* so that they are executed in UTF-8, which has every character, and whether that takes a change."""
    if connection.info.encoding == "utf-8":
        return queries, False
    before = connection.info.parameter_status("client_encoding")
    return _changing_encoding(queries, before=before), True


def _changing_encoding(queries: Queries[T], *, before: str | None) -> Queries[T]:
    """
    Do *queries* in UTF-8, and put back the encoding that was there before.

    An error of the server puts it back by itself, with all that the transaction, or the savepoint, has set.
    """
    change = b"SELECT set_config('client_encoding', %(encoding)s, true)"
    yield Query(change, {"encoding": "UTF8"})
    try:
        result = yield from queries
    except Exception:
        yield Query(change, {"encoding": before})
        raise
    yield Query(change, {"encoding": before})
    return result


@contextmanager
def _schema_errors() -> Iterator[None]:
    try:
        yield
    except (errors.UndefinedTable, errors.UndefinedColumn, errors.InvalidSchemaName) as error:
        raise SchemaMismatch(
            f"{error.diag.message_primary}: apply the migrations with `outbox-relay migrate apply`, for a consumer's "
            "tables with --inbox, or set the schema or search_path that they are in"
        ) from error
    except errors.InsufficientPrivilege as error:
        raise SchemaMismatch(
            f"{error.diag.message_primary}: grant outbox_writer, or inbox_consumer for a consumer's tables, "
            "to the role that runs this"
        ) from error
