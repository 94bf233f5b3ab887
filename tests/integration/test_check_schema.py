"""What a relay learns about its schema at start, as a login that has the group role's grants and no more."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, LiteralString

import pytest
from psycopg import sql

from outbox_relay.errors import SchemaMismatch
from outbox_relay.operate import migrate
from outbox_relay.operate.schema import check_schema
from tests.fixtures.marks import mark
from tests.fixtures.outbox import insert

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from tests.fixtures.postgres import Database

# Each GRANT on something in the schema, with the REVOKE that takes it from the group role.
GRANTS = """
    SELECT format('REVOKE %s ON %I.%I FROM outbox_relay', privilege_type, 'shop', relname),
        format('GRANT %s ON shop.%I TO ', privilege_type, relname)
    FROM pg_class, aclexplode(relacl)
    WHERE relnamespace = 'shop'::regnamespace AND grantee = 'outbox_relay'::regrole
    UNION ALL
    SELECT format('REVOKE %s (%I) ON %I.%I FROM outbox_relay', privilege_type, attname, 'shop', relname),
        format('GRANT %s (%I) ON shop.%I TO ', privilege_type, attname, relname)
    FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid, aclexplode(attacl)
    WHERE relnamespace = 'shop'::regnamespace AND grantee = 'outbox_relay'::regrole
    UNION ALL
    SELECT 'REVOKE USAGE ON SCHEMA shop FROM outbox_relay', 'GRANT USAGE ON SCHEMA shop TO '
"""

COLUMNS = """
    SELECT relname, attname
    FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
    WHERE relnamespace = 'shop'::regnamespace
        AND relname IN (
            'outbox', 'outbox_shard', 'outbox_published', 'outbox_pending', 'outbox_unordered', 'outbox_reconciled'
        )
        AND attnum > 0
