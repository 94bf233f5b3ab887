"""What a Consumer refuses before it speaks to anybody, and what importing the consumer's side needs."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import confluent_kafka
import psycopg
import pytest

from outbox_relay.consumer import Inbox
from outbox_relay.consumer.kafka import Consumer
from outbox_relay.consumer.kafka.reader import OLDEST_VERSION, checked
from outbox_relay.errors import ConfigurationError


def consumer(**config: object) -> Consumer:
    given = {name.replace("_", "."): value for name, value in config.items()}
    return Consumer(given, ["order.events"], connect=psycopg.connect, inbox=Inbox("billing"), handle=lambda *_: None)


@pytest.mark.parametrize("config", [{}, {"group_id": ""}])
def test_a_group_must_be_named(config: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=r"^group\.id is not set"):
        consumer(**config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enable.auto.commit", True),
        ("enable.auto.commit", "true"),
        ("enable.auto.offset.store", "yes"),
        ("enable.partition.eof", False),
    ],
)
def test_what_would_lose_messages_is_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name} = .* is refused: .*; remove it$"):
        checked({"group.id": "billing", name: value})


def test_a_librdkafka_that_passes_over_messages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, number in [("2.13.1", 0x020D01FF), ("1.9.2", 0x010902FF)]:
        monkeypatch.setattr(confluent_kafka, "libversion", lambda given=(text, number): given)
        with pytest.raises(ConfigurationError, match=rf"^librdkafka {text} can pass over messages: pip install"):
            checked({"group.id": "billing"})
    monkeypatch.setattr(confluent_kafka, "libversion", lambda: ("2.13.2", 0x020D02FF))
    assert checked({"group.id": "billing"})


def test_the_oldest_librdkafka_is_the_one_that_is_installed_with_the_extra() -> None:
    checkout = Path(__file__).parents[2]
    extras = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["kafka"] == ["confluent-kafka>=" + ".".join(map(str, OLDEST_VERSION))]


def test_the_same_values_as_ours_are_taken_and_the_beginning_is_where_a_new_group_begins() -> None:
    completed = checked({"group.id": "billing", "enable.auto.commit": "false", "enable.partition.eof": 1})
    completed.pop("logger")
    assert completed == {
        "group.id": "billing",
        "auto.offset.reset": "earliest",
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "enable.partition.eof": True,
    }


def test_where_a_new_group_begins_is_the_users_choice() -> None:
    assert checked({"group.id": "billing", "auto.offset.reset": "latest"})["auto.offset.reset"] == "latest"


def test_only_the_loop_imports_confluent_kafka() -> None:
    program = "import sys, outbox_relay.consumer; sys.exit('confluent_kafka' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_loop_imports_nothing_of_the_daemon() -> None:
    daemon = ["click", "structlog", "prometheus_client", "pydantic", "outbox_relay.relay", "outbox_relay.config"]
    program = f"import sys, outbox_relay.consumer.kafka; sys.exit(str([n for n in {daemon} if n in sys.modules]))"
    ran = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert ran.stderr == "[]\n"
