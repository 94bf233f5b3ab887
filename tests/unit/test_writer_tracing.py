"""A message carries the trace of the span in which it is written; without OpenTelemetry nothing is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState, use_span

from outbox_relay.writer import Message
from outbox_relay.writer.rows import MAX_MESSAGE_BYTES, Pending, encode

if TYPE_CHECKING:
    from collections.abc import Mapping

SPAN = NonRecordingSpan(
    SpanContext(
        trace_id=0xA1B2,
        span_id=0xC3,
        is_remote=False,
        trace_flags=TraceFlags(1),
        trace_state=TraceState([("vendor", "1")]),
    )
)
TRACE = {"traceparent": f"00-{0xA1B2:032x}-{0xC3:016x}-01", "tracestate": "vendor=1"}


def placed(headers: Mapping[str, str] | None = None) -> Message:
    return Message(aggregate_type="order", aggregate_id="4711", event_type="placed", headers=headers or {})


def headers_of(*messages: Message) -> list[dict[str, str]]:
    return [json.loads(row.headers) for row in encode(messages, max_message_bytes=MAX_MESSAGE_BYTES)]


def test_messages_of_an_active_span_carry_its_trace_beside_their_own_headers() -> None:
    with use_span(SPAN):
        assert headers_of(placed(), placed({"tenant": "t1"})) == [TRACE, {"tenant": "t1"} | TRACE]


def test_a_span_of_the_sdk_is_found_as_well() -> None:
    with TracerProvider(shutdown_on_exit=False).get_tracer("shop").start_as_current_span("place order") as span:
        context = span.get_span_context()
        traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        assert headers_of(placed()) == [{"traceparent": traceparent}]


def test_without_a_span_nothing_is_added() -> None:
    assert headers_of(placed(), placed({"tenant": "t1"})) == [{}, {"tenant": "t1"}]


@pytest.mark.parametrize("own", [{"traceparent": "00-mine"}, {"tracestate": "mine=1"}])
def test_a_trace_of_its_own_is_neither_overwritten_nor_mixed(own: Mapping[str, str]) -> None:
    with use_span(SPAN):
        assert headers_of(placed(own)) == [own]


def test_a_deferred_message_belongs_to_the_span_in_which_it_was_written() -> None:
    pending = Pending(max_message_bytes=MAX_MESSAGE_BYTES)
    with use_span(SPAN):
        pending.write(placed())
    assert [json.loads(row.headers) for row in pending.end()] == [TRACE]


WITHOUT_OPENTELEMETRY = """
import sys
sys.modules["opentelemetry"] = None  # as if it were not installed
from outbox_relay.writer.tracing import trace_headers
assert trace_headers() == {}, trace_headers()
"""

ONLY_PSYCOPG = """
import sys
import outbox_relay.writer
optional = {"opentelemetry", "sqlalchemy", "django", "confluent_kafka", "click", "structlog", "pydantic"}
assert not optional & sys.modules.keys(), optional & sys.modules.keys()
"""


@pytest.mark.parametrize("program", [WITHOUT_OPENTELEMETRY, ONLY_PSYCOPG])
def test_a_writer_needs_nothing_but_psycopg(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True)
