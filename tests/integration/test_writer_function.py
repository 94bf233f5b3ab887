"""The SQL function for every other language: it writes what a library would, and refuses what the relay would park."""

from __future__ import annotations

from typing import TYPE_CHECKING, LiteralString
from uuid import UUID

import psycopg
import pytest
from psycopg import errors
from psycopg.types.json import Jsonb

from outbox_relay.operate import migrate
from outbox_relay.wire import RESERVED_HEADERS
from tests.integration.test_schema import PROBE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from tests.fixtures.postgres import Database
    from tests.fixtures.shop import Shop

pytestmark = pytest.mark.every_postgres

ID = UUID("8c4f0b0e-5d1c-4e64-9f0b-5f1d0d3f7a11")


@pytest.fixture
def connection(shop: Shop) -> Iterator[Connection]:
    with psycopg.connect(shop.dsn) as connection:
        yield connection


def test_a_writer_may_call_it_and_gets_the_id(shop: Shop, connection: Connection) -> None:
    [(message_id,)] = connection.execute("""SELECT outbox_write('order', '4711', 'placed', '{"total": 120}')""")
    connection.commit()
    [row] = shop.messages()
    assert (row.message_id, row.aggregate_type, row.aggregate_id, row.event_type, row.payload, row.headers) == (
        message_id,
        "order",
        "4711",
        "placed",
        {"total": 120},
        {},
    )


def test_every_field_can_be_given_by_name(shop: Shop, connection: Connection) -> None:
    connection.execute(
        """
        SELECT outbox_write(
            aggregate_type => 'order', aggregate_id => '1', event_type => 'placed',
            payload_bytes => '\\x00ff', headers => '{"tenant": "t1"}', message_id => %s
        )
        """,
        [ID],
    )
    connection.execute("SELECT outbox_write('order', '2', 'erased')")
    connection.commit()
    assert [(row.payload, row.payload_bytes, row.headers) for row in shop.messages()] == [
        (None, b"\x00\xff", {"tenant": "t1"}),
        (None, None, {}),
    ]
    assert shop.messages()[0].message_id == ID


def test_what_it_writes_is_rolled_back_with_the_transaction(shop: Shop, connection: Connection) -> None:
    connection.execute("SELECT outbox_write('order', '4711', 'placed')")
    connection.rollback()
    assert shop.keys() == []


def test_it_has_a_transaction_id_before_it_draws_a_number(database: Database) -> None:
    with database.connect() as connection:
        connection.execute(PROBE)
        notices: list[str | None] = []
        connection.add_notice_handler(lambda notice: notices.append(notice.message_primary))
        connection.execute("SELECT outbox_write('order', key, 'placed') FROM unnest(ARRAY['1', '2']) AS key")
        [(own,)] = connection.execute("SELECT pg_current_xact_id()::text")
        found = connection.execute("SELECT transaction_id::text, sequence_no FROM outbox ORDER BY 2").fetchall()
    assert notices == ["before 0", "after 1", "before 1", "after 2"]
    assert found == [(own, 1), (own, 2)]


def test_it_finds_its_own_schema_whatever_the_caller_searches(shop: Shop, connection: Connection) -> None:
    with shop.database.connect() as admin:
        migrate.apply(admin, schema='odd "name')
    connection.execute("""
        SET search_path = '';
        CREATE TEMPORARY TABLE outbox (
            message_id uuid, aggregate_type text, aggregate_id text, event_type text,
            payload jsonb, payload_bytes bytea, headers jsonb
        );
    """)
    connection.execute("""SELECT "odd ""name".outbox_write('order', 'odd', 'placed')""")
    connection.execute("SELECT public.outbox_write('order', 'public', 'placed')")
    connection.commit()
    with shop.database.connect() as admin:
        assert admin.execute('SELECT aggregate_id FROM "odd ""name".outbox').fetchall() == [("odd",)]
    assert shop.keys() == ["public"]


def test_nobody_but_a_writer_may_call_it(shop: Shop, connection: Connection) -> None:
    with shop.database.connect() as admin:
        admin.execute(f'REVOKE outbox_writer FROM "{shop.login}"')
    with pytest.raises(errors.InsufficientPrivilege, match="permission denied for function outbox_write"):
        connection.execute("SELECT outbox_write('order', '4711', 'placed')")


def test_it_gives_no_privilege_that_its_caller_lacks(shop: Shop, connection: Connection) -> None:
    with shop.database.connect() as admin:
        admin.execute(f"""
            REVOKE outbox_writer FROM "{shop.login}";
            GRANT EXECUTE ON FUNCTION outbox_write TO "{shop.login}";
        """)
    with pytest.raises(errors.InsufficientPrivilege, match="permission denied for table outbox"):
        connection.execute("SELECT outbox_write('order', '4711', 'placed')")


ONE_VALUE = ("payload and payload_bytes are both given", "A message has one value: leave one out.")
TEXTS = "Give an object of strings."


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ("'', '1', 'e'", "aggregate_type is empty", "Give the kind of thing that the message is about."),
        ("NULL, '1', 'e'", "aggregate_type is empty", "Give the kind of thing that the message is about."),
        ("'o', '', 'e'", "aggregate_id is empty", "Give the key: messages of one type and key are in order."),
        ("'o', NULL, 'e'", "aggregate_id is empty", "Give the key: messages of one type and key are in order."),
        ("'o', '1', ''", "event_type is empty", "Give what has happened."),
        ("'o', '1', 'e', 'null', ''", *ONE_VALUE),
        ("'o', '1', 'e', '{}', '\\x00'", *ONE_VALUE),
        ("'o', '1', 'e', message_id => NULL", "message_id is null", "Leave it out, or give a uuid."),
        ("'o', '1', 'e', headers => NULL", "headers are null", TEXTS),
        ("'o', '1', 'e', headers => 'null'", "headers are null", TEXTS),
        ("'o', '1', 'e', headers => '[\"a\"]'", 'headers are ["a"]', TEXTS),
        ("'o', '1', 'e', headers => '{\"a\": 3}'", 'headers are {"a": 3}', TEXTS),
        ("'o', '1', 'e', headers => '{\"a\": null}'", 'headers are {"a": null}', TEXTS),
        ("'o', '1', 'e', headers => '{\"a\": [\"b\"]}'", 'headers are {"a": ["b"]}', TEXTS),
        ("'o', '1', 'e', headers => '{\"a\": {\"b\": \"c\"}}'", 'headers are {"a": {"b": "c"}}', TEXTS),
    ],
)
def test_what_could_never_be_published_is_refused_with_a_hint(
    connection: Connection, arguments: LiteralString, message: str, hint: str
) -> None:
    with pytest.raises(errors.InvalidParameterValue) as raised:
        connection.execute(f"SELECT outbox_write({arguments})")
    assert (raised.value.diag.message_primary, raised.value.diag.message_hint) == (message, hint)


@pytest.mark.parametrize("name", sorted(RESERVED_HEADERS))
def test_a_header_of_the_relay_is_refused(connection: Connection, name: str) -> None:
    with pytest.raises(errors.InvalidParameterValue, match=f'headers are {{"{name}": "x"}}') as raised:
        connection.execute("SELECT outbox_write('order', '4711', 'placed', headers => %s)", [Jsonb({name: "x"})])
    assert str(raised.value.diag.message_hint).startswith("The relay sets id, event_type,")
