"""Whatever the role, the database, the environment or a pooler sets, a connection of the relay has its own settings."""

from __future__ import annotations

import os
import random
from contextlib import ExitStack
from typing import TYPE_CHECKING, LiteralString

import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay.database import begin, connect, transaction
from outbox_relay.operate.migrate import status as migration_status
from outbox_relay.operate.schema import check_schema
from outbox_relay.relay.claim import ClaimOptions, claim_shards
from outbox_relay.relay.horizon import read_last_number
from outbox_relay.relay.read import Limits, read_messages
from outbox_relay.relay.shards import SHARDS
from outbox_relay.relay.watch import Reached
from tests.fixtures.foreign_settings import as_options, draw_settings, given_by_database, given_by_role
from tests.fixtures.outbox import insert
from tests.fixtures.pgbouncer import pooled
from tests.fixtures.postgres import RELAY_LOGIN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from outbox_relay.relay.message import Message
    from tests.fixtures.postgres import Database

DRAWS = int(os.environ.get("RELAY_TEST_SETTINGS", "5"))  # sets of settings for each test and version

# All that decides what a statement answers and whether it ends, whatever its value.
SELECT_OWN: LiteralString = r"""
SELECT name, setting
FROM pg_settings
WHERE context = 'user'
    AND category NOT LIKE ALL (
        '{"Customized%","Connections and Authentication%","Reporting and%","Resource Usage%","Replication%"}'::text[]
    )
    AND name NOT IN ('default_toast_compression', 'search_path', 'createrole_self_grant', 'transaction_deferrable')
ORDER BY name
"""

WAYS = ["direct", "transaction", "session"]
SETTINGS_OF_STRANGERS: dict[str, dict[str, str]] = {
    "another encoding": {"client_encoding": "LATIN1"},
    "no encoding": {"client_encoding": "SQL_ASCII"},
    "dates": {"DateStyle": "German, DMY", "IntervalStyle": "sql_standard", "TimeZone": "Asia/Kathmandu"},
    "names": {"quote_all_identifiers": "on"},
    "time-outs": {"statement_timeout": "300", "lock_timeout": "1", "idle_in_transaction_session_timeout": "500"},
    "transactions": {
        "default_transaction_isolation": "serializable",
        "default_transaction_read_only": "on",
        "default_transaction_deferrable": "on",
    },
    "text": {"bytea_output": "escape", "extra_float_digits": "-15", "standard_conforming_strings": "off"},
    "comparisons": {"transform_null_equals": "on", "array_nulls": "off", "exit_on_error": "on"},
    "plans": {f"enable_{each}": "off" for each in ("indexscan", "indexonlyscan", "nestloop", "sort", "material")},
    "names of tables": {"search_path": "nowhere, pg_catalog"},
}


@pytest.fixture(params=WAYS)
def url(request: pytest.FixtureRequest, database: Database) -> Iterator[str]:
    """Of the relay's login, directly or through a pooler."""
    if request.param == "direct":
        yield database.relay_dsn
        return
    with pooled(database, pool_size=2, users=["postgres", RELAY_LOGIN], pool_mode=request.param) as port:
        yield make_conninfo(database.relay_dsn, port=port)


def own(connection: Connection) -> dict[str, str]:
    """What a transaction of ours has."""
    begin(connection, b"")
    found: dict[str, str] = dict(connection.execute(SELECT_OWN).fetchall())
    connection.commit()
    return found


def read_all(connection: Connection) -> list[Message]:
    """Read as a lane does, and leave it at that."""
    reached = Reached(*read_last_number(connection, schema="public"))
    claim = claim_shards(
        connection,
        options=ClaimOptions(),
        reached=reached,
        candidates=range(SHARDS),
        most=SHARDS,
        takes_all=True,
        looks_for_waiting=True,
    )
    batch = read_messages(connection, claim, schema="public", through=reached.through, limits=Limits())
    connection.rollback()
    return batch.messages


