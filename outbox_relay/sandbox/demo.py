"""
The demo: a shop writes orders, two relays publish them, one relay is killed, and a history of it all is judged.

Everything in it is real but, unless asked for, the Kafka cluster; the file reads from the top as the demo runs.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from random import Random
from statistics import quantiles
from tempfile import TemporaryDirectory
from threading import Event
from typing import TYPE_CHECKING, Literal, Self

import psycopg
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from outbox_relay.errors import ConfigurationError, KafkaUnavailable, OutboxRelayError
from outbox_relay.operate import migrate
from outbox_relay.sandbox.history import History, Write, commit_to_arrival_seconds
from outbox_relay.sandbox.judge import Verdict, judge
from outbox_relay.sandbox.kafka import KAFKA, Kafka, KafkaCluster
from outbox_relay.sandbox.mock_cluster import MockCluster
from outbox_relay.sandbox.orders import AGGREGATE_TYPE, create_orders, write_orders
from outbox_relay.sandbox.postgres import PostgresServer, installed_servers
from outbox_relay.sandbox.reading import count_unsettled, read_outbox, read_topics
from outbox_relay.sandbox.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from outbox_relay.sandbox.history import Mark, Row

KafkaChoice = Literal["mock", "broker"]

WRITERS = 12
ORDERS_PER_SECOND = 400.0
PARTITIONS = 6
DEAD_SECONDS = 2.0
START_TIMEOUT_SECONDS = 30.0
DRAIN_TIMEOUT_SECONDS = 30.0
STOP_TIMEOUT_SECONDS = 30.0
DELETE_TIMEOUT_SECONDS = 10.0
LOG_TAIL_LINES = 8


class DemoFailed(OutboxRelayError):
    """The demo did not get to its verdict; the message ends with what the relays said last."""


@dataclass(frozen=True, slots=True)
class Report:
    """What the demo found; the latencies are from commit to consumer, None when nothing arrived."""

    verdict: Verdict
    latency_median_seconds: float | None
    latency_p99_seconds: float | None


def run_demo(*, kafka: KafkaChoice | None, seconds: float, say: Callable[[str], None]) -> Report:
    """
    Run the whole demo, a few seconds longer than *seconds* of load, and leave nothing behind.

    Args:
        kafka: Which Kafka to start; None means the one at KAFKA_BOOTSTRAP_SERVERS, or the mock where that is not set.
        say: Gets one plain line for each step as it happens.

    Raises:
        ConfigurationError: A part is missing on this machine; the message says how to get it.
        KafkaUnavailable: Nobody answers at KAFKA_BOOTSTRAP_SERVERS, or the topic was refused.
        DemoFailed: A relay ended by itself, or the outbox was not drained in time.
    """
    with (
        _temporary_directory() as directory,
        _postgres(directory / "postgres", say=say) as dsn,
        _kafka(kafka, directory / "kafka", say=say) as cluster,
        _topic(cluster, say=say) as (topic, template),
        _relays(directory, dsn=dsn, kafka=cluster, topic_template=template, say=say) as relays,
    ):
        return _report(_record_history(relays, dsn=dsn, kafka=cluster, topic=topic, seconds=seconds, say=say))


@contextmanager
def _temporary_directory() -> Iterator[Path]:
    with TemporaryDirectory(prefix="outbox-relay-demo-") as name:
        directory = Path(name)
        directory.chmod(0o755)  # PostgreSQL may have to run as another user
        yield directory


@contextmanager
def _postgres(directory: Path, *, say: Callable[[str], None]) -> Iterator[str]:
    servers = installed_servers()
    if not servers:
        raise ConfigurationError('the demo needs PostgreSQL\'s programs: pip install "outbox-relay[demo]"')
    with PostgresServer.create(servers[max(servers)], directory) as server:
        say(f"PostgreSQL {server.version} runs on port {server.port}, in a temporary directory.")
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            applied = migrate.apply(connection, schema="public")
        create_orders(server.dsn())
        say(f"Its database has the shop's table, orders, and {len(applied)} migrations of the outbox.")
        yield server.dsn()


@contextmanager
def _kafka(choice: KafkaChoice | None, directory: Path, *, say: Callable[[str], None]) -> Iterator[Kafka | MockCluster]:
    own = Kafka(os.environ.get("KAFKA_BOOTSTRAP_SERVERS", ""))
    if own.bootstrap_servers and choice is None:
        if not own.brokers_seen():
            raise KafkaUnavailable(f"no Kafka answers at KAFKA_BOOTSTRAP_SERVERS={own.bootstrap_servers}")
        say(f"Kafka is yours, at {own.bootstrap_servers}.")
        yield own
    elif choice == "broker":
        if missing := KAFKA.what_is_missing():
            raise ConfigurationError(missing)
        say("A real Kafka broker is starting (the first time on a machine, Maven fetches it: about a minute) ...")
        with KafkaCluster(directory) as cluster:
            say(f"Kafka is one real broker, at {cluster.bootstrap_servers}.")
            yield cluster
    else:
        with MockCluster() as mock:
            say(
                f"Kafka is librdkafka's MOCK cluster, at {mock.bootstrap_servers}: it speaks the protocol, but keeps "
                "nothing on disk, replicates nothing and checks no rights. "
                "For a real broker: --kafka=broker, or set KAFKA_BOOTSTRAP_SERVERS."
            )
            yield mock


@contextmanager
def _topic(kafka: Kafka | MockCluster, *, say: Callable[[str], None]) -> Iterator[tuple[str, str]]:
    """Make a topic of the demo's own; yield its name and the template that names it so."""
    template = f"outbox-relay-demo-{secrets.token_hex(4)}.{{aggregate_type}}.events"
    topic = template.format(aggregate_type=AGGREGATE_TYPE)
    try:
        kafka.create_topic(topic, partitions=PARTITIONS)
    except (KafkaException, TimeoutError) as error:
        raise KafkaUnavailable(f"the demo could not create its topic at {kafka.bootstrap_servers}: {error}") from error
    say(f"Topic {topic} has {PARTITIONS} partitions.")
    try:
        yield topic, template
    finally:
        if isinstance(kafka, Kafka):
            _delete_topic(topic, kafka=kafka, say=say)


