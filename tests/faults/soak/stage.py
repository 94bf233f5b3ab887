"""What is on the stage of a soak: servers, relays and consumers, writers, and the commands of an operator."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from threading import Event
from typing import TYPE_CHECKING

from psycopg.conninfo import make_conninfo

from outbox_relay.cli.exits import ExitCode
from outbox_relay.sandbox.history import Outcome
from outbox_relay.sandbox.kafka import KafkaCluster
from outbox_relay.sandbox.reading import read_ends
from tests.faults.soak.relay import Relay
from tests.fixtures.consumer_process import Options, consumer_process
from tests.fixtures.daemon import outbox_relay
from tests.fixtures.journal import create_journal
from tests.fixtures.load import Plan, key_of
from tests.fixtures.postgres import login
from tests.fixtures.proxy import TcpProxy
from tests.fixtures.topics import committed
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import LiteralString

    from outbox_relay.sandbox.history import Hold, Write
    from outbox_relay.sandbox.kafka import Kafka
    from outbox_relay.sandbox.postgres import PostgresServer
    from tests.fixtures.consumer_process import Guard
    from tests.fixtures.daemon import Daemon
    from tests.fixtures.load import Load
    from tests.fixtures.pipeline import Pipeline
    from tests.fixtures.postgres import Database

RELAYS = 2
GUARDS: tuple[Guard, ...] = ("inbox", "sequence")
MEMBERS = 2  # consumers of each group
SESSION_TIMEOUT_MS = 6000
PLAN = Plan(writers=4, longest_pause=0.1)
COMMAND_SECONDS = 60.0
SIGN_SECONDS = 15.0

RECOVERY_SECONDS = 60.0

SELECT_FIRST_PUBLISHED = """
SELECT coalesce(min(first.sequence_no), 9223372036854775807)
FROM outbox_shard
CROSS JOIN LATERAL (
    SELECT outbox_message.sequence_no
    FROM outbox_message
    WHERE outbox_message.shard = outbox_shard.shard AND outbox_message.state = 'published'
    ORDER BY outbox_message.sequence_no
    LIMIT 1
) AS first
"""


class DidNotFire(Exception):
    """The fault was to strike, and there is no sign that it did."""


class TryLater(Exception):
    """A command could not do its work now, for other faults are at work."""


@dataclass(slots=True)
class Stage:
    """
    The parts, all of them running, and what the nemesis itself does to messages.

    Attributes:
        writers_network: Between the writers and PostgreSQL; relays have their own.
        operator_dsn: Of a login that may decide about parked messages.
        pruner_dsn: Of a login that may prune.
        writes: Messages that the nemesis has written, beside those of the load.
        skipped: How many of them it has written where no relay looks.
        holds: How long keys were parked.
    """

    pipeline: Pipeline
    server: PostgresServer
    kafka: Kafka
    inbox: Database
    load: Load
    writers_network: TcpProxy
    operator_dsn: str
    pruner_dsn: str
    relays: list[Relay] = field(default_factory=list)
    consumers: dict[Guard, list[Daemon]] = field(default_factory=dict)
    writes: list[Write] = field(default_factory=list)
    skipped: int = 0
    holds: list[Hold] = field(default_factory=list)

    @property
    def broker(self) -> KafkaCluster:
        """The broker, if it is the soak's own."""
        assert isinstance(self.kafka, KafkaCluster)
        return self.kafka

    @property
    def is_consumed(self) -> bool:
        """Whether each group has committed all that the topics hold."""
        servers, topics = self.kafka.bootstrap_servers, self.pipeline.topics
        records = sum(read_ends(servers, topics=topics).values())
        return all(committed(servers, topics, group=self._group(guard)) == records for guard in self.consumers)

    def start_consumer(self, guard: Guard) -> Daemon:
        """Start one more member of the group of *guard*."""
        config = {
            "bootstrap.servers": self.kafka.bootstrap_servers,
            "group.id": self._group(guard),
            "session.timeout.ms": SESSION_TIMEOUT_MS,
            "auto.offset.reset": "earliest",
        }
        dsn = make_conninfo(self.inbox.dsn, application_name=f"consumer {guard}")
        topics = self.pipeline.topics
        return consumer_process(
            Options(config=config, topics=topics, dsn=dsn, guard=guard, consumer=guard, effect="note")
        )

    def kill_consumers(self) -> None:
        for members in self.consumers.values():
            for member in members:
                member.kill()

    def command(self, *arguments: str, dsn: str) -> str:
        """
        Run a command of `outbox-relay` as the login of *dsn*, and give what it printed.

        Raises:
            TryLater: It says so itself.
        """
        environment = {**os.environ, **self.pipeline.environment(database_url=dsn)}
        done = subprocess.run(
            outbox_relay(*arguments),
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_SECONDS,
        )
        if done.returncode == ExitCode.UNAVAILABLE:
            raise TryLater(done.stderr)
        assert done.returncode == 0, f"{arguments} ended with {done.returncode}: {done.stderr}"
        return done.stdout

    @property
    def keys(self) -> list[str]:
        """The keys of the load."""
        return [key_of(number) for number in range(PLAN.keys)]

    def committed(self, writes: Iterable[Write]) -> None:
        """Record messages that the nemesis has written."""
        self.writes += [replace(write, outcome=Outcome.COMMITTED, ended_at=time.monotonic()) for write in writes]

    @property
    def found_skipped(self) -> int:
        """How many messages relays have found that no mark had counted."""
        return sum(relay.found_skipped for relay in self.relays)

    @property
    def first_number(self) -> int:
        """The lowest number that is published and still in the table; behind all numbers if there is none."""
        with self.pipeline.database.connect() as connection:
            [(number,)] = connection.execute(SELECT_FIRST_PUBLISHED).fetchall()
        return int(number)

    def count(self, event: str) -> int:
        """How often relays have logged *event*."""
        return sum(relay.count(event) for relay in self.relays)

    def fail_if_one_ended(self) -> None:
        """Raise for a process that is gone although nobody ended it."""
        members = [member for members in self.consumers.values() for member in members]
        for process in [*(relay.running for relay in self.relays), *members]:
            assert not process.has_ended, f"nobody ended this process: {process.ending()}"

    def _group(self, guard: Guard) -> str:
        return f"{self.pipeline.topics[0]}.{guard}"


