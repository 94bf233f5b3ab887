"""What the group roles may do, asked from the catalog in whole and tried out by real logins."""

from __future__ import annotations

from typing import TYPE_CHECKING, LiteralString

import pytest
from psycopg import errors, sql

from outbox_relay.operate import migrate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fixtures.postgres import Database

pytestmark = pytest.mark.every_postgres

INSERT: LiteralString = "INSERT INTO outbox (aggregate_type, aggregate_id, event_type) VALUES ('order', '1', 'placed')"
AUDIT: LiteralString = """
    INSERT INTO outbox_audit (action, outbox_id, message_id, aggregate_type, aggregate_id, sequence_no)
    VALUES ('release', 1, gen_random_uuid(), 'order', '1', 1)
"""

REPLAY: LiteralString = """
    INSERT INTO outbox_replay (name, why, selection, published_before) VALUES ('again', 'a bug', '{}', now())
"""

# Every privilege that is effective on anything in the schema; a column's only where the whole table's is not.
PRIVILEGES: LiteralString = """
    WITH thing AS (
        SELECT oid, relname::text AS name, relkind
        FROM pg_class
        WHERE relnamespace = 'shop'::regnamespace AND relkind IN ('r', 'S')
    )
    SELECT name || ' ' || privilege
    FROM thing,
        unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) AS privilege
    WHERE relkind = 'r' AND has_table_privilege(%(role)s, oid, privilege)
    UNION ALL
    SELECT name || ' ' || privilege
    FROM thing, unnest(ARRAY['USAGE', 'SELECT', 'UPDATE']) AS privilege
    WHERE relkind = 'S' AND has_sequence_privilege(%(role)s, oid, privilege)
    UNION ALL
    SELECT name || ' ' || privilege || ' ' || attname
    FROM thing
    JOIN pg_attribute ON attrelid = thing.oid AND attnum > 0,
        unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'REFERENCES']) AS privilege
    WHERE relkind = 'r'
        AND has_column_privilege(%(role)s, thing.oid, attnum, privilege)
        AND NOT has_table_privilege(%(role)s, thing.oid, privilege)
    UNION ALL
    SELECT 'schema ' || privilege
    FROM unnest(ARRAY['USAGE', 'CREATE']) AS privilege
    WHERE has_schema_privilege(%(role)s, 'shop', privilege)
"""

EXPECTED = {
    "outbox_writer": {
        "schema USAGE",
        "outbox INSERT message_id",
        "outbox INSERT aggregate_type",
        "outbox INSERT aggregate_id",
        "outbox INSERT event_type",
        "outbox INSERT payload",
        "outbox INSERT payload_bytes",
        "outbox INSERT headers",
        "outbox INSERT created_at",
    },
    "outbox_relay": {
        "schema USAGE",
        "outbox SELECT",
        "outbox DELETE",
        "outbox UPDATE published_at",
        "outbox UPDATE parked_at",
        "outbox UPDATE parked_reason",
        "outbox_sequence_no_seq SELECT",
        "outbox_shard SELECT",
        "outbox_shard UPDATE generation",
        "outbox_unordered SELECT",
        "outbox_unordered INSERT",
        "outbox_unordered DELETE",
        "outbox_relay_migration SELECT",
    },
    "outbox_pruner": {
        "schema USAGE",
        "outbox SELECT",
        "outbox DELETE",
        "outbox_unordered SELECT",
        "outbox_unordered DELETE",
    },
    "outbox_operator": {
        "schema USAGE",
        "outbox SELECT",
        "outbox DELETE",
        "outbox UPDATE payload",
        "outbox UPDATE payload_bytes",
        "outbox UPDATE headers",
        "outbox UPDATE parked_at",
        "outbox UPDATE parked_reason",
        "outbox_shard SELECT",
        "outbox_shard UPDATE generation",
        "outbox_unordered SELECT",
        "outbox_unordered INSERT transaction_id",
        "outbox_replay SELECT",
        "outbox_replay INSERT name",
        "outbox_replay INSERT operator",
        "outbox_replay INSERT why",
        "outbox_replay INSERT selection",
        "outbox_replay INSERT published_before",
        "outbox_replay UPDATE messages",
        "outbox_replay UPDATE reached_no",
        "outbox_replay UPDATE finished_at",
        "outbox_audit SELECT",
        "outbox_audit INSERT action",
        "outbox_audit INSERT operator",
        "outbox_audit INSERT why",
        "outbox_audit INSERT outbox_id",
        "outbox_audit INSERT message_id",
        "outbox_audit INSERT aggregate_type",
        "outbox_audit INSERT aggregate_id",
        "outbox_audit INSERT sequence_no",
        "outbox_audit INSERT parked_reason",
        "outbox_audit INSERT content",
    },
}

