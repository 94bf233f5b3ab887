"""The real command `outbox-relay reconcile`, and a relay that publishes what had been skipped."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, cast

import pytest

from outbox_relay.sandbox.history import State
from tests.fixtures.daemon import outbox_relay
from tests.fixtures.marks import mark
from tests.fixtures.outbox import insert
from tests.fixtures.postgres import login
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from tests.fixtures.pipeline import Pipeline
    from tests.fixtures.postgres import Database

INSERT_AT = """
INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload, sequence_no)
OVERRIDING SYSTEM VALUE
VALUES ('order', '7', 'placed', '{"skipped": true}', %s)
"""
DRAW = "SELECT nextval('outbox_sequence_no_seq')"


def reconcile(dsn: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        outbox_relay("reconcile", *arguments),
        env=os.environ | {"OUTBOX_RELAY_DATABASE_URL": dsn},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def admin(database: Database) -> Iterator[Connection]:
    with database.connect(autocommit=True) as connection:
        yield connection


def skip_one(admin: Connection) -> int:
    """Let a message appear below a mark, and return its number."""
    [(number,)] = admin.execute(DRAW).fetchall()
    insert(admin, "7", "7", "7")
    mark(admin)
    admin.execute(INSERT_AT, [number])
    return int(number)


def pending(admin: Connection) -> list[tuple[int, str]]:
    return admin.execute("SELECT sequence_no, reason_code FROM outbox_pending ORDER BY sequence_no").fetchall()


def test_it_exits_with_0_when_nothing_was_skipped(database: Database, admin: Connection) -> None:
    insert(admin, "7", "8", "9")
    mark(admin)
    insert(admin, "7")
    done = reconcile(database.relay_dsn)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3 messages compared, none was skipped\n", "")


def test_it_only_reports_unless_it_is_told_to_repair(database: Database, admin: Connection) -> None:
    skipped = skip_one(admin)
    found = reconcile(database.relay_dsn)
    assert found.returncode == 5
    assert found.stdout.splitlines()[0].endswith(f"numbers 1 to {skipped + 3}: 1 skipped")
    assert found.stdout.splitlines()[1] == (
        "4 messages compared, some were skipped: run this with --repair, and relays publish them"
    )
    assert pending(admin) == []

    repaired = reconcile(database.relay_dsn, "--repair")
    assert repaired.returncode == 0
    assert repaired.stdout.splitlines()[1] == "4 messages compared, 1 wait to be published now"
    assert pending(admin) == [(skipped, "skipped")]
    assert reconcile(database.relay_dsn).returncode == 0


def test_all_of_an_interval_is_counted_where_nobody_can_tell_what_was_skipped(
    database: Database, admin: Connection
) -> None:
    insert(admin, "7", "7", "7")
    mark(admin)
    admin.execute("UPDATE outbox_published SET messages = 2")
    [(shard,)] = admin.execute("SELECT shard FROM outbox_published").fetchall()
    found = reconcile(database.relay_dsn)
    assert found.stdout.splitlines()[0] == f"shard {shard}, numbers 1 to 3: 3 messages, of which the mark has counted 2"
    repaired = json.loads(reconcile(database.relay_dsn, "--repair", "--json").stdout)
    assert repaired == {
        "compared_messages": 3,
        "damaged": [
            {
                "shard": shard,
                "from_no": 0,
                "through": 3,
                "marked_messages": 2,
                "found_messages": 3,
                "skipped_messages": 3,
                "is_whole": True,
            }
        ],
        "repaired_messages": 3,
    }


def test_a_message_with_the_number_of_a_deleted_one_is_found(database: Database, admin: Connection) -> None:
    insert(admin, "7")
    mark(admin)
    admin.execute("DELETE FROM outbox")
    admin.execute(INSERT_AT, [1])
    found = cast("dict[str, object]", json.loads(reconcile(database.relay_dsn, "--json").stdout))
    assert (found["compared_messages"], found["repaired_messages"]) == (1, 0)
    assert reconcile(database.relay_dsn, "--repair").returncode == 0
    assert pending(admin) == [(1, "skipped")]


def test_an_operator_may_look_and_not_repair(database: Database, admin: Connection) -> None:
    skip_one(admin)
    with login(database, group="outbox_operator") as name:
        dsn = database.server.dsn(database.name, user=name)
        assert reconcile(dsn).returncode == 5
        refused = reconcile(dsn, "--repair")
    assert refused.returncode == 3
    assert "permission denied for table outbox_p" in refused.stderr
    assert pending(admin) == []


def test_a_database_that_is_away_is_exit_4() -> None:
    assert reconcile("host=127.0.0.1 port=1").returncode == 4


@pytest.mark.kafka
@pytest.mark.slow
def test_a_relay_publishes_what_had_been_skipped_and_says_so(pipeline: Pipeline) -> None:
    with pipeline.database.connect(autocommit=True) as admin:
        [(number,)] = admin.execute(DRAW).fetchall()
        insert(admin, "7", "7", "7")
        with pipeline.relays(1):
            pipeline.await_settled()
        admin.execute(INSERT_AT, [number])
    with pipeline.relays(1) as [relay]:
        event = relay.wait_for_event("skipped_messages_found")
        assert (event["messages"], event["is_whole"]) == (1, False)
        eventually(lambda: len(pipeline.records()) == 4)
        pipeline.await_settled()
    assert pipeline.states() == [State.PUBLISHED] * 4
    assert [each.sequence_no for each in pipeline.records() if each.is_unordered] == [number]
    assert reconcile(pipeline.database.relay_dsn).returncode == 0