def _delete_topic(topic: str, *, kafka: Kafka, say: Callable[[str], None]) -> None:
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers, "log_level": 0})
    try:
        admin.delete_topics([topic])[topic].result(DELETE_TIMEOUT_SECONDS)
    except (KafkaException, TimeoutError) as error:
        say(f"Topic {topic} could not be deleted: {error}")


class Relay:
    """A relay in a process of its own, configured by its environment as in production; its log goes to a file."""

    def __init__(self, name: str, *, environment: dict[str, str], log_path: Path) -> None:
        self.name = name
        self._environment = environment
        self._log_path = log_path
        self._process = self._launch()

    def wait_until_started(self) -> None:
        """Return once it says that it has started."""
        eventually(self._has_started, timeout=START_TIMEOUT_SECONDS, message=f"{self.name} did not start")

    def kill(self) -> None:
        """Kill it with SIGKILL, as the kernel does when memory runs out."""
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        """Start it again, and wait for it."""
        self._process = self._launch()
        self.wait_until_started()

    def check(self) -> None:
        """Raise when it has ended by itself."""
        if self._process.poll() is not None:
            raise DemoFailed(f"{self.name} ended by itself with exit code {self._process.returncode}")

    def log_tail(self) -> str:
        """Return its last lines."""
        lines = self._log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([f"Last lines of {self.name}:", *lines])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def _launch(self) -> subprocess.Popen[bytes]:
        # In a session of its own: Ctrl-C in the terminal is for the demo, which stops its relays in order.
        with self._log_path.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "outbox_relay", "run"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _has_started(self) -> bool:
        self.check()
        return "relay_started" in self._log_path.read_text(errors="replace")


