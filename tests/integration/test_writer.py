"""Messages written with psycopg share the fate of their transaction, and their numbers follow the order of writing."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outbox_relay.errors import InvalidMessage, NoTransaction, SchemaMismatch
from outbox_relay.operate import migrate
from outbox_relay.relay.message import Addressing
from outbox_relay.writer import Message, Outbox
from tests.fixtures.outbox import PLAIN
from tests.fixtures.waiting import eventually
from tests.integration.test_schema import PROBE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from uuid import UUID

    from psycopg import Connection

    from outbox_relay.queries import Session
    from tests.fixtures.postgres import Database
    from tests.fixtures.shop import Shop

OUTBOX = Outbox()
ORDER = "INSERT INTO orders (id, total) VALUES (4711, 120)"


def placed(key: str = "4711", **fields: Any) -> Message:  # noqa: ANN401 -- the fields of a message
    return Message(aggregate_type="order", aggregate_id=key, event_type="placed", **fields)


@pytest.fixture
def connection(shop: Shop) -> Iterator[Connection]:
    with psycopg.connect(shop.dsn) as connection:
        yield connection


@pytest.mark.every_postgres
def test_a_committed_message_is_in_the_outbox_as_it_was_given(shop: Shop, connection: Connection) -> None:
    sent = placed(
        payload={"total": 120}, headers={"tenant": "Köln"}, created_at=datetime(2026, 11, 21, 5, 0, 0, 123456, UTC)
    )
    assert OUTBOX.write(connection, sent) == sent.message_id
    connection.commit()
    [row] = shop.messages()
    assert (row.message_id, row.aggregate_type, row.aggregate_id, row.event_type) == (
        sent.message_id,
        "order",
        "4711",
        "placed",
    )
    assert (row.payload, row.payload_bytes, row.headers) == ({"total": 120}, None, {"tenant": "Köln"})
    assert row.created_at == sent.created_at


def test_a_tombstone_and_a_json_null_are_told_apart(shop: Shop, connection: Connection) -> None:
    OUTBOX.write_many(connection, [placed(), placed(payload=None), placed(payload_bytes=b"\x00\xff")])
    connection.commit()
    with shop.database.connect() as admin:
        stored = admin.execute("SELECT payload::text, payload_bytes FROM outbox ORDER BY sequence_no").fetchall()
    assert stored == [(None, None), ("null", None), (None, b"\x00\xff")]


def test_without_a_time_of_its_own_a_message_has_that_of_its_transaction(shop: Shop, connection: Connection) -> None:
    [(began,)] = connection.execute("SELECT now()")
    OUTBOX.write(connection, placed())
    connection.commit()
    assert shop.messages()[0].created_at == began


def test_message_and_change_are_rolled_back_together(shop: Shop, connection: Connection) -> None:
    connection.execute(ORDER)
    OUTBOX.write(connection, placed())
    connection.rollback()
    assert (shop.orders(), shop.keys()) == ([], [])


def test_a_savepoint_takes_back_its_own_messages_only(shop: Shop, connection: Connection) -> None:
    OUTBOX.write(connection, placed("before"))
    with connection.transaction(force_rollback=True):
        OUTBOX.write(connection, placed("inside"))
    OUTBOX.write(connection, placed("after"))
    connection.commit()
    assert shop.keys() == ["before", "after"]


@pytest.mark.parametrize("write", [OUTBOX.write, lambda session, _: OUTBOX.write_many(session, [])])
def test_autocommit_is_refused_because_it_would_be_a_dual_write(
    shop: Shop, write: Callable[[Session, Message], object]
) -> None:
    with psycopg.connect(shop.dsn, autocommit=True) as connection:
        for session in (connection, connection.cursor()):
            with pytest.raises(NoTransaction, match="in autocommit mode and no transaction is open"):
                write(session, placed())
    assert shop.keys() == []


def test_a_transaction_block_on_an_autocommit_connection_is_a_transaction(shop: Shop) -> None:
    with psycopg.connect(shop.dsn, autocommit=True) as connection, connection.transaction():
        OUTBOX.write(connection.cursor(), placed())
    assert shop.keys() == ["4711"]


@pytest.mark.every_postgres
def test_numbers_follow_the_order_of_the_list(shop: Shop, connection: Connection) -> None:
    keys = [f"{number * 7919 % 5000:04}" for number in range(5000)]
    sent = [placed(key) for key in keys]
    assert OUTBOX.write_many(connection, iter(sent)) == [message.message_id for message in sent]
    connection.commit()
    rows = shop.messages()
    assert [row.aggregate_id for row in rows] == keys
    assert [row.sequence_no for row in rows] == list(range(1, 5001))


@pytest.mark.every_postgres
def test_a_writer_of_many_has_its_transaction_id_before_it_draws_a_number(database: Database) -> None:
    with database.connect() as connection:
        connection.execute(PROBE)
        notices: list[str | None] = []
        connection.add_notice_handler(lambda notice: notices.append(notice.message_primary))
        OUTBOX.write_many(connection, [placed(), placed()])
    assert notices == ["before 0", "after 1", "before 1", "after 2"]


def test_many_messages_are_inserted_by_one_command(shop: Shop, connection: Connection) -> None:
    OUTBOX.write_many(connection, [placed(str(number)) for number in range(100)])
    OUTBOX.write(connection, placed())
    connection.commit()
    with shop.database.connect() as admin:
        commands = admin.execute("SELECT cmin::text, count(*) FROM outbox GROUP BY 1 ORDER BY 1").fetchall()
    assert commands == [("0", 100), ("1", 1)]


def test_one_bad_message_leaves_none_and_the_transaction_usable(shop: Shop, connection: Connection) -> None:
    with pytest.raises(InvalidMessage):
        OUTBOX.write_many(connection, [placed("good"), placed("bad", payload=float("nan"))])
    OUTBOX.write(connection, placed("next"))
    connection.commit()
    assert shop.keys() == ["next"]


def test_the_outbox_may_be_in_a_schema_that_is_not_searched(shop: Shop, connection: Connection) -> None:
    with shop.database.connect() as admin:
        migrate.apply(admin, schema='odd "name')
    OUTBOX.write(connection, placed("public"))
    Outbox(schema='odd "name').write(connection, placed("odd"))
    connection.commit()
    with shop.database.connect() as admin:
        assert admin.execute('SELECT aggregate_id FROM "odd ""name".outbox').fetchall() == [("odd",)]
    assert shop.keys() == ["public"]


def test_a_missing_table_is_reported_with_the_command_that_makes_it(connection: Connection) -> None:
    with pytest.raises(SchemaMismatch, match="apply the migrations with `outbox-relay migrate apply`"):
        Outbox(schema="nowhere").write(connection, placed())


def test_a_missing_privilege_is_reported_with_the_role_that_has_it(shop: Shop, connection: Connection) -> None:
    with shop.database.connect() as admin:
        admin.execute(f'REVOKE outbox_writer FROM "{shop.login}"')
    with pytest.raises(SchemaMismatch, match="permission denied for table outbox: grant outbox_writer"):
        OUTBOX.write(connection, placed())


@pytest.mark.parametrize("autocommit", [True, False])
def test_pipeline_mode_writes_in_the_block_that_is_open(shop: Shop, *, autocommit: bool) -> None:
    with psycopg.connect(shop.dsn, autocommit=autocommit) as connection, connection.pipeline():
        with connection.transaction():
            OUTBOX.write(connection, placed("1"))
            OUTBOX.write(connection, placed("2"))
        with connection.transaction(force_rollback=True):
            OUTBOX.write(connection, placed("3"))
    assert shop.keys() == ["1", "2"]


def test_asynchronous_connections_write_the_same(shop: Shop) -> None:
    async def write() -> list[UUID]:
        async with await psycopg.AsyncConnection.connect(shop.dsn) as connection:
            ids = [await OUTBOX.write_async(connection, placed("1"))]
            async with connection.transaction(force_rollback=True):
                await OUTBOX.write_async(connection, placed("rolled back"))
            ids += await OUTBOX.write_many_async(connection.cursor(), [placed("2"), placed("3")])
        return ids

    ids = asyncio.run(write())
    assert [(row.aggregate_id, row.message_id) for row in shop.messages()] == list(zip("123", ids, strict=True))


def test_asynchronous_autocommit_is_refused_too(shop: Shop) -> None:
    async def write() -> None:
        async with await psycopg.AsyncConnection.connect(shop.dsn, autocommit=True) as connection:
            await OUTBOX.write_async(connection, placed())

    with pytest.raises(NoTransaction):
        asyncio.run(write())
    assert shop.keys() == []


def last_number(shop: Shop) -> int:
    with shop.database.connect() as admin:
        [(number,)] = admin.execute("SELECT coalesce(pg_sequence_last_value('outbox_sequence_no_seq'), 0)")
    return int(number)


@pytest.mark.parametrize("autocommit", [True, False])
def test_a_deferred_message_draws_its_number_at_the_end_of_its_block(shop: Shop, *, autocommit: bool) -> None:
    with psycopg.connect(shop.dsn, autocommit=autocommit) as connection:
        with OUTBOX.transaction(connection) as pending:
            sent = [placed("1"), placed("2")]
            assert [pending.write(message) for message in sent] == [message.message_id for message in sent]
            connection.execute(ORDER)
            assert last_number(shop) == 0
        assert connection.info.transaction_status is psycopg.pq.TransactionStatus.IDLE
    assert (shop.orders(), shop.keys()) == ([4711], ["1", "2"])


def test_nothing_is_inserted_if_the_block_raises(shop: Shop, connection: Connection) -> None:
    for error in (ZeroDivisionError, psycopg.Rollback):
        with suppress(ZeroDivisionError), OUTBOX.transaction(connection) as pending:
            connection.execute(ORDER)
            pending.write(placed())
            raise error
    connection.commit()
    assert (shop.orders(), shop.keys(), last_number(shop)) == ([], [], 0)


def test_a_deferred_block_in_an_open_transaction_is_a_savepoint_of_it(shop: Shop, connection: Connection) -> None:
    with connection.transaction():
        connection.execute(ORDER)
        with OUTBOX.transaction(connection) as outer:
            outer.write(placed("outer"))
            with OUTBOX.transaction(connection) as inner:
                inner.write(placed("inner"))
            with suppress(ZeroDivisionError), OUTBOX.transaction(connection) as failed:
                failed.write(placed("failed"))
                raise ZeroDivisionError
        assert shop.keys() == []
    assert shop.keys() == ["inner", "outer"]


def test_a_savepoint_of_ones_own_takes_back_what_is_written_but_not_what_is_pending(
    shop: Shop, connection: Connection
) -> None:
    with OUTBOX.transaction(connection) as pending, connection.transaction(force_rollback=True):
        OUTBOX.write(connection, placed("written"))
        pending.write(placed("pending"))
    assert shop.keys() == ["pending"]


def test_asynchronous_blocks_defer_as_well(shop: Shop) -> None:
    async def write() -> int:
        async with await psycopg.AsyncConnection.connect(shop.dsn, autocommit=True) as connection:
            async with OUTBOX.transaction_async(connection) as pending:
                pending.write(placed("1"))
                before = last_number(shop)
            with suppress(ZeroDivisionError):
                async with OUTBOX.transaction_async(connection) as pending:
                    pending.write(placed("2"))
                    raise ZeroDivisionError
        return before

    assert (asyncio.run(write()), shop.keys()) == (0, ["1"])


def test_deferred_messages_of_a_key_are_in_the_order_in_which_its_row_was_locked(
    shop: Shop, connection: Connection
) -> None:
    """The second writer writes its message first, and has to wait for the row: its number is the higher one."""
    connection.execute(ORDER)
    connection.commit()
    raise_total = "UPDATE orders SET total = total + 1 WHERE id = 4711"

    async def second(started: asyncio.Event) -> None:
        async with await psycopg.AsyncConnection.connect(shop.dsn) as other, OUTBOX.transaction_async(other) as pending:
            pending.write(placed(payload="second"))
            started.set()
            await other.execute(raise_total)

    async def both() -> None:
        started = asyncio.Event()
        with OUTBOX.transaction(connection) as pending:
            connection.execute(raise_total)
            task = asyncio.create_task(second(started))
            await started.wait()
            pending.write(placed(payload="first"))
            await asyncio.to_thread(eventually, lambda: waits_for_a_lock(shop))
        await task

    asyncio.run(both())
    assert [row.payload for row in shop.messages()] == ["first", "second"]


def waits_for_a_lock(shop: Shop) -> bool:
    with shop.database.connect() as admin:
        query = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        return len(admin.execute(query).fetchall()) == 1


@pytest.fixture
def admin(database: Database) -> Iterator[Connection]:
    with database.connect() as connection:
        yield connection


ANY_TEXT = st.text(st.characters(exclude_categories=[]), max_size=8)
SMALL_FLOATS = st.floats(-1e15, 1e15)  # jsonb writes out the digits of larger ones, which are integers when read again
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | SMALL_FLOATS | st.sampled_from([float("nan"), float("inf")]) | ANY_TEXT,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(ANY_TEXT, values, max_size=3),
    max_leaves=5,
)


@given(
    texts=st.tuples(ANY_TEXT, ANY_TEXT, ANY_TEXT),
    headers=st.dictionaries(ANY_TEXT, ANY_TEXT, max_size=3),
    json_=ANY_JSON,
)
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_message_is_refused_at_once_or_stored_and_publishable_as_it_is(
    admin: Connection, texts: tuple[str, str, str], headers: dict[str, str], json_: object
) -> None:
    aggregate_type, aggregate_id, event_type = texts
    try:
        message = Message(
            aggregate_type=aggregate_type,
            aggregate_id=aggregate_id,
            event_type=event_type,
            headers=headers,
            payload=json_,
        )
        OUTBOX.write(admin, message)
    except InvalidMessage:
        return
    [(stored_key, stored_headers, payload)] = admin.execute(
        "SELECT aggregate_id, headers::text, payload::text FROM outbox WHERE message_id = %s", [message.message_id]
    )
    addressing = Addressing(topics={aggregate_type: "orders"})
    record = addressing.record(PLAIN._replace(headers=stored_headers, payload=payload), topic="orders")
    assert stored_key == aggregate_id
    assert headers.items() <= {(name, value) for name, value in record.headers if isinstance(value, str)}
    assert json.loads(payload) == json_