def pause(seconds: float) -> None:
    """Let the others work for so long."""
    Event().wait(seconds)


def comes_true(condition: Callable[[], object], *, seconds: float = SIGN_SECONDS) -> bool:
    """Whether *condition* comes true in time."""
    with suppress(TimeoutError):
        return bool(eventually(condition, timeout=seconds))
    return False


@contextmanager
def noticed(relays: Stage | Relay, event: str) -> Iterator[None]:
    """The fault has fired if *relays* log *event*, from the beginning of the body on; it is waited for at its end."""
    before = relays.count(event)
    yield
    if not comes_true(lambda: relays.count(event) > before):
        raise DidNotFire


@contextmanager
def staged(pipeline: Pipeline, *, inbox: Database) -> Iterator[Stage]:
    """Set the stage and start everything but the writers."""
    database = pipeline.database
    create_journal(inbox)
    with ExitStack() as stack:

        def network() -> TcpProxy:
            return stack.enter_context(TcpProxy(database.server.host, database.server.port))

        def dsn_of(group: LiteralString) -> str:
            return database.server.dsn(database.name, user=stack.enter_context(login(database, group=group)))

        writers_network = network()
        stage = Stage(
            pipeline=pipeline,
            server=database.server,
            kafka=pipeline.kafka,
            inbox=inbox,
            load=pipeline.load(PLAN, through=writers_network),
            writers_network=writers_network,
            operator_dsn=dsn_of("outbox_operator"),
            pruner_dsn=dsn_of("outbox_pruner"),
        )
        for _ in range(RELAYS):
            relay = Relay(pipeline, network=network())
            stack.callback(relay.kill)
            stage.relays.append(relay)
            relay.start()
        for guard in GUARDS:
            stage.consumers[guard] = [stage.start_consumer(guard) for _ in range(MEMBERS)]
        stack.callback(stage.kill_consumers)
        yield stage
