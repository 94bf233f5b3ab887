"""Messages of writers that were given up on: each is collected once, whoever collects them and stops in between."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import pytest
from psycopg import ClientCursor
from psycopg.conninfo import make_conninfo

from outbox_relay import database as relay_database
from outbox_relay.errors import DatabaseUnavailable
from outbox_relay.relay import late
from outbox_relay.relay.claim import ClaimOptions, begin_statement
from outbox_relay.relay.horizon import record_unordered
from outbox_relay.relay.late import collect_late
from outbox_relay.sql import statement
from tests.fixtures.marks import mark, set_aside
from tests.fixtures.outbox import insert
from tests.fixtures.postgres import both_layouts
from tests.fixtures.proxy import TcpProxy
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from tests.fixtures.postgres import Database

pytestmark = [pytest.mark.every_postgres, both_layouts]

OPTIONS = ClaimOptions()
NO_TRANSACTION_YET = 2**62  # an id that no cluster has given away


@pytest.fixture
def collector(database: Database) -> Iterator[Connection]:
    with relay_database.connect(database.relay_dsn, application_name="late") as connection:
        yield connection


@pytest.fixture
def shop(database: Database) -> Iterator[Connection]:
    with database.connect(autocommit=True) as connection:
        yield connection


@pytest.fixture
def _short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three numbers are looked through at once."""
    monkeypatch.setattr(late, "_NUMBERS", 3)


def collect(collector: Connection) -> int | None:
    return collect_late(collector, options=OPTIONS)


def collect_all(collector: Connection) -> list[int]:
    """Collect until there is no such writer; return what came each time."""
    return list(iter(lambda: collect(collector), None))


@contextmanager
def given_up(database: Database) -> Iterator[Connection]:
    """A transaction that a relay has given up on, before it draws its first number."""
    with database.connect() as writer, database.connect(autocommit=True) as relay:
        [(xid,)] = writer.execute("SELECT pg_current_xact_id()::text").fetchall()
        record_unordered(relay, schema="public", xids=[int(xid)])
        yield writer


def pending(shop: Connection) -> list[int]:
    return [number for (number,) in shop.execute("SELECT sequence_no FROM outbox_pending ORDER BY 1")]


def records(shop: Connection) -> list[tuple[int, int | None, int | None, bool]]:
    return shop.execute(
        """
        SELECT from_no, to_no, collected_through, collected_at IS NOT NULL
        FROM outbox_unordered
        ORDER BY transaction_id
        """
    ).fetchall()


def test_where_no_writer_was_given_up_on_nothing_is_collected(collector: Connection) -> None:
    assert collect(collector) is None
    assert not collector.info.transaction_status


def test_a_writer_that_is_still_open_is_left_alone(database: Database, collector: Connection, shop: Connection) -> None:
    with given_up(database) as writer:
        insert(writer, "1")
        assert collect(collector) is None
        assert records(shop) == [(0, None, None, False)]


def test_looking_for_late_messages_in_vain_takes_no_transaction_id(database: Database, collector: Connection) -> None:
    with given_up(database) as writer:
        insert(writer, "1")
        collector.execute(begin_statement(OPTIONS))
        look = statement("collect_late", schema="public").removesuffix(b"COMMIT")
        assert ClientCursor(collector).execute(look, {"numbers": 10}).fetchall() == []
        assert collector.execute("SELECT pg_current_xact_id_if_assigned()").fetchall() == [(None,)]
        collector.rollback()


def test_messages_of_a_writer_that_has_ended_wait_as_unordered_ones(
    database: Database, collector: Connection, shop: Connection
) -> None:
    with given_up(database) as writer:
        insert(writer, "1", "2")
        insert(shop, "1", "7")
        insert(writer, "7")
        writer.commit()
    insert(shop, "1")
    assert collect_all(collector) == [3]
    assert shop.execute(
        """
        SELECT pending.sequence_no, pending.state, pending.reason_code, pending.is_unordered, outbox.aggregate_id
        FROM outbox_pending AS pending
        JOIN outbox ON outbox.shard = pending.shard
            AND outbox.sequence_no = pending.sequence_no
            AND outbox.aggregate_type = pending.aggregate_type
            AND hashtextextended(outbox.aggregate_type || ':' || outbox.aggregate_id, 0) = pending.key_hash
        ORDER BY 1
        """
    ).fetchall() == [
        (1, "waiting", "late", True, "1"),
        (2, "waiting", "late", True, "2"),
        (5, "waiting", "late", True, "7"),
    ]
    assert records(shop) == [(0, 6, 6, True)]


def test_a_writer_that_was_rolled_back_leaves_nothing_to_collect(
    database: Database, collector: Connection, shop: Connection
) -> None:
    with given_up(database) as writer:
        insert(writer, "1")
        writer.rollback()
    assert collect_all(collector) == [0]
    assert (pending(shop), records(shop)) == ([], [(0, 1, 1, True)])


def test_a_writer_that_wrote_nothing_after_all_is_closed(
    database: Database, collector: Connection, shop: Connection
) -> None:
    with given_up(database) as writer:
        writer.commit()
    assert collect_all(collector) == [0]
    assert [is_collected for *_, is_collected in records(shop)] == [True]


@pytest.mark.parametrize(("end", "expected"), [("COMMIT", [1, 2]), ("ROLLBACK", [])])
def test_messages_of_a_prepared_transaction_are_collected_once_it_has_ended(
    database: Database, collector: Connection, shop: Connection, end: str, expected: list[int]
) -> None:
    gid = f"forgotten in {database.name}"
    with given_up(database) as writer:
        insert(writer, "1", "2")
        writer.execute(f"PREPARE TRANSACTION '{gid}'".encode())
    try:
        assert collect(collector) is None
    finally:
        shop.execute(f"{end} PREPARED '{gid}'".encode())
    collect_all(collector)
    assert pending(shop) == expected


