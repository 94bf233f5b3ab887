"""The relay as a real process, and what it takes of the machine."""

from __future__ import annotations

import json
import re
import urllib.request
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from benchmarks.bench import AGGREGATE_TYPE
from benchmarks.usage import process_seconds
from outbox_relay.sandbox.ports import ReservedPort
from tests.fixtures.daemon import Daemon

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from benchmarks.bench import Bench
    from benchmarks.topic import Topic


class Relay(Daemon):
    """`outbox-relay run`, with its use of processor and memory as Linux accounts for it."""

    def cpu_seconds(self) -> float:
        """Return the processor time of all its threads so far."""
        return process_seconds(self.pid)

    def peak_megabytes(self) -> float:
        """Return the most memory it has held. Not wait4's figure: that one counts the parent's before the exec."""
        return self.peak_memory_bytes / 1e6

    def metrics(self) -> dict[str, float]:
        """Return the sums of its metrics over their labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics") as answer:
            text = answer.read().decode()
        sums: dict[str, float] = {}
        for name, value in re.findall(r"^(\w+)(?:{.*})? (\S+)$", text, re.MULTILINE):
            sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    @property
    def _port(self) -> int:
        return int(self._environment["OUTBOX_RELAY_METRICS_PORT"])


@contextmanager
def running_relays(
    bench: Bench, *, dsn: str, topic: Topic, count: int = 1, settings: Mapping[str, str] | None = None
) -> Iterator[list[Relay]]:
    """
    Start relays of the installation that is measured and wait until each is ready; stop them in order afterwards.

    Raises:
        RuntimeError: One did not finish its stint in hand.
    """
    environment = {
        "OUTBOX_RELAY_DATABASE_URL": dsn,
        "OUTBOX_RELAY_KAFKA__BOOTSTRAP_SERVERS": bench.kafka.bootstrap_servers,
        "OUTBOX_RELAY_TOPIC_MAP": json.dumps({AGGREGATE_TYPE: topic.name}),
        "OUTBOX_RELAY_METRICS_HOST": "127.0.0.1",
        **(settings or {}),
    }
    command = bench.installation.command("run")
    ports = [ReservedPort() for _ in range(count)]
    with ExitStack() as running:
        relays = [
            running.enter_context(
                Relay({**environment, "OUTBOX_RELAY_METRICS_PORT": str(port.number)}, command=command)
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
