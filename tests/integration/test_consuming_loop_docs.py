"""docs/consuming-loop.md: its program and its dead letters do what the text says."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.fixtures.daemon import Daemon
from tests.fixtures.ledger import Desk, Ledger, numbered, publish, running

if TYPE_CHECKING:
    from outbox_relay.consumer import Message
    from outbox_relay.sandbox.kafka import Kafka
    from tests.fixtures.kafka import CreateTopic

pytestmark = pytest.mark.kafka

PAGE = (Path(__file__).parents[2] / "docs" / "consuming-loop.md").read_text(encoding="utf-8")
PROGRAM, DEAD_LETTERS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def desk(kafka: Kafka, ledger: Ledger, topic: CreateTopic) -> Desk:
    return Desk(kafka, ledger, topic("deposits"))


def test_the_program_consumes_once_and_ends_in_order(desk: Desk, tmp_path: Path) -> None:
    with desk.ledger.database.connect() as connection:
        connection.execute("ALTER TABLE account RENAME COLUMN key TO id")
        connection.execute("INSERT INTO account VALUES ('key-0', 0)")
    messages = numbered(10, keys=1)
    publish(desk.kafka, desk.topic, [*messages, *messages])
    settings = f"KAFKA = {desk.kafka.bootstrap_servers!r}\nDATABASE = {desk.ledger.dsn!r}\n"
    program = tmp_path / "billing.py"
    program.write_text(settings + PROGRAM.replace("order.events", desk.topic), encoding="utf-8")
    with Daemon({}, command=[sys.executable, str(program)]) as billing:
        desk.await_consumed(20, group="billing")
        billing.terminate()
        assert billing.wait() == 0
    with desk.ledger.database.connect() as connection:
        assert connection.execute("SELECT * FROM account").fetchall() == [("key-0", 10)]


def test_dead_letters_are_written(desk: Desk) -> None:
    with desk.ledger.database.connect() as connection:
        connection.execute(
            "CREATE TABLE dead_letter (topic text, partition int, record_offset bigint, value bytea, error text)"
        )
        connection.execute("GRANT INSERT ON dead_letter TO public")
    names: dict[str, Any] = {}
    exec(DEAD_LETTERS, names)  # noqa: S102 -- our own page
    publish(desk.kafka, desk.topic, numbered(1))

    def refuse(_connection: object, messages: list[Message]) -> None:
        raise ArithmeticError(messages[0].key)

    with running(desk.consumer(handle=refuse, on_poison=names["put_aside"])):
        desk.await_consumed(1)
    with desk.ledger.database.connect() as connection:
        letters = connection.execute("SELECT * FROM dead_letter").fetchall()
    assert letters == [(desk.topic, 0, 0, b'{"total": 1.50}', "ArithmeticError('key-1')")]