@pytest.mark.parametrize("settings", SETTINGS_OF_STRANGERS.values(), ids=SETTINGS_OF_STRANGERS)
def test_what_a_stranger_sets_changes_nothing_that_is_read(
    database: Database, url: str, settings: dict[str, str]
) -> None:
    with database.connect(autocommit=True) as writer:
        insert(writer, "clé-€", payload={"price": "9 €"})
    with given_by_role(database, RELAY_LOGIN, settings), connect(url, application_name="test") as connection:
        check_schema(connection, schema="public")
        [message] = read_all(connection)
        with transaction(connection):
            applied = migration_status(connection, schema="public")
    assert (message.aggregate_id, message.payload) == ("clé-€", '{"price": "9 €"}')
    assert applied


@pytest.mark.every_postgres
@pytest.mark.parametrize("draw", range(DRAWS))
def test_drawn_settings_leave_every_transaction_with_those_of_a_plain_login(
    database: Database, url: str, monkeypatch: pytest.MonkeyPatch, draw: int
) -> None:
    chance = random.Random(draw)  # noqa: S311 -- no secret
    with connect(database.dsn, application_name="test") as connection:
        plain = own(connection)
    with database.connect(autocommit=True) as admin:
        drawn = [draw_settings(admin, chance, contexts=[each]) for each in ("user", "superuser", "user")]
    with ExitStack() as given:
        given.enter_context(given_by_role(database, RELAY_LOGIN, drawn[0]))
        given.enter_context(given_by_database(database, drawn[1]))
        environment = given.enter_context(monkeypatch.context())
        if make_conninfo(url) == make_conninfo(database.relay_dsn):  # PgBouncer refuses options
            environment.setenv("PGOPTIONS", as_options(drawn[2]))
            environment.setenv("PGCLIENTENCODING", chance.choice(["LATIN1", "SQL_ASCII"]))
        with connect(url, application_name="test") as connection:
            assert own(connection) == plain
            check_schema(connection, schema="public")
            assert read_all(connection) == []


def test_a_direct_session_has_its_settings_between_its_transactions_too(database: Database) -> None:
    strange = {"idle_session_timeout": "1h", "DateStyle": "SQL, DMY", "statement_timeout": "1h", "enable_sort": "off"}
    with (
        given_by_database(database, strange),
        connect(database.relay_dsn, application_name="test") as connection,
    ):
        found = [connection.execute(f"SHOW {name}").fetchone() for name in strange]
    assert found == [("0",), ("ISO, MDY",), ("0",), ("on",)]


def test_what_somebody_decided_for_the_login_stays(database: Database) -> None:
    decided = {
        "work_mem": "12MB",
        "tcp_keepalives_idle": "77",
        "application.name": "shop",
        "debug_print_plan": "off",
        "role": "outbox_relay",
    }
    with (
        given_by_role(database, RELAY_LOGIN, decided),
        connect(f"{database.relay_dsn}?tcp_user_timeout=0", application_name="test") as connection,
    ):
        found = [connection.execute(f"SHOW {name}").fetchone() for name in decided]
    assert found == [(value,) for value in decided.values()]


def test_no_function_of_a_search_path_comes_before_those_of_postgresql(database: Database) -> None:
    with database.connect(autocommit=True) as admin:
        admin.execute("CREATE FUNCTION public.now() RETURNS timestamptz LANGUAGE sql AS 'SELECT NULL::timestamptz'")
    with (
        given_by_database(database, {"search_path": "public, pg_catalog"}),
        connect(database.relay_dsn, application_name="test") as connection,
    ):
        assert connection.execute("SELECT now() IS NULL").fetchone() == (False,)
        assert connection.execute("SHOW search_path").fetchone() == ("pg_catalog, public, pg_catalog",)


def test_a_read_that_is_prepared_outlives_a_change_of_a_columns_type(database: Database) -> None:
    with database.connect(autocommit=True) as admin, connect(database.relay_dsn, application_name="test") as connection:
        insert(admin, "1")
        before = read_all(connection)
        admin.execute("DROP VIEW outbox_message")
        admin.execute("ALTER TABLE outbox ALTER COLUMN event_type TYPE varchar(200)")
        assert read_all(connection) == before
