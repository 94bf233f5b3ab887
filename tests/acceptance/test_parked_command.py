"""What operators do with messages that Kafka refused, by the command, and what Kafka holds in the end."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import pytest

from outbox_relay.sandbox.history import Outcome
from tests.fixtures.daemon import outbox_relay
from tests.fixtures.load import new_write, own_headers, payload_of
from tests.fixtures.outbox import insert
from tests.fixtures.pipeline import Pipeline
from tests.fixtures.postgres import login
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from outbox_relay.sandbox.history import Write
    from outbox_relay.sandbox.kafka import Kafka
    from tests.fixtures.postgres import Database

KEY = "order-0"
WIDEST = 100_000
ROUNDS = 3


class Operator:
    """Runs `outbox-relay parked` as a login that has the role of operators and nothing else."""

    def __init__(self, dsn: str) -> None:
        self._environment = os.environ | {"OUTBOX_RELAY_DATABASE_URL": dsn}

    def run(self, *arguments: str, stdin: int = subprocess.DEVNULL) -> subprocess.CompletedProcess[str]:
        return self.run_any("parked", *arguments, stdin=stdin)

    def run_any(self, *arguments: str, stdin: int = subprocess.DEVNULL) -> subprocess.CompletedProcess[str]:
        """Run another command of the relay."""
        return subprocess.run(
            outbox_relay(*arguments),
            env=self._environment,
            stdin=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def ask(self, *arguments: str) -> dict[str, object]:
        """What the command prints as JSON; it has to succeed."""
        ended = self.run(*arguments, "--json")
        assert (ended.returncode, ended.stderr) == (0, "")
        return cast("dict[str, object]", json.loads(ended.stdout))


@pytest.fixture
def operator(database: Database) -> Iterator[Operator]:
    with login(database, group="outbox_operator") as name:
        yield Operator(database.server.dsn(database.name, user=name))


@pytest.fixture
def parked(database: Database) -> Database:
    """The guilty message 1 of order 7, with 2 and 3 behind it, and the guilty message 4 of order 8."""
    with database.connect() as connection:
        insert(connection, "7", "7", "7", "8", payload={"total": 1})
        connection.execute(
            """
            UPDATE outbox
            SET parked_at = '2026-11-21 12:00:00Z',
                parked_reason = CASE
                    WHEN id IN (1, 4) THEN 'MSG_SIZE_TOO_LARGE: 5 bytes'
                    ELSE 'behind_parked: an earlier message of the key is parked'
                END
            """
        )
    return database


def rows(database: Database) -> list[tuple[int, bool]]:
    """The ids, and which of them are parked."""
    with database.connect() as connection:
        return connection.execute("SELECT id, parked_at IS NOT NULL FROM outbox ORDER BY id").fetchall()


@pytest.mark.usefixtures("parked")
def test_list_prints_a_table_and_says_when_there_is_more(operator: Operator) -> None:
    whole = operator.run("list")
    assert [line.split()[0] for line in whole.stdout.splitlines()] == ["id", "1", "4"]
    assert [line.split()[5] for line in whole.stdout.splitlines()[1:]] == ["2", "0"]
    assert (whole.returncode, whole.stderr) == (0, "")

    first = operator.run("list", "--limit", "1")
    assert [line.split()[0] for line in first.stdout.splitlines()] == ["id", "1"]
    assert first.stderr == "there are more than 1: narrow the list, or raise --limit\n"

    none = operator.run("list", "--type", "basket")
    assert (none.returncode, none.stdout, none.stderr) == (0, "", "nothing is parked that fits\n")


@pytest.mark.usefixtures("parked")
def test_list_and_show_have_the_same_facts_as_json(operator: Operator) -> None:
    listed = operator.ask("list", "--key", "order", "7", "--waiting", "--limit", "2")
    messages = cast("list[dict[str, object]]", listed["messages"])
    facts = [(message["id"], message["is_guilty"], message["waiting"]) for message in messages]
    assert (facts, listed["has_more"]) == ([(1, True, 2), (2, False, 1)], True)

    shown = operator.ask("show", "1")
    assert (shown["payload"], shown["headers"], shown["aggregate_id"]) == ({"total": 1}, {}, "7")
    assert operator.run("show", "1").stdout.startswith("id              1\n")


@pytest.mark.outside("it reads files of the test")
def test_edit_takes_a_payload_from_the_command_line_or_a_file(
    operator: Operator, parked: Database, tmp_path: Path
) -> None:
    binary = tmp_path / "payload"
    binary.write_bytes(b"\0\xff")
    assert operator.ask("edit", "1", "--payload", '{"total": 2}', "--header", "by=a=b") == {"edited": 1}
    assert operator.ask("edit", "4", "--payload-bytes", f"@{binary}", "--why", "broken") == {"edited": 4}
    with parked.connect() as connection:
        edited = connection.execute(
            "SELECT payload, payload_bytes, headers FROM outbox WHERE id IN (1, 4) ORDER BY id"
        ).fetchall()
    assert edited == [({"total": 2}, None, {"by": "a=b"}), (None, b"\0\xff", {})]


HOSTILE = "\x1b[2J\r\n\u202e" + "k" * 10_000


@pytest.fixture
def hostile(database: Database) -> str:
    """A parked message in whose every text is what a terminal must not get; gives its aggregate type and key."""
    with database.connect() as connection:
        insert(connection, HOSTILE, HOSTILE, aggregate_type=HOSTILE, headers={HOSTILE: "\x9b"}, payload=["\x9b\u2028"])
        connection.execute(
            "UPDATE outbox SET parked_at = now(), parked_reason = %s", ["unpublishable: \x1b]0;evil\x07"]
        )
    return HOSTILE


@pytest.mark.usefixtures("hostile")
@pytest.mark.parametrize(
    "arguments",
    [
        ("parked", "list", "--waiting"),
        ("parked", "show", "1"),
        ("parked", "release", "2"),
        ("parked", "release", "--all", "--dry-run"),
        ("parked", "skip", "1", "--why", "test", "--yes"),
        ("parked", "edit", "1", "--header", "\x9b=1"),
        ("status",),
        ("replay", "--all", "--dry-run", "--why", "test"),
        ("doctor",),
    ],
    ids=" ".join,
)
def test_no_text_of_a_message_moves_the_cursor_of_a_terminal(operator: Operator, arguments: tuple[str, ...]) -> None:
    ended = operator.run_any(*arguments)
    assert [line for line in (ended.stdout + ended.stderr).split("\n") if not line.isprintable()] == []
    assert "Traceback" not in ended.stderr


def test_a_list_has_the_beginning_of_a_long_key_and_its_json_the_whole(operator: Operator, hostile: str) -> None:
    listed = operator.run("list").stdout
    assert r"\x1b[2J\r\n\u202ekkk" in listed
    assert max(map(len, listed.splitlines())) < 250
    messages = cast("list[dict[str, object]]", operator.ask("list")["messages"])
    assert [(each["aggregate_type"], each["aggregate_id"]) for each in messages] == [(hostile, hostile)] * 2
    assert operator.ask("show", "1")["aggregate_id"] == hostile
    assert hostile[-1000:] in operator.run("show", "1").stdout


def test_a_dry_run_of_a_release_prints_the_same_and_changes_nothing(operator: Operator, parked: Database) -> None:
    before = rows(parked)
    released = [
        {"shard": 13, "aggregate_type": "order", "aggregate_id": "7", "messages": 3},
    ]
    assert operator.ask("release", "1", "--dry-run") == {"dry_run": True, "released": released}
    assert rows(parked) == before
    assert operator.ask("release", "1") == {"dry_run": False, "released": released}
    assert rows(parked) == [(1, False), (2, False), (3, False), (4, True)]


@pytest.mark.parametrize("selection", [["--all"], ["--reason", "too_large"], ["--type", "order"]], ids=" ".join)
def test_a_release_by_selection_takes_whole_keys(operator: Operator, parked: Database, selection: list[str]) -> None:
    released = operator.run("release", *selection)
    assert released.stdout.splitlines()[-1] == "released 4 messages of 2 keys"
    assert rows(parked) == [(1, False), (2, False), (3, False), (4, False)]


def test_skip_says_what_is_left_parked(operator: Operator, parked: Database) -> None:
    skipped = operator.run("skip", "1", "--why", "test order", "--operator", "ada", "--yes")
    assert skipped.stdout == (
        "skipped 1 message\norder 7  2\nstill parked: 2 messages of 1 key; see outbox-relay parked release\n"
    )
    assert rows(parked) == [(2, True), (3, True), (4, True)]
    with parked.connect() as connection:
        record = connection.execute("SELECT action, operator, why, content ->> 'id' FROM outbox_audit").fetchall()
    assert record == [("skip", "ada", "test order", "1")]


@pytest.mark.parametrize(("answer", "left"), [(b"n\n", [1, 2, 3, 4]), (b"y\n", [2, 3, 4])])
def test_skip_asks_at_a_terminal(operator: Operator, parked: Database, answer: bytes, left: list[int]) -> None:
    keyboard, terminal = os.openpty()
    os.write(keyboard, answer)
    asked = operator.run("skip", "1", "--why", "test order", stdin=terminal)
    os.close(keyboard)
    os.close(terminal)
    assert asked.stderr.startswith("Never publish 1 message?")
    assert [number for number, _ in rows(parked)] == left


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["skip", "1", "--why", "spam"], "--yes"),
        (["skip", "1", "--yes"], "--why"),
        (["skip", "--why", "spam", "--yes"], "IDs"),
        (["skip", "99", "--why", "spam", "--yes"], "not parked"),
        (["release"], "say what to release"),
        (["release", "1", "--all"], "say what to release"),
        (["release", "3"], "--key order 7"),
        (["show", "99"], "not parked"),
        (["edit", "1"], "nothing to change"),
        (["edit", "1", "--payload", "{"], "cannot be stored"),
        (["edit", "1", "--payload", "@/nowhere"], "/nowhere cannot be read"),
        (["edit", "1", "--payload", "{}", "--payload-bytes", "@x"], "one payload"),
        (["edit", "1", "--payload-bytes", "x"], "@FILE"),
        (["edit", "1", "--header", "source=x"], "choose another name"),
        (["edit", "1", "--header", "source"], "NAME=VALUE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_refused_with_2_and_changes_nothing(
    operator: Operator, parked: Database, arguments: list[str], words: str
) -> None:
    before = rows(parked)
    refused = operator.run(*arguments)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert words in refused.stderr
    assert rows(parked) == before


def test_a_login_without_the_role_is_told_which_grant_it_lacks(parked: Database) -> None:
    with login(parked, group="outbox_writer") as name:
        refused = Operator(parked.server.dsn(parked.name, user=name)).run("list")
    assert (refused.returncode, refused.stdout) == (3, "")
    assert "permission denied for table outbox" in refused.stderr


@pytest.fixture
def narrow(database: Database, kafka: Kafka, topic_prefix: str, seed: int) -> Pipeline:
    """No topic takes batches of more than WIDEST bytes."""
    pipeline = Pipeline(database, kafka, prefix=topic_prefix, seed=seed)
    for topic in pipeline.topics:
        kafka.create_topic(topic, partitions=3, config={"max.message.bytes": str(WIDEST)})
    return pipeline


def commit_poison(pipeline: Pipeline) -> Write:
    """A message of KEY that its topic refuses, as it would be once it is mended."""
    write = new_write(str(uuid.uuid4()), key=KEY)
    with pipeline.database.connect() as connection:
        connection.execute(
            """
            INSERT INTO outbox (message_id, aggregate_type, aggregate_id, event_type, payload_bytes, headers)
            VALUES (%s, 'order', %s, 'happened', %s, %s)
            """,
            [write.message_id, KEY, os.urandom(WIDEST + 50_000), json.dumps(own_headers(write.message_id))],
        )
    return replace(write, outcome=Outcome.COMMITTED)


def await_parked(database: Database, *, waiting: int) -> str:
    """The id of the first parked message, once so many wait behind it."""
    with database.connect(autocommit=True) as connection:

        def found() -> int | None:
            [(first, count)] = connection.execute("SELECT min(id), count(*) FROM outbox WHERE parked_at IS NOT NULL")
            return first if count > waiting else None

        return str(eventually(found, timeout=60, message="nothing is parked"))


@pytest.mark.kafka
def test_mended_messages_and_all_behind_them_arrive_in_order_while_relays_run(
    narrow: Pipeline, operator: Operator
) -> None:
    mended = []
    with narrow.relays(2):
        with narrow.load() as load:
            for _ in range(ROUNDS):
                poison = commit_poison(narrow)
                guilty = await_parked(narrow.database, waiting=20)
                operator.ask("edit", guilty, "--payload", payload_of(poison.message_id), "--why", "too large")
                [released] = cast("list[dict[str, int]]", operator.ask("release", guilty)["released"])
                assert released["messages"] > 20
                mended.append(poison)
            load.await_more(500)
        narrow.await_settled()
    verdict = narrow.judge([*load.writes, *mended])
    assert (verdict.is_correct, verdict.parked) == (True, ()), verdict.counts()


@pytest.mark.kafka
def test_what_waits_behind_a_skipped_message_arrives_in_order_while_relays_run(
    narrow: Pipeline, operator: Operator
) -> None:
    with narrow.relays(2):
        with narrow.load() as load:
            poison = commit_poison(narrow)
            guilty = await_parked(narrow.database, waiting=20)
            operator.ask("skip", guilty, "--why", "too large", "--yes")
            operator.ask("release", "--key", "order", KEY)
            load.await_more(500)
        narrow.await_settled()
    verdict = narrow.judge(load.writes)
    assert (verdict.is_correct, verdict.parked) == (True, ()), verdict.counts()
    assert poison.message_id not in {record.message_id for record in narrow.records()}
