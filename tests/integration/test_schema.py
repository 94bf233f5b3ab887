"""What the relay's order relies on in the schema, and the committed dump that shows what a migration did."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, LiteralString

import pytest
from psycopg import errors

from outbox_relay.operate import migrate
from outbox_relay.sandbox.postgres import installed_servers
from tests.fixtures.postgres import both_layouts, create_database, drop_database

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg import Connection

    from outbox_relay.sandbox.postgres import PostgresServer
    from tests.fixtures.postgres import Database

MIGRATIONS = Path(__file__).parents[2] / "migrations"
DUMPED_WITH = 18  # other versions of pg_dump write the same schema in other words

INSERT: LiteralString = "INSERT INTO outbox (aggregate_type, aggregate_id, event_type)"

# Each default tells the last number drawn at the moment it is evaluated. The one behind sequence_no is the control:
# it must see the number that the row has just drawn.
PROBE: LiteralString = """
    CREATE FUNCTION last_number(place text) RETURNS xid8 LANGUAGE plpgsql STABLE AS $$
    BEGIN
        RAISE NOTICE '% %', place, coalesce(pg_sequence_last_value('outbox_sequence_no_seq'), 0);
        RETURN pg_current_xact_id();
    END
    $$;
    ALTER TABLE outbox ALTER transaction_id SET DEFAULT last_number('before');
    ALTER TABLE outbox ADD behind_sequence_no xid8;
    ALTER TABLE outbox ALTER behind_sequence_no SET DEFAULT last_number('after');
