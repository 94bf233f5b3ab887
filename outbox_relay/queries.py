"""Database work of the libraries, written once and executed on synchronous and asynchronous connections alike."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from psycopg import AsyncConnection, AsyncCursor, Connection, Cursor, errors
from psycopg.pq import TransactionStatus
from psycopg.rows import TupleRow, tuple_row

from outbox_relay.errors import NoTransaction, SchemaMismatch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    Session = Connection[Any] | Cursor[Any]
    AsyncSession = AsyncConnection[Any] | AsyncCursor[Any]

T = TypeVar("T")


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
    connection = session if isinstance(session, Connection) else session.connection
    require_transaction(connection)
    with _schema_errors(), connection.cursor(row_factory=tuple_row) as cursor:
        rows: list[TupleRow] | None = None
        while True:
            try:
                query = next(queries) if rows is None else queries.send(rows)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]  # a generator's value is untyped here
            cursor.execute(query.text, query.parameters)
            rows = cursor.fetchall() if query.has_rows else []


async def execute_async(session: AsyncSession, queries: Queries[T]) -> T:
    """Do what `execute` does, on an asynchronous connection or one of its cursors."""
    connection = session if isinstance(session, AsyncConnection) else session.connection
    require_transaction(connection)
    with _schema_errors():
        async with connection.cursor(row_factory=tuple_row) as cursor:
            rows: list[TupleRow] | None = None
            while True:
                try:
                    query = next(queries) if rows is None else queries.send(rows)
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]  # a generator's value is untyped here
                await cursor.execute(query.text, query.parameters)
                rows = await cursor.fetchall() if query.has_rows else []


def require_transaction(connection: Connection[Any] | AsyncConnection[Any]) -> None:
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
