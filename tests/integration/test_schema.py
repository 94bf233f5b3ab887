"""What the relay's order relies on in the schema, and the committed dump that shows what a migration did."""

from __future__ import annotations

import os
import random
import re
import string
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, LiteralString

import pytest
from psycopg import errors

from outbox_relay.operate import migrate
from outbox_relay.sandbox.postgres import installed_servers
from tests.fixtures.marks import mark, set_aside
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
def test_even_the_owner_cannot_insert_a_number_of_his_own(conn: Connection) -> None:
    with pytest.raises(errors.GeneratedAlways):
        conn.execute(
            "INSERT INTO outbox (sequence_no, aggregate_type, aggregate_id, event_type) VALUES (7, 'o', '1', 'e')"
        )


@both_layouts
@pytest.mark.every_postgres
def test_sessions_draw_numbers_one_at_a_time(database: Database) -> None:
    with database.connect(autocommit=True) as one, database.connect(autocommit=True) as two:
        drawn = [
            session.execute(f"{INSERT} VALUES ('order', '1', 'placed') RETURNING sequence_no").fetchall()
            for session in (one, two, one, two)
        ]
    assert drawn == [[(1,)], [(2,)], [(3,)], [(4,)]]


@both_layouts
@pytest.mark.every_postgres
def test_the_only_index_of_the_outbox_is_its_primary_key_by_shard_and_number(conn: Connection) -> None:
    indexes = conn.execute(
        "SELECT pg_get_constraintdef(pg_constraint.oid) FROM pg_index LEFT JOIN pg_constraint ON conindid = indexrelid"
        " WHERE indrelid = 'outbox'::regclass AND contype = 'p'"
    ).fetchall()
    assert indexes == [("PRIMARY KEY (shard, sequence_no)",)]
    assert conn.execute("SELECT FROM pg_index WHERE indrelid = 'outbox'::regclass").rowcount == 1


@both_layouts
@pytest.mark.every_postgres
def test_a_type_and_a_key_may_be_longer_than_any_index_takes(conn: Connection) -> None:
    conn.execute(f"{INSERT} VALUES (%s, %s, 'placed')", [random_text(seed=1), random_text(seed=2)])
    set_aside(conn, 1)
    assert conn.execute("SELECT length(aggregate_id), state FROM outbox_message").fetchall() == [(100_000, "parked")]


def random_text(*, seed: int) -> str:
    """A long text that hardly any compression makes shorter."""
    return "".join(random.Random(seed).choices(string.printable, k=100_000))  # noqa: S311 -- no secret


@both_layouts
@pytest.mark.every_postgres
def test_the_messages_are_shown_with_what_the_marks_say_of_them(database: Database) -> None:
    with database.connect(autocommit=True) as shop, database.connect() as late:
        for key in ("1", "1", "2"):  # of the shards 1, 1 and 2
            shop.execute(f"{INSERT} VALUES ('order', %s, 'placed')", [key])
        mark(shop, through=1, age_seconds=60)
        mark(shop, through=3)
        late.execute(f"{INSERT} VALUES ('order', '1', 'placed')")
        shop.execute(f"{INSERT} VALUES ('order', '1', 'placed'), ('order', '7', 'placed'), ('order', '2', 'placed')")
        late.execute("INSERT INTO outbox_unordered (transaction_id, from_no) VALUES (pg_current_xact_id(), 3)")
        late.commit()
        mark(shop, through=5)
        set_aside(shop, 2, state="parked", reason_code="code", reason="why")
        set_aside(shop, 3, state="waiting", reason_code="code", reason="why not")
        assert shop.execute(
            """
            SELECT sequence_no, state, published_at < now() - interval '50 s', since IS NOT NULL, reason_code, reason
            FROM outbox_message
            ORDER BY sequence_no
            """
        ).fetchall() == [
            (1, "published", True, False, None, None),
            (2, "parked", None, True, "code", "why"),
            (3, "waiting", None, True, "code", "why not"),
            (4, "waiting", None, True, "late", None),
            (5, "published", False, False, None, None),
            (6, "unpublished", None, False, None, None),
            (7, "unpublished", None, False, None, None),
        ]


@both_layouts
@pytest.mark.every_postgres
def test_whoever_truncates_the_outbox_empties_what_is_said_of_its_messages(database: Database) -> None:
    role = f"cleaner_of_{database.name}"
    with database.connect(autocommit=True) as admin:
        admin.execute(f'CREATE ROLE "{role}" LOGIN')
        try:
            admin.execute(f'GRANT TRUNCATE ON outbox TO "{role}"')
            admin.execute(f"{INSERT} VALUES ('order', '1', 'placed')")
            mark(admin)
            set_aside(admin, 1)
            admin.execute("INSERT INTO outbox_unordered (transaction_id, from_no) VALUES ('500', 0)")
            admin.execute("INSERT INTO outbox_reconciled (shard) VALUES (1)")
            with database.connect(user=role, autocommit=True) as cleaner:
                cleaner.execute("TRUNCATE outbox")
            tables = ("outbox_published", "outbox_pending", "outbox_unordered", "outbox_reconciled")
            assert [admin.execute(f"SELECT FROM {table}".encode()).rowcount for table in tables] == [0] * 4
            assert admin.execute("SELECT FROM outbox_shard").rowcount == 16
        finally:
            admin.execute(f'DROP OWNED BY "{role}"; DROP ROLE "{role}"')


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
def bare_database(shared_server: Callable[..., PostgresServer]) -> Iterator[Database]:
    """A database of the version that the dumps are made with, without the schema app."""
    database = create_database(shared_server(DUMPED_WITH, fsync="off"))
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
