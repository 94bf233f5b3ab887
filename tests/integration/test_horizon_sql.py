"""What the horizon sees of real sessions on every PostgreSQL: writers, bystanders, relays and prepared transactions."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay import database as relay_database
from outbox_relay.errors import DatabaseUnavailable, SchemaMismatch
from outbox_relay.relay.claim import ClaimOptions, claim_shards
from outbox_relay.relay.horizon import (
    LastNumber,
    check_tables,
    describe,
    list_writers,
    observe,
    read_last_number,
    record_unordered,
)
from outbox_relay.relay.shards import SHARDS
from outbox_relay.relay.watch import Reached
from tests.fixtures.marks import mark
from tests.fixtures.outbox import insert
from tests.fixtures.postgres import both_layouts, create_database, drop_database
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from tests.fixtures.postgres import Database

pytestmark = [pytest.mark.every_postgres, both_layouts]


@pytest.fixture
def watch(database: Database, relay_login: str) -> Iterator[Connection]:
    dsn = database.server.dsn(database.name, user=relay_login)
    with relay_database.connect(dsn, application_name="horizon") as connection:
        yield connection


@contextmanager
def writer(database: Database, *, application_name: str = "shop") -> Iterator[tuple[Connection, int]]:
    """An open transaction that has inserted a message, and its transaction id."""
    with database.connect(application_name=application_name) as connection:
        insert(connection, "1")
        yield connection, xid_of(connection)


def xid_of(connection: Connection) -> int:
    [(xid,)] = connection.execute("SELECT pg_current_xact_id()::text").fetchall()
    return int(xid)


def running(watch: Connection) -> frozenset[int]:
    return observe(watch, schema="public").running


def writers(watch: Connection) -> frozenset[int]:
    return list_writers(watch, schema="public")


def last_number(watch: Connection) -> LastNumber:
    return read_last_number(watch, schema="public")


def test_no_number_drawn_is_zero(watch: Connection) -> None:
    assert last_number(watch).number == 0
    assert observe(watch, schema="public").last_no == 0


@pytest.mark.parametrize(("is_called", "expected"), [("true", 100), ("false", 99)])
def test_a_sequence_that_was_set_has_drawn_its_value_only_if_it_is_called(
    database: Database, watch: Connection, is_called: str, expected: int
) -> None:
    with database.connect(autocommit=True) as admin:
        admin.execute(f"SELECT setval('outbox_sequence_no_seq', 100, {is_called})".encode())
    assert last_number(watch).number == observe(watch, schema="public").last_no == expected


def test_the_last_number_is_seen_before_its_transaction_commits(database: Database, watch: Connection) -> None:
    with writer(database):
        assert last_number(watch).number == 1
        assert observe(watch, schema="public").last_no == 1


def test_an_observation_is_of_the_epoch_of_the_last_number(watch: Connection) -> None:
    assert observe(watch, schema="public").epoch == last_number(watch).epoch


def test_numbers_go_on_in_their_epoch_whatever_is_written_and_removed(database: Database, watch: Connection) -> None:
    before = last_number(watch)
    with database.connect(autocommit=True) as admin:
        insert(admin, "1")
        admin.execute("DELETE FROM outbox")
        admin.execute("VACUUM FULL outbox")
        admin.execute("TRUNCATE outbox")
    assert last_number(watch) == LastNumber(1, before.epoch)


@pytest.mark.parametrize(
    "restart", [b"TRUNCATE outbox RESTART IDENTITY", b"ALTER SEQUENCE outbox_sequence_no_seq RESTART WITH 100"]
)
def test_a_sequence_that_is_restarted_begins_an_epoch_of_its_own(
    database: Database, watch: Connection, restart: bytes
) -> None:
    before = last_number(watch)
    with database.connect(autocommit=True) as admin:
        admin.execute(restart)
    assert last_number(watch).epoch != before.epoch


def test_a_server_that_was_restarted_begins_an_epoch_of_its_own(own_database: Database) -> None:
    with relay_database.connect(own_database.relay_dsn, application_name="horizon") as watch:
        before = last_number(watch)
    own_database.server.stop()
    own_database.server.start()
    with relay_database.connect(own_database.relay_dsn, application_name="horizon") as watch:
        after = last_number(watch)
    assert after.epoch.server_started_at > before.epoch.server_started_at
    assert after.epoch.sequence_file == before.epoch.sequence_file


def test_the_tables_are_looked_at_for_what_a_relay_cannot_trust(database: Database, watch: Connection) -> None:
    with database.connect(autocommit=True) as shop:
        insert(shop, "1", "2")
        mark(shop)
        check_tables(watch, schema="public")
        shop.execute("SELECT setval('outbox_sequence_no_seq', 2, false)")
        with pytest.raises(
            SchemaMismatch, match="the sequence went back: the next number is 2, the newest mark is at 2"
        ):
            check_tables(watch, schema="public")
        shop.execute("SELECT setval('outbox_sequence_no_seq', 2)")
        check_tables(watch, schema="public")


def test_an_open_writer_is_running_and_a_writer_until_it_ends(database: Database, watch: Connection) -> None:
    with writer(database) as (connection, xid):
        assert xid in running(watch)
        assert writers(watch) == {xid}
        connection.rollback()
        assert xid not in running(watch)
        assert writers(watch) == set()


def test_a_writer_is_running_although_it_began_after_the_last_one_that_completed(
    database: Database, watch: Connection
) -> None:
    with writer(database) as (_, first), writer(database) as (_, second):
        [(xmax,)] = watch.execute("SELECT pg_snapshot_xmax(pg_current_snapshot())::text").fetchall()
        assert int(xmax) <= first < second  # so a snapshot lists neither
        assert running(watch) >= {first, second}


def test_a_transaction_elsewhere_is_running_and_no_writer(database: Database, watch: Connection) -> None:
    with database.connect(autocommit=True) as admin:
        admin.execute("CREATE TABLE report ()")
    with database.connect() as etl:
        etl.execute("LOCK TABLE report IN ROW EXCLUSIVE MODE")
        etl.execute("SELECT FROM outbox")
        xid = xid_of(etl)
        assert xid in running(watch)
        assert writers(watch) == set()


def test_a_writer_to_another_database_is_no_writer_here(database: Database, watch: Connection) -> None:
    other = create_database(database.server)
    try:
        with writer(database) as (_, here), writer(other) as (_, elsewhere):
            assert running(watch) >= {here, elsewhere}
            assert writers(watch) == {here}
    finally:
        drop_database(other)


def test_a_writer_in_a_savepoint_is_known_by_its_top_level_transaction(database: Database, watch: Connection) -> None:
    with database.connect() as connection, connection.transaction(force_rollback=True), connection.transaction():
        insert(connection, "1")
        xid = xid_of(connection)
        assert xid in running(watch)
        assert xid in writers(watch)


def test_a_prepared_transaction_is_a_writer_and_known_by_its_gid(database: Database, watch: Connection) -> None:
    gid = f"forgotten in {database.name}"
    with database.connect() as connection:
        insert(connection, "1")
        xid = xid_of(connection)
        connection.execute(f"PREPARE TRANSACTION '{gid}'")
    try:
        assert xid in running(watch)
        assert writers(watch) == {xid}
        [found] = describe(watch, schema="public", xids=[xid])
        assert (found.xid, found.pid, found.gid, found.state) == (xid, 0, gid, "prepared")
        assert 0 <= found.age_seconds < 60
    finally:
        with database.connect(autocommit=True) as admin:
            admin.execute(f"ROLLBACK PREPARED '{gid}'")
    assert xid not in running(watch)


def test_a_relay_is_not_among_the_running(database: Database, relay_login: str, watch: Connection) -> None:
    with database.connect(autocommit=True) as shop:
        insert(shop, "1", "2")
    dsn = database.server.dsn(database.name, user=relay_login)
    with relay_database.connect(dsn, application_name="lane") as lane, writer(database) as (_, xid):
        claim_shards(
            lane,
            options=ClaimOptions(),
            reached=Reached(*last_number(lane)),
            candidates=range(SHARDS),
            most=SHARDS,
            takes_all=True,
            looks_for_waiting=False,
        )
        relay_xid = xid_of(lane)
        assert writers(watch) == {xid}
        assert xid in running(watch)
        assert relay_xid not in running(watch)


def test_who_is_behind_a_transaction_is_told_oldest_first(database: Database) -> None:
    with (
        database.connect(autocommit=True) as superuser,
        writer(database, application_name="checkout") as (first, old),
        writer(database, application_name="shop") as (_, young),
    ):
        described = describe(superuser, schema="public", xids=[young, old])
        assert [(each.xid, each.application_name, each.role_name, each.gid) for each in described] == [
            (old, "checkout", "postgres", ""),
            (young, "shop", "postgres", ""),
        ]
        assert described[0].pid == first.info.backend_pid
        assert described[0].age_seconds > described[1].age_seconds > 0


def test_state_age_and_query_are_shown_to_members_of_pg_read_all_stats_only(
    database: Database, relay_login: str, watch: Connection
) -> None:
    with database.connect(autocommit=True) as admin, writer(database) as (_, xid):
        [hidden] = describe(watch, schema="public", xids=[xid])
        assert (hidden.application_name, hidden.state, hidden.age_seconds) == ("shop", "", 0.0)
        admin.execute(f'GRANT pg_read_all_stats TO "{relay_login}"')
        [shown] = describe(watch, schema="public", xids=[xid])
        assert (shown.application_name, shown.state) == ("shop", "idle in transaction")
        assert shown.age_seconds > 0
        assert "pg_current_xact_id" in shown.query


def test_a_transaction_that_has_ended_is_described_by_its_number_alone(watch: Connection) -> None:
    [found] = describe(watch, schema="public", xids=[5])
    assert (found.xid, found.pid, found.application_name, found.state, found.gid) == (5, 0, "", "", "")


def test_a_serializable_default_of_the_role_does_no_harm(database: Database, relay_login: str) -> None:
    with database.connect(autocommit=True) as admin:
        admin.execute(f"ALTER ROLE \"{relay_login}\" SET default_transaction_isolation = 'serializable'")
    dsn = database.server.dsn(database.name, user=relay_login)
    with relay_database.connect(dsn, application_name="horizon") as watch:
        with writer(database) as (connection, xid):
            assert xid in running(watch)
            connection.commit()
        seen = observe(watch, schema="public")
        assert (seen.last_no, xid in seen.running) == (1, False)


def recorded(database: Database) -> list[tuple[str, int, int | None, bool]]:
    with database.connect() as other:
        return other.execute(
            """
            SELECT transaction_id::text, from_no, to_no, collected_at IS NULL
            FROM outbox_unordered
            ORDER BY outbox_unordered.transaction_id
            """
        ).fetchall()


def test_a_writer_that_is_given_up_on_has_all_its_numbers_above_the_newest_mark_of_all(
    database: Database, watch: Connection
) -> None:
    with database.connect(autocommit=True) as shop:
        insert(shop, "1", "1")
        mark(shop)
        insert(shop, "2")
        mark(shop)
        insert(shop, "1")
    with writer(database) as (_, xid):
        record_unordered(watch, schema="public", xids=[xid])
        assert recorded(database) == [(str(xid), 3, None, True)]


def test_recording_twice_keeps_the_first_record_of_each(database: Database, watch: Connection) -> None:
    beyond_32_bits = 3 * 2**32 + 500
    record_unordered(watch, schema="public", xids=[500, beyond_32_bits])
    with database.connect(autocommit=True) as shop:
        insert(shop, "1")
        mark(shop)
    record_unordered(watch, schema="public", xids=[500])
    assert recorded(database) == [("500", 0, None, True), (str(beyond_32_bits), 0, None, True)]


def test_a_record_survives_a_crash_of_the_server(own_database: Database) -> None:
    dsn = make_conninfo(own_database.relay_dsn, options="-c synchronous_commit=off")
    with relay_database.connect(dsn, application_name="horizon") as watch:
        record_unordered(watch, schema="public", xids=[500])
        own_database.server.kill()
    own_database.server.start()
    assert recorded(own_database) == [("500", 0, None, True)]


def test_an_outbox_that_is_not_there_is_a_mismatch_and_names_the_remedy(watch: Connection) -> None:
    with pytest.raises(SchemaMismatch, match="outbox-relay migrate apply"):
        read_last_number(watch, schema="nowhere")


def test_a_connection_that_was_ended_is_unavailable(database: Database, watch: Connection) -> None:
    with database.connect(autocommit=True) as admin:
        admin.execute("SELECT pg_terminate_backend(%s)", [watch.info.backend_pid])
        ended = "SELECT FROM pg_stat_activity WHERE pid = %s"
        eventually(lambda: not admin.execute(ended, [watch.info.backend_pid]).fetchall())
    with pytest.raises(DatabaseUnavailable):
        observe(watch, schema="public")
