"""A message as an application makes it, checked for everything that could never be published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from typing import Final
from uuid import UUID, uuid4

from outbox_relay.errors import InvalidMessage
from outbox_relay.wire import RESERVED_HEADERS

_EARLIEST = datetime(1970, 1, 1, microsecond=1000, tzinfo=UTC)  # a Kafka timestamp is a positive number of milliseconds


class Tombstone(Enum):
    """The type of `TOMBSTONE`."""

    TOMBSTONE = "TOMBSTONE"


TOMBSTONE: Final = Tombstone.TOMBSTONE
"""The payload of a message that has none: a compacted topic forgets its key. None is a payload, the JSON null."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """
    One message, with the id that consumers deduplicate on from the moment it is made.

    All of it is checked here, except the payload, which is encoded when the message is written.

    Attributes:
        aggregate_type: Kind of thing that the message is about; makes the topic, by default `<aggregate_type>.events`.
        aggregate_id: Which one of that kind; Kafka's key. Messages of one type and id are in order.
        payload: What `json.dumps` takes: dict, list, str, int, float, bool or None. Stored as jsonb, which keeps
            neither the order of keys nor white space.
        payload_bytes: The value as it is to be on the wire, in any encoding, instead of *payload*. Name the encoding
            in the header `content-type`; the relay writes `application/octet-stream` otherwise.
        headers: Sent as they are. Names that the relay sets itself are refused.
        message_id: Give your own to make a producer idempotent: consumers drop what they have seen.
        created_at: The record's timestamp; None is the time at which the transaction began.

    Raises:
        InvalidMessage: Something is not what is said here, or is text that PostgreSQL cannot store.
    """

    aggregate_type: str
    aggregate_id: str
    event_type: str
    payload: object = TOMBSTONE
    payload_bytes: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    message_id: UUID = field(default_factory=uuid4)
    created_at: datetime | None = None

    def __post_init__(self) -> None:
        for name in ("aggregate_type", "aggregate_id", "event_type"):
            value = getattr(self, name)
            _check_text(name, value)
            if not value:
                raise InvalidMessage(f"{name} is empty: give the text that names it")
        if not isinstance(self.headers, Mapping):
            raise InvalidMessage(f"headers is {self.headers!r:.100}: give a mapping of str to str")
        for name, value in self.headers.items():
            _check_header(name, value)
        if not isinstance(self.payload_bytes, bytes | None):
            raise InvalidMessage(
                f"payload_bytes is {self.payload_bytes!r:.100}: give bytes, or a JSON value as payload"
            )
        if self.payload_bytes is not None and self.payload is not TOMBSTONE:
            raise InvalidMessage("payload and payload_bytes are both given: a message has one value, leave one out")
        if not isinstance(self.message_id, UUID):
            raise InvalidMessage(f"message_id is {self.message_id!r:.100}: give a uuid.UUID")
        if self.created_at is not None:
            _check_time(self.created_at)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidMessage(f"{name} is {value!r:.100}: give a str")
    if "\0" in value:
        raise InvalidMessage(f"{name} is {value!r:.100}: PostgreSQL stores no NUL character, leave it out")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidMessage(f"{name} is {value!r:.100}: a lone surrogate is no character, leave it out") from error


def _check_header(name: object, value: object) -> None:
    _check_text("the name of a header", name)
    _check_text(f'header "{name}"', value)
    if name in RESERVED_HEADERS:
        raise InvalidMessage(f'header "{name}" is set by the relay: choose another name')


def _check_time(created_at: object) -> None:
    if not isinstance(created_at, datetime):
        raise InvalidMessage(f"created_at is {created_at!r:.100}: give a datetime.datetime")
    if created_at.tzinfo is None:
        raise InvalidMessage(f"created_at is {created_at}, without a time zone: give one, as in datetime.now(UTC)")
    if created_at < _EARLIEST:
        raise InvalidMessage(f"created_at is {created_at}: a Kafka timestamp is after 1970-01-01, give a later one")
