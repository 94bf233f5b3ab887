"""The headers of a record: the relay's own envelope, or a CloudEvent in binary mode, as Kafka carries it."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, cast

from outbox_relay.relay.failures import Unpublishable, quoted
from outbox_relay.wire import CE_SPECVERSION, CE_SUBJECT, CE_TIME, CLOUDEVENTS, NATIVE, RESERVED_HEADERS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from outbox_relay.relay.message import Message

Envelope = Literal["native", "cloudevents"]
Header = tuple[str, str | bytes | None]

# Not looked up in the tuple for each message
_ID, _EVENT_TYPE, _AGGREGATE_TYPE, _SEQUENCE_NO, _SOURCE = NATIVE[:5]
_CE_ID, _CE_TYPE, _CE_AGGREGATETYPE, _CE_SEQUENCE, _CE_SOURCE = CLOUDEVENTS[:5]

# https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md, "Naming Conventions" and "Type System"
_ATTRIBUTE = re.compile(r"ce_(?!data$|datacontenttype$)[a-z0-9]+")
_NONCHARACTERS = "".join(chr(plane << 16 | end) for plane in range(17) for end in (0xFFFE, 0xFFFF))
_FORBIDDEN = re.compile(f"[\x00-\x1f\x7f-\x9f\ufdd0-\ufdef{_NONCHARACTERS}]")

# RFC 2045; application/cloudevents says that the payload is a whole event, which is the structured mode
_WORD = r"[\w!#$%&'*+.^`|~-]+"
_MEDIA_TYPE = re.compile(rf"(?!application/cloudevents){_WORD}/{_WORD} *(;.*)?", re.ASCII | re.IGNORECASE)

# RFC 3986: a scheme, or no colon in the first segment; then authority, path, query, fragment
_PCHAR = r"(?:[\w.~!$&'()*+,;=:@-]|%[0-9a-f]{2})"
_URI_REFERENCE = re.compile(
    rf"(?:[a-z][a-z0-9+.-]*:|(?![^/?#]*:))(?://(?:{_PCHAR}|[\[\]])*)?(?:{_PCHAR}|/)*"
    rf"(?:\?(?:{_PCHAR}|[/?])*)?(?:\#(?:{_PCHAR}|[/?])*)?",
    re.ASCII | re.IGNORECASE,
)


def native_headers(message: Message, *, source: str) -> list[Header]:
    """Give the headers that every message has in the relay's own envelope."""
    return [
        (_ID, message.message_id),
        (_EVENT_TYPE, message.event_type),
        (_AGGREGATE_TYPE, message.aggregate_type),
        (_SEQUENCE_NO, str(message.sequence_no)),
        (_SOURCE, source),
    ]


def cloudevent_headers(message: Message, *, source: str) -> list[Header]:
    """
    Give the attributes that every message has as a CloudEvent.

    Raises:
        Unpublishable: A text is none that an attribute may have, or RFC 3339 has no such time.
    """
    _check_attribute("event_type", message.event_type)
    _check_attribute("aggregate_type", message.aggregate_type)
    _check_attribute("aggregate_id", message.aggregate_id)
    return [
        (CE_SPECVERSION, "1.0"),
        (_CE_ID, message.message_id),
        (_CE_SOURCE, source),
        (_CE_TYPE, message.event_type),
        (CE_SUBJECT, message.aggregate_id),
        (CE_TIME, _rfc_3339(message.created_at_ms)),
        (_CE_AGGREGATETYPE, message.aggregate_type),
        (_CE_SEQUENCE, str(message.sequence_no).zfill(19)),  # the extension compares sequences as text
    ]


def own_headers(text: str, *, envelope: Envelope) -> Mapping[str, str]:
    """
    Give the headers of a message's own, which go out as they are.

    As a CloudEvent those that begin with `ce_` are attributes, and `content-type` is one in other words. Case is
    ignored in telling so, as some readers do.

    Raises:
        Unpublishable: One is no string, is the relay's, or is none that a CloudEvent may have.
    """
    try:
        own: dict[str, object] = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or as many brackets
        raise Unpublishable(f"the headers cannot be read ({error}): a header is a string") from error
    for name, value in own.items():
        if not isinstance(value, str):
            raise Unpublishable(f"header {quoted(name)} is {json.dumps(value)[:100]}: a header is a string")
        if name in RESERVED_HEADERS:
            raise Unpublishable(f'header "{name}" is set by the relay: choose another name')
        if envelope == "cloudevents":
            _check_own(name, value)
    return cast("dict[str, str]", own)


def is_uri_reference(text: str) -> bool:
    """Tell whether *text* is a URI or a relative reference, as the source of a CloudEvent has to be."""
    return _URI_REFERENCE.fullmatch(text) is not None


def _check_own(name: str, value: str) -> None:
    lowered = name.lower()
    if lowered.startswith("ce_"):
        if not _ATTRIBUTE.fullmatch(name):
            raise Unpublishable(
                f"header {quoted(name)} is no attribute of a CloudEvent: after ce_ come a-z and 0-9, and not data"
            )
        _check_attribute(f"header {quoted(name)}", value)
    elif lowered == "content-type" and not (name == lowered and _MEDIA_TYPE.fullmatch(value)):
        raise Unpublishable(
            f'header "{name}" is {value!r:.100}: the content-type of a CloudEvent is a media type such as text/plain,'
            " and not application/cloudevents, because the headers are the event"
        )


def _check_attribute(name: str, value: str) -> None:
    is_allowed = value.isprintable() or not _FORBIDDEN.search(value)  # the first is quick, and mostly enough
    if not (value and is_allowed):
        raise Unpublishable(
            f"{name} is {value!r:.100}: an attribute of a CloudEvent has no control character, nor is it empty"
        )


def _rfc_3339(time_ms: int) -> str:
    second, millisecond = divmod(time_ms, 1000)
    return f"{_second(second)}.{millisecond:03}Z"


@lru_cache
def _second(time: int) -> str:
    """Give the time without its fraction, which many messages of a batch share."""
    try:
        return datetime.fromtimestamp(time, UTC).isoformat().removesuffix("+00:00")
    except (ValueError, OverflowError):
        raise Unpublishable("created_at is after the year 9999, as the time of a CloudEvent cannot be") from None