"""

RENAME = sql.SQL("ALTER TABLE shop.{table} RENAME {old} TO {new}")


@pytest.fixture
def admin(database: Database) -> Iterator[Connection]:
    with database.connect(autocommit=True) as conn:
        yield conn


@pytest.fixture
def relay(database: Database, admin: Connection) -> Iterator[Connection]:
    """The connection of a login that is in the group outbox_relay."""
    login = f"relay_of_{database.name}"
    admin.execute(sql.SQL("CREATE ROLE {} LOGIN IN ROLE outbox_relay").format(sql.Identifier(login)))
    with database.connect(user=login) as conn:
        yield conn
    admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(login)))


def refusal(relay: Connection) -> str:
    with pytest.raises(SchemaMismatch) as raised:
        check_schema(relay, schema="shop")
    return str(raised.value)


@pytest.mark.every_postgres
def test_a_relay_with_the_group_role_finds_nothing_missing(admin: Connection, relay: Connection) -> None:
    migrate.apply(admin, schema="shop")
    assert check_schema(relay, schema="shop") is None


def test_a_schema_that_another_tool_migrated_is_accepted(admin: Connection, relay: Connection) -> None:
    with admin.transaction():
        admin.execute("CREATE SCHEMA shop; SET LOCAL search_path = shop")
        for migration in migrate.migrations():
            admin.execute(migration.sql.encode())
    assert check_schema(relay, schema="shop") is None


def test_missing_tables_are_named_with_the_command_that_makes_them(relay: Connection) -> None:
    assert refusal(relay) == (
        "schema 'shop' has no outbox, outbox_message, outbox_pending, outbox_published, outbox_reconciled, "
        "outbox_sequence_no_seq, outbox_shard, outbox_unordered: "
        "run `outbox-relay migrate apply`, or correct OUTBOX_RELAY_SCHEMA"
    )


def test_every_missing_column_is_named(admin: Connection, relay: Connection) -> None:
    migrate.apply(admin, schema="shop")
    columns = admin.execute(COLUMNS).fetchall()
    assert len(columns) == 36
    for table, column in columns:
        admin.execute(
            RENAME.format(table=sql.Identifier(table), old=sql.Identifier(column), new=sql.Identifier("gone"))
        )
        assert refusal(relay).startswith(f"schema 'shop' has no {table}.{column}: run `outbox-relay migrate apply`")
        admin.execute(
            RENAME.format(table=sql.Identifier(table), old=sql.Identifier("gone"), new=sql.Identifier(column))
        )
    assert check_schema(relay, schema="shop") is None


@pytest.mark.every_postgres
def test_every_missing_privilege_is_named_as_the_grant_that_gives_it(admin: Connection, relay: Connection) -> None:
    migrate.apply(admin, schema="shop")
    grants = admin.execute(GRANTS).fetchall()
    assert len(grants) == 22
    for revoke, grant in grants:
        admin.execute(revoke)
        login = relay.info.user
        assert refusal(relay) == (
            f"role {login!r} lacks privileges that `GRANT outbox_relay TO {login}` gives, or: {grant}{login}"
        )
        admin.execute(grant + "outbox_relay")
    assert check_schema(relay, schema="shop") is None


def test_an_older_schema_is_refused_with_what_it_waits_for(admin: Connection, relay: Connection) -> None:
    migrate.apply(admin, schema="shop")
    admin.execute("DELETE FROM shop.outbox_relay_migration WHERE version = 2")
    assert refusal(relay) == (
        "schema 'shop' is older than this version and waits for 0002_grant_roles: run `outbox-relay migrate apply`"
    )


def test_an_older_partitioned_schema_is_refused_with_what_it_waits_for(admin: Connection, relay: Connection) -> None:
    for line in ("outbox", "partitioned"):
        migrate.apply(admin, schema="shop", line=line)
    assert check_schema(relay, schema="shop") is None
    admin.execute("DELETE FROM shop.outbox_relay_migration WHERE line = 'partitioned' AND version = 4")
    assert refusal(relay) == (
        "schema 'shop' is older than this version and waits for 0004_create_outbox_partition: "
        "run `outbox-relay migrate apply --partitioned`"
    )


def test_a_schema_on_its_way_to_partitions_is_accepted(admin: Connection, relay: Connection) -> None:
    migrate.apply(admin, schema="shop")
    admin.execute("INSERT INTO shop.outbox_relay_migration VALUES ('partitioned', 1, 'bound_ids')")
    assert check_schema(relay, schema="shop") is None


def test_a_newer_schema_is_a_warning(admin: Connection, relay: Connection) -> None:
    migrate.apply(admin, schema="shop")
    admin.execute("INSERT INTO shop.outbox_relay_migration VALUES ('outbox', 9999, 'add_wonder')")
    assert check_schema(relay, schema="shop") == (
        "schema 'shop' has 9999_add_wonder of a newer version: this one runs on it, upgrade it soon"
    )


@pytest.fixture
def ready(admin: Connection, relay: Connection) -> Connection:
    """The connection of a relay to a schema that has all it needs."""
    migrate.apply(admin, schema="shop")
    assert check_schema(relay, schema="shop") is None
    return relay


def mend(admin: Connection, refused: str) -> None:
    """Do what the refusal says, as an administrator would who pastes it."""
    for problem in refused.split("; "):
        _, _, remedy = problem.partition(" -- ")
        admin.execute(re.split(", (?:or|then) ", remedy)[0].encode())


@pytest.mark.every_postgres
@pytest.mark.parametrize(
    ("damage", "lacking"),
    [
        ("DELETE FROM shop.outbox_shard", "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15"),
        ("DELETE FROM shop.outbox_shard WHERE shard IN (7, 11)", "7, 11"),
    ],
    ids=["all", "two"],
)
def test_a_shard_without_a_row_is_named_with_the_statement_that_inserts_it(
    admin: Connection, ready: Connection, damage: LiteralString, lacking: str
) -> None:
    admin.execute(damage)
    refused = refusal(ready)
    assert refused == (
        f"outbox_shard lacks {lacking} -- "
        "INSERT INTO shop.outbox_shard (shard) SELECT generate_series(0, 15) ON CONFLICT DO NOTHING"
    )
    mend(admin, refused)
    assert check_schema(ready, schema="shop") is None


def test_a_surplus_shard_is_named_with_the_statement_that_deletes_it(admin: Connection, ready: Connection) -> None:
    admin.execute("INSERT INTO shop.outbox_shard VALUES (16)")
    refused = refusal(ready)
    assert refused == "outbox_shard has 16 -- DELETE FROM shop.outbox_shard WHERE shard NOT BETWEEN 0 AND 15"
    mend(admin, refused)
    assert check_schema(ready, schema="shop") is None


@pytest.mark.every_postgres
@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("CACHE 50", "CACHE 50, INCREMENT 1"),
        ("INCREMENT 2", "CACHE 1, INCREMENT 2"),
        ("INCREMENT -1", "CACHE 1, INCREMENT -1"),
        ("CYCLE", "CACHE 1, INCREMENT 1, CYCLE"),
    ],
)
def test_a_sequence_that_does_not_draw_one_by_one_is_refused_with_the_remedy(
    admin: Connection, ready: Connection, option: LiteralString, named: str
) -> None:
    admin.execute(f"ALTER SEQUENCE shop.outbox_sequence_no_seq {option}")
    refused = refusal(ready)
    assert refused == (
        f"numbers are not drawn one by one: outbox_sequence_no_seq has {named} -- "
        "ALTER SEQUENCE shop.outbox_sequence_no_seq CACHE 1 INCREMENT 1 NO CYCLE, then let all applications connect "
        "anew, for their sessions use up the numbers that they have drawn"
    )
    mend(admin, refused)
    assert check_schema(ready, schema="shop") is None


def insert_five_and_mark(admin: Connection, *, through: int) -> None:
    with admin.transaction():
        admin.execute("SET LOCAL search_path = shop")
        insert(admin, *"12345")
        mark(admin, through=through)


@pytest.mark.every_postgres
def test_marks_above_the_sequence_are_refused_with_the_number_to_set_it_to(
    admin: Connection, ready: Connection
) -> None:
    insert_five_and_mark(admin, through=5)
    assert check_schema(ready, schema="shop") is None
    admin.execute("DELETE FROM shop.outbox; ALTER SEQUENCE shop.outbox_sequence_no_seq RESTART")
    refused = refusal(ready)
    assert refused == (
        "the sequence went back: the next number is 1, the newest mark is at 5, the newest message is 0 -- "
        "SELECT setval('shop.outbox_sequence_no_seq', 5)"
    )
    mend(admin, refused)
    assert check_schema(ready, schema="shop") is None
    assert admin.execute("SELECT nextval('shop.outbox_sequence_no_seq')").fetchall() == [(6,)]


@pytest.mark.parametrize(
    ("next_number", "words"),
    [("5, true", None), ("6, false", None), ("4, true", "number is 5"), ("5, false", "number is 5")],
)
def test_a_message_above_the_sequence_is_refused_although_no_mark_is_there(
    admin: Connection, ready: Connection, next_number: LiteralString, words: str | None
) -> None:
    insert_five_and_mark(admin, through=2)
    admin.execute(f"SELECT setval('shop.outbox_sequence_no_seq', {next_number})")
    if words is None:
        assert check_schema(ready, schema="shop") is None
    else:
        assert words in refusal(ready)


@pytest.mark.every_postgres
def test_a_truncate_that_restarts_the_numbers_is_no_damage(admin: Connection, ready: Connection) -> None:
    insert_five_and_mark(admin, through=5)
    admin.execute("TRUNCATE shop.outbox RESTART IDENTITY")
    assert check_schema(ready, schema="shop") is None


@pytest.mark.every_postgres
@pytest.mark.parametrize(
    ("damage", "remedy"),
    [
        (
            "ALTER TABLE shop.outbox DISABLE TRIGGER outbox_forget_trigger",
            "ALTER TABLE shop.outbox ENABLE TRIGGER outbox_forget_trigger",
        ),
        (
            "ALTER TABLE shop.outbox ENABLE REPLICA TRIGGER outbox_forget_trigger",
            "ALTER TABLE shop.outbox ENABLE TRIGGER outbox_forget_trigger",
        ),
        (
            "DROP TRIGGER outbox_forget_trigger ON shop.outbox",
            (
                "CREATE TRIGGER outbox_forget_trigger AFTER TRUNCATE ON shop.outbox "
                "FOR EACH STATEMENT EXECUTE FUNCTION shop.outbox_forget()"
            ),
        ),
    ],
    ids=["disabled", "for replicas only", "dropped"],
)
def test_without_its_trigger_on_truncate_the_outbox_is_refused(
    admin: Connection, ready: Connection, damage: LiteralString, remedy: str
) -> None:
    admin.execute(damage)
    refused = refusal(ready)
    assert refused == f"no enabled trigger outbox_forget_trigger empties the marks when outbox is truncated -- {remedy}"
    mend(admin, refused)
    assert check_schema(ready, schema="shop") is None


TABLES = ("outbox", "outbox_shard", "outbox_published", "outbox_pending", "outbox_unordered", "outbox_reconciled")


@pytest.mark.every_postgres
@pytest.mark.parametrize("table", TABLES)
def test_a_policy_that_hides_rows_from_the_relay_is_refused_whatever_the_session_says(
    admin: Connection, ready: Connection, table: str
) -> None:
    admin.execute(sql.SQL("ALTER TABLE shop.{} ENABLE ROW LEVEL SECURITY").format(sql.Identifier(table)))
    hidden = f"row level security hides rows of {table} from role {ready.info.user}"
    remedies = f"ALTER TABLE shop.{table} DISABLE ROW LEVEL SECURITY, or ALTER ROLE {ready.info.user} BYPASSRLS"
    for setting in ("on", "off"):
        ready.execute(f"SET row_security = {setting}")
        assert refusal(ready) == f"{hidden} -- {remedies}"
    admin.execute(sql.SQL("ALTER ROLE {} BYPASSRLS").format(sql.Identifier(ready.info.user)))
    assert check_schema(ready, schema="shop") is None


def test_a_policy_on_the_outbox_is_mended_by_the_statement_in_the_refusal(admin: Connection, ready: Connection) -> None:
    admin.execute("ALTER TABLE shop.outbox ENABLE ROW LEVEL SECURITY")
    admin.execute("CREATE POLICY only_inserts ON shop.outbox FOR INSERT WITH CHECK (true)")
    mend(admin, refusal(ready))
    assert check_schema(ready, schema="shop") is None


@pytest.mark.parametrize("event", ["INSERT", "UPDATE", "DELETE"])
def test_a_rule_that_replaces_what_is_asked_is_refused(
    admin: Connection, ready: Connection, event: LiteralString
) -> None:
    admin.execute(f"CREATE RULE append_only AS ON {event} TO shop.outbox DO INSTEAD NOTHING")
    refused = refusal(ready)
    assert refused == (
        "rule append_only of outbox does something else instead of what is asked -- "
        "DROP RULE append_only ON shop.outbox"
    )
    mend(admin, refused)
    assert check_schema(ready, schema="shop") is None


def test_a_rule_that_does_something_besides_is_accepted(admin: Connection, ready: Connection) -> None:
    admin.execute("CREATE RULE tell AS ON INSERT TO shop.outbox DO ALSO NOTIFY outbox")
    assert check_schema(ready, schema="shop") is None


def test_all_that_is_wrong_is_named_at_once(admin: Connection, ready: Connection) -> None:
    insert_five_and_mark(admin, through=5)
    admin.execute("ALTER TABLE shop.outbox DISABLE TRIGGER outbox_forget_trigger")
    admin.execute("ALTER SEQUENCE shop.outbox_sequence_no_seq CACHE 10")
    refused = refusal(ready)
    assert [problem.partition(" -- ")[0] for problem in refused.split("; ")] == [
        "no enabled trigger outbox_forget_trigger empties the marks when outbox is truncated",
        "numbers are not drawn one by one: outbox_sequence_no_seq has CACHE 10, INCREMENT 1",
    ]
    mend(admin, refused)
    assert check_schema(ready, schema="shop") is None