ALLOWED: dict[str, list[LiteralString]] = {
    "outbox_writer": [
        INSERT,
        """
        INSERT INTO outbox (message_id, aggregate_type, aggregate_id, event_type, payload, headers, created_at)
        VALUES (gen_random_uuid(), 'order', '1', 'placed', '{}', '{}', now())
        """,
        "INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload_bytes) VALUES ('o', '1', 'e', '')",
    ],
    "outbox_relay": [
        "SELECT * FROM outbox ORDER BY sequence_no LIMIT 1 FOR UPDATE",
        "UPDATE outbox SET published_at = now() WHERE id = 1",
        "UPDATE outbox SET parked_at = now(), parked_reason = 'too large' WHERE id = 1",
        "DELETE FROM outbox WHERE id = 1",
        "SELECT xmax, shard, generation FROM outbox_shard ORDER BY shard FOR UPDATE SKIP LOCKED",
        "UPDATE outbox_shard SET generation = generation + 1 WHERE shard = 0",
        "SELECT last_value, is_called FROM outbox_sequence_no_seq",
        "SELECT pg_sequence_last_value('outbox_sequence_no_seq')",
        "INSERT INTO outbox_unordered (transaction_id) VALUES ('7') ON CONFLICT DO NOTHING",
        "SELECT transaction_id FROM outbox_unordered",
        "DELETE FROM outbox_unordered WHERE recorded_at < now()",
        "SELECT version FROM outbox_relay_migration",
    ],
    "outbox_pruner": [
        "DELETE FROM outbox WHERE id IN (SELECT id FROM outbox WHERE published_at < now() ORDER BY id LIMIT 10)",
        "DELETE FROM outbox_unordered WHERE recorded_at < now()",
    ],
    "outbox_operator": [
        "SELECT * FROM outbox WHERE parked_at IS NOT NULL",
        "UPDATE outbox SET payload = NULL, payload_bytes = NULL, headers = '{}' WHERE id = 1",
        "UPDATE outbox SET parked_at = NULL, parked_reason = NULL WHERE id = 1",
        "DELETE FROM outbox WHERE id = 1",
        "SELECT FROM outbox_shard WHERE shard = 0 FOR UPDATE",
        "UPDATE outbox_shard SET generation = generation + 1 WHERE shard = 0",
        "INSERT INTO outbox_unordered (transaction_id) VALUES ('7') ON CONFLICT DO NOTHING",
        AUDIT,
        "SELECT * FROM outbox_audit",
        REPLAY,
        "UPDATE outbox_replay SET messages = 1, reached_no = 1, finished_at = now() WHERE name = 'again'",
    ],
}

