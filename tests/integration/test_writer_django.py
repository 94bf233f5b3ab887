"""Messages written with Django share the fate of its atomic blocks."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import django
import pytest
from django.conf import settings
from django.db import connections, transaction

from outbox_relay.errors import InvalidMessage, NoTransaction
from outbox_relay.operate import migrate
from outbox_relay.writer import Message
from outbox_relay.writer.django import Outbox

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fixtures.shop import Shop

OUTBOX = Outbox(using="shop")


def placed(key: str = "4711", **fields: Any) -> Message:  # noqa: ANN401 -- the fields of a message
    return Message(aggregate_type="order", aggregate_id=key, event_type="placed", **fields)


def insert_order(number: int) -> None:
    with connections["shop"].cursor() as cursor:
        cursor.execute("INSERT INTO orders (id, total) VALUES (%s, 120)", [number])


@pytest.fixture(autouse=True)
def _alias(shop: Shop) -> Iterator[None]:
    """The alias "shop" of Django's databases, for the time of one test."""
    if not settings.configured:
        settings.configure(DATABASES={}, LOGGING_CONFIG=None)
        django.setup()
    server = shop.database.server
    wanted = {"ENGINE": "django.db.backends.postgresql", "NAME": shop.database.name, "USER": shop.login}
    wanted |= {"HOST": "127.0.0.1", "PORT": str(server.port)}
    connections.databases["shop"] = connections.configure_settings({"default": {}, "shop": wanted})["shop"]
    yield
    connections["shop"].close()
    del connections["shop"]
    del connections.databases["shop"]


def test_a_committed_message_is_in_the_outbox_as_it_was_given(shop: Shop) -> None:
    sent = [placed("1", payload={"total": 120}, headers={"a": "ä"}), placed("2", payload_bytes=b"\0\xff"), placed("3")]
    with transaction.atomic(using="shop"):
        assert OUTBOX.write(sent[0]) == sent[0].message_id
        assert OUTBOX.write_many(sent[1:]) == [message.message_id for message in sent[1:]]
        assert OUTBOX.write_many([]) == []
        assert shop.keys() == []
    rows = shop.messages()
    assert [(row.aggregate_id, row.payload, row.payload_bytes, row.headers) for row in rows] == [
        ("1", {"total": 120}, None, {"a": "ä"}),
        ("2", None, b"\0\xff", {}),
        ("3", None, None, {}),
    ]
    assert [row.message_id for row in rows] == [message.message_id for message in sent]


def test_message_and_change_are_rolled_back_together(shop: Shop) -> None:
    with suppress(ZeroDivisionError), transaction.atomic(using="shop"):
        insert_order(1)
        OUTBOX.write(placed())
        raise ZeroDivisionError
    assert (shop.orders(), shop.keys()) == ([], [])


def test_a_savepoint_takes_back_its_own_messages_only(shop: Shop) -> None:
    with transaction.atomic(using="shop"):
        OUTBOX.write(placed("before"))
        with suppress(ZeroDivisionError), transaction.atomic(using="shop"):
            OUTBOX.write(placed("inside"))
            raise ZeroDivisionError
        OUTBOX.write(placed("after"))
    assert shop.keys() == ["before", "after"]


def test_no_atomic_block_is_refused_because_it_would_be_a_dual_write(shop: Shop) -> None:
    with pytest.raises(NoTransaction, match="no transaction is open"):
        OUTBOX.write(placed())
    assert shop.keys() == []


def test_after_the_commit_it_is_too_late_for_a_message(shop: Shop) -> None:
    with pytest.raises(NoTransaction), transaction.atomic(using="shop"):
        transaction.on_commit(lambda: OUTBOX.write(placed()), using="shop")
    assert shop.keys() == []


def test_a_block_of_another_database_does_not_count(shop: Shop) -> None:
    connections.databases["other"] = connections.databases["shop"]
    with transaction.atomic(using="other"), pytest.raises(NoTransaction):
        OUTBOX.write(placed())
    connections["other"].close()
    del connections["other"]
    del connections.databases["other"]
    assert shop.keys() == []


def test_a_bad_message_leaves_the_block_usable(shop: Shop) -> None:
    with transaction.atomic(using="shop"):
        with pytest.raises(InvalidMessage):
            OUTBOX.write(placed("bad", payload=object()))
        OUTBOX.write(placed("next"))
    assert shop.keys() == ["next"]


def test_the_outbox_may_be_in_a_schema_that_is_not_searched(shop: Shop) -> None:
    with shop.database.connect() as admin:
        migrate.apply(admin, schema='odd "name')
    with transaction.atomic(using="shop"):
        Outbox(using="shop", schema='odd "name').write(placed("odd"))
    with shop.database.connect() as admin:
        assert admin.execute('SELECT aggregate_id FROM "odd ""name".outbox').fetchall() == [("odd",)]


def test_a_deferred_message_is_inserted_at_the_end_of_its_block(shop: Shop) -> None:
    with OUTBOX.atomic() as pending:
        pending.write(placed())
        insert_order(4711)
    with shop.database.connect() as admin:
        order = admin.execute("SELECT orders.cmin::text, outbox.cmin::text FROM orders, outbox").fetchall()
    assert order == [("0", "1")]


def test_nothing_is_inserted_if_the_block_raises(shop: Shop) -> None:
    with suppress(ZeroDivisionError), OUTBOX.atomic() as pending:
        insert_order(1)
        pending.write(placed())
        raise ZeroDivisionError
    assert (shop.orders(), shop.keys()) == ([], [])


def test_a_deferred_block_in_an_open_one_is_a_savepoint_of_it(shop: Shop) -> None:
    with OUTBOX.atomic() as outer:
        outer.write(placed("outer"))
        with OUTBOX.atomic() as inner:
            inner.write(placed("inner"))
        with suppress(ZeroDivisionError), OUTBOX.atomic() as failed:
            failed.write(placed("failed"))
            raise ZeroDivisionError
        assert shop.keys() == []
    assert shop.keys() == ["inner", "outer"]
