"""A relay in a process whose tracing is set up: its spans reach the exporter, and nothing else changes."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, cast

import pytest

from tests.fixtures import traced_relay
from tests.fixtures.daemon import Daemon
from tests.fixtures.outbox import insert
from tests.integration.test_publish import written

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fixtures.pipeline import Pipeline

pytestmark = pytest.mark.kafka

COMMAND = (sys.executable, "-m", traced_relay.__name__, "run")
TRACE = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "vendor=1"}


def test_spans_of_batches_are_exported_and_a_signal_still_drains(pipeline: Pipeline, tmp_path: Path) -> None:
    spans_file = tmp_path / "spans.jsonl"
    with pipeline.database.connect() as writer:
        insert(writer, "7", headers=TRACE)
    with Daemon(pipeline.environment() | {"SPANS_FILE": str(spans_file)}, command=COMMAND) as relay:
        assert relay.wait_for_event("relay_started")["is_traced"] is True
        pipeline.await_settled()
        relay.terminate()
        assert relay.wait() == 0
    [span] = [json.loads(line) for line in spans_file.read_text().splitlines()]
    [link] = span["links"]
    assert (span["name"], span["kind"], span["status"]) == (
        f"send {pipeline.topic('order')}",
        "SpanKind.CLIENT",
        {"status_code": "UNSET"},
    )
    assert (link["context"]["trace_id"], link["context"]["span_id"]) == (
        "0x0af7651916cd43dd8448eb211c80319c",
        "0xb7ad6b7169203331",
    )
    [record] = written(pipeline.kafka.bootstrap_servers, pipeline.topic("order"))
    headers = dict(cast("list[tuple[str, bytes]]", record.headers()))
    assert {name: headers[name].decode() for name in TRACE} == TRACE


def test_a_relay_whose_tracing_is_not_set_up_makes_no_spans(pipeline: Pipeline) -> None:
    with pipeline.relay() as relay:
        assert relay.wait_for_event("relay_started")["is_traced"] is False
