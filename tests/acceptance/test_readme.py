"""The README does what it says: its commands are the ones that exist, its snippets run, and what they write arrives."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from confluent_kafka import KafkaException

from tests.fixtures.daemon import outbox_relay

if TYPE_CHECKING:
    from outbox_relay.sandbox.kafka import Kafka
    from tests.fixtures.postgres import Database

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def snippets(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def shop(database: Database) -> Database:
    with database.connect(autocommit=True) as connection:
        connection.execute("CREATE TABLE orders (id bigint PRIMARY KEY, total numeric NOT NULL)")
    return database


def outbox(database: Database) -> list[tuple[str, str, str, object, bool]]:
    with database.connect() as connection:
        return connection.execute(
            "SELECT aggregate_type, aggregate_id, event_type, payload, state = 'published' FROM outbox_message"
            " ORDER BY sequence_no"
        ).fetchall()


def test_make_offers_the_commands_of_the_readme() -> None:
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    dry_run = subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S607
    assert (targets, dry_run.returncode) == (["demo", "test"], 0), dry_run.stderr


def test_the_sql_snippet_writes_a_message_in_the_transaction_of_the_order(shop: Database) -> None:
    with shop.connect(autocommit=True) as connection:
        connection.execute(snippets(README, "sql")[0].encode())
    assert outbox(shop) == [("order", "4711", "order_placed", {"total": 120}, False)]


def test_every_python_snippet_is_one_of_those_that_the_tests_of_the_pages_run() -> None:
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("writing.md", "consuming.md")]
    run = {snippet for page in pages for snippet in snippets(page, "python")}
    printed = snippets(README, "python")
    assert (len(printed), set(printed) - run) == (4, set())


@pytest.mark.kafka
def test_what_the_python_snippet_writes_is_published_by_the_commands_of_the_readme(
    shop: Database, kafka: Kafka
) -> None:
    subprocess.run(
        [sys.executable, "-c", snippets(README, "python")[0].replace("DATABASE_URL", repr(shop.dsn))], check=True
    )
    with suppress(KafkaException):  # the topic may be there from an earlier run on a broker that stays
        kafka.create_topic("order.events", partitions=1)
    commands = [line.split("#")[0].split() for line in snippets(README, "bash")[1].splitlines() if line]
    assert [command[:3] for command in commands if command[0] == "outbox-relay"] == [
        ["outbox-relay", "migrate", "apply"],
        ["outbox-relay", "run"],
        ["outbox-relay", "status"],
        ["outbox-relay", "doctor"],
    ]
    environment = os.environ | {
        "OUTBOX_RELAY_DATABASE_URL": shop.dsn,
        "OUTBOX_RELAY_KAFKA__BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
    }
    for command in (["run", "--once"], ["status"], ["doctor"]):
        subprocess.run(outbox_relay(*command), env=environment, check=True, timeout=60)
    assert outbox(shop) == [("order", "4712", "order_placed", {"total": 80}, True)]


def test_the_operations_page_names_commands_for_parked_messages_that_exist() -> None:
    commands = re.findall(r"^    outbox-relay (parked \S+)(.*)$", OPERATIONS, re.MULTILINE)
    assert {command for command, _ in commands} == {
        f"parked {name}" for name in ("list", "show", "edit", "release", "skip")
    }
    for command, arguments in commands:
        asked = outbox_relay(*command.split(), "--help")
        told = subprocess.run(asked, capture_output=True, text=True, check=True)
        assert [option for option in re.findall(r"--[a-z-]+", arguments) if option not in told.stdout] == []