"""


@pytest.fixture
def conn(database: Database) -> Iterator[Connection]:
    with database.connect() as conn:
        yield conn


def insert_values(conn: Connection) -> None:
    conn.execute(f"{INSERT} VALUES ('order', '1', 'placed'), ('order', '2', 'placed'), ('order', '3', 'placed')")


def insert_select(conn: Connection) -> None:
    conn.execute(f"{INSERT} SELECT 'order', number, 'placed' FROM generate_series(1, 3) AS number ORDER BY number DESC")


def insert_one_by_one(conn: Connection) -> None:
    for _ in range(3):
        conn.execute(f"{INSERT} VALUES ('order', '1', 'placed')")


def copy(conn: Connection) -> None:
    with conn.cursor().copy("COPY outbox (aggregate_type, aggregate_id, event_type) FROM STDIN") as rows:
        for _ in range(3):
            rows.write_row(("order", "1", "placed"))


@both_layouts
@pytest.mark.every_postgres
@pytest.mark.parametrize("write", [insert_one_by_one, insert_values, insert_select, copy])
def test_a_writer_has_its_transaction_id_before_it_draws_a_number(
    conn: Connection, write: Callable[[Connection], None]
) -> None:
    conn.execute(PROBE)
    notices: list[str | None] = []
    conn.add_notice_handler(lambda notice: notices.append(notice.message_primary))
    write(conn)
    assert notices == ["before 0", "after 1", "before 1", "after 2", "before 2", "after 3"]


@both_layouts
@pytest.mark.every_postgres
def test_messages_carry_the_top_level_transaction_id_even_from_a_savepoint(conn: Connection) -> None:
    with conn.transaction():
        insert_one_by_one(conn)
        with conn.transaction():
            insert_values(conn)
            with conn.transaction():
                copy(conn)
        [(own,)] = conn.execute("SELECT pg_current_xact_id()::text")
        found = conn.execute("SELECT transaction_id::text, count(*) FROM outbox GROUP BY 1").fetchall()
    assert found == [(own, 9)]


@both_layouts
@pytest.mark.every_postgres
@pytest.mark.parametrize("column", ["sequence_no", "id"])
def test_even_the_owner_cannot_insert_a_number_of_his_own(conn: Connection, column: LiteralString) -> None:
    with pytest.raises(errors.GeneratedAlways):
        conn.execute(
            f"INSERT INTO outbox ({column}, aggregate_type, aggregate_id, event_type) VALUES (7, 'o', '1', 'e')"
        )


@both_layouts
@pytest.mark.every_postgres
def test_sessions_draw_numbers_one_at_a_time(database: Database) -> None:
    with database.connect(autocommit=True) as one, database.connect(autocommit=True) as two:
        for session in (one, two, one, two):
            session.execute(f"{INSERT} VALUES ('order', '1', 'placed')")
        assert one.execute("SELECT sequence_no FROM outbox ORDER BY id").fetchall() == [(1,), (2,), (3,), (4,)]


@pytest.mark.every_postgres
def test_no_unique_index_has_the_sequence_number(conn: Connection) -> None:
    indexes = conn.execute(
        """
        SELECT indexrelid::regclass::text, indisunique
        FROM pg_index
        JOIN pg_attribute ON attrelid = indrelid AND attnum = ANY (indkey)
        WHERE indrelid = 'outbox'::regclass AND attname = 'sequence_no'
        ORDER BY 1
        """
    ).fetchall()
    assert indexes == [("outbox_parked_idx", False), ("outbox_unpublished_idx", False)]


@both_layouts
@pytest.mark.every_postgres
def test_the_shard_is_the_same_on_every_version_and_depends_on_type_and_id(conn: Connection) -> None:
    keys = [("order", "1"), ("order", "2"), ("basket", "1"), ("bestellung", "ä"), ("order", "1")]
    with conn.cursor() as cursor:
        cursor.executemany(f"{INSERT} VALUES (%s, %s, 'placed')", keys)
    shards = conn.execute("SELECT shard FROM outbox ORDER BY sequence_no").fetchall()
    assert shards == [(1,), (2,), (3,), (13,), (1,)]


@pytest.mark.every_postgres
def test_keys_spread_over_exactly_the_shards_that_can_be_claimed(conn: Connection) -> None:
    conn.execute(f"{INSERT} SELECT 'order', number, 'placed' FROM generate_series(1, 16000) AS number")
    sizes: dict[int, int] = dict(conn.execute("SELECT shard, count(*) FROM outbox GROUP BY shard").fetchall())
    assert sizes.keys() == {shard for (shard,) in conn.execute("SELECT shard FROM outbox_shard")} == set(range(16))
    assert min(sizes.values()) > 800
    assert max(sizes.values()) < 1200


@pytest.fixture
def bare_database(shared_server: Callable[[int], PostgresServer]) -> Iterator[Database]:
    """A database of the version that the dumps are made with, without the schema app."""
    database = create_database(shared_server(DUMPED_WITH))
    yield database
    drop_database(database)


def dump(database: Database) -> str:
    """The schema as pg_dump writes it, without what changes from one run or one minor version to the next."""
    program = str(installed_servers()[database.server.version] / "pg_dump")
    options = ["--schema-only", "--no-owner", "--schema=app"]
    text = subprocess.run([program, *options, database.dsn], capture_output=True, text=True, check=True).stdout
    return re.sub(r"\n{2,}", "\n\n", re.sub(r"(?m)^(--|\\|SET |SELECT pg_catalog.set_config).*\n", "", text)).lstrip()


@pytest.mark.parametrize("lines", [["outbox"], ["outbox", "partitioned"], ["inbox"]], ids=lambda lines: lines[-1])
def test_the_committed_dump_shows_what_the_migrations_make(bare_database: Database, lines: list[str]) -> None:
    with bare_database.connect() as conn:
        for line in lines:
            migrate.apply(conn, schema="app", line=line)
    actual = dump(bare_database)
    committed = MIGRATIONS / f"{lines[-1]}.schema.sql"
    if os.environ.get("RELAY_TEST_RENEW_SCHEMA") == "1":
        committed.write_text(actual)
    assert committed.read_text() == actual, "a migration changed the schema: run `make schema` and commit the dump"
