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
MARK: LiteralString = "INSERT INTO outbox_published (shard, through, messages, checksum) VALUES (0, 1, 1, 1)"
PENDING: LiteralString = """
    INSERT INTO outbox_pending (shard, sequence_no, key_hash, aggregate_type, state, reason_code, reason)
    VALUES (0, 1, 0, 'order', 'parked', 'unpublishable', 'a header is a string')
"""
UNORDERED: LiteralString = "INSERT INTO outbox_unordered (transaction_id, from_no) VALUES ('7', 0)"
RECONCILED: LiteralString = "INSERT INTO outbox_reconciled (shard, checked_through) VALUES (0, 1)"
AUDIT: LiteralString = """
    INSERT INTO outbox_audit (action, sequence_no, message_id, aggregate_type, aggregate_id, parked_reason)
    VALUES ('release', 1, gen_random_uuid(), 'order', '1', 'unpublishable: a header is a string')
"""
REPLAY: LiteralString = """
    INSERT INTO outbox_replay (name, why, selection, published_through) VALUES ('again', 'a bug', '{}', '{7}')
"""

# Every privilege that is effective on anything in the schema; a column's only where the whole table's is not.
PRIVILEGES: LiteralString = """
    WITH thing AS (
        SELECT oid, relname::text AS name, relkind
        FROM pg_class
        WHERE relnamespace = 'shop'::regnamespace AND relkind IN ('r', 'v', 'S')
    )
    SELECT name || ' ' || privilege
    FROM thing,
        unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) AS privilege
    WHERE relkind <> 'S' AND has_table_privilege(%(role)s, oid, privilege)
    UNION ALL
    SELECT name || ' ' || privilege
    FROM thing, unnest(ARRAY['USAGE', 'SELECT', 'UPDATE']) AS privilege
    WHERE relkind = 'S' AND has_sequence_privilege(%(role)s, oid, privilege)
    UNION ALL
    SELECT name || ' ' || privilege || ' ' || attname
    FROM thing
    JOIN pg_attribute ON attrelid = thing.oid AND attnum > 0,
        unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'REFERENCES']) AS privilege
    WHERE relkind <> 'S'
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
        "outbox_message SELECT",
        "outbox_sequence_no_seq SELECT",
        "outbox_shard SELECT",
        "outbox_shard UPDATE shard",
        "outbox_published SELECT",
        "outbox_published INSERT",
        "outbox_published UPDATE",
        "outbox_published DELETE",
        "outbox_pending SELECT",
        "outbox_pending INSERT",
        "outbox_pending UPDATE",
        "outbox_pending DELETE",
        "outbox_unordered SELECT",
        "outbox_unordered INSERT",
        "outbox_unordered UPDATE",
        "outbox_unordered DELETE",
        "outbox_reconciled SELECT",
        "outbox_reconciled INSERT",
        "outbox_reconciled UPDATE",
        "outbox_relay_migration SELECT",
    },
    "outbox_pruner": {
        "schema USAGE",
        "outbox SELECT",
        "outbox DELETE",
        "outbox_message SELECT",
        "outbox_sequence_no_seq SELECT",
        "outbox_shard SELECT",
        "outbox_shard UPDATE shard",
        "outbox_published SELECT",
        "outbox_published INSERT",
        "outbox_published UPDATE",
        "outbox_published DELETE",
        "outbox_pending SELECT",
        "outbox_pending INSERT",
        "outbox_pending UPDATE",
        "outbox_pending DELETE",
        "outbox_unordered SELECT",
        "outbox_unordered DELETE",
        "outbox_reconciled SELECT",
        "outbox_reconciled INSERT",
        "outbox_reconciled UPDATE",
    },
    "outbox_operator": {
        "schema USAGE",
        "outbox SELECT",
        "outbox DELETE",
        "outbox UPDATE payload",
        "outbox UPDATE payload_bytes",
        "outbox UPDATE headers",
        "outbox_message SELECT",
        "outbox_sequence_no_seq SELECT",
        "outbox_shard SELECT",
        "outbox_shard UPDATE shard",
        "outbox_published SELECT",
        "outbox_pending SELECT",
        "outbox_pending DELETE",
        "outbox_pending UPDATE state",
        "outbox_pending UPDATE reason_code",
        "outbox_pending UPDATE reason",
        "outbox_pending UPDATE is_unordered",
        "outbox_pending UPDATE since",
        "outbox_unordered SELECT",
        "outbox_reconciled SELECT",
        "outbox_replay SELECT",
        "outbox_replay INSERT name",
        "outbox_replay INSERT operator",
        "outbox_replay INSERT why",
        "outbox_replay INSERT selection",
        "outbox_replay INSERT published_through",
        "outbox_replay UPDATE messages",
        "outbox_replay UPDATE reached_no",
        "outbox_replay UPDATE finished_at",
        "outbox_audit SELECT",
        "outbox_audit INSERT action",
        "outbox_audit INSERT operator",
        "outbox_audit INSERT why",
        "outbox_audit INSERT sequence_no",
        "outbox_audit INSERT message_id",
        "outbox_audit INSERT aggregate_type",
        "outbox_audit INSERT aggregate_id",
        "outbox_audit INSERT event_type",
        "outbox_audit INSERT payload",
        "outbox_audit INSERT payload_bytes",
        "outbox_audit INSERT headers",
        "outbox_audit INSERT created_at",
        "outbox_audit INSERT parked_reason",
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
        "LOCK TABLE ONLY outbox IN ACCESS SHARE MODE",
        "SELECT * FROM outbox ORDER BY shard, sequence_no",
        "SELECT state FROM outbox_message",
        "SELECT xmax, shard FROM outbox_shard ORDER BY shard FOR UPDATE SKIP LOCKED",
        "SELECT last_value, is_called FROM outbox_sequence_no_seq",
        "SELECT pg_sequence_last_value('outbox_sequence_no_seq')",
        MARK,
        "UPDATE outbox_published SET messages = messages + 1",
        "DELETE FROM outbox_published",
        PENDING,
        "UPDATE outbox_pending SET state = 'waiting'",
        "DELETE FROM outbox_pending",
        UNORDERED,
        "SELECT * FROM outbox_unordered ORDER BY transaction_id FOR UPDATE",
        "UPDATE outbox_unordered SET collected_at = clock_timestamp()",
        "DELETE FROM outbox_unordered WHERE recorded_at < now()",
        RECONCILED,
        "UPDATE outbox_reconciled SET checked_through = 1",
        "SELECT version FROM outbox_relay_migration",
    ],
    "outbox_pruner": [
        "DELETE FROM outbox WHERE shard = 0 AND sequence_no <= 10",
        "SELECT shard FROM outbox_shard FOR UPDATE",
        "DELETE FROM outbox_published WHERE shard = 0 AND through < 10",
        MARK,
        PENDING,
        "DELETE FROM outbox_unordered WHERE recorded_at < now()",
        RECONCILED,
        "SELECT last_value FROM outbox_sequence_no_seq",
    ],
    "outbox_operator": [
        "SELECT * FROM outbox_message WHERE state = 'parked'",
        "SELECT * FROM outbox_published, outbox_pending, outbox_unordered, outbox_reconciled",
        "SELECT last_value FROM outbox_sequence_no_seq",
        "LOCK TABLE ONLY outbox IN ACCESS SHARE MODE",
        "SELECT FROM outbox_shard WHERE shard = 0 FOR UPDATE",
        "UPDATE outbox SET payload = NULL, payload_bytes = NULL, headers = '{}' WHERE shard = 0 AND sequence_no = 1",
        """
        UPDATE outbox_pending
        SET state = 'waiting', reason_code = 'released', reason = '', is_unordered = true, since = now()
        WHERE shard = 0
        """,
        "DELETE FROM outbox_pending WHERE shard = 0 AND sequence_no = 1",
        "DELETE FROM outbox WHERE shard = 0 AND sequence_no = 1",
        AUDIT,
        "SELECT * FROM outbox_audit",
        REPLAY,
        "UPDATE outbox_replay SET messages = 1, reached_no = 1, finished_at = now() WHERE name = 'again'",
    ],
}

MARKS: list[LiteralString] = [
    MARK,
    "UPDATE outbox_published SET through = 9",
    "DELETE FROM outbox_published",
    "TRUNCATE outbox_published",
]

REFUSED: dict[str, list[LiteralString]] = {
    "outbox_writer": [
        "SELECT payload FROM outbox",
        "SELECT payload FROM outbox_message",
        "INSERT INTO outbox (aggregate_type, aggregate_id, event_type) VALUES ('o', '1', 'e') RETURNING sequence_no",
        "INSERT INTO outbox (transaction_id, aggregate_type, aggregate_id, event_type) VALUES ('3', 'o', '1', 'e')",
        """
        INSERT INTO outbox (sequence_no, aggregate_type, aggregate_id, event_type)
        OVERRIDING SYSTEM VALUE VALUES (1, 'o', '1', 'e')
        """,
        "COPY outbox (sequence_no, aggregate_type, aggregate_id, event_type) FROM STDIN",
        "COPY outbox (transaction_id, aggregate_type, aggregate_id, event_type) FROM STDIN",
        "UPDATE outbox SET payload = NULL",
        "DELETE FROM outbox",
        "TRUNCATE outbox",
        "SELECT nextval('outbox_sequence_no_seq')",
        "SELECT setval('outbox_sequence_no_seq', 1)",
        "SELECT shard FROM outbox_shard",
        "SELECT through FROM outbox_published",
        *MARKS,
        PENDING,
        UNORDERED,
        RECONCILED,
        "SELECT version FROM outbox_relay_migration",
    ],
    "outbox_relay": [
        INSERT,
        "UPDATE outbox SET payload = NULL",
        "UPDATE outbox SET headers = '{}' WHERE shard = 0",
        "UPDATE outbox SET sequence_no = DEFAULT",
        "DELETE FROM outbox",
        "SELECT * FROM outbox ORDER BY sequence_no LIMIT 1 FOR UPDATE",
        "SELECT * FROM outbox ORDER BY sequence_no LIMIT 1 FOR KEY SHARE",
        "LOCK TABLE outbox IN ROW EXCLUSIVE MODE",
        "TRUNCATE outbox",
        "TRUNCATE outbox_published",
        "SELECT nextval('outbox_sequence_no_seq')",
        "SELECT setval('outbox_sequence_no_seq', 1)",
        "INSERT INTO outbox_shard (shard) VALUES (16)",
        "DELETE FROM outbox_shard",
        "DELETE FROM outbox_reconciled",
        "DELETE FROM outbox_relay_migration",
        "SELECT id FROM outbox_audit",
        "CREATE TABLE mine ()",
    ],
    "outbox_pruner": [
        INSERT,
        "UPDATE outbox SET payload = NULL",
        UNORDERED,
        "UPDATE outbox_unordered SET collected_at = now()",
        "INSERT INTO outbox_shard (shard) VALUES (16)",
        "DELETE FROM outbox_shard",
        "TRUNCATE outbox",
        "SELECT nextval('outbox_sequence_no_seq')",
        "SELECT setval('outbox_sequence_no_seq', 1)",
        "SELECT id FROM outbox_audit",
        "SELECT name FROM outbox_replay",
        "CREATE TABLE mine ()",
    ],
    "outbox_operator": [
        INSERT,
        "UPDATE outbox SET message_id = gen_random_uuid()",
        "UPDATE outbox SET aggregate_id = '2'",
        "UPDATE outbox SET event_type = 'changed'",
        "TRUNCATE outbox",
        *MARKS,
        PENDING,
        "UPDATE outbox_pending SET sequence_no = 2",
        "UPDATE outbox_pending SET key_hash = 2",
        UNORDERED,
        "DELETE FROM outbox_unordered",
        RECONCILED,
        "UPDATE outbox_reconciled SET checked_through = 0",
        "SELECT setval('outbox_sequence_no_seq', 1)",
        "INSERT INTO outbox_shard (shard) VALUES (16)",
        "DELETE FROM outbox_shard",
        AUDIT.replace("(action", "(session_role, action").replace("VALUES (", "VALUES ('somebody', "),
        AUDIT.replace("(action", "(recorded_at, action").replace("VALUES (", "VALUES (now(), "),
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


ROWS_ABOUT_MESSAGES: LiteralString = """
    SELECT
        (SELECT count(*) FROM outbox),
        (SELECT count(*) FROM outbox_published),
        (SELECT count(*) FROM outbox_pending),
        (SELECT count(*) FROM outbox_unordered),
        (SELECT count(*) FROM outbox_reconciled),
        (SELECT count(*) FROM outbox_shard)
