"""A message as a CloudEvent: its attributes, and what none can be; the official SDK judges elsewhere."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from outbox_relay.errors import ConfigurationError
from outbox_relay.relay.failures import Unpublishable
from outbox_relay.relay.message import Addressing
from tests.fixtures.outbox import PLAIN

if TYPE_CHECKING:
    from collections.abc import Mapping

    from outbox_relay.relay.envelope import Header
    from outbox_relay.relay.message import Message

TOPIC = "order.events"
NATIVE = Addressing(source="shop.public")
CLOUDEVENTS = Addressing(source="shop.public", envelope="cloudevents")
ATTRIBUTES: list[Header] = [
    ("ce_specversion", "1.0"),
    ("ce_id", "8c4f0b0e-5d1c-4e64-9f0b-5f1d0d3f7a11"),
    ("ce_source", "shop.public"),
    ("ce_type", "placed"),
    ("ce_subject", "4711"),
    ("ce_time", "2023-11-14T22:13:20.123Z"),
    ("ce_aggregatetype", "order"),
    ("ce_sequence", "0000000000000000001"),
]
CONTENT_TYPE: Header = ("content-type", "application/json")


def with_headers(own: Mapping[str, object]) -> Message:
    return PLAIN._replace(headers=json.dumps(own))


def reason(message: Message) -> str:
    """Why *message* cannot be published as a CloudEvent."""
    with pytest.raises(Unpublishable) as refused:
        CLOUDEVENTS.record(message, topic=TOPIC)
    return str(refused.value)


def test_only_the_headers_differ_between_the_envelopes() -> None:
    record = CLOUDEVENTS.record(PLAIN, topic=TOPIC)
    assert record.headers == [*ATTRIBUTES, CONTENT_TYPE]
    assert record._replace(headers=[]) == NATIVE.record(PLAIN, topic=TOPIC)._replace(headers=[])


@pytest.mark.parametrize(
    ("changes", "content_type"),
    [
        ({"payload": None}, []),
        ({"payload": None, "payload_bytes": b"\xff"}, [("content-type", "application/octet-stream")]),
        ({"headers": '{"content-type": "text/plain; charset=utf-8"}'}, [("content-type", "text/plain; charset=utf-8")]),
    ],
    ids=["tombstone", "bytes", "content type of its own"],
)
def test_the_content_type_is_that_of_the_payload(changes: Mapping[str, object], content_type: list[Header]) -> None:
    message = PLAIN._replace(**changes)  # type: ignore[arg-type]  # one of several by name
    assert CLOUDEVENTS.record(message, topic=TOPIC).headers == [*ATTRIBUTES, *content_type]


@pytest.mark.parametrize(
    ("time_ms", "time"),
    [
        (1, "1970-01-01T00:00:00.001Z"),
        (1_700_000_000_000, "2023-11-14T22:13:20.000Z"),
        (253_402_300_799_999, "9999-12-31T23:59:59.999Z"),
    ],
)
def test_the_time_is_exact_to_the_millisecond(time_ms: int, time: str) -> None:
    headers = CLOUDEVENTS.record(PLAIN._replace(created_at_ms=time_ms), topic=TOPIC).headers
    assert dict(headers)["ce_time"] == time


def test_sequences_are_in_the_same_order_as_text_and_as_numbers() -> None:
    numbers = [1, 9, 10, 4711, 2**63 - 1]
    records = [CLOUDEVENTS.record(PLAIN._replace(sequence_no=number), topic=TOPIC) for number in numbers]
    texts = [str(dict(record.headers)["ce_sequence"]) for record in records]
    assert texts == sorted(texts)
    assert [int(text) for text in texts] == numbers


@pytest.mark.parametrize(
    ("addressing", "added"),
    [
        (Addressing(source="shop.public", replay="june"), ("replay", "june")),
        (Addressing(source="shop.public", envelope="cloudevents", replay="june"), ("ce_replay", "june")),
    ],
    ids=["a replay", "a replay as an event"],
)
def test_a_replayed_message_says_so_before_its_own_headers(addressing: Addressing, added: Header) -> None:
    record = addressing.record(with_headers({"tenant": "a"}), topic=TOPIC)
    assert record.headers[-2:] == [added, ("tenant", "a")]


@pytest.mark.parametrize(
    "own", [{"ce_tenant": "größe ✓"}, {"ce_dataschema": "urn:order:1"}, {"tenant": "\n"}, {"traceparent": "00-ab"}]
)
def test_own_headers_go_out_as_they_are_and_so_become_attributes(own: Mapping[str, str]) -> None:
    assert CLOUDEVENTS.record(with_headers(own), topic=TOPIC).headers == [*ATTRIBUTES, CONTENT_TYPE, *own.items()]


NOT_AN_ATTRIBUTE = "is no attribute of a CloudEvent: after ce_ come a-z and 0-9, and not data"
NOT_A_TEXT = "an attribute of a CloudEvent has no control character, nor is it empty"
NOT_A_TYPE = (
    "the content-type of a CloudEvent is a media type such as text/plain, and not application/cloudevents, because"
    " the headers are the event"
)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        *(({name: "x"}, f'header "{name}" {NOT_AN_ATTRIBUTE}') for name in ("ce_", "ce_Tenant", "CE_tenant", "ce_a_b")),
        *(({name: "x"}, f'header "{name}" {NOT_AN_ATTRIBUTE}') for name in ("ce_data", "ce_datacontenttype")),
        *(
            ({"ce_a": text}, f'header "ce_a" is {text!r}: {NOT_A_TEXT}')
            for text in ("", "\t", "\x7f", "\x9f", "\ufdd0")
        ),
        ({"ce_a": "a" * 200 + "\n"}, f'header "ce_a" is \'{"a" * 99}: {NOT_A_TEXT}'),
        ({"ce_id": "x"}, 'header "ce_id" is set by the relay: choose another name'),
        *(
            ({"content-type": text}, f'header "content-type" is {text!r}: {NOT_A_TYPE}')
            for text in ("", "json", "application/cloudevents+json", "Application/CloudEvents-batch+json")
        ),
        ({"Content-Type": "text/plain"}, f"header \"Content-Type\" is 'text/plain': {NOT_A_TYPE}"),
    ],
)
def test_an_own_header_that_would_spoil_the_event_is_refused(own: Mapping[str, str], expected: str) -> None:
    assert reason(with_headers(own)) == expected


def test_the_native_envelope_takes_other_headers_in_ce() -> None:
    own = {"ce_Tenant": "\n", "Content-Type": "json"}
    assert NATIVE.record(with_headers(own), topic=TOPIC).headers[-2:] == [*own.items()]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (PLAIN._replace(event_type=""), f"event_type is '': {NOT_A_TEXT}"),
        (PLAIN._replace(event_type="a\nb"), f"event_type is 'a\\nb': {NOT_A_TEXT}"),
        (PLAIN._replace(aggregate_type="\U0001ffff"), f"aggregate_type is '\\U0001ffff': {NOT_A_TEXT}"),
        (PLAIN._replace(aggregate_id="\x85"), f"aggregate_id is '\\x85': {NOT_A_TEXT}"),
        (
            PLAIN._replace(created_at_ms=253_402_300_800_000),
            "created_at is after the year 9999, as the time of a CloudEvent cannot be",
        ),
        (
            PLAIN._replace(created_at_ms=9_224_318_015_999_999),  # as late as PostgreSQL can tell
            "created_at is after the year 9999, as the time of a CloudEvent cannot be",
        ),
    ],
)
def test_a_message_that_can_be_no_cloudevent_is_refused_and_in_the_native_envelope_not(
    message: Message, expected: str
) -> None:
    assert reason(message) == expected
    assert NATIVE.record(message, topic=TOPIC)


@pytest.mark.parametrize(
    "text", ["order placed", "größe\u200b", "\N{NO-BREAK SPACE}", "\U0001f600", "\ue000", "\u0378"]
)
def test_other_text_is_fit_for_an_attribute(text: str) -> None:
    message = PLAIN._replace(event_type=text, aggregate_id=text)
    headers = dict(CLOUDEVENTS.record(message, topic=TOPIC).headers)
    assert (headers["ce_type"], headers["ce_subject"]) == (text, text)


@pytest.mark.parametrize(
    "source",
    [
        "shop.public",
        "/shop/orders",
        "//shop.example/orders",
        "https://shop.example:443/orders?a=b#c",
        "https://[2001:db8::1]/",
        "urn:uuid:6e8bc430-9c3a-11d9-9669-0800200c9a66",
        "mailto:shop@example.org",
        "1-555-123-4567",
        "a%20b",
        "./a:b",
    ],
)
def test_a_uri_reference_is_fit_for_a_source(source: str) -> None:
    assert Addressing(source=source, envelope="cloudevents").source == source


@pytest.mark.parametrize(
    "source",
    ["my shop.public", "größe.public", "1:2", ":a", "a%2", "a#b#c", "a[b]", "a\n", "<a>", "a\\b", '"a"', "a^b"],
)
def test_any_other_source_is_refused_for_cloudevents_only(source: str) -> None:
    assert Addressing(source=source).source == source
    with pytest.raises(ConfigurationError) as refused:
        Addressing(source=source, envelope="cloudevents")
    assert str(refused.value) == (
        f'the source "{source}" is no URI-reference, as that of a CloudEvent has to be: set OUTBOX_RELAY_SOURCE to a'
        " URI, or to a name without spaces"
    )
