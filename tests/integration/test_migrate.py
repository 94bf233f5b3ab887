from __future__ import annotations

import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from outbox_relay.errors import ConfigurationError, DatabaseUnavailable, MigrationError
from outbox_relay.operate import migrate
from outbox_relay.sandbox.postgres import installed_servers
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from psycopg import Connection

    from tests.fixtures.postgres import Database

SCHEMA = "shop"
ALL = migrate.migrations()


@pytest.fixture
def conn(database: Database) -> Iterator[Connection]:
    with database.connect() as conn:
        yield conn


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory whose files are the migrations of every line."""
    monkeypatch.setattr("outbox_relay.operate.migrate._directory", lambda _line: tmp_path)
    return tmp_path


@pytest.fixture
def own_role(database: Database) -> Iterator[str]:
    """A role with no privilege but to connect."""
    role = f"role_of_{database.name}"
    with database.connect(autocommit=True) as conn:
        conn.execute(f'CREATE ROLE "{role}" LOGIN')
        yield role
        conn.execute(f'DROP OWNED BY "{role}"')
        conn.execute(f'DROP ROLE "{role}"')


def tables(conn: Connection) -> set[str]:
    return {name for (name,) in conn.execute("SELECT tablename FROM pg_tables WHERE schemaname = %s", [SCHEMA])}


def states(conn: Connection) -> list[tuple[int, str, str]]:
    return [(known.number, known.name, known.state) for known in migrate.status(conn, schema=SCHEMA)]


@pytest.mark.every_postgres
def test_apply_creates_the_schema_and_its_tables(conn: Connection) -> None:
    assert migrate.apply(conn, schema=SCHEMA) == ALL
    of_the_relay = {
        "outbox",
        "outbox_shard",
        "outbox_published",
        "outbox_pending",
        "outbox_unordered",
        "outbox_reconciled",
    }
    assert tables(conn) == {*of_the_relay, "outbox_audit", "outbox_replay", "outbox_relay_migration"}


@pytest.mark.every_postgres
def test_both_lines_share_a_schema_and_its_record(conn: Connection) -> None:
    migrate.apply(conn, schema=SCHEMA)
    assert migrate.apply(conn, schema=SCHEMA, line="inbox") == migrate.migrations("inbox")
    assert tables(conn) >= {"outbox", "inbox_message", "inbox_sequence", "inbox_offset", "outbox_relay_migration"}
    conn.rollback()
    assert {
        known.state for line in ("outbox", "inbox") for known in migrate.status(conn, schema=SCHEMA, line=line)
    } == {"applied"}


def test_a_second_run_applies_nothing(conn: Connection) -> None:
    migrate.apply(conn, schema=SCHEMA)
    assert migrate.apply(conn, schema=SCHEMA) == []


def test_the_newest_migration_is_the_expected_version() -> None:
    assert migrate.expected_version() == ALL[-1].number == len(ALL)


@pytest.mark.every_postgres
def test_of_runners_at_once_exactly_one_applies_each_migration(database: Database) -> None:
    runners = 6
    start = threading.Barrier(runners)

    def run(_runner: int) -> list[migrate.Migration]:
        with database.connect() as conn:
            start.wait(timeout=30)
            return migrate.apply(conn, schema=SCHEMA)

    with ThreadPoolExecutor(runners) as pool:
        applied = [migration for migrations in pool.map(run, range(runners)) for migration in migrations]
    assert sorted(applied, key=lambda migration: migration.number) == ALL


def test_quoted_schema_names_are_taken_literally(conn: Connection) -> None:
    assert migrate.apply(conn, schema='Shop "1"') == ALL
    assert [known.state for known in migrate.status(conn, schema='Shop "1"')] == ["applied"] * len(ALL)


@pytest.mark.parametrize("autocommit", [True, False])
def test_the_settings_of_the_session_stay_as_they_were(database: Database, *, autocommit: bool) -> None:
    query = "SELECT name, setting FROM pg_settings WHERE name NOT LIKE 'plpgsql.%' ORDER BY name"
    with database.connect(autocommit=True) as conn:
        before = conn.execute(query).fetchall()
        conn.autocommit = autocommit
        migrate.apply(conn, schema=SCHEMA)
        assert conn.execute(query).fetchall() == before


def test_an_open_transaction_is_refused(conn: Connection) -> None:
    conn.execute("SELECT 1")
    with pytest.raises(MigrationError, match="without an open transaction"):
        migrate.apply(conn, schema=SCHEMA)


def test_a_failed_migration_is_rolled_back_and_those_before_it_stay(conn: Connection, line: Path) -> None:
    (line / "0001_create_kept.sql").write_text("CREATE TABLE kept ();")
    (line / "0002_divide.sql").write_text("CREATE TABLE gone (); SELECT 1 / 0;")
    with pytest.raises(MigrationError) as raised:
        migrate.apply(conn, schema=SCHEMA)
    assert str(raised.value) == "migration 0002_divide is rolled back: division by zero"
    assert tables(conn) == {"kept", "outbox_relay_migration"}
    assert states(conn) == [(1, "create_kept", "applied"), (2, "divide", "pending")]


def test_status_tells_applied_pending_and_unknown(conn: Connection, line: Path) -> None:
    (line / "0001_create_first.sql").write_text("CREATE TABLE first ();")
    assert states(conn) == [(1, "create_first", "pending")]
    (line / "0003_create_third.sql").write_text("CREATE TABLE third ();")
    migrate.apply(conn, schema=SCHEMA)
    (line / "0003_create_third.sql").unlink()
    (line / "0002_create_second.sql").write_text("CREATE TABLE second ();")
    assert states(conn) == [
        (1, "create_first", "applied"),
        (2, "create_second", "pending"),
        (3, "create_third", "unknown"),
    ]


def test_a_migration_steps_back_from_a_lock_and_gets_it_later(
    database: Database, conn: Connection, line: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox_relay.operate.migrate._PAUSE_SECONDS", 0.01)
    (line / "0001_alter_outbox.sql").write_text("ALTER TABLE public.outbox ADD COLUMN note text;")
    waited = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'"
    with ThreadPoolExecutor(1) as pool, database.connect() as writer, database.connect(autocommit=True) as observer:
        writer.execute("LOCK TABLE outbox IN ROW EXCLUSIVE MODE")
        applied = pool.submit(migrate.apply, conn, schema=SCHEMA, lock_timeout_seconds=0.2)
        eventually(lambda: observer.execute(waited, [conn.info.backend_pid]).fetchone() == (1,))
        # Another writer, queued behind the migration, gets through although the first one never lets go.
        observer.execute("SET lock_timeout = '5s'")
        observer.execute(
            "INSERT INTO outbox (aggregate_type, aggregate_id, event_type) VALUES ('order', '1', 'placed')"
        )
        writer.rollback()
        assert [str(migration) for migration in applied.result(timeout=30)] == ["0001_alter_outbox"]


def test_a_lock_that_is_never_free_is_an_error_with_its_remedy(
    database: Database, conn: Connection, line: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox_relay.operate.migrate._PAUSE_SECONDS", 0.01)
    (line / "0001_alter_outbox.sql").write_text("ALTER TABLE public.outbox ADD COLUMN note text;")
    with database.connect() as writer:
        writer.execute("LOCK TABLE outbox IN ROW EXCLUSIVE MODE")
        with pytest.raises(MigrationError) as raised:
            migrate.apply(conn, schema=SCHEMA, lock_timeout_seconds=0.02)
    assert str(raised.value) == (
        "migration 0001_alter_outbox is rolled back: canceling statement due to lock timeout. "
        "No lock in 10 attempts: end the long transactions (see pg_stat_activity) and run it again"
    )


def test_a_role_that_may_not_create_is_told_what_to_grant(database: Database, own_role: str) -> None:
    with database.connect(autocommit=True) as admin, database.connect(user=own_role) as conn:
        with pytest.raises(ConfigurationError, match=f"permission denied for database {database.name}"):
            migrate.apply(conn, schema=SCHEMA)
        admin.execute(f'CREATE SCHEMA shop; GRANT USAGE ON SCHEMA shop TO "{own_role}"')
        with pytest.raises(ConfigurationError, match="GRANT CREATE ON SCHEMA"):
            migrate.apply(conn, schema=SCHEMA)


def test_the_owner_of_a_schema_needs_no_more_than_that(database: Database, own_role: str) -> None:
    with database.connect(autocommit=True) as admin, database.connect(user=own_role) as conn:
        admin.execute(f'CREATE SCHEMA shop AUTHORIZATION "{own_role}"')
        assert migrate.apply(conn, schema=SCHEMA) == ALL


def test_an_administrator_is_asked_for_a_group_role_that_cannot_be_created(own_database: Database) -> None:
    with own_database.connect(autocommit=True) as admin:
        admin.execute("ALTER ROLE outbox_pruner RENAME TO another_pruner")
        admin.execute("CREATE ROLE deployer LOGIN")
        admin.execute("CREATE SCHEMA shop AUTHORIZATION deployer")
    with own_database.connect(user="deployer") as conn, pytest.raises(ConfigurationError) as raised:
        migrate.apply(conn, schema=SCHEMA)
    assert str(raised.value) == (
        "migration 0002_grant_roles is rolled back: role outbox_pruner does not exist and deployer may not create it. "
        "Let an administrator run: CREATE ROLE outbox_pruner NOLOGIN;"
    )


def test_a_schema_made_by_another_tool_is_left_alone(conn: Connection) -> None:
    with conn.transaction():
        conn.execute("CREATE SCHEMA shop; CREATE TABLE shop.outbox ()")
    with pytest.raises(MigrationError) as raised:
        migrate.apply(conn, schema=SCHEMA)
    assert str(raised.value) == (
        'migration 0001_create_outbox is rolled back: relation "outbox" already exists. '
        "If another tool applied it, go on with that tool, or record it in outbox_relay_migration"
    )


def test_a_lost_connection_is_a_database_that_is_unavailable(database: Database, conn: Connection) -> None:
    with database.connect(autocommit=True) as admin:
        admin.execute("SELECT pg_terminate_backend(%s, 10000)", [conn.info.backend_pid])
    with pytest.raises(DatabaseUnavailable):
        migrate.apply(conn, schema=SCHEMA)


def run_script(database: Database, script: str) -> subprocess.CompletedProcess[str]:
    psql = str(installed_servers()[database.server.version] / "psql")
    command = [psql, database.dsn, "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--file=-"]
    return subprocess.run(command, input=script, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.every_postgres
@pytest.mark.parametrize("line", ["outbox", "inbox"])
def test_the_printed_script_in_psql_does_what_apply_does(database: Database, conn: Connection, line: str) -> None:
    script = migrate.sql(schema=SCHEMA, line=line)
    finished = run_script(database, script)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")
    assert {known.state for known in migrate.status(conn, schema=SCHEMA, line=line)} == {"applied"}
    conn.rollback()
    assert migrate.apply(conn, schema=SCHEMA, line=line) == []
    assert "outbox_relay_migration_pkey" in run_script(database, script).stderr


def test_the_printed_script_can_go_on_where_apply_stopped(database: Database, conn: Connection, line: Path) -> None:
    (line / "0001_create_first.sql").write_text("CREATE TABLE first ();\n")
    migrate.apply(conn, schema=SCHEMA)
    (line / "0002_create_second.sql").write_text("CREATE TABLE second ();\n")
    run_script(database, migrate.sql(schema=SCHEMA, after=1)).check_returncode()
    assert states(conn) == [(1, "create_first", "applied"), (2, "create_second", "applied")]