@contextmanager
def _relays(
    directory: Path, *, dsn: str, kafka: Kafka | MockCluster, topic_template: str, say: Callable[[str], None]
) -> Iterator[list[Relay]]:
    """Start two relays; what goes wrong afterwards is told together with their last words."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OUTBOX_RELAY_", "PG"))}
    environment |= {
        "OUTBOX_RELAY_DATABASE_URL": dsn,
        "OUTBOX_RELAY_KAFKA__BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
        "OUTBOX_RELAY_TOPIC_TEMPLATE": topic_template,
        "OUTBOX_RELAY_METRICS_PORT": "0",
        "OUTBOX_RELAY_LOG_FORMAT": "json",
    }
    with ExitStack() as stack:
        relays = [
            stack.enter_context(Relay(name, environment=environment, log_path=directory / f"{name}.log"))
            for name in ("relay-1", "relay-2")
        ]
        try:
            for relay in relays:
                relay.wait_until_started()
            say("Two relays run, each a process of its own; they share nothing but the database.")
            yield relays
        except (OutboxRelayError, TimeoutError, psycopg.Error) as error:
            raise DemoFailed("\n".join([str(error), *(relay.log_tail() for relay in relays)])) from error


def _record_history(
    relays: Sequence[Relay],
    *,
    dsn: str,
    kafka: Kafka | MockCluster,
    topic: str,
    seconds: float,
    say: Callable[[str], None],
) -> History:
    """Put the relays under load, kill the first one in the middle of it, and record what writers and consumer saw."""
    stop_writing, stop_reading = Event(), Event()
    with ThreadPoolExecutor(WRITERS + 1) as threads, ExitStack() as on_failure_too:
        on_failure_too.callback(stop_reading.set)
        on_failure_too.callback(stop_writing.set)
        reader = threads.submit(read_topics, kafka.bootstrap_servers, topics=[topic], stop=stop_reading)
        writers = [
            threads.submit(write_orders, dsn, per_second=ORDERS_PER_SECOND / WRITERS, stop=stop_writing, random=random)
            for random in map(Random, range(WRITERS))
        ]
        say(f"{WRITERS} writers commit and roll back about {ORDERS_PER_SECOND:g} orders a second for {seconds:g} s.")

        _let_run(writers, seconds=(seconds - DEAD_SECONDS) / 2)
        relays[0].kill()
        say(f"{relays[0].name} is killed with kill -9 under load; {relays[1].name} goes on alone.")
        _let_run(writers, seconds=DEAD_SECONDS)
        relays[0].restart()
        say(f"{relays[0].name} is back.")
        _let_run(writers, seconds=(seconds - DEAD_SECONDS) / 2)

        stop_writing.set()
        writes = [write for writer in writers for write in writer.result()]
        say(f"The writers stop after {len(writes):,} transactions.")
        rows, marks = _drained_outbox(dsn, relays=relays)
        say(f"The outbox is drained: {len(rows):,} rows, all of them settled by {len(marks):,} marks.")
        stop_reading.set()
        return History(writes, rows, reader.result(), marks=marks, partition_counts={topic: (PARTITIONS,)})


def _let_run(writers: Sequence[Future[list[Write]]], *, seconds: float) -> None:
    """Let *seconds* pass; a writer that ends meanwhile has failed, and its error is raised."""
    for ended in wait(writers, timeout=seconds, return_when=FIRST_COMPLETED).done:
        ended.result()


def _drained_outbox(dsn: str, *, relays: Sequence[Relay]) -> tuple[list[Row], list[Mark]]:
    """Wait until every row is published or parked, and return all rows and marks."""
    with psycopg.connect(dsn, autocommit=True) as connection:

        def is_drained() -> bool:
            for relay in relays:
                relay.check()
            return count_unsettled(connection) == 0

        eventually(is_drained, timeout=DRAIN_TIMEOUT_SECONDS, message="the outbox was not drained")
        return read_outbox(connection)


def _report(history: History) -> Report:
    latencies = commit_to_arrival_seconds(history)
    median, p99 = itemgetter(49, 98)(quantiles(latencies, n=100)) if len(latencies) > 1 else (None, None)
    return Report(verdict=judge(history), latency_median_seconds=median, latency_p99_seconds=p99)
