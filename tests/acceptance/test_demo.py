"""`outbox-relay demo` as people run it: its verdict, its exit code, and what it leaves behind when it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING

import psutil
import pytest
from click.testing import CliRunner
from confluent_kafka.admin import AdminClient

from outbox_relay.cli import cli
from outbox_relay.sandbox.demo import Report
from outbox_relay.sandbox.history import History, Mark, Outcome, Record, Row, State, Write
from outbox_relay.sandbox.judge import judge
from tests.fixtures.daemon import outbox_relay
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from outbox_relay.sandbox.kafka import Kafka

pytestmark = [pytest.mark.slow, pytest.mark.outside("the demo brings a PostgreSQL, which the image has not")]

COMMAND = outbox_relay("demo", "--seconds=5")


@pytest.fixture
def reachable_path() -> Iterator[Path]:
    """Give a directory that PostgreSQL can reach, which runs as another user when we are root."""
    with TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory


@pytest.fixture
def _restored_sigterm() -> Iterator[None]:
    """Undo what a command does to SIGTERM in the process of the tests."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def run(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *options], env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )


@contextmanager
def started(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Start the demo with its temporary files below *directory*."""
    environment = os.environ | {"TMPDIR": str(directory)}
    with subprocess.Popen([*COMMAND, "--kafka=mock"], env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def stderr_of(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stderr is not None
    return process.stderr


def read_until(words: str, process: subprocess.Popen[str]) -> None:
    assert any(words in line for line in stderr_of(process)), f"the demo ended before it said {words!r}"


def test_demo_without_flags_shows_a_kill_and_that_nothing_is_lost() -> None:
    demo = run(KAFKA_BOOTSTRAP_SERVERS="")
    assert demo.returncode == 0, demo.stderr
    assert "Kafka is librdkafka's MOCK cluster" in demo.stderr
    assert "relay-1 is killed with kill -9 under load" in demo.stderr
    table = dict(line.strip().rsplit(maxsplit=1) for line in _numbers(demo.stdout))
    assert int(table["committed"].replace(",", "")) > 1000
    assert int(table["rolled back"].replace(",", "")) > 100
    assert table["published"] == table["committed"]
    broken = ("lost", "phantoms", "out of order", "false marks", "miscounted", "corrupted")
    assert [table[name] for name in broken] == ["0"] * len(broken)
    assert demo.stdout.endswith("Nothing is lost, nothing is a phantom, every key is in order.\n")


def _numbers(table: str) -> list[str]:
    """Return the name and number of each line of the table, without the note."""
    return [line[:27] for line in table.splitlines() if line.startswith("  ") and "latency" not in line]


@pytest.mark.kafka
def test_demo_uses_the_kafka_of_the_environment_and_removes_its_topic(kafka: Kafka) -> None:
    demo = run("--json", KAFKA_BOOTSTRAP_SERVERS=kafka.bootstrap_servers)
    assert demo.returncode == 0, demo.stderr
    verdict = json.loads(demo.stdout)
    assert verdict["is_correct"]
    assert verdict["published"] == verdict["committed"] > 1000
    assert 0 < verdict["latency_median_seconds"] <= verdict["latency_p99_seconds"]
    assert f"Kafka is yours, at {kafka.bootstrap_servers}" in demo.stderr
    topics = AdminClient({"bootstrap.servers": kafka.bootstrap_servers}).list_topics(timeout=10).topics
    assert [topic for topic in topics if topic.startswith("outbox-relay-demo-")] == []


def test_demo_without_a_kafka_at_the_given_address_says_so() -> None:
    demo = run(KAFKA_BOOTSTRAP_SERVERS="127.0.0.1:1")
    assert demo.returncode == 4
    assert demo.stderr.endswith("outbox-relay: no Kafka answers at KAFKA_BOOTSTRAP_SERVERS=127.0.0.1:1\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_leaves_no_process_and_no_file(number: signal.Signals, reachable_path: Path) -> None:
    with started(reachable_path) as demo:
        read_until("writers commit and roll back", demo)
        children = psutil.Process(demo.pid).children(recursive=True)
        assert len(children) > 3, "two relays and PostgreSQL's processes"
        demo.send_signal(number)
        stderr_of(demo).read()
        assert demo.wait() == 130
    assert psutil.wait_procs(children, timeout=10)[1] == []
    assert list(reachable_path.iterdir()) == []


def test_demo_whose_relay_ends_by_itself_shows_its_last_lines(reachable_path: Path) -> None:
    with started(reachable_path) as demo:
        read_until("writers commit and roll back", demo)
        relay = eventually(lambda: _relays_of(demo)[1], message="the second relay did not start")
        relay.kill()
        said = stderr_of(demo).read()
        assert demo.wait() == 1
    assert "outbox-relay: relay-2 ended by itself with exit code -9" in said
    assert "outbox-relay: Last lines of relay-2:" in said
    assert "relay_started" in said
    assert list(reachable_path.iterdir()) == []


def _relays_of(demo: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(demo.pid).children()
    return [child for child in children if child.cmdline()[-2:] == ["outbox_relay", "run"]]


@pytest.mark.usefixtures("_restored_sigterm")
def test_broken_promise_is_shown_and_exits_5(monkeypatch: pytest.MonkeyPatch) -> None:
    lost_and_phantom = History(
        [
            Write(message_id="lost", key="k", digest=b"", outcome=Outcome.COMMITTED, ended_at=0.0),
            Write(message_id="phantom", key="k", digest=b"", outcome=Outcome.ROLLED_BACK, ended_at=0.0),
        ],
        [Row(message_id="lost", key="k", sequence_no=1, state=State.PUBLISHED)],
        marks=[Mark(shard=0, through=1, messages=0, checksum=0)],
        records=[
            Record(
                topic="t",
                partition=0,
                offset=0,
                key="k",
                message_id="phantom",
                sequence_no=2,
                is_unordered=False,
                digest=b"",
                arrived_at=0.0,
            )
        ],
    )
    report = Report(verdict=judge(lost_and_phantom), latency_median_seconds=None, latency_p99_seconds=None)
    monkeypatch.setattr("outbox_relay.cli.demo.run_demo", lambda **_options: report)
    shown = CliRunner().invoke(cli, ["demo"])
    assert shown.exit_code == 5
    assert shown.stdout.splitlines()[1:10] == [
        "  committed               1",
        "  rolled back             1",
        "  published               1  distinct messages that a consumer received",
        "  lost                    1  committed, never received",
        "  phantoms                1  received, never committed",
        "  out of order            0  behind a later message of their key",
        "  false marks             1  marked published, never received",
        "  miscounted              1  marks that counted other messages than there are",
        "  corrupted               0  received with another key, value or number",
    ]
    assert shown.stdout.endswith("A PROMISE IS BROKEN: see above.\n")
