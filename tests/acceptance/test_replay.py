"""Operators publish messages again while relays, writers and consumers are at work; judged from Kafka and balances."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay.consumer import Inbox, SequenceInbox
from outbox_relay.sandbox.history import Outcome
from outbox_relay.sandbox.ports import ReservedPort
from tests.fixtures.consumer_process import Options, consumer_process
from tests.fixtures.daemon import Daemon, outbox_relay
from tests.fixtures.ledger import AcceptsEverything, Desk, balances_after, deposit, running
from tests.fixtures.load import Plan, commit_messages
from tests.fixtures.pipeline import flaws
from tests.fixtures.postgres import login
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from psycopg import Connection

    from outbox_relay.consumer import Message
    from outbox_relay.sandbox.history import Write
    from tests.fixtures.consumer_process import Guard
    from tests.fixtures.ledger import Balances, Ledger
    from tests.fixtures.pipeline import Pipeline
    from tests.fixtures.postgres import Database

pytestmark = pytest.mark.kafka

COMMAND = outbox_relay("replay", "--why", "a bug in billing")


class Operator:
    """Runs `outbox-relay replay` as a login that has the role of operators and nothing else."""

    def __init__(self, pipeline: Pipeline, user: str) -> None:
        url = make_conninfo(pipeline.database.dsn, user=user)
        self.environment = pipeline.environment(database_url=url, log_format="json")

    def run(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        given = {f"OUTBOX_RELAY_{name.upper()}": value for name, value in settings.items()}
        return subprocess.run(
            [*COMMAND, *arguments],
            env=os.environ | self.environment | given,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def ask(self, *arguments: str) -> dict[str, Any]:
        """What the command prints as JSON; it has to succeed."""
        ended = self.run(*arguments, "--json")
        assert (ended.returncode, ended.stderr) == (0, "")
        return cast("dict[str, Any]", json.loads(ended.stdout))


@pytest.fixture
def operator(pipeline: Pipeline) -> Iterator[Operator]:
    with login(pipeline.database, group="outbox_operator") as name:
        yield Operator(pipeline, name)


@pytest.fixture
def published(pipeline: Pipeline) -> list[Write]:
    """Sixty published messages of three keys."""
    with pipeline.relay(), pipeline.database.connect() as writer:
        writes = commit_messages(writer, *("order-0", "order-1", "parcel-2") * 20)
        pipeline.await_settled()
    return writes


def reached(database: Database) -> int:
    with database.connect() as connection:
        rows = connection.execute("SELECT reached_no FROM outbox_replay WHERE finished_at IS NULL").fetchall()
    return int(rows[0][0]) if rows else 0


def forget_replays(database: Database) -> None:
    """So that the same name can be used again, as if everything were delivered twice."""
    with database.connect() as connection:
        connection.execute("DELETE FROM outbox_replay")


def all_messages(desk: Desk, count: int) -> list[Message]:
    """Everything that the topics hold, per partition in its order."""
    found: list[Message] = []
    group = f"{desk.topic}.reader.{os.urandom(4).hex()}"

    def handle(_connection: Connection[Any], messages: Sequence[Message]) -> None:
        found.extend(messages)

    with running(desk.consumer(config=desk.config(group_id=group), inbox=AcceptsEverything(), handle=handle)):
        desk.await_consumed(count, group=group)
    return found


def into_accounts_of(name: str) -> Callable[[Connection[Any], Sequence[Message]], None]:
    """Deposit into accounts of the consumer's own."""

    def handle(connection: Connection[Any], messages: Sequence[Message]) -> None:
        deposit(connection, [replace(message, key=f"{name} {message.key}") for message in messages])

    return handle


def deposits(writes: Sequence[Write], *, to: str = "") -> list[tuple[str, str]]:
    return [(f"{to}{write.key}", write.message_id) for write in writes]


