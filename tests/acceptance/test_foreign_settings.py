"""The main journey by the commands themselves, whatever the database and the environment set, directly and pooled."""

from __future__ import annotations

import json
import os
import random
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import pytest
from psycopg.conninfo import make_conninfo

from tests.fixtures.daemon import outbox_relay
from tests.fixtures.foreign_settings import as_options, draw_settings, given_by_database
from tests.fixtures.load import commit_messages, commit_poison
from tests.fixtures.pgbouncer import pooled
from tests.fixtures.postgres import RELAY_LOGIN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fixtures.pipeline import Pipeline

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

DRAWS = int(os.environ.get("RELAY_TEST_SETTINGS", "0"))
ALL_AT_ONCE = {
    "client_encoding": "LATIN1",
    "DateStyle": "German, DMY",
    "quote_all_identifiers": "on",
    "idle_session_timeout": "2s",
    "statement_timeout": "1s",
    "lock_timeout": "10",
    "default_transaction_isolation": "serializable",
    "default_transaction_read_only": "on",
    "search_path": "nowhere",
    "TimeZone": "Asia/Kathmandu",
    "bytea_output": "escape",
    "extra_float_digits": "-15",
    "standard_conforming_strings": "off",
    "enable_indexscan": "off",
}


@pytest.fixture(params=["direct", "session"])
def url(request: pytest.FixtureRequest, pipeline: Pipeline, settings: dict[str, str]) -> Iterator[str]:
    """Of the database with *settings*, which all sessions of a pooler have."""
    with given_by_database(pipeline.database, settings), reached(request.param, pipeline) as given:
        yield given


@contextmanager
def reached(way: Literal["direct", "session"], pipeline: Pipeline) -> Iterator[str]:
    if way == "direct":
        yield pipeline.database.dsn
        return
    users = ["postgres", RELAY_LOGIN]
    with pooled(pipeline.database, pool_size=10, users=users, pool_mode=way) as port:
        yield make_conninfo(pipeline.database.dsn, port=port)


@pytest.fixture(params=["all at once", *range(DRAWS)])
def settings(request: pytest.FixtureRequest, pipeline: Pipeline) -> dict[str, str]:
    if request.param == "all at once":
        return ALL_AT_ONCE
    with pipeline.database.connect(autocommit=True) as admin:
        chance = random.Random(request.param)  # noqa: S311 -- no secret
        return draw_settings(admin, chance, contexts=["user", "superuser"])


def test_every_command_works_whatever_is_set(pipeline: Pipeline, url: str, settings: dict[str, str]) -> None:
    with pipeline.database.connect(
        client_encoding="UTF8", options="-c default_transaction_read_only=off -c search_path=public"
    ) as writer:
        commit_messages(writer, "order-clé€")
        commit_poison(writer, "order-guilty")
    environment = pipeline.environment(database_url=url)
    if make_conninfo(url) == make_conninfo(pipeline.database.dsn):  # PgBouncer refuses options
        environment |= {"PGOPTIONS": as_options(settings), "PGCLIENTENCODING": "SQL_ASCII"}

    def command(*arguments: str) -> str:
        finished = subprocess.run(
            outbox_relay(*arguments),
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert finished.returncode == 0, f"{arguments}: {finished.stdout}{finished.stderr}"
        assert '"database_lost"' not in finished.stderr, finished.stderr
        assert '"thread_failed"' not in finished.stderr
        return finished.stdout

    command("migrate", "apply", "--schema", "elsewhere")
    command("run", "--once")
    found = json.loads(command("status", "--json"))
    assert (found["unpublished"], found["parked"]) == (0, 1)
    [parked] = json.loads(command("parked", "list", "--json"))["messages"]
    command("parked", "skip", str(parked["sequence_no"]), "--yes", "--why", "a test")
    command("replay", "--name", "again", "--all", "--yes", "--why", "a test")
    command("reconcile", "--repair")
    command("prune", "--older-than", "1d", "--yes")
    command("doctor")
