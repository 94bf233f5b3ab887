"""The relay as a real process, and what it takes of the machine."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.bench import AGGREGATE_TYPE
from outbox_relay.sandbox.ports import ReservedPort
from tests.fixtures.daemon import Daemon

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from benchmarks.topic import Topic
    from outbox_relay.sandbox.kafka import Kafka


class Relay(Daemon):
    """`outbox-relay run`, with its use of processor and memory as Linux accounts for it."""

    @property
    def port(self) -> int:
        """Where its metrics are."""
        return int(self._environment["OUTBOX_RELAY_METRICS_PORT"])

    def cpu_seconds(self) -> float:
        """Give the processor time of all its threads so far, from its clock as clock_getcpuclockid(3) names it."""
        return time.clock_gettime(~self.pid << 3 | 2)

    def peak_megabytes(self) -> float:
        """Give the most memory it has held. Not wait4's figure: that one counts the parent's before the exec."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM"))


@contextmanager
def running_relays(
    count: int = 1, *, dsn: str, kafka: Kafka, topic: Topic, settings: Mapping[str, str] | None = None
) -> Iterator[list[Relay]]:
    """
    Start relays and wait until each is ready; stop them in order afterwards.

    Raises:
        RuntimeError: One did not finish its batch in hand.
    """
    environment = {
        "OUTBOX_RELAY_DATABASE_URL": dsn,
        "OUTBOX_RELAY_KAFKA__BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
        "OUTBOX_RELAY_TOPIC_MAP": json.dumps({AGGREGATE_TYPE: topic.name}),
        "OUTBOX_RELAY_METRICS_HOST": "127.0.0.1",
        **(settings or {}),
    }
    ports = [ReservedPort() for _ in range(count)]
    with ExitStack() as running:
        relays = [
            running.enter_context(Relay({**environment, "OUTBOX_RELAY_METRICS_PORT": str(port.number)}))
            for port in ports
        ]
        for relay in relays:
            relay.wait_until_ready()
        yield relays
        for relay in relays:
            relay.terminate()
        codes = [relay.wait() for relay in relays]
        if any(codes):
            raise RuntimeError(f"the relays ended with exit codes {codes}")