"""


@pytest.mark.parametrize("right", ["GRANT TRUNCATE ON outbox TO {}", "ALTER TABLE outbox OWNER TO {}"])
def test_who_may_truncate_the_outbox_empties_the_marks_without_rights_on_them(
    shop: Database, login: str, right: LiteralString
) -> None:
    with shop.connect(options="-c search_path=shop") as conn:
        for statement in (INSERT, MARK, PENDING, UNORDERED, RECONCILED):
            conn.execute(statement)
        conn.execute(sql.SQL("GRANT USAGE ON SCHEMA shop TO {}").format(sql.Identifier(login)))
        conn.execute(sql.SQL(right).format(sql.Identifier(login)))
        assert conn.execute(ROWS_ABOUT_MESSAGES).fetchall() == [(1, 1, 1, 1, 1, 16)]
    assert not attempt(shop, login, statement="DELETE FROM outbox_published")
    with shop.connect(user=login, options="-c search_path=shop") as conn:
        conn.execute("TRUNCATE outbox")
    with shop.connect(options="-c search_path=shop") as conn:
        assert conn.execute(ROWS_ABOUT_MESSAGES).fetchall() == [(0, 0, 0, 0, 0, 16)]
        conn.execute("ALTER TABLE outbox OWNER TO CURRENT_USER")
        conn.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(login)))


def test_nobody_can_empty_the_marks_by_calling_what_a_truncate_calls(shop: Database, login: str) -> None:
    with shop.connect() as conn:
        conn.execute(sql.SQL("GRANT outbox_operator TO {}").format(sql.Identifier(login)))
    with (
        shop.connect(user=login, options="-c search_path=shop") as conn,
        pytest.raises((errors.InsufficientPrivilege, errors.FeatureNotSupported)),
    ):
        conn.execute("SELECT outbox_forget()")
