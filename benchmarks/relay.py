"""The relay as a real process, and what it takes of the machine."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.bench import AGGREGATE_TYPE
from outbox_relay.sandbox.ports import ReservedPort
from tests.fixtures.daemon import Daemon

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.topic import Topic
    from outbox_relay.sandbox.kafka import Kafka

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_USER_TICKS, _SYSTEM_TICKS = 11, 12  # in /proc/<pid>/stat behind the command's name


class Relay(Daemon):
    """`outbox-relay run`, with its use of processor and memory as Linux accounts for it."""

    def cpu_seconds(self) -> float:
        """Give the processor time of all its threads so far, to 10 ms."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[_USER_TICKS]) + int(fields[_SYSTEM_TICKS])) / _TICKS_PER_SECOND

    def peak_megabytes(self) -> float:
        """Give the most memory it has held. Not wait4's figure: that one counts the parent's before the exec."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM"))


@contextmanager
def running_relays(
    count: int = 1, *, dsn: str, kafka: Kafka, topic: Topic, settings: dict[str, str] | None = None
) -> Iterator[list[Relay]]:
    """
    Start relays and wait until each is ready; stop them in order afterwards.

    Raises:
        RuntimeError: One did not finish its batch in hand.
    """
    with ExitStack() as running:
        ports = [ReservedPort() for _ in range(count)]
        relays = [
            running.enter_context(
                Relay(
                    {
                        "OUTBOX_RELAY_DATABASE_URL": dsn,
                        "OUTBOX_RELAY_KAFKA__BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
                        "OUTBOX_RELAY_TOPIC_MAP": json.dumps({AGGREGATE_TYPE: topic.name}),
                        "OUTBOX_RELAY_METRICS_HOST": "127.0.0.1",
                        "OUTBOX_RELAY_METRICS_PORT": str(port.number),
                        **(settings or {}),
                    }
                )
            )
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