def test_messages_below_the_range_of_a_record_are_of_somebody_else(
    database: Database, collector: Connection, shop: Connection
) -> None:
    with database.connect() as writer:
        insert(writer, "1", "1")
        writer.commit()
    mark(shop)
    with given_up(database) as writer:
        insert(writer, "1")
        writer.commit()
    shop.execute(b"UPDATE outbox SET transaction_id = (SELECT max(transaction_id) FROM outbox)")
    assert (collect_all(collector), pending(shop)) == ([1], [3])


def test_a_message_that_is_pending_already_stays_as_it_is(
    database: Database, collector: Connection, shop: Connection
) -> None:
    with given_up(database) as writer:
        numbers = insert(writer, "1", "2")
        writer.commit()
    set_aside(shop, numbers[0], state="parked", is_unordered=True)
    assert collect_all(collector) == [1]
    states = shop.execute("SELECT state FROM outbox_pending ORDER BY sequence_no").fetchall()
    assert states == [("parked",), ("waiting",)]


@pytest.mark.usefixtures("_short_steps")
def test_a_long_range_is_collected_step_by_step(database: Database, collector: Connection, shop: Connection) -> None:
    with given_up(database) as writer:
        insert(writer, "1", "2")
        insert(shop, "1", "1", "1", "1", "1")
        insert(writer, "7")
        writer.commit()
    steps = []
    while (messages := collect(collector)) is not None:
        steps.append((messages, *records(shop)))
        insert(shop, "1")  # which lengthens no range
    assert steps == [(2, (0, 8, 3, False)), (0, (0, 8, 6, False)), (1, (0, 8, 8, True))]


@pytest.mark.usefixtures("_short_steps")
@pytest.mark.parametrize("fault", ["cut_before", "swallow_reply_to"])
def test_a_collector_that_is_cut_off_is_followed_by_another_that_collects_the_rest(
    database: Database, shop: Connection, collector: Connection, fault: str
) -> None:
    with given_up(database) as writer:
        insert(writer, *["1"] * 8)
        writer.commit()
    assert collect(collector) == 3
    with TcpProxy("127.0.0.1", database.server.port) as proxy:
        dsn = make_conninfo(database.relay_dsn, host="127.0.0.1", port=proxy.port)
        with closing(relay_database.connect(dsn, application_name="late")) as cut_off:
            getattr(proxy, fault)(b"outbox_unordered")
            with pytest.raises(DatabaseUnavailable):
                collect(cut_off)
        assert sum(proxy.fired.values()) == 1
    eventually(lambda: collect_all(collector) == [] and records(shop)[0][3])
    assert pending(shop) == list(range(1, 9))


def test_a_record_of_another_cluster_counts_as_ended(collector: Connection, shop: Connection) -> None:
    insert(shop, "1", "2", "1")
    shop.execute("UPDATE outbox SET transaction_id = %s::text::xid8 WHERE sequence_no > 1", [str(NO_TRANSACTION_YET)])
    shop.execute(
        "INSERT INTO outbox_unordered (transaction_id, from_no) VALUES (%s::text::xid8, 2)", [str(NO_TRANSACTION_YET)]
    )
    assert collect_all(collector) == [1]
    assert (pending(shop), records(shop)) == ([3], [(2, 3, 3, True)])


def test_the_transaction_that_is_running_now_is_not_taken_for_one_of_another_cluster(
    database: Database, collector: Connection, shop: Connection
) -> None:
    with given_up(database) as writer:
        insert(writer, "1")
        for _ in range(3):  # whose ids are higher, and lower than the next one
            insert(shop, "1")
        assert collect(collector) is None


def test_a_writer_that_is_given_the_id_of_a_collected_one_again_is_not_collected(
    collector: Connection, shop: Connection
) -> None:
    [late_number] = insert(shop, "1")
    shop.execute("INSERT INTO outbox_unordered (transaction_id, from_no) SELECT transaction_id, 0 FROM outbox")
    assert collect_all(collector) == [1]
    insert(shop, "1")
    shop.execute(b"UPDATE outbox SET transaction_id = (SELECT min(transaction_id) FROM outbox)")
    assert (collect_all(collector), pending(shop)) == ([], [late_number])


def test_a_record_that_somebody_collects_at_this_moment_is_left_to_him(
    database: Database, collector: Connection, shop: Connection
) -> None:
    with given_up(database) as writer:
        insert(writer, "1")
        writer.commit()
    with database.connect() as other:
        other.execute("SELECT FROM outbox_unordered FOR UPDATE")
        assert collect(collector) is None
    assert (collect(collector), pending(shop)) == (1, [1])


@pytest.mark.usefixtures("_short_steps")
def test_several_relays_at_once_collect_every_message_once(database: Database, shop: Connection) -> None:
    expected = []
    for _ in range(4):
        with given_up(database) as writer:
            expected += insert(writer, *["1", "2", "7"] * 3)
            insert(shop, "1")
            writer.commit()

    def run(_relay: int) -> int:
        with closing(relay_database.connect(database.relay_dsn, application_name="late")) as collector:
            return sum(collect_all(collector))

    with ThreadPoolExecutor(4) as relays:
        collected = sum(relays.map(run, range(4)))
    with closing(relay_database.connect(database.relay_dsn, application_name="late")) as last:
        collected += sum(collect_all(last))
    assert (collected, pending(shop)) == (len(expected), expected)
    assert {is_collected for *_, is_collected in records(shop)} == {True}