@pytest.mark.slow
def test_while_all_are_at_work_a_replay_has_one_more_effect_where_it_is_applied_and_none_elsewhere(
    pipeline: Pipeline, operator: Operator, ledger: Ledger
) -> None:
    desk = Desk(pipeline.kafka, ledger, *pipeline.topics)
    inboxes = {
        "ignores by id": Inbox("1"),
        "ignores by number": SequenceInbox("2"),
        "applies by id": Inbox("3", replays="apply"),
        "applies by number": SequenceInbox("4", replays="apply"),
    }
    groups = {name: f"{desk.topic}.{name.replace(' ', '-')}" for name in inboxes}
    consumers = [
        desk.consumer(
            config=desk.config(group_id=groups[name]), inbox=inbox, handle=into_accounts_of(name), batch_messages=50
        )
        for name, inbox in inboxes.items()
    ]
    keys = ["--key", "order", "order-0", "--key", "payment", "payment-1", "--name", "r1", "--rate", "300", "--yes"]
    with pipeline.relays(2), running(*consumers):
        with pipeline.load(Plan(writers=2)) as load:
            load.await_more(300)
            replays = [operator.ask(*keys)]
            forget_replays(pipeline.database)
            load.await_more(100)
            replays.append(operator.ask(*keys))
            load.await_more(100)
        pipeline.await_settled()
        sent = sum(replay["replayed_messages"] for replay in replays)
        records = len(pipeline.records())
        for group in groups.values():
            desk.await_consumed(records, group=group, timeout=60)
    committed = [write for write in load.writes if write.outcome is Outcome.COMMITTED]
    found = all_messages(desk, records)
    replayed_ids = {str(message.message_id) for message in found if message.replay == "r1"}
    replayed = [write for write in committed if write.message_id in replayed_ids]
    expected: Balances = {}
    for name in inboxes:
        expected |= balances_after(
            deposits(committed, to=f"{name} ")
            + (deposits(replayed, to=f"{name} ") if name.startswith("applies") else [])
        )
    assert ledger.excess(expected) == {}
    assert replays[0]["replayed_messages"] > 20
    assert {write.key for write in replayed} == {"order-0", "payment-1"}
    assert flaws(pipeline.judge(load.writes)) == {"replayed": sent}
    assert sent == len([message for message in found if message.replay is not None])


@pytest.mark.slow
@pytest.mark.parametrize("guard", ["inbox", "sequence"])
def test_a_consumer_that_is_killed_behind_an_applied_replay_applies_it_once(
    pipeline: Pipeline, operator: Operator, ledger: Ledger, published: list[Write], guard: Guard
) -> None:
    desk = Desk(pipeline.kafka, ledger, *pipeline.topics)
    config = desk.config(group_instance_id="1")
    options = Options(config=config, topics=desk.topics, dsn=ledger.dsn, guard=guard, replays="apply")
    with consumer_process(options) as consumer:
        desk.await_consumed(60)
        consumer.terminate()
        assert consumer.wait() == 0
    assert operator.ask("--all", "--name", "r1", "--yes")["replayed_messages"] == 60
    with consumer_process(replace(options, waits_before_offsets=True)) as victim:
        victim.wait_for_event("effects_committed")
        victim.kill()
    assert desk.committed() == 60
    forget_replays(pipeline.database)
    operator.ask("--all", "--name", "r1", "--yes")
    with consumer_process(options) as successor:
        desk.await_consumed(180)
        successor.terminate()
        assert successor.wait() == 0
    assert ledger.excess(balances_after(deposits(published) * 2)) == {}


def test_a_replayed_record_is_the_first_one_but_for_a_header_and_comes_in_order(
    pipeline: Pipeline, operator: Operator, ledger: Ledger, published: list[Write]
) -> None:
    desk = Desk(pipeline.kafka, ledger, *pipeline.topics)
    assert operator.ask("--type", "order", "--name", "r1", "--yes")["replayed_messages"] == 40
    found = all_messages(desk, 100)
    firsts = {message.message_id: message for message in found if message.replay is None}
    again = [message for message in found if message.replay is not None]
    assert len(firsts) == len(published)
    assert [
        replace(message, replay=None, offset=0, headers=dict(message.headers) | {"replay": ""}) for message in again
    ] == [
        replace(firsts[message.message_id], offset=0, headers=dict(message.headers) | {"replay": ""})
        for message in again
    ]
    for key in ("order-0", "order-1"):
        numbers = [message.sequence_no for message in again if message.key == key]
        assert (len(numbers), numbers) == (20, sorted(numbers))
    assert {message.headers["replay"] for message in again} == {"r1"}


def test_a_side_topic_gets_the_replay_and_nobody_else_does(
    pipeline: Pipeline, operator: Operator, ledger: Ledger, published: list[Write]
) -> None:
    side = pipeline.topic("side")
    pipeline.kafka.create_topic(side, partitions=3)
    assert operator.ask("--all", "--to-topic", side, "--yes")["replayed_messages"] == 60
    found = all_messages(Desk(pipeline.kafka, ledger, side), 60)
    assert sorted(str(message.message_id) for message in found) == sorted(write.message_id for write in published)
    assert len(pipeline.records()) == 60


