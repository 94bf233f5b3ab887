"""Messages written with SQLAlchemy share the fate of its transaction: Core and ORM, with and without asyncio."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from outbox_relay.errors import InvalidMessage, NoTransaction
from outbox_relay.operate import migrate
from outbox_relay.writer import Message
from outbox_relay.writer.sqlalchemy import Outbox

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from tests.fixtures.shop import Shop

OUTBOX = Outbox()
EACH_SESSION = pytest.mark.parametrize("open_session", [Connection, Session], ids=["core", "orm"])
EACH_ASYNC_SESSION = pytest.mark.parametrize("open_session", [AsyncConnection, AsyncSession], ids=["core", "orm"])


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    total: Mapped[int]


def placed(key: str = "4711", **fields: Any) -> Message:  # noqa: ANN401 -- the fields of a message
    return Message(aggregate_type="order", aggregate_id=key, event_type="placed", **fields)


def url(shop: Shop, *, driver: str) -> str:
    return shop.dsn.replace("postgresql://", f"postgresql+{driver}://")


@pytest.fixture(params=["psycopg", "psycopg2"])
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["psycopg", "asyncpg"])
def async_driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def engine(shop: Shop, driver: str) -> Iterator[Engine]:
    engine = create_engine(url(shop, driver=driver))
    yield engine
    engine.dispose()


def run_async(shop: Shop, work: Callable[[Any], Awaitable[object]], *, open_session: type, driver: str) -> None:
    async def run() -> None:
        engine = create_async_engine(url(shop, driver=driver))
        try:
            async with engine.connect() if open_session is AsyncConnection else AsyncSession(engine) as session:
                await work(session)
        finally:
            await engine.dispose()

    asyncio.run(run())


@pytest.fixture
def session(engine: Engine, open_session: type) -> Iterator[Connection | Session]:
    with engine.connect() if open_session is Connection else Session(engine) as session:
        yield session


@EACH_SESSION
def test_a_committed_message_is_in_the_outbox_as_it_was_given(shop: Shop, session: Connection | Session) -> None:
    sent = [placed("1", payload={"total": 120}, headers={"a": "ä"}), placed("2", payload_bytes=b"\0"), placed("3")]
    assert OUTBOX.write(session, sent[0]) == sent[0].message_id
    assert OUTBOX.write_many(session, sent[1:]) == [message.message_id for message in sent[1:]]
    assert OUTBOX.write_many(session, []) == []
    assert shop.keys() == []
    session.commit()
    rows = shop.messages()
    assert [(row.aggregate_id, row.payload, row.payload_bytes, row.headers) for row in rows] == [
        ("1", {"total": 120}, None, {"a": "ä"}),
        ("2", None, b"\0", {}),
        ("3", None, None, {}),
    ]
    assert [row.message_id for row in rows] == [message.message_id for message in sent]


@EACH_SESSION
def test_message_and_change_are_rolled_back_together(shop: Shop, session: Connection | Session) -> None:
    session.execute(text("INSERT INTO orders (id, total) VALUES (1, 2)"))
    OUTBOX.write(session, placed())
    session.rollback()
    assert (shop.orders(), shop.keys()) == ([], [])


@EACH_SESSION
def test_a_savepoint_takes_back_its_own_messages_only(shop: Shop, session: Connection | Session) -> None:
    OUTBOX.write(session, placed("before"))
    with session.begin_nested() as savepoint:
        OUTBOX.write(session, placed("inside"))
        savepoint.rollback()
    OUTBOX.write(session, placed("after"))
    session.commit()
    assert shop.keys() == ["before", "after"]


@EACH_SESSION
@pytest.mark.parametrize("where", ["engine", "connection"])
def test_autocommit_is_refused_because_it_would_be_a_dual_write(
    shop: Shop, driver: str, open_session: type, where: str
) -> None:
    level: Any = {"isolation_level": "AUTOCOMMIT"}
    engine = create_engine(url(shop, driver=driver), **level if where == "engine" else {})
    connection = engine.connect().execution_options(**level if where == "connection" else {})
    with connection, connection if open_session is Connection else Session(connection) as session:
        for attempt in (write, write_deferred):
            with pytest.raises(NoTransaction, match="the isolation level is AUTOCOMMIT"):
                attempt(session)
            session.rollback()
    engine.dispose()
    assert (shop.orders(), shop.keys()) == ([], [])


def write(session: Connection | Session) -> None:
    OUTBOX.write(session, placed())


def write_deferred(session: Connection | Session) -> None:
    with OUTBOX.transaction(session):
        session.execute(text("INSERT INTO orders (id, total) VALUES (1, 2)"))


def test_changes_of_a_session_are_in_the_database_before_the_message(shop: Shop, engine: Engine) -> None:
    with Session(engine) as session:
        session.add(Order(id=4711, total=120))
        OUTBOX.write(session, placed())
        session.commit()
    with shop.database.connect() as admin:
        assert admin.execute("SELECT orders.cmin::text, outbox.cmin::text FROM orders, outbox").fetchall() == [
            ("0", "1")
        ]


@EACH_SESSION
def test_a_deferred_message_is_inserted_at_the_end_of_its_block(shop: Shop, session: Connection | Session) -> None:
    with OUTBOX.transaction(session) as pending:
        pending.write(placed())
        if isinstance(session, Session):
            session.add(Order(id=4711, total=120))
        else:
            session.execute(text("INSERT INTO orders (id, total) VALUES (4711, 120)"))
    with shop.database.connect() as admin:
        assert admin.execute("SELECT orders.cmin::text, outbox.cmin::text FROM orders, outbox").fetchall() == [
            ("0", "1")
        ]


@EACH_SESSION
def test_nothing_is_inserted_if_the_block_raises(shop: Shop, session: Connection | Session) -> None:
    with suppress(ZeroDivisionError), OUTBOX.transaction(session) as pending:
        session.execute(text("INSERT INTO orders (id, total) VALUES (1, 2)"))
        pending.write(placed())
        raise ZeroDivisionError
    session.commit()
    assert (shop.orders(), shop.keys()) == ([], [])


@EACH_SESSION
def test_a_deferred_block_in_an_open_transaction_is_a_savepoint_of_it(
    shop: Shop, session: Connection | Session
) -> None:
    with OUTBOX.transaction(session) as outer:
        outer.write(placed("outer"))
        with OUTBOX.transaction(session) as inner:
            inner.write(placed("inner"))
        with suppress(ZeroDivisionError), OUTBOX.transaction(session) as failed:
            failed.write(placed("failed"))
            raise ZeroDivisionError
        assert shop.keys() == []
    assert shop.keys() == ["inner", "outer"]


@EACH_SESSION
def test_a_bad_message_leaves_the_transaction_usable(shop: Shop, session: Connection | Session) -> None:
    with pytest.raises(InvalidMessage):
        OUTBOX.write(session, placed("bad", payload=object()))
    OUTBOX.write(session, placed("next"))
    session.commit()
    assert shop.keys() == ["next"]


def test_the_outbox_may_be_in_a_schema_that_is_not_searched(shop: Shop, engine: Engine) -> None:
    with shop.database.connect() as admin:
        migrate.apply(admin, schema='odd :"name')
    with engine.begin() as connection:
        Outbox(schema='odd :"name').write(connection, placed("odd"))
    with shop.database.connect() as admin:
        assert admin.execute('SELECT aggregate_id FROM "odd :""name".outbox').fetchall() == [("odd",)]


@EACH_ASYNC_SESSION
def test_asynchronous_sessions_write_the_same(shop: Shop, async_driver: str, open_session: type) -> None:
    async def work(session: AsyncConnection | AsyncSession) -> None:
        await OUTBOX.write_async(session, placed("1"))
        savepoint = await session.begin_nested()
        await OUTBOX.write_async(session, placed("rolled back"))
        await savepoint.rollback()
        await OUTBOX.write_many_async(session, [placed("2"), placed("3")])
        await session.commit()
        await OUTBOX.write_async(session, placed("never committed"))

    run_async(shop, work, open_session=open_session, driver=async_driver)
    assert shop.keys() == ["1", "2", "3"]


@EACH_ASYNC_SESSION
def test_asynchronous_autocommit_is_refused_too(shop: Shop, async_driver: str, open_session: type) -> None:
    async def work(session: AsyncConnection | AsyncSession) -> None:
        if isinstance(session, AsyncConnection):
            await session.execution_options(isolation_level="AUTOCOMMIT")
        else:
            await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        await OUTBOX.write_async(session, placed())

    with pytest.raises(NoTransaction):
        run_async(shop, work, open_session=open_session, driver=async_driver)
    assert shop.keys() == []


@EACH_ASYNC_SESSION
def test_asynchronous_blocks_defer_as_well(shop: Shop, async_driver: str, open_session: type) -> None:
    async def work(session: AsyncConnection | AsyncSession) -> None:
        async with OUTBOX.transaction_async(session) as outer:
            outer.write(placed("outer"))
            async with OUTBOX.transaction_async(session) as inner:
                inner.write(placed("inner"))
            with suppress(ZeroDivisionError):
                async with OUTBOX.transaction_async(session) as failed:
                    failed.write(placed("failed"))
                    raise ZeroDivisionError

    run_async(shop, work, open_session=open_session, driver=async_driver)
    assert shop.keys() == ["inner", "outer"]
