"""The span of a batch: what it is called, what it says, and which traces it is linked to."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from outbox_relay.config.kafka import DEFAULTS
from outbox_relay.errors import KafkaUnavailable
from outbox_relay.relay.message import Record
from outbox_relay.relay.tracing import TracedPublisher
from outbox_relay.sandbox.ports import ReservedPort
from tests.integration.test_publish import send

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opentelemetry.sdk.trace import ReadableSpan

    from outbox_relay.sandbox.mock_cluster import MockCluster

BATCH = {"messaging.system": "kafka", "messaging.operation.name": "send", "messaging.operation.type": "send"}


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], ReadableSpan]]:
    """Give the one span that was made; spans of this test go into memory."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)

    def only_span() -> ReadableSpan:
        [span] = exporter.get_finished_spans()
        return span

    yield only_span
    provider.shutdown()


@pytest.fixture
def publisher(mock_cluster: MockCluster) -> Iterator[TracedPublisher]:
    for topic in ("orders", "baskets"):
        mock_cluster.create_topic(topic)
    publisher = TracedPublisher(
        lambda: {**DEFAULTS, "bootstrap.servers": mock_cluster.bootstrap_servers, "log_level": 0}
    )
    yield publisher
    publisher.close()


def traceparent(number: int) -> str:
    return f"00-{number:032x}-{number:016x}-01"


def record(number: int | None = None, *, topic: str = "orders", value: str = "{}", **headers: str) -> Record:
    """A record that was written in the span *number*."""
    trace_headers = {} if number is None else {"traceparent": traceparent(number)}
    return Record(topic, "4711", value, [("id", "1"), *(trace_headers | headers).items()], 1)


def linked(span: ReadableSpan) -> list[tuple[int, int]]:
    return [(link.context.trace_id, link.context.span_id) for link in span.links]


def test_a_batch_is_one_span_that_names_its_topic_and_links_to_each_trace_once(
    publisher: TracedPublisher, finished: Callable[[], ReadableSpan]
) -> None:
    records = [record(1), record(2, tracestate="vendor=1"), record(1), record(), record(traceparent="00-none-01")]
    assert send(publisher, records) == [None] * 5
    span = finished()
    assert (span.name, span.kind, span.status.status_code) == ("send orders", SpanKind.CLIENT, StatusCode.UNSET)
    assert span.attributes == BATCH | {"messaging.batch.message_count": 5, "messaging.destination.name": "orders"}
    assert linked(span) == [(1, 1), (2, 2)]
    assert [link.context.trace_state.to_header() for link in span.links] == ["", "vendor=1"]


def test_a_batch_for_several_topics_names_none(
    publisher: TracedPublisher, finished: Callable[[], ReadableSpan]
) -> None:
    assert send(publisher, [record(), record(topic="baskets")]) == [None] * 2
    assert finished().name == "send"
    assert finished().attributes == BATCH | {"messaging.batch.message_count": 2}


def test_a_span_links_to_its_first_traces_only(
    publisher: TracedPublisher, finished: Callable[[], ReadableSpan]
) -> None:
    assert send(publisher, [record(number) for number in range(1, 200)]) == [None] * 199
    assert linked(finished()) == [(number, number) for number in range(1, 129)]


def test_what_is_active_around_a_batch_is_its_parent_and_no_link(
    publisher: TracedPublisher, finished: Callable[[], ReadableSpan]
) -> None:
    around = trace.NonRecordingSpan(trace.SpanContext(7, 7, is_remote=False, trace_flags=trace.TraceFlags(1)))
    with trace.use_span(around):
        send(publisher, [record()])
    assert finished().parent == around.get_span_context()
    assert linked(finished()) == []


def test_a_batch_that_is_not_acknowledged_as_a_whole_is_an_error(
    publisher: TracedPublisher, finished: Callable[[], ReadableSpan]
) -> None:
    [acknowledged, refused] = send(publisher, [record(), record(value="x" * 2_000_000)])
    assert (acknowledged, refused and refused.code) == (None, "MSG_SIZE_TOO_LARGE")
    assert (finished().attributes or {})["error.type"] == "MSG_SIZE_TOO_LARGE"
    assert finished().status.status_code is StatusCode.ERROR
    assert finished().status.description == "1 of 2 messages were not acknowledged"


def test_a_batch_that_no_broker_takes_is_an_error(finished: Callable[[], ReadableSpan]) -> None:
    port = ReservedPort()
    publisher = TracedPublisher(lambda: {**DEFAULTS, "bootstrap.servers": f"127.0.0.1:{port.number}", "log_level": 0})
    with pytest.raises(KafkaUnavailable):
        send(publisher, [record()], seconds=0.1)
    publisher.close()
    assert finished().status.status_code is StatusCode.ERROR
    assert "KafkaUnavailable" in str(finished().status.description)


WITHOUT_OPENTELEMETRY = """
import sys
sys.modules["opentelemetry"] = None  # as if it were not installed
from outbox_relay.cli.run import choose_publisher
from outbox_relay.relay.publish import Publisher
assert choose_publisher() is Publisher
"""

NOT_SET_UP = """
from outbox_relay.cli.run import choose_publisher
from outbox_relay.relay.publish import Publisher
assert choose_publisher() is Publisher
"""

SET_UP = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
trace.set_tracer_provider(TracerProvider())
from outbox_relay.cli.run import choose_publisher
from outbox_relay.relay.tracing import TracedPublisher
assert choose_publisher() is TracedPublisher
"""


@pytest.mark.parametrize("program", [WITHOUT_OPENTELEMETRY, NOT_SET_UP, SET_UP])
def test_only_a_process_that_is_set_up_for_tracing_makes_spans(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True)
