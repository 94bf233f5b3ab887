"""From the plain layout to the partitioned one: nothing is copied, lost or loosened, and later partitions are alike."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, LiteralString

import pytest
from psycopg import errors
from psycopg.conninfo import make_conninfo

from outbox_relay import database as relay_database
from outbox_relay.errors import MigrationError
from outbox_relay.operate import migrate
from outbox_relay.relay.horizon import list_writers, read_last_number
from outbox_relay.relay.prune import PruneOptions, open_partition
from outbox_relay.sandbox.postgres import installed_servers
from tests.fixtures.marks import disagreeing_marks, mark, set_aside
from tests.fixtures.outbox import insert
from tests.fixtures.postgres import login

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection
    from psycopg.rows import TupleRow

    from tests.fixtures.postgres import Database

pytestmark = pytest.mark.every_postgres

WAY_BACK = str(Path(__file__).parents[2] / "docs" / "plain-again.sql")
PARTITIONED = [str(migration) for migration in migrate.migrations("partitioned")]
GROUPS: list[LiteralString] = ["outbox_writer", "outbox_relay", "outbox_pruner", "outbox_operator"]

COLUMNS = """
    SELECT attname, format_type(atttypid, atttypmod), attnotnull, attstorage, attgenerated,
        pg_get_expr(adbin, adrelid) AS expression, col_description(attrelid, attnum)
    FROM pg_attribute
    LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
    WHERE attrelid = %s::regclass AND attnum > 0
    ORDER BY attnum
"""
IDENTITIES = "SELECT attname, attidentity FROM pg_attribute WHERE attrelid = 'outbox'::regclass AND attidentity <> ''"
CONSTRAINTS = """
    SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = %s::regclass AND contype IN ('c', 'p', 'u')
    ORDER BY 1
"""
INDEXES = """
    SELECT substring(pg_get_indexdef(indexrelid) FROM ' USING .*'), indisunique, indisvalid
    FROM pg_index WHERE indrelid = %s::regclass
    ORDER BY 1
"""
INDEX_NAMES = "SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = 'outbox'::regclass ORDER BY 1"
TRIGGERS = """
    SELECT tgrelid::regclass::text, tgname, pg_get_triggerdef(oid) FROM pg_trigger
    WHERE tgname LIKE 'outbox%' AND NOT tgisinternal
"""
VIEW = """
    SELECT pg_get_viewdef(oid), reloptions, relacl, relowner, obj_description(oid),
        (SELECT array_agg(col_description(oid, attnum) ORDER BY attnum) FROM pg_attribute WHERE attrelid = pg_class.oid)
    FROM pg_class
    WHERE oid = 'outbox_message'::regclass
"""
SETTINGS = "SELECT reloptions FROM pg_class WHERE oid = %s::regclass"
PRIVILEGES = """
    SELECT grantee::regrole::text, privilege_type, NULL
    FROM pg_class, aclexplode(relacl) WHERE oid = ANY (%(relations)s::regclass[]) AND grantee <> relowner
    UNION ALL
    SELECT grantee::regrole::text, privilege_type, attname
    FROM pg_attribute, aclexplode(attacl) WHERE attrelid = ANY (%(relations)s::regclass[])
    ORDER BY 1, 2, 3
