"""What settling writes, and that it is all or nothing when the connection breaks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay import database as relay_database
from outbox_relay.errors import DatabaseUnavailable
from outbox_relay.relay.claim import ClaimOptions, Floors, claim
from outbox_relay.relay.settle import Parked, Settlement, SettleMode, settle
from tests.fixtures.outbox import insert
from tests.fixtures.postgres import both_layouts
from tests.fixtures.proxy import TcpProxy
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from outbox_relay.relay.message import Message
    from tests.fixtures.postgres import Database

pytestmark = [pytest.mark.every_postgres, both_layouts]


@pytest.fixture
def proxy(database: Database) -> Iterator[TcpProxy]:
    with TcpProxy("127.0.0.1", database.server.port) as running:
        yield running


@pytest.fixture
def lane(database: Database, proxy: TcpProxy) -> Iterator[Connection]:
    """A lane of a relay that has the shipped grants and nothing else."""
    login = f"relay_of_{database.name}"
    with database.connect(autocommit=True) as admin:
        admin.execute(f'CREATE ROLE "{login}" LOGIN IN ROLE outbox_relay')
        dsn = make_conninfo(database.dsn, port=proxy.port, user=login)
        with relay_database.connect(dsn, application_name="lane") as connection:
            yield connection
        eventually(lambda: not admin.execute("SELECT FROM pg_stat_activity WHERE usename = %s", [login]).fetchall())
        admin.execute(f'DROP ROLE "{login}"')


@pytest.fixture
def shop(database: Database) -> Iterator[Connection]:
    with database.connect(autocommit=True) as connection:
        insert(connection, "1", "1", "2", "7")  # of the shards 1, 1, 2 and 13
        yield connection


def claimed(lane: Connection) -> list[Message]:
    return claim(lane, options=ClaimOptions(), through=10**6, floors=Floors()).messages


def write(lane: Connection, settlement: Settlement, *, mode: SettleMode = "mark") -> dict[int, int]:
    return settle(lane, schema="public", settlement=settlement, mode=mode)


def states(shop: Connection) -> dict[int, str | None]:
    """The messages of the table by number: published, the reason of a parked one, or None."""
    return dict(
        shop.execute(
            """
            SELECT sequence_no, CASE WHEN published_at <= now() THEN 'published' ELSE parked_reason END
            FROM outbox
            ORDER BY sequence_no
            """
        ).fetchall()
    )


def generations(shop: Connection) -> dict[int, int]:
    """The shards whose generation is not the first."""
    return dict(shop.execute("SELECT shard, generation FROM outbox_shard WHERE generation > 0").fetchall())


def test_published_messages_are_marked_and_the_others_left(lane: Connection, shop: Connection) -> None:
    messages = claimed(lane)
    assert write(lane, Settlement(published=[messages[0], messages[2]], unsettled=[messages[1]])) == {}
    assert states(shop) == {1: "published", 2: None, 3: "published", 4: None}
    assert generations(shop) == {}


def test_published_messages_are_deleted_when_asked_for(lane: Connection, shop: Connection) -> None:
    messages = claimed(lane)
    assert write(lane, Settlement(published=[messages[0], messages[2]]), mode="delete") == {}
    assert states(shop) == {2: None, 4: None}


def test_a_parked_message_has_its_reason_and_begins_a_generation_of_its_shard_only(
    lane: Connection, shop: Connection
) -> None:
    first, second, third, _ = claimed(lane)
    parked = [Parked(first, "too large: shrink it"), Parked(second, "behind 1")]
    assert write(lane, Settlement(published=[third], parked=parked)) == {1: 1}
    assert states(shop) == {1: "too large: shrink it", 2: "behind 1", 3: "published", 4: None}
    assert generations(shop) == {1: 1}


def test_every_parking_begins_another_generation(lane: Connection, shop: Connection) -> None:
    first, second, third, fourth = claimed(lane)
    assert write(lane, Settlement(parked=[Parked(first, "a")])) == {1: 1}
    assert write(lane, Settlement(parked=[Parked(m, "b") for m in (second, third, fourth)])) == {1: 2, 2: 1, 13: 1}
    assert generations(shop) == {1: 2, 2: 1, 13: 1}


def test_settling_nothing_ends_the_transaction_and_frees_the_messages(lane: Connection, shop: Connection) -> None:
    assert write(lane, Settlement(unsettled=claimed(lane))) == {}
    assert states(shop) == dict.fromkeys((1, 2, 3, 4))
    shop.execute("SELECT FROM outbox_shard, outbox FOR UPDATE NOWAIT")


def test_a_commit_whose_answer_is_lost_is_unavailable_and_was_made(
    proxy: TcpProxy, lane: Connection, shop: Connection
) -> None:
    messages = claimed(lane)
    proxy.swallow_reply_to(b"COMMIT")
    with pytest.raises(DatabaseUnavailable):
        write(lane, Settlement(published=messages))
    assert states(shop) == dict.fromkeys((1, 2, 3, 4), "published")
    assert proxy.fired == {"swallowed": 1}


def test_a_commit_that_never_arrived_is_unavailable_and_everything_is_as_before(
    proxy: TcpProxy, lane: Connection, shop: Connection
) -> None:
    messages = claimed(lane)
    proxy.cut_before(b"COMMIT")
    with pytest.raises(DatabaseUnavailable):
        write(lane, Settlement(published=messages[1:], parked=[Parked(messages[0], "a")]))
    eventually(lambda: not shop.execute("SELECT FROM pg_stat_activity WHERE application_name = 'lane'").fetchall())
    assert states(shop) == dict.fromkeys((1, 2, 3, 4))
    assert (generations(shop), proxy.fired) == ({}, {"cut_before": 1})
