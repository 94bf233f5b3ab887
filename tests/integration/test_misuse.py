"""What cannot work is refused at once, with an error that names what to pass or to do."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import asyncpg  # type: ignore[import-untyped]
import psycopg
import psycopg2.pool  # type: ignore[import-untyped]
import pytest
import sqlalchemy
from psycopg_pool import ConnectionPool
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

import outbox_relay.writer.sqlalchemy
from outbox_relay.consumer import Inbox, SequenceInbox
from outbox_relay.errors import TransactionError
from outbox_relay.idempotency import IdempotencyKeys
from outbox_relay.transactions import transact, transact_async
from outbox_relay.writer import Message, Outbox
from tests.fixtures.messages import a_message

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fixtures.postgres import Database

KEYS = IdempotencyKeys("charges")
PLACED = Message(aggregate_type="order", aggregate_id="1", event_type="placed")
ALCHEMY = outbox_relay.writer.sqlalchemy.Outbox()

CALLS: dict[str, Callable[[Any], object]] = {
    "accept": lambda given: Inbox("billing").accept(given, a_message()),
    "accept by number": lambda given: SequenceInbox("billing").accept(given, a_message()),
    "process": lambda given: Inbox("billing").process(given, a_message(), lambda *_: 1),
    "prune_all": lambda given: Inbox("billing").prune_all(given, older_than=None),  # type: ignore[arg-type]
    "answer": lambda given: KEYS.answer(given, "k", lambda _: 1, fingerprint="f"),
    "write": lambda given: Outbox().write(given, PLACED),
    "once": lambda given: ExitStack().enter_context(Inbox("billing").once(given, a_message())),
    "transaction": lambda given: ExitStack().enter_context(Outbox().transaction(given)),
}


@pytest.fixture(scope="module")
def url() -> str:
    return "postgresql+psycopg://nobody@127.0.0.1:1/nowhere"


def misfits(dsn: str) -> dict[str, tuple[object, str]]:
    """Give what people pass, and what the error is to say."""
    engine = sqlalchemy.create_engine("postgresql+psycopg://nobody@127.0.0.1:1/nowhere")
    return {
        "session": (Session(engine), "outbox_relay.writer.sqlalchemy"),
        "scoped": (scoped_session(sessionmaker(engine)), "outbox_relay.writer.sqlalchemy"),
        "pool": (ConnectionPool(dsn, open=False), "with pool.connection() as connection"),
        "none": (None, "not a psycopg.Connection"),
        "text": (dsn, "not a psycopg.Connection"),
    }


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_connection_is_refused_with_what_to_pass(database: Database, call: str) -> None:
    with psycopg2_connection(database) as other:
        for given, words in [*misfits(database.dsn).values(), (other, "not a psycopg.Connection")]:
            with pytest.raises(TypeError, match=re.escape(words)):
                CALLS[call](given)


def psycopg2_connection(database: Database) -> Any:  # noqa: ANN401 -- psycopg2 has no types
    return psycopg2.connect(database.dsn)


def test_connections_of_the_other_kind_are_refused_with_the_method_to_call(database: Database) -> None:
    async def swap() -> None:
        async with await psycopg.AsyncConnection.connect(database.dsn) as connection:
            for call in CALLS.values():
                with pytest.raises(TypeError, match="ends in _async"):
                    call(connection)
        with database.connect() as plain:
            with pytest.raises(TypeError, match="without _async"):
                await Inbox("billing").accept_async(plain, a_message())  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="without _async"):
                await Outbox().write_async(plain, PLACED)  # type: ignore[arg-type]
        other = await asyncpg.connect(database.dsn)
        with pytest.raises(TypeError, match=r"not a psycopg\.AsyncConnection"):
            await Inbox("billing").accept_async(other, a_message())
        with pytest.raises(TypeError, match="a psycopg_pool pool"):
            await transact_async(other, lambda _: asyncio.sleep(0))
        await other.close()

    asyncio.run(swap())


def test_what_gives_no_connection_of_psycopg_is_no_source(database: Database) -> None:
    pool = psycopg2.pool.SimpleConnectionPool(1, 1, database.dsn)
    sources: list[Any] = [pool, database.dsn, None, lambda: None]
    for source in sources:
        with pytest.raises(TypeError, match="a psycopg_pool pool"):
            transact(source, lambda _: 1)
    pool.closeall()
    opening: Any = lambda: psycopg.AsyncConnection.connect(database.dsn)  # noqa: E731
    with pytest.raises(TypeError, match="ends in _async"):
        transact(opening, lambda _: 1)


@pytest.mark.parametrize("kind", [Inbox, SequenceInbox])
def test_a_misspelt_choice_is_refused(kind: type[Inbox]) -> None:
    with pytest.raises(ValueError, match=r"replays is 'ignored': give .ignore. or .apply."):
        kind("billing", replays="ignored")  # type: ignore[arg-type]


def test_a_block_that_would_not_commit_is_refused(database: Database) -> None:
    with database.connect() as connection:
        connection.execute("SELECT")
        with pytest.raises(TransactionError, match="Commit it first"), Outbox().transaction(connection):
            pass
        connection.commit()
        with Outbox().transaction(connection) as pending:
            pending.write(PLACED)
    with database.connect() as connection:
        assert connection.execute("SELECT count(*) FROM outbox").fetchone() == (1,)


def test_a_block_of_a_session_that_would_not_commit_is_refused(database: Database) -> None:
    engine = sqlalchemy.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(database.dsn))
    with Session(engine) as session:
        session.execute(sqlalchemy.text("SELECT 1"))
        with pytest.raises(TransactionError, match="commit it first"), ALCHEMY.transaction(session):
            pass
        session.commit()
        with ALCHEMY.transaction(session) as pending:
            pending.write(PLACED)
    with database.connect() as connection:
        assert connection.execute("SELECT count(*) FROM outbox").fetchone() == (1,)
    engine.dispose()


def test_sessions_of_the_wrong_kind_are_refused_with_what_to_pass(url: str) -> None:
    engine = sqlalchemy.create_engine(url)
    wrong: list[tuple[Any, str]] = [
        (scoped_session(sessionmaker(engine)), "pass the one of this scope"),
        (engine, "pass a Session or a Connection"),
        (create_async_engine(url).connect(), "ends in _async"),
    ]
    for session, words in wrong:
        with pytest.raises(TypeError, match=words):
            ALCHEMY.write(session, PLACED)
        with pytest.raises(TypeError, match=words), ALCHEMY.transaction(session):
            pass
    plain: Any = Session(engine)
    with pytest.raises(TypeError, match="without _async"):
        asyncio.run(ALCHEMY.write_async(plain, PLACED))


def test_without_greenlet_the_writer_is_there_for_those_who_do_not_await() -> None:
    program = "import sys; sys.modules['greenlet'] = None; import outbox_relay.writer.sqlalchemy"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_session_of_several_databases_writes_no_message_apart_from_its_change(
    database: Database, inbox_database: Database
) -> None:
    engines = [
        sqlalchemy.create_engine("postgresql+psycopg://", creator=lambda dsn=each.dsn: psycopg.connect(dsn))
        for each in (database, inbox_database)
    ]
    orders = sqlalchemy.Table("orders", sqlalchemy.MetaData(), sqlalchemy.Column("id", sqlalchemy.Integer))
    orders.create(engines[1])
    with Session(engines[0], binds={orders: engines[1]}) as session:
        session.execute(orders.insert().values(id=1))
        with pytest.raises(TransactionError, match="bound to several databases"):
            ALCHEMY.write(session, PLACED)
    for engine in engines:
        engine.dispose()
