"""`outbox-relay health`, as the health check of a container calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from outbox_relay.sandbox.ports import ReservedPort
from tests.fixtures.daemon import AWAY, Daemon, outbox_relay

if TYPE_CHECKING:
    from collections.abc import Iterator

NOT_READY = ["database has not been reached yet", "kafka has not been reached yet"]


@pytest.fixture
def port() -> Iterator[int]:
    """The port of a relay that is alive, and whose database is away."""
    reserved = ReservedPort()
    with Daemon(AWAY | {"OUTBOX_RELAY_METRICS_PORT": str(reserved.number)}) as relay:
        relay.wait_for_event("database_lost")
        yield reserved.number


def health(port: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OUTBOX_RELAY_METRICS_PORT": str(port)}
    return subprocess.run(
        outbox_relay("health", *arguments), env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_relay_whose_database_is_away_is_alive_but_not_ready(port: int) -> None:
    alive, ready = health(port), health(port, "--ready")
    assert (alive.returncode, alive.stdout) == (0, "ok\n")
    assert (ready.returncode, ready.stdout.splitlines()) == (5, NOT_READY)


def test_json_has_the_reasons_as_a_list(port: int) -> None:
    assert json.loads(health(port, "--json").stdout) == {"is_healthy": True, "reasons": []}
    assert json.loads(health(port, "--ready", "--json").stdout) == {"is_healthy": False, "reasons": NOT_READY}


def test_nobody_to_ask_exits_with_4() -> None:
    port = ReservedPort().number
    asked = health(port)
    assert (asked.returncode, asked.stdout) == (4, "")
    assert asked.stderr.startswith(f"outbox-relay: no relay answers at 127.0.0.1:{port}: ")


def test_asking_loads_neither_the_settings_nor_a_driver() -> None:
    program = "import sys, outbox_relay.cli.health; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert {"confluent_kafka", "psycopg", "pydantic"} & set(loaded) == set()
