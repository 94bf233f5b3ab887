"""What a line of log looks like, whoever wrote it."""

from __future__ import annotations

import json
import logging
import re
from typing import TYPE_CHECKING

import pytest
import structlog

from outbox_relay.observe.logs import OncePerMinute, configure

if TYPE_CHECKING:
    from collections.abc import Iterator

TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()  # or configure() would close those of the test runner
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def json_lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [json.loads(line) for line in captured.err.splitlines()]
    for line in lines:
        assert TIMESTAMP.fullmatch(line.pop("timestamp"))
    return lines


def test_an_event_is_a_json_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    configure(log_format="auto", level="info")

    structlog.get_logger("outbox_relay").info("batch_published", rows=3)

    assert json_lines(capsys) == [
        {"event": "batch_published", "rows": 3, "level": "info", "logger": "outbox_relay"},
    ]


def test_lines_of_the_standard_library_and_librdkafka_look_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    configure(log_format="json", level="info")

    logging.getLogger("librdkafka").warning("FAIL [%s] %s", "producer-1", "connect refused")

    assert json_lines(capsys) == [
        {"event": "FAIL [producer-1] connect refused", "level": "warning", "logger": "librdkafka"},
    ]


def test_lines_below_the_level_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    configure(log_format="json", level="warning")

    structlog.get_logger("outbox_relay").info("batch_published")
    logging.getLogger("librdkafka").info("noise")

    assert json_lines(capsys) == []


def test_an_exception_is_part_of_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure(log_format="json", level="info")

    try:
        int("seven")
    except ValueError:
        structlog.get_logger("outbox_relay").exception("lane_failed")

    [line] = json_lines(capsys)
    assert line["event"] == "lane_failed"
    assert str(line["exception"]).splitlines()[-1] == "ValueError: invalid literal for int() with base 10: 'seven'"


def test_secrets_are_taken_out_of_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure(log_format="json", level="info", secrets={'hunter"2', "", 'postgresql://u:hunter"2@h'})

    logging.getLogger("psycopg").warning('cannot connect to postgresql://u:hunter"2@h with hunter"2')

    assert json_lines(capsys) == [
        {"event": "cannot connect to ******** with ********", "level": "warning", "logger": "psycopg"},
    ]


def test_a_terminal_gets_lines_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    configure(log_format="console", level="info", secrets={"hunter2"})

    structlog.get_logger("outbox_relay").info("batch_published", rows=3, user="hunter2")

    line = capsys.readouterr().err
    assert re.fullmatch(r"\S+Z \[info *\] batch_published +\[outbox_relay\] rows=3 user=\*{8}\n", line), line


def test_configuring_again_replaces_what_was_configured(capsys: pytest.CaptureFixture[str]) -> None:
    configure(log_format="console", level="error")
    configure(log_format="json", level="info")

    structlog.get_logger("outbox_relay").info("relay_started")

    assert json_lines(capsys) == [{"event": "relay_started", "level": "info", "logger": "outbox_relay"}]


def test_the_same_words_of_librdkafka_pass_once_a_minute() -> None:
    once = OncePerMinute()

    def passes(text: str, *, at: float) -> bool:
        record = logging.LogRecord("librdkafka", logging.ERROR, "", 0, text, None, None)
        record.created = at
        return bool(once.filter(record))

    refused = (
        "FAIL [outbox-relay#producer-{}] [thrd:a:9092/1]: a:9092/1: Connection refused (after {}ms in state CONNECT)"
    )
    assert passes(refused.format(2, 0), at=1000.0)
    assert not passes(refused.format(3, "0ms, 1 identical error(s) suppressed, 17"), at=1059.0)
    assert passes("FAIL [outbox-relay#producer-2] [thrd:a:9092/1]: a:9092/1: SASL authentication error", at=1059.0)
    assert passes(refused.format(3, 17), at=1060.0)
