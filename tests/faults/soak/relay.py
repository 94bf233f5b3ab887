"""A place for a relay: processes come and go in it, behind a network of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from psycopg.conninfo import make_conninfo

if TYPE_CHECKING:
    import signal

    from tests.fixtures.daemon import Daemon, Event
    from tests.fixtures.pipeline import Pipeline
    from tests.fixtures.proxy import TcpProxy

DEADLINE_SECONDS = 3
TRANSACTION_SECONDS = 5
STATEMENT_SECONDS = 5
LANES = 2
BATCH_SIZE = 200
SETTINGS: dict[str, str | float] = {
    "lanes": LANES,
    "batch_size": BATCH_SIZE,
    "publish_deadline": DEADLINE_SECONDS,
    "kafka__message_timeout_ms": 4000,
    "transaction_timeout": TRANSACTION_SECONDS,
    "statement_timeout": STATEMENT_SECONDS,
    "lock_timeout": 1,
    "ordering_timeout": 2,
    "retention": 0,  # an operator prunes
}
END_SECONDS = 30.0


class Relay:
    """The nemesis ends and starts its processes; whatever else ends one is a flaw."""

    def __init__(self, pipeline: Pipeline, *, network: TcpProxy) -> None:
        self.network = network
        self._pipeline = pipeline
        self._daemons: list[Daemon] = []

    @property
    def running(self) -> Daemon:
        """The newest process."""
        return self._daemons[-1]

    @property
    def log(self) -> list[Event]:
        """What its processes have logged."""
        return [event for daemon in self._daemons for event in list(daemon.events)]

    def start(self, **settings: str | float) -> None:
        """Start a process; it waits for PostgreSQL and Kafka by itself."""
        dsn = make_conninfo(self._pipeline.database.relay_dsn, host="127.0.0.1", port=self.network.port)
        self._daemons.append(self._pipeline.relay(database_url=dsn, **(SETTINGS | settings)))

    def await_start(self) -> None:
        self.running.wait_for_event("relay_started")

    def signal(self, number: signal.Signals) -> None:
        self.running.signal(number)

    def await_end(self) -> int:
        """Wait until the process has ended, and give its exit code."""
        return self.running.wait(timeout=END_SECONDS)

    def count(self, event: str) -> int:
        """How often its processes have logged *event*."""
        return sum(len(daemon.events_named(event)) for daemon in self._daemons)

    @property
    def found_skipped(self) -> int:
        """How many messages its processes have found that no mark had counted."""
        return sum(int(str(event["messages"])) for event in self.log if event.get("event") == "skipped_messages_found")

    def kill(self) -> None:
        """End whatever still runs."""
        for daemon in self._daemons:
            daemon.kill()
