"""What a relay learns about its schema at start, as a login that has the group role's grants and no more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from psycopg import sql

from outbox_relay.errors import SchemaMismatch
from outbox_relay.operate import migrate
from outbox_relay.operate.schema import check_schema

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
        AND relname IN ('outbox', 'outbox_shard', 'outbox_unordered')
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
        "schema 'shop' has no outbox, outbox_sequence_no_seq, outbox_shard, outbox_unordered: "
        "run `outbox-relay migrate apply`, or correct OUTBOX_RELAY_SCHEMA"
    )


def test_every_missing_column_is_named(admin: Connection, relay: Connection) -> None:
    migrate.apply(admin, schema="shop")
    columns = admin.execute(COLUMNS).fetchall()
    assert len(columns) == 19
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
    assert len(grants) == 13
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
