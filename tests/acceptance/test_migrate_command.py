from __future__ import annotations

import json
import os
import subprocess
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from outbox_relay.operate import migrate
from tests.fixtures.daemon import outbox_relay

if TYPE_CHECKING:
    from tests.fixtures.postgres import Database

OUTBOX = migrate.migrations("outbox")
INBOX = migrate.migrations("inbox")
LINES = pytest.mark.parametrize(("options", "known"), [([], OUTBOX), (["--inbox"], INBOX)], ids=["outbox", "inbox"])


def run(dsn: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = outbox_relay("migrate", *arguments)
    environment = os.environ | {"OUTBOX_RELAY_DATABASE_URL": dsn, "OUTBOX_RELAY_SCHEMA": "shop"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@LINES
def test_status_exits_with_5_until_apply_has_run(
    database: Database, options: list[str], known: list[migrate.Migration]
) -> None:
    before = run(database.dsn, "status", *options)
    assert (before.returncode, before.stdout) == (5, "".join(f"{migration}  pending\n" for migration in known))

    applied = run(database.dsn, "apply", *options)
    assert (applied.returncode, applied.stdout) == (0, "".join(f"{migration} applied\n" for migration in known))
    again = run(database.dsn, "apply", *options)
    assert (again.returncode, again.stdout) == (0, "nothing is pending\n")

    after = run(database.dsn, "status", *options)
    assert (after.returncode, after.stdout) == (0, "".join(f"{migration}  applied\n" for migration in known))


def test_json_has_the_same_facts_for_scripts(database: Database) -> None:
    applied = json.loads(run(database.dsn, "apply", "--json").stdout)
    assert applied == [{"number": migration.number, "name": migration.name} for migration in OUTBOX]

    states = json.loads(run(database.dsn, "status", "--json").stdout)
    times = [datetime.fromisoformat(state.pop("applied_at")) for state in states]
    assert states == [{"number": known.number, "name": known.name, "state": "applied"} for known in OUTBOX]
    assert times == sorted(times)
    assert (datetime.now(tz=UTC) - times[0]).total_seconds() < 60


def test_the_partitioned_layout_comes_on_top_of_the_outbox(database: Database) -> None:
    refused = run(database.dsn, "apply", "--partitioned")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "there is no outbox yet. Run first: outbox-relay migrate apply" in refused.stderr
    for options, known in (([], OUTBOX), (["--partitioned"], migrate.migrations("partitioned"))):
        applied = run(database.dsn, "apply", *options)
        assert (applied.returncode, applied.stdout) == (0, "".join(f"{migration} applied\n" for migration in known))


@pytest.mark.parametrize(
    ("options", "line"), [([], "outbox"), (["--partitioned"], "partitioned"), (["--inbox"], "inbox")]
)
def test_sql_prints_the_script_without_a_database(options: list[str], line: str) -> None:
    printed = run("host=127.0.0.1 port=1", "sql", "--after", "1", "--schema", "sales", *options)
    assert (printed.returncode, printed.stdout) == (0, migrate.sql(schema="sales", line=line, after=1))


def test_a_database_that_is_away_exits_with_4() -> None:
    failed = run("host=127.0.0.1 port=1", "apply")
    assert (failed.returncode, failed.stdout) == (4, "")
    assert failed.stderr.startswith("outbox-relay: ")


def test_a_role_without_the_privilege_exits_with_3_and_the_remedy(database: Database) -> None:
    login = f"login_of_{database.name}"
    with database.connect(autocommit=True) as admin:
        admin.execute(f'CREATE ROLE "{login}" LOGIN')
        refused = run(database.server.dsn(database.name, user=login), "apply")
        admin.execute(f'DROP ROLE "{login}"')
    assert refused.returncode == 3
    assert refused.stderr == (
        f"outbox-relay: schema 'shop' could not be prepared: permission denied for database {database.name}. "
        "Use a role that owns the schema, or may create in it: GRANT CREATE ON SCHEMA <schema> TO <role>\n"
    )