"""


@pytest.fixture
def admin(database: Database) -> Iterator[Connection]:
    with database.connect(autocommit=True) as connection:
        yield connection


def convert(admin: Connection) -> None:
    applied = migrate.apply(admin, schema="public", line="partitioned")
    assert [str(migration) for migration in applied] == PARTITIONED


def shape(admin: Connection, table: str) -> list[list[TupleRow]]:
    """What is the same of a table and of its partitions."""
    return [admin.execute(query, [table]).fetchall() for query in (COLUMNS, CONSTRAINTS, INDEXES)]


def privileges(admin: Connection, *relations: str) -> list[TupleRow]:
    return admin.execute(PRIVILEGES, {"relations": list(relations)}).fetchall()


def test_messages_marks_and_pending_ones_stay_as_they_are_and_numbers_go_on(admin: Connection) -> None:
    insert(admin, "1", "2", "3", "4")
    mark(admin, through=3)
    set_aside(admin, 2)
    looked = "SELECT * FROM outbox_message ORDER BY sequence_no", "SELECT *, ctid FROM outbox ORDER BY sequence_no"
    before = [admin.execute(query).fetchall() for query in looked]
    convert(admin)
    assert [admin.execute(query).fetchall() for query in looked] == before
    assert [row[0] for row in admin.execute("SELECT state FROM outbox_message ORDER BY sequence_no").fetchall()] == [
        "published",
        "parked",
        "published",
        "unpublished",
    ]
    assert disagreeing_marks(admin) == []
    assert read_last_number(admin, schema="public").number == 4
    assert insert(admin, "5") == [5]
    assert admin.execute("SELECT max(sequence_no) FROM outbox WHERE transaction_id IS NOT NULL").fetchall() == [(5,)]


def test_an_outbox_that_was_never_used_begins_with_number_one(admin: Connection) -> None:
    convert(admin)
    assert read_last_number(admin, schema="public").number == 0
    assert insert(admin, "1", "2") == [1, 2]


def test_the_table_and_every_partition_keep_columns_checks_indexes_and_settings(admin: Connection) -> None:
    admin.execute("CREATE INDEX outbox_created_at_idx ON outbox (created_at)")
    admin.execute("COMMENT ON COLUMN outbox.headers IS 'Flat'")
    admin.execute("ALTER TABLE outbox SET (fillfactor = 70)")
    expected, names, identities = (
        shape(admin, "outbox"),
        *(admin.execute(q).fetchall() for q in (INDEX_NAMES, IDENTITIES)),
    )
    settings = admin.execute(SETTINGS, ["outbox"]).fetchall()
    convert(admin)
    open_next(admin)
    assert admin.execute(INDEX_NAMES).fetchall() == names
    assert admin.execute(IDENTITIES).fetchall() == identities
    assert shape(admin, "outbox") == expected
    for part in ("outbox_p0", "outbox_p1", "outbox_p2", "outbox_p3"):
        assert shape(admin, part) == expected
        assert admin.execute(SETTINGS, [part]).fetchall() == settings


def test_every_grant_is_kept_and_none_leads_to_a_partition(admin: Connection) -> None:
    admin.execute("GRANT REFERENCES (sequence_no), SELECT (shard) ON outbox TO outbox_writer")
    admin.execute("GRANT SELECT ON outbox_message TO PUBLIC")
    relations = ["outbox", "outbox_message", "outbox_sequence_no_seq"]
    before = privileges(admin, *relations)
    convert(admin)
    assert privileges(admin, *relations) == before
    assert privileges(admin, "outbox_p0", "outbox_p1", "outbox_p2") == []


@pytest.mark.parametrize("group", GROUPS)
def test_no_role_reads_or_writes_a_partition_directly(
    database: Database, admin: Connection, group: LiteralString
) -> None:
    convert(admin)
    with login(database, group=group) as name, database.connect(user=name, autocommit=True) as session:
        for attempt in (
            "INSERT INTO outbox_p0 (aggregate_type, aggregate_id, event_type) VALUES ('o', '1', 'e')",
            "SELECT FROM outbox_p0",
            "UPDATE outbox_p0 SET headers = '{}'",
            "TRUNCATE outbox_p0",
            "DROP TABLE outbox_p0",
        ):
            with pytest.raises(errors.InsufficientPrivilege):
                session.execute(attempt)


def test_a_writer_that_goes_to_a_partition_itself_is_refused_or_seen(database: Database, admin: Connection) -> None:
    convert(admin)
    with database.connect() as owner:
        try:
            owner.execute("INSERT INTO outbox_p0 (aggregate_type, aggregate_id, event_type) VALUES ('o', '1', 'e')")
        except errors.NotNullViolation:
            assert admin.info.server_version < 170_000
        else:
            [(xid,)] = owner.execute("SELECT pg_current_xact_id()::text").fetchall()
            assert list_writers(admin, schema="public") == {int(xid)}


def test_a_writer_is_seen_by_its_lock_on_the_outbox(database: Database, admin: Connection) -> None:
    convert(admin)
    with database.connect() as writer:
        insert(writer, "1")
        [(xid,)] = writer.execute("SELECT pg_current_xact_id()::text").fetchall()
        assert list_writers(admin, schema="public") == {int(xid)}


def test_later_migrations_of_the_outbox_reach_all_partitions(admin: Connection) -> None:
    convert(admin)
    admin.execute("ALTER TABLE outbox ADD COLUMN note text")
    admin.execute("CREATE INDEX outbox_note_idx ON outbox (note)")
    open_next(admin)
    expected = shape(admin, "outbox")
    assert [shape(admin, f"outbox_p{number}") for number in range(4)] == [expected] * 4


def test_the_view_of_the_messages_keeps_its_definition_grants_comments_and_what_reads_it(admin: Connection) -> None:
    admin.execute("ALTER VIEW outbox_message SET (security_barrier = true)")
    admin.execute("COMMENT ON VIEW outbox_message IS 'All of them'")
    admin.execute("CREATE VIEW troubled AS SELECT sequence_no FROM outbox_message WHERE state = 'parked'")
    before = admin.execute(VIEW).fetchall()
    convert(admin)
    assert admin.execute(VIEW).fetchall() == before
    open_next(admin)
    [number] = insert(admin, "1")
    mark(admin)
    set_aside(admin, number)
    assert admin.execute("SELECT sequence_no FROM troubled").fetchall() == [(number,)]


def test_the_outbox_forgets_its_marks_when_it_is_emptied_and_no_partition_has_a_trigger(admin: Connection) -> None:
    before = admin.execute(TRIGGERS).fetchall()
    assert [row[0] for row in before] == ["outbox"]
    convert(admin)
    assert admin.execute(TRIGGERS).fetchall() == before
    open_next(admin)
    set_aside(admin, *insert(admin, "1"))
    mark(admin)
    admin.execute("TRUNCATE outbox")
    assert admin.execute("SELECT FROM outbox_published UNION ALL SELECT FROM outbox_pending").fetchall() == []


@pytest.mark.parametrize(
    ("obstacle", "named"),
    [
        ("CREATE TRIGGER tell AFTER INSERT ON outbox EXECUTE FUNCTION suppress_redundant_updates_trigger()", "tell"),
        ("CREATE TRIGGER outbox_forget_trigger2 AFTER TRUNCATE ON outbox EXECUTE FUNCTION other()", "outbox_forget"),
        ("CREATE VIEW waiting AS SELECT sequence_no FROM outbox", "_RETURN"),
        ("CREATE RULE tell AS ON INSERT TO outbox DO ALSO NOTHING", "tell"),
        ("CREATE POLICY mine ON outbox USING (true)", "mine"),
        ("ALTER TABLE outbox ENABLE ROW LEVEL SECURITY", "row security"),
        ("CREATE PUBLICATION feed FOR TABLE outbox", "feed"),
        (
            "CREATE FUNCTION newest() RETURNS bigint BEGIN ATOMIC SELECT max(sequence_no) FROM outbox; END",
            r"newest\(\)",
        ),
        (
            "CREATE TABLE note (shard smallint, number bigint, FOREIGN KEY (shard, number) REFERENCES outbox)",
            "note_shard_number_fkey",
        ),
    ],
)
def test_what_would_stay_behind_is_named_and_nothing_is_changed(
    admin: Connection, obstacle: LiteralString, named: str
) -> None:
    admin.execute("CREATE FUNCTION other() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'")
    admin.execute(obstacle)
    with pytest.raises(MigrationError, match=f"the outbox has .*{named}.* Drop it, run this again, and create it anew"):
        migrate.apply(admin, schema="public", line="partitioned")
    assert admin.execute("SELECT relkind FROM pg_class WHERE relname = 'outbox'").fetchall() == [("r",)]


def test_without_an_outbox_it_says_what_to_run_first(admin: Connection) -> None:
    with pytest.raises(MigrationError, match=r"there is no outbox yet\. Run first: outbox-relay migrate apply"):
        migrate.apply(admin, schema="elsewhere", line="partitioned")


def test_a_writer_that_does_not_let_go_is_an_error_and_the_plain_layout_stays(
    database: Database, admin: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "_PAUSE_SECONDS", 0.01)
    with database.connect() as writer:
        insert(writer, "1")
        with pytest.raises(MigrationError, match="end the long transactions"):
            migrate.apply(admin, schema="public", line="partitioned", lock_timeout_seconds=0.02)
        insert(writer, "2")
        writer.commit()
    convert(admin)
    assert insert(admin, "3") == [3]


def test_the_owner_of_a_quoted_schema_converts_it_and_a_pruner_opens_partitions_there(
    database: Database, admin: Connection
) -> None:
    schema = 'Shop "1"'
    admin.execute('CREATE SCHEMA "Shop ""1"""')
    with login(database, group="outbox_operator") as owner, login(database, group="outbox_pruner") as pruner:
        admin.execute(f'ALTER SCHEMA "Shop ""1""" OWNER TO "{owner}"'.encode())
        with database.connect(user=owner, autocommit=True) as connection:
            migrate.apply(connection, schema=schema)
            migrate.apply(connection, schema=schema, line="partitioned")
            connection.execute('UPDATE "Shop ""1""".outbox_partition SET open_for = \'1 microsecond\'')
        dsn = make_conninfo(database.dsn, user=pruner)
        with relay_database.connect(dsn, application_name="pruner") as connection:
            open_partition(connection, options=PruneOptions(schema=schema))
        tables = admin.execute(
            "SELECT tablename FROM pg_tables WHERE tablename ~ '_p\\d' AND tableowner = %s ORDER BY 1", [owner]
        ).fetchall()
    assert [name for (name,) in tables] == ["outbox_p0", "outbox_p1", "outbox_p2", "outbox_p3"]


