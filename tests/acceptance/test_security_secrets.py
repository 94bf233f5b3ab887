"""No command shows a secret: not when it works, not when it fails, and not when the secret itself is malformed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay.sandbox.ports import ReservedPort
from tests.fixtures.daemon import outbox_relay
from tests.fixtures.load import commit_messages
from tests.fixtures.probes import ask

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.fixtures.pipeline import Pipeline

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

WORDS = ["sesame", "hunter2"]  # in the database's password, and in Kafka's

COMMANDS = [
    "run --once",
    "migrate apply",
    "migrate status",
    "status",
    "doctor",
    "parked list",
    "prune --older-than 1d --yes",
    "replay --all --dry-run",
    "config show",
    "config show --json",
]

AWAY = {"database_url": "postgresql://u:sesame@127.0.0.1:1/shop", "kafka__sasl_password": "hunter2"}
# What a slip makes of them: each is refused, or fails later.
SLIPS = {
    "nobody answers": {},
    "no URL": {"database_url": "postgres//u:sesame@h/d"},
    "a port that is none": {"database_url": "postgresql://u:p@h:sesame/d"},
    "an unknown parameter": {"database_url": "host=127.0.0.1 port=1 pasword=sesame"},
    "a password in two": {"database_url": "host=127.0.0.1 port=1 password=open sesame"},
    "an unknown property": {"kafka__sasl_pasword": "hunter2"},
    "a list of properties": {"kafka": "sasl.password=hunter2"},
    "a key that is none": {"kafka__ssl_key_pem": "hunter2", "kafka__security_protocol": "ssl"},
}


def shown(words: str) -> list[str]:
    return [word for word in WORDS if word in words]


def output_of(command: str, settings: Mapping[str, str]) -> str:
    variables = {f"OUTBOX_RELAY_{name.upper()}": value for name, value in settings.items()}
    finished = subprocess.run(
        outbox_relay(*command.split()),
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=60,
        check=False,
    )
    return finished.stdout


@pytest.mark.parametrize("slip", SLIPS)
def test_no_command_shows_a_secret_with(slip: str) -> None:
    settings = {"kafka__bootstrap_servers": "127.0.0.1:1", "publish_deadline": "1", "log_level": "debug"}
    settings |= AWAY | SLIPS[slip]

    said = {command: output_of(command, settings) for command in COMMANDS}

    assert all(said.values())
    assert {command: shown(words) for command, words in said.items() if shown(words)} == {}


def test_a_running_relay_shows_no_secret_at_its_most_talkative(pipeline: Pipeline) -> None:
    port = ReservedPort()
    secrets = {
        "database_url": make_conninfo(pipeline.database.relay_dsn, password="sesame"),  # noqa: S106 -- looked for below
        "kafka__sasl_password": "hunter2",
        "kafka__ssl_key_password": "hunter2",
    }
    talk: dict[str, str | float] = {
        "log_level": "debug",
        "kafka__debug": "security,broker,conf",
        "metrics_port": port.number,
    }
    with pipeline.relay(**secrets, **talk) as relay, pipeline.database.connect() as writer:
        relay.wait_until_ready()
        commit_messages(writer, "order-1")
        pipeline.await_settled()
        answers = [ask(port.number, path) for path in ("/metrics", "/livez", "/readyz")]
        arguments = Path(f"/proc/{relay.pid}/cmdline").read_text()
        relay.terminate()
        assert relay.wait() == 0

    assert "sasl.password" in str(relay.events)
    assert shown(f"{relay.events}{relay.other_lines}{answers}{arguments}") == []
