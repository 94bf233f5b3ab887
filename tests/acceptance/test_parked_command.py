"""What operators do with messages that Kafka refused, by the command, and what Kafka holds in the end."""

from __future__ import annotations

import json
import os
import random
import string
import subprocess
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import pytest

from outbox_relay.sandbox.history import Outcome
from tests.fixtures.daemon import outbox_relay
from tests.fixtures.load import new_write, own_headers, payload_of
from tests.fixtures.marks import mark, set_aside
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
        set_aside(connection, 1, 4, reason="5 bytes")
        set_aside(connection, 2, 3, reason_code="behind_parked", reason="an earlier message of the key is parked")
        mark(connection)
    return database


def states(database: Database) -> dict[int, str]:
    """What has become of each message by its number."""
    with database.connect() as connection:
        return dict(connection.execute("SELECT sequence_no, state FROM outbox_message ORDER BY 1").fetchall())


@pytest.mark.usefixtures("parked")
def test_list_prints_a_table_and_says_when_there_is_more(operator: Operator) -> None:
    whole = operator.run("list")
    heading, *lines = [line.split() for line in whole.stdout.splitlines()]
    assert heading == ["sequence_no", "since", "key", "behind", "reason"]
    assert [[line[0], *line[2:]] for line in lines] == [
        ["1", "order", "7", "2", "MSG_SIZE_TOO_LARGE:", "5", "bytes"],
        ["4", "order", "8", "0", "MSG_SIZE_TOO_LARGE:", "5", "bytes"],
    ]
    assert (whole.returncode, whole.stderr) == (0, "")

    first = operator.run("list", "--limit", "1")
    assert [line.split()[0] for line in first.stdout.splitlines()] == ["sequence_no", "1"]
    assert first.stderr == "there are more than 1: narrow the list, or raise --limit\n"

    none = operator.run("list", "--type", "basket")
    assert (none.returncode, none.stdout, none.stderr) == (0, "", "no parked message fits\n")


@pytest.mark.usefixtures("parked")
def test_list_and_show_have_the_same_facts_as_json(operator: Operator) -> None:
    listed = operator.ask("list", "--key", "order", "7", "--behind", "--limit", "2")
    messages = cast("list[dict[str, object]]", listed["messages"])
    facts = [(message["sequence_no"], message["is_guilty"], message["behind"]) for message in messages]
    assert (facts, listed["has_more"]) == ([(1, True, 2), (2, False, 1)], True)
    assert (messages[0]["reason_code"], messages[0]["reason"]) == ("MSG_SIZE_TOO_LARGE", "5 bytes")
    assert "id" not in messages[0]

    shown = operator.ask("show", "1")
    assert (shown["payload"], shown["headers"], shown["aggregate_id"]) == ({"total": 1}, {}, "7")
    assert [shown[name] for name in ("since", "reason_code", "reason", "message_id", "aggregate_type", "shard")] == [
        messages[0][name] for name in ("since", "reason_code", "reason", "message_id", "aggregate_type", "shard")
    ]
    assert operator.run("show", "1").stdout.startswith("sequence_no     1\n")


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
            "SELECT payload, payload_bytes, headers FROM outbox WHERE sequence_no IN (1, 4) ORDER BY sequence_no"
        ).fetchall()
    assert edited == [({"total": 2}, None, {"by": "a=b"}), (None, b"\0\xff", {})]


HOSTILE = "\x1b[2J\r\n\u202e" + "k" * 10_000


@pytest.fixture
def hostile(database: Database) -> str:
    """A parked message in whose every text is what a terminal must not get; gives its aggregate type and key."""
    with database.connect() as connection:
        insert(connection, HOSTILE, HOSTILE, aggregate_type=HOSTILE, headers={HOSTILE: "\x9b"}, payload=["\x9b\u2028"])
        set_aside(connection, 1, 2, reason_code="unpublishable", reason="\x1b]0;evil\x07")
    return HOSTILE


