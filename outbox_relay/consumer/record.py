"""Reads a Kafka client's record as the message that a relay has published."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Protocol, cast
from uuid import UUID

from outbox_relay.consumer.message import Message
from outbox_relay.errors import ForeignRecord
from outbox_relay.wire import CE_SPECVERSION, CLOUDEVENTS, NATIVE

if TYPE_CHECKING:
    from collections.abc import Iterable

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LARGEST_NUMBER = 2**63 - 1


class _MethodRecord(Protocol):
    """A record whose parts are methods, as those of `confluent_kafka.Message`."""

    def topic(self) -> str | None: ...
    def partition(self) -> int | None: ...
    def offset(self) -> int | None: ...
    def key(self) -> object: ...
    def value(self) -> object: ...
    def headers(self) -> object: ...
    def timestamp(self) -> tuple[int, int]: ...


class _AttributeRecord(Protocol):
    """A record whose parts are attributes, as those of `aiokafka.ConsumerRecord`."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def key(self) -> object: ...
    @property
    def value(self) -> object: ...
    @property
    def headers(self) -> object: ...
    @property
    def timestamp(self) -> int: ...


Record = _MethodRecord | _AttributeRecord
"""What a Kafka client brings: parts as methods, as of `confluent_kafka`, or as attributes, as of `aiokafka`."""


def message_from(record: Record) -> Message:
    r"""
    Give the message in *record*, which any Kafka client may have brought, its key and value as bytes.

    Of a header that is there twice the last one counts, as in Kafka's own clients. A header's bytes that are no UTF-8
    show as `\xNN`, so that what others add to a record does no harm; a header without a value is empty text.

    Raises:
        ForeignRecord: A header that every relay writes is missing or malformed, or there is no key or no time stamp.
    """
    parts = _parts(record)
    try:
        return _message(parts)
    except ValueError as error:
        place = f"offset {parts.offset} of {parts.topic}[{parts.partition}]"
        raise ForeignRecord(f"the record at {place} was not written by a relay: {error}") from error


@dataclass(frozen=True, slots=True)
class _Parts:
    topic: str
    partition: int
    offset: int
    key: object
    value: object
    headers: Iterable[tuple[str, bytes | None]]
    timestamp_ms: int


def _parts(record: Record) -> _Parts:
    if callable(record.topic):
        return _Parts(
            topic=cast("str", record.topic()),
            partition=cast("int", record.partition()),
            offset=cast("int", record.offset()),
            key=record.key(),
            value=record.value(),
            headers=_pairs(record.headers()),
            timestamp_ms=record.timestamp()[1],
        )
    return _Parts(
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        key=record.key,
        value=record.value,
        headers=_pairs(record.headers),
        timestamp_ms=record.timestamp,
    )


def _pairs(headers: object) -> Iterable[tuple[str, bytes | None]]:
    return cast("Iterable[tuple[str, bytes | None]]", headers or ())


def _message(parts: _Parts) -> Message:
    headers = {name: (value or b"").decode(errors="backslashreplace") for name, value in parts.headers}
    names = CLOUDEVENTS if CE_SPECVERSION in headers else NATIVE
    return Message(
        message_id=_message_id(headers, name=names.message_id),
        source=_required(headers, names.source),
        sequence_no=_sequence_no(headers, name=names.sequence_no),
        aggregate_type=_required(headers, names.aggregate_type),
        event_type=_required(headers, names.event_type),
        key=_key(parts.key),
        payload=_payload(parts.value),
        headers=headers,
        created_at=_created_at(parts.timestamp_ms),
        topic=parts.topic,
        partition=parts.partition,
        offset=parts.offset,
        is_unordered=names.unordered in headers,
        replay=headers.get(names.replay),
    )


def _required(headers: dict[str, str], name: str) -> str:
    try:
        return headers[name]
    except KeyError:
        raise ValueError(f'it has no header "{name}"') from None


def _message_id(headers: dict[str, str], *, name: str) -> UUID:
    text = _required(headers, name)
    try:
        return UUID(text)
    except ValueError:
        raise ValueError(f'its header "{name}" is {text!r}, not a UUID') from None


def _sequence_no(headers: dict[str, str], *, name: str) -> int:
    text = _required(headers, name)
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= _LARGEST_NUMBER):
        raise ValueError(f'its header "{name}" is {text!r}, not a number from 1 to {_LARGEST_NUMBER}')
    return int(text)


def _key(key: object) -> str:
    if not isinstance(key, bytes):
        raise ValueError(f"its key is {_kind(key)}, not bytes")  # noqa: TRY004 -- becomes ForeignRecord
    try:
        return key.decode()
    except UnicodeDecodeError:
        raise ValueError(f"its key is {key!r}, not UTF-8") from None


def _payload(value: object) -> bytes | None:
    if value is None or isinstance(value, bytes):
        return value
    raise ValueError(f"its value is {_kind(value)}, not bytes: read the topic without a deserializer")


def _created_at(timestamp_ms: int) -> datetime:
    try:
        created_at = _EPOCH + timedelta(milliseconds=timestamp_ms)
    except OverflowError:
        raise ValueError(f"its time stamp is {timestamp_ms} ms, beyond the year 9999") from None
    if created_at <= _EPOCH:
        raise ValueError("it has no time stamp")
    return created_at


def _kind(value: object) -> str:
    return "missing" if value is None else type(value).__name__
