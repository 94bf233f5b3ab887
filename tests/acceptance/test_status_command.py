"""The real command `outbox-relay status`, as an operator watches it and as a script asks it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.fixtures.daemon import outbox_relay
from tests.fixtures.marks import mark, set_aside
from tests.fixtures.outbox import insert

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fixtures.postgres import Database

COMMAND = outbox_relay("status")


def environment(database: Database) -> dict[str, str]:
    return os.environ | {"OUTBOX_RELAY_DATABASE_URL": database.dsn}


def status(database: Database, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], env=environment(database), capture_output=True, text=True, timeout=60, check=False
    )


@contextmanager
def watching(database: Database, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [*COMMAND, "--watch", "0.1", *arguments], env=environment(database), stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def insert_old(database: Database) -> None:
    with database.connect() as writer:
        insert(writer, "1", created_at="2001-01-01")


def test_it_exits_with_5_when_the_oldest_message_is_older_than_allowed(database: Database) -> None:
    assert status(database, "--max-age", "60").returncode == 0
    insert_old(database)
    too_old = status(database, "--max-age", "60")
    assert (too_old.returncode, too_old.stdout.splitlines()[0]) == (5, "unpublished   1")
    assert status(database, "--max-age", "1e10").returncode == 0


def test_a_writer_is_named_with_the_statement_that_ends_it(database: Database) -> None:
    with database.connect(application_name="checkout") as writer:
        insert(writer, "1")
        last = status(database).stdout.splitlines()[-1]
        pid = writer.info.backend_pid
    assert last.startswith(f"  pid {pid} (checkout), idle in transaction, ")
    assert f": SELECT pg_terminate_backend({pid});  -- last query: INSERT INTO outbox" in last


def test_what_waits_is_told_with_its_reasons_and_whoever_holds_shards_with_what_ends_him(database: Database) -> None:
    with database.connect(application_name="by hand") as person, database.connect(autocommit=True) as admin:
        insert(admin, "1", "2", "3", created_at="2001-01-01")
        set_aside(admin, 1, state="waiting", reason_code="late\x1b")
        set_aside(admin, 2, state="parked")
        mark(admin, through=2)
        person.execute("SELECT FROM outbox_shard FOR UPDATE")
        lines = status(database).stdout.splitlines()
        pid = person.info.backend_pid
    assert [*lines[:1], *lines[2:5]] == [
        "unpublished   2",
        "waiting       1; late\\x1b: 1",
        "parked        1 of 1 keys",
        "shards held   by 1, who are no relays",
    ]
    assert lines[1].startswith("oldest        ")
    assert lines[5].startswith(f"  pid {pid} (by hand), idle in transaction, ")
    assert lines[6] == "open writers  0"


def test_watching_prints_an_object_a_line_until_it_is_interrupted(database: Database) -> None:
    with watching(database, "--json") as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["unpublished"] == 0
        insert_old(database)
        while json.loads(process.stdout.readline())["unpublished"] == 0:
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130


def test_watching_with_a_limit_ends_when_it_is_exceeded(database: Database) -> None:
    with watching(database, "--max-age", "60") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "unpublished   0\n"
        insert_old(database)
        assert process.wait(timeout=30) == 5


def test_watch_needs_no_number_and_can_stand_before_another_option(database: Database) -> None:
    insert_old(database)
    watched = status(database, "--watch", "--json", "--max-age", "60")
    assert (watched.returncode, json.loads(watched.stdout)["unpublished"]) == (5, 1)