@pytest.mark.usefixtures("hostile")
@pytest.mark.parametrize(
    "arguments",
    [
        ("parked", "list", "--behind"),
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


@pytest.mark.usefixtures("database")
@pytest.mark.parametrize("length", [3_000, 100_000])
def test_a_key_that_no_index_could_hold_is_listed_shown_and_released(
    operator: Operator, database: Database, length: int, seed: int
) -> None:
    chance = random.Random(seed)  # noqa: S311 -- no secret
    key = "".join(chance.choices(string.ascii_letters + string.digits, k=length))
    with database.connect() as connection:
        insert(connection, key, key)
        set_aside(connection, 1)
        set_aside(connection, 2, reason_code="behind_parked")
    assert max(map(len, operator.run("list").stdout.splitlines())) < 250
    [message] = cast("list[dict[str, object]]", operator.ask("list")["messages"])
    assert (message["aggregate_id"], message["behind"]) == (key, 1)
    assert operator.ask("show", "1")["aggregate_id"] == key
    [released] = cast("list[dict[str, object]]", operator.ask("release", "1")["released"])
    assert (released["aggregate_id"], released["messages"]) == (key, 2)
    assert states(database) == {1: "waiting", 2: "waiting"}


def test_what_was_deleted_from_the_outbox_is_said_and_cleared(operator: Operator, parked: Database) -> None:
    with parked.connect() as connection:
        connection.execute("DELETE FROM outbox WHERE sequence_no IN (1, 4)")
    listed = [line.split()[2:5] for line in operator.run("list").stdout.splitlines()[1:]]
    assert listed == [["order", "(deleted)", "2"], ["order", "(deleted)", "0"]]
    shown = operator.run("show", "1")
    assert shown.stderr == "message 1 was deleted from the outbox: this is what is left of it\n"
    assert operator.run("edit", "1", "--payload", "{}").returncode == 2
    released = operator.run("release", "--key", "order", "7")
    assert released.stdout.splitlines() == [
        "order (deleted)  1",
        "order 7  2",
        "released 2 messages of 1 key",
        "1 message more had been deleted from the outbox",
    ]
    skipped = operator.run("skip", "4", "--why", "gone", "--yes")
    assert skipped.stdout == "skipped 1 message\ndeleted from the outbox before: 4\n"
    assert states(parked) == {2: "waiting", 3: "waiting"}
    assert operator.ask("list") == {"messages": [], "has_more": False}


def test_a_dry_run_of_a_release_prints_the_same_and_changes_nothing(operator: Operator, parked: Database) -> None:
    before = states(parked)
    released = [
        {"shard": 13, "aggregate_type": "order", "aggregate_id": "7", "messages": 3},
    ]
    assert operator.ask("release", "1", "--dry-run") == {"dry_run": True, "released": released}
    assert states(parked) == before
    assert operator.ask("release", "1") == {"dry_run": False, "released": released}
    assert states(parked) == {1: "waiting", 2: "waiting", 3: "waiting", 4: "parked"}


@pytest.mark.parametrize("selection", [["--all"], ["--reason", "too_large"], ["--type", "order"]], ids=" ".join)
def test_a_release_by_selection_takes_whole_keys(operator: Operator, parked: Database, selection: list[str]) -> None:
    released = operator.run("release", *selection)
    assert released.stdout.splitlines()[-1] == "released 4 messages of 2 keys"
    assert set(states(parked).values()) == {"waiting"}


@pytest.mark.parametrize(("on_poison", "are_unordered"), [("park", False), ("skip", True)])
def test_a_release_knows_by_the_settings_whether_later_messages_were_published(
    operator: Operator, parked: Database, on_poison: str, *, are_unordered: bool
) -> None:
    operator.ask("release", "1", "--on-poison", on_poison)
    with parked.connect() as connection:
        query = "SELECT DISTINCT is_unordered FROM outbox_pending WHERE state = 'waiting'"
        assert connection.execute(query).fetchall() == [(are_unordered,)]


def test_skip_says_what_is_left_parked(operator: Operator, parked: Database) -> None:
    skipped = operator.run("skip", "1", "--why", "test order", "--operator", "ada", "--yes")
    assert skipped.stdout == (
        "skipped 1 message\norder 7  2\nstill parked: 2 messages of 1 key; see outbox-relay parked release\n"
    )
    assert states(parked) == {2: "parked", 3: "parked", 4: "parked"}
    with parked.connect() as connection:
        record = connection.execute("SELECT action, operator, why, sequence_no, payload FROM outbox_audit").fetchall()
    assert record == [("skip", "ada", "test order", 1, {"total": 1})]


def test_skip_has_all_that_it_did_as_json(operator: Operator, parked: Database) -> None:
    with parked.connect() as connection:
        connection.execute("DELETE FROM outbox WHERE sequence_no = 4")
    skipped = operator.ask("skip", "1", "4", "--why", "test order", "--release-rest", "--yes")
    released = [{"shard": 13, "aggregate_type": "order", "aggregate_id": "7", "messages": 2}]
    assert (sorted(cast("list[int]", skipped["skipped"])), skipped["deleted_before"]) == ([1, 4], [4])
    assert (skipped["released"], skipped["left"]) == (released, [])


@pytest.mark.parametrize(("answer", "left"), [(b"n\n", [1, 2, 3, 4]), (b"y\n", [2, 3, 4])])
def test_skip_asks_at_a_terminal(operator: Operator, parked: Database, answer: bytes, left: list[int]) -> None:
    keyboard, terminal = os.openpty()
    os.write(keyboard, answer)
    asked = operator.run("skip", "1", "--why", "test order", stdin=terminal)
    os.close(keyboard)
    os.close(terminal)
    assert asked.stderr.startswith("Never publish 1 message?")
    assert list(states(parked)) == left


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["skip", "1", "--why", "spam"], "--yes"),
        (["skip", "1", "--yes"], "--why"),
        (["skip", "--why", "spam", "--yes"], "SEQUENCE_NOs"),
        (["skip", "99", "--why", "spam", "--yes"], "not parked"),
        (["release"], "say what to release"),
        (["release", "1", "--all"], "say what to release"),
        (["release", "3"], "--key order 7"),
        (["show", "99"], "not parked"),
        (["show", "0"], "not in the range"),
        (["show", "9223372036854775808"], "not in the range"),
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
    before = states(parked)
    refused = operator.run(*arguments)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert words in refused.stderr
    assert states(parked) == before


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
    """The number of the first parked message, once so many stand behind it."""
    with database.connect(autocommit=True) as connection:

        def found() -> int | None:
            [(first, count)] = connection.execute(
                "SELECT min(sequence_no), count(*) FROM outbox_pending WHERE state = 'parked'"
            )
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


@pytest.mark.kafka
def test_a_part_of_the_reason_finds_what_kafka_refused_and_what_was_too_large_to_be_read(
    narrow: Pipeline, operator: Operator
) -> None:
    with narrow.database.connect() as writer:
        insert(writer, "order-1", payload_bytes=os.urandom(WIDEST + 50_000))
        insert(writer, "order-2", payload_bytes=bytes(9_000_000))
        insert(writer, "order-3", headers={"attempt": 3})
    with narrow.relays(1):
        narrow.await_settled()
        found = cast("list[dict[str, object]]", operator.ask("list", "--reason", "TOO_LARGE")["messages"])
        assert [message["aggregate_id"] for message in found] == ["order-1", "order-2"]


@pytest.mark.kafka
def test_what_is_released_under_skip_arrives_with_the_header_unordered(narrow: Pipeline, operator: Operator) -> None:
    with narrow.database.connect() as writer:
        insert(writer, KEY, headers={"attempt": 3})
        insert(writer, KEY)
    with narrow.relays(1, on_poison="skip"):
        narrow.await_settled()
        operator.ask("edit", "1", "--header", "attempt=3")
        operator.ask("release", "1", "--on-poison", "skip")
        eventually(lambda: len(narrow.records()) == 2, message="the released message does not arrive")
    records = sorted(narrow.records(), key=lambda record: record.offset)
    assert [(record.sequence_no, record.is_unordered) for record in records] == [(2, False), (1, True)]
