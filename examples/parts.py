"""The real parts that examples run on: PostgreSQL, Kafka and processes, started here and removed in the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from outbox_relay.errors import ConfigurationError
from outbox_relay.operate import migrate
from outbox_relay.sandbox.kafka import KAFKA, KafkaCluster
from outbox_relay.sandbox.mock_cluster import MockCluster
from outbox_relay.sandbox.postgres import PostgresServer, installed_servers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

STOP_SECONDS = 30.0
LOG_TAIL_LINES = 5


@dataclass(frozen=True, slots=True)
class Parts:
    """The connection string of a PostgreSQL server, a Kafka, and a directory; all are gone when the example ends."""

    server: str
    kafka: KafkaCluster | MockCluster
    directory: Path


@dataclass(frozen=True, slots=True)
class Process:
    """How to start a process."""

    command: tuple[str, ...]
    environment: Mapping[str, str]


@contextmanager
def start_parts(say: Callable[[str], None]) -> Iterator[Parts]:
    """Start a PostgreSQL, and a Kafka broker, or librdkafka's mock of one on a machine without Java."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that everything is stopped then, too
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="outbox-relay-example-")))
        directory.chmod(0o755)  # PostgreSQL may have to run as another user
        server = stack.enter_context(_new_server(directory / "postgres"))
        if missing := KAFKA.what_is_missing():
            say(f"Kafka is librdkafka's MOCK cluster; {missing}.")
            kafka: KafkaCluster | MockCluster = stack.enter_context(MockCluster())
        else:
            say("A Kafka broker is starting (the first time on a machine, Maven fetches it: about a minute) ...")
            kafka = stack.enter_context(KafkaCluster(directory / "kafka"))
        yield Parts(server.dsn(), kafka, directory)


def create_database(server: str, name: str, *, schema: str) -> str:
    """Create a database with an outbox, an inbox and the tables in *schema*; give its connection string."""
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    database = make_conninfo(server, dbname=name)
    with psycopg.connect(database, autocommit=True) as connection:
        migrate.apply(connection, schema="public", line="outbox")  # as `outbox-relay migrate apply` does
        migrate.apply(connection, schema="public", line="inbox")  # and with --inbox
        connection.execute(schema.encode())
    return database


def service(module: str, name: str, *, database: str, bootstrap_servers: str) -> Process:
    """Give a service that `python -m <module> <name>` runs."""
    environment = {"DATABASE_URL": database, "KAFKA_BOOTSTRAP_SERVERS": bootstrap_servers}
    return Process((sys.executable, "-m", module, name), environment)


def relay(database: str, *, bootstrap_servers: str, topic_template: str) -> Process:
    """Give the relay of a database."""
    environment = {
        "OUTBOX_RELAY_DATABASE_URL": database,
        "OUTBOX_RELAY_KAFKA__BOOTSTRAP_SERVERS": bootstrap_servers,
        "OUTBOX_RELAY_TOPIC_TEMPLATE": topic_template,
        "OUTBOX_RELAY_LANES": "1",
    }
    return Process((sys.executable, "-m", "outbox_relay", "run"), environment)


class RunningProcess:
    """A process that can be killed and started again; what it says goes to a file."""

    def __init__(self, process: Process, *, log_path: Path) -> None:
        self._process = process
        self._log_path = log_path
        self.start()

    def start(self) -> None:
        """Start it, once more if it was killed."""
        # A relay must not read settings that are meant for another one.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_RELAY_")}
        # In a session of its own: Ctrl-C in the terminal is for the example, which ends its processes in order.
        with self._log_path.open("ab") as log:
            self._running = subprocess.Popen(  # noqa: S603 -- our own modules
                self._process.command,
                env={**inherited, **self._process.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        self._running.kill()
        self._running.wait()

    def stop(self) -> None:
        """Let it finish what is in its hands."""
        self._running.terminate()
        try:
            self._running.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def log_tail(self) -> str:
        """Return its last words."""
        return "\n".join(self._log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])


@contextmanager
def start_processes(
    processes: Mapping[str, Process], *, directory: Path, say: Callable[[str], None]
) -> Iterator[Mapping[str, RunningProcess]]:
    """Run all *processes*; when they do not get done with their work in time, tell what they said last."""
    with ExitStack() as stack:
        running = {}
        for name, process in processes.items():
            running[name] = RunningProcess(process, log_path=directory / f"{name}.log")
            stack.callback(running[name].stop)
        try:
            yield running
        except TimeoutError:
            for name, started in running.items():
                say(f"Last lines of {name}:\n{started.log_tail()}")
            raise


def _new_server(directory: Path) -> PostgresServer:
    servers = installed_servers()
    if not servers:
        raise ConfigurationError('the example needs PostgreSQL\'s programs: pip install "outbox-relay[demo]"')
    return PostgresServer.create(servers[max(servers)], directory)