def test_a_dry_run_tells_what_would_happen_and_nothing_does(
    pipeline: Pipeline, operator: Operator, published: list[Write]
) -> None:
    planned = operator.ask("--all", "--dry-run")
    assert (planned["messages"], planned["topics"]) == (
        len(published),
        {pipeline.topic("order"): 40, pipeline.topic("parcel"): 20},
    )
    assert (planned["first"]["sequence_no"], planned["last"]["sequence_no"]) == (1, 60)
    text = operator.run("--from-sequence", "59", "--dry-run").stdout.splitlines()
    assert [text[0], text[1], text[-1]] == [
        f"1 to {pipeline.topic('order')}",
        f"1 to {pipeline.topic('parcel')}",
        "would replay 2 messages",
    ]
    nothing = operator.run("--type", "basket", "--yes")
    assert (nothing.returncode, nothing.stdout) == (0, "")
    assert nothing.stderr == "nothing is published and kept that fits\n"
    refused = operator.run("--all")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "consumers will get messages again: add --yes" in refused.stderr
    assert len(pipeline.records()) == 60
    assert operator.run("--all", "--to-topic", "a b", "--yes").returncode == 2


@pytest.mark.usefixtures("published")
def test_an_interrupted_replay_says_where_it_stopped_and_goes_on_there(pipeline: Pipeline, operator: Operator) -> None:
    command = [*COMMAND, "--all", "--name", "r1", "--yes", "--rate"]
    for number in (signal.SIGINT, signal.SIGTERM):
        before = reached(pipeline.database)
        with Daemon(operator.environment, command=[*command, "20"]) as running_replay:
            eventually(lambda: reached(pipeline.database) > before, message="no progress")  # noqa: B023 -- at once
            running_replay.signal(number)
            assert running_replay.wait() == 130
        assert running_replay.other_lines == ["to go on: the same command with --name r1\n"]
        assert before < reached(pipeline.database) < 60
    assert operator.ask("--all", "--name", "r1", "--yes")["replayed_messages"] == 60
    assert len(pipeline.records()) == 120
    again = operator.run("--all", "--name", "r1", "--yes")
    assert (again.returncode, "replay r1 was finished at" in again.stderr) == (2, True)


@pytest.mark.usefixtures("published")
def test_a_missing_topic_is_named_before_anything_is_published(pipeline: Pipeline, operator: Operator) -> None:
    missing = pipeline.topic("missing")
    refused = operator.run("--all", "--to-topic", missing, "--yes")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f'topic "{missing}"' in refused.stderr
    assert len(pipeline.records()) == 60


@pytest.mark.usefixtures("published")
def test_kafka_that_is_away_from_the_start_ends_the_command_with_its_code(operator: Operator) -> None:
    nobody = f"127.0.0.1:{ReservedPort().number}"
    away = operator.run("--all", "--name", "r1", "--yes", kafka__bootstrap_servers=nobody)
    assert (away.returncode, away.stdout) == (4, "")
    assert "no broker answered" in away.stderr
    assert operator.ask("--all", "--name", "r1", "--yes")["replayed_messages"] == 60


@pytest.mark.slow
def test_kafka_that_goes_away_ends_the_command_and_the_same_one_goes_on(own_kafka_pipeline: Pipeline) -> None:
    pipeline = own_kafka_pipeline
    with pipeline.relay(), pipeline.database.connect() as writer:
        commit_messages(writer, *["order-0"] * 60)
        pipeline.await_settled()
    with login(pipeline.database, group="outbox_operator") as name:
        operator = Operator(pipeline, name)
        short = {"OUTBOX_RELAY_PUBLISH_DEADLINE": "2", "OUTBOX_RELAY_LOG_LEVEL": "error"}
        command = [*COMMAND, "--all", "--name", "r1", "--yes"]
        with Daemon(operator.environment | short, command=[*command, "--rate", "20"]) as running_replay:
            eventually(lambda: reached(pipeline.database) > 0, message="no progress")
            pipeline.kafka.kill()  # type: ignore[attr-defined]  # a cluster of this test's own
            assert running_replay.wait() == 4
        assert "to go on: the same command with --name r1\n" in running_replay.other_lines
        assert 0 < reached(pipeline.database) < 60
        pipeline.kafka.restart()  # type: ignore[attr-defined]  # the same
        rest = operator.run("--all", "--name", "r1", "--yes", "--json")
        assert (rest.returncode, json.loads(rest.stdout)["is_finished"]) == (0, True)
    sent = [record.sequence_no for record in pipeline.records()][60:]
    assert set(sent) == set(range(1, 61))


@pytest.mark.usefixtures("published")
def test_progress_is_shown_on_a_terminal(operator: Operator) -> None:
    terminal, other_end = os.openpty()
    with (
        os.fdopen(terminal, "rb", buffering=0) as screen,
        subprocess.Popen(
            [*COMMAND, "--all", "--yes"],
            env=os.environ | operator.environment,
            stdout=subprocess.DEVNULL,
            stderr=other_end,
        ) as command,
    ):
        os.close(other_end)  # so that reading fails once the command has ended
        shown = b""
        while b"100%" not in shown:
            shown += screen.read(4096)
        assert command.wait() == 0
    assert b"[#" in shown