REFUSED: dict[str, list[LiteralString]] = {
    "outbox_writer": [
        "SELECT payload FROM outbox",
        "INSERT INTO outbox (aggregate_type, aggregate_id, event_type) VALUES ('o', '1', 'e') RETURNING id",
        "INSERT INTO outbox (transaction_id, aggregate_type, aggregate_id, event_type) VALUES ('3', 'o', '1', 'e')",
        "INSERT INTO outbox (published_at, aggregate_type, aggregate_id, event_type) VALUES (now(), 'o', '1', 'e')",
        """
        INSERT INTO outbox (sequence_no, aggregate_type, aggregate_id, event_type)
        OVERRIDING SYSTEM VALUE VALUES (1, 'o', '1', 'e')
        """,
        "COPY outbox (sequence_no, aggregate_type, aggregate_id, event_type) FROM STDIN",
        "COPY outbox (transaction_id, aggregate_type, aggregate_id, event_type) FROM STDIN",
        "UPDATE outbox SET payload = NULL",
        "DELETE FROM outbox",
        "SELECT nextval('outbox_sequence_no_seq')",
        "SELECT setval('outbox_sequence_no_seq', 1)",
        "SELECT shard FROM outbox_shard",
        "INSERT INTO outbox_unordered (transaction_id) VALUES ('7')",
        "SELECT version FROM outbox_relay_migration",
    ],
    "outbox_relay": [
        INSERT,
        "UPDATE outbox SET payload = NULL",
        "UPDATE outbox SET sequence_no = DEFAULT",
        "TRUNCATE outbox",
        "SELECT nextval('outbox_sequence_no_seq')",
        "SELECT setval('outbox_sequence_no_seq', 1)",
        "INSERT INTO outbox_shard (shard) VALUES (16)",
        "UPDATE outbox_shard SET shard = 16 WHERE shard = 0",
        "DELETE FROM outbox_shard",
        "UPDATE outbox_unordered SET recorded_at = now()",
        "DELETE FROM outbox_relay_migration",
        "CREATE TABLE mine ()",
    ],
    "outbox_pruner": [
        INSERT,
        "UPDATE outbox SET published_at = NULL",
        "SELECT shard FROM outbox_shard FOR UPDATE",
        "INSERT INTO outbox_unordered (transaction_id) VALUES ('7')",
        "TRUNCATE outbox",
        "SELECT id FROM outbox_audit",
    ],
    "outbox_operator": [
        INSERT,
        "UPDATE outbox SET published_at = now()",
        "UPDATE outbox SET message_id = gen_random_uuid()",
        "UPDATE outbox SET aggregate_id = '2'",
        "SELECT setval('outbox_sequence_no_seq', 1)",
        "DELETE FROM outbox_shard",
        "DELETE FROM outbox_unordered",
        AUDIT.replace("(action", "(session_role, action").replace("VALUES (", "VALUES ('somebody', "),
        "UPDATE outbox_audit SET why = NULL",
        "DELETE FROM outbox_audit",
        "TRUNCATE outbox_audit",
        REPLAY.replace("(name", "(session_role, name").replace("VALUES (", "VALUES ('somebody', "),
        "UPDATE outbox_replay SET why = 'another'",
        "DELETE FROM outbox_replay",
        "CREATE TABLE mine ()",
    ],
}


@pytest.fixture
def shop(database: Database) -> Database:
    """A database with the outbox in a schema of its own, so that nothing is inherited from what PUBLIC may do."""
    with database.connect() as conn:
        migrate.apply(conn, schema="shop")
    return database


@pytest.fixture
def login(shop: Database) -> Iterator[str]:
    """A login role that belongs to no group yet."""
    name = f"login_of_{shop.name}"
    with shop.connect(autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
        yield name
        conn.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


def attempt(shop: Database, login: str, *, statement: LiteralString) -> bool:
    """Whether the server lets *login* run *statement*, which leaves nothing behind."""
    with shop.connect(user=login, options="-c search_path=shop") as conn:
        try:
            conn.execute(statement)
        except errors.InsufficientPrivilege:
            return False
        finally:
            conn.rollback()
    return True


@pytest.mark.parametrize("role", EXPECTED)
def test_a_group_role_has_exactly_the_privileges_of_its_job(shop: Database, role: str) -> None:
    with shop.connect() as conn:
        assert {privilege for (privilege,) in conn.execute(PRIVILEGES, {"role": role})} == EXPECTED[role]


def test_who_belongs_to_no_group_may_do_nothing(shop: Database, login: str) -> None:
    with shop.connect() as conn:
        assert conn.execute(PRIVILEGES, {"role": login}).fetchall() == []


@pytest.mark.parametrize("role", EXPECTED)
def test_group_roles_cannot_log_in_nor_do_anything_to_the_server(shop: Database, role: str) -> None:
    with shop.connect() as conn:
        powers = "rolcanlogin, rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls"
        assert conn.execute(f"SELECT {powers} FROM pg_roles WHERE rolname = %s", [role]).fetchall() == [(False,) * 6]


@pytest.mark.parametrize("role", EXPECTED)
def test_a_login_in_a_group_can_do_its_job_and_nothing_else(shop: Database, login: str, role: LiteralString) -> None:
    with shop.connect() as conn:
        conn.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(role), sql.Identifier(login)))
    allowed = [statement for statement in ALLOWED[role] + REFUSED[role] if attempt(shop, login, statement=statement)]
    assert allowed == ALLOWED[role]


def test_a_writer_can_copy_messages_in(shop: Database, login: str) -> None:
    with shop.connect() as conn:
        conn.execute(sql.SQL("GRANT outbox_writer TO {}").format(sql.Identifier(login)))
    with shop.connect(user=login, options="-c search_path=shop") as conn, conn.cursor() as cursor:
        with cursor.copy("COPY outbox (aggregate_type, aggregate_id, event_type) FROM STDIN") as copy:
            copy.write_row(("order", "1", "placed"))
        assert cursor.rowcount == 1