def test_the_way_back_leads_to_the_plain_layout_with_everything_in_it(database: Database, admin: Connection) -> None:
    relations = ["outbox", "outbox_message", "outbox_sequence_no_seq"]
    migrate.apply(admin, schema="shop")
    admin.execute("SET search_path = shop")
    admin.execute("GRANT SELECT ON outbox, outbox_message TO PUBLIC")
    plain = kept_by_the_way_back(admin)
    grants = privileges(admin, *relations)
    insert(admin, "1", "2")
    migrate.apply(admin, schema="shop", line="partitioned")
    open_next(admin)
    [third, last] = insert(admin, "3", "4")
    mark(admin, through=third)
    set_aside(admin, 2)
    admin.execute("DELETE FROM outbox WHERE sequence_no = %s", [last])
    before = admin.execute("SELECT * FROM outbox_message ORDER BY sequence_no").fetchall()

    psql = str(installed_servers()[database.server.version] / "psql")
    command = [
        psql,
        make_conninfo(database.dsn, options="-csearch_path=shop"),
        "-Xqv",
        "ON_ERROR_STOP=1",
        "-f",
        WAY_BACK,
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=60)

    assert admin.execute("SELECT * FROM outbox_message ORDER BY sequence_no").fetchall() == before
    assert disagreeing_marks(admin) == []
    assert kept_by_the_way_back(admin) == plain
    assert privileges(admin, *relations) == grants
    assert insert(admin, "5") == [last + 1]
    assert [state.state for state in migrate.status(admin, schema="shop", line="partitioned")] == ["pending"] * 4
    admin.execute("TRUNCATE outbox")
    assert admin.execute("SELECT FROM outbox_published UNION ALL SELECT FROM outbox_pending").fetchall() == []


def kept_by_the_way_back(admin: Connection) -> list[list[TupleRow]]:
    queries: list[LiteralString] = [INDEX_NAMES, IDENTITIES, TRIGGERS, VIEW]
    return [
        *shape(admin, "outbox"),
        *(admin.execute(query).fetchall() for query in queries),
        admin.execute(SETTINGS, ["outbox"]).fetchall(),
    ]


def open_next(admin: Connection) -> None:
    """Open the next partition as if the time of the present one were over."""
    admin.execute("UPDATE outbox_partition SET opened_at = opened_at - open_for")
    admin.execute("SELECT outbox_open_partition()")
