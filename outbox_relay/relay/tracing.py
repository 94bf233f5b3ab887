"""A span for each batch that is sent, linked to the traces of its messages; imported where OpenTelemetry is there."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, ProxyTracerProvider, SpanKind, StatusCode

from outbox_relay import __version__
from outbox_relay.relay.publish import Publisher

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from opentelemetry.trace import Span

    from outbox_relay.relay.failures import Outcome
    from outbox_relay.relay.message import Record

_MOST_LINKS = 128  # the SDK keeps as many by default


def is_set_up() -> bool:
    """Tell whether anybody takes the spans of this process."""
    return not isinstance(trace.get_tracer_provider(), ProxyTracerProvider)


class TracedPublisher(Publisher):
    """
    Makes a span of each batch.

    Names are those of https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/. The span's own context
    goes nowhere, messages keep the one they were written in, and so its kind is CLIENT: PRODUCER is for spans that
    consumers continue.
    """

    def publish(self, records: Sequence[Record], *, deadline: float) -> list[Outcome]:
        """Send *records* as a `Publisher` does."""
        with _span(records) as span:
            outcomes = super().publish(records, deadline=deadline)
            failures = [outcome for outcome in outcomes if outcome is not None]
            if failures:
                span.set_attribute("error.type", failures[0].code)
                span.set_status(StatusCode.ERROR, f"{len(failures)} of {len(outcomes)} messages were not acknowledged")
        return outcomes


def _span(records: Sequence[Record]) -> AbstractContextManager[Span]:
    attributes: dict[str, str | int] = {
        "messaging.system": "kafka",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.batch.message_count": len(records),
    }
    name = "send"
    topics = {record.topic for record in records}
    if len(topics) == 1:
        [topic] = topics
        attributes["messaging.destination.name"] = topic
        name = f"send {topic}"
    tracer = trace.get_tracer("outbox_relay", __version__)
    return tracer.start_as_current_span(name, kind=SpanKind.CLIENT, attributes=attributes, links=_links(records))


def _links(records: Sequence[Record]) -> list[Link]:
    """Give a link to each place where the first messages were written, as far as their headers tell."""
    fields = propagate.get_global_textmap().fields
    carriers = dict.fromkeys(tuple(header for header in record.headers if header[0] in fields) for record in records)
    contexts = [propagate.extract(dict(carrier), Context()) for carrier in islice(carriers, _MOST_LINKS)]
    origins = [trace.get_current_span(context).get_span_context() for context in contexts]
    return [Link(origin) for origin in origins if origin.is_valid]
