"""A message of the outbox, and the Kafka record it becomes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from outbox_relay.errors import ConfigurationError
from outbox_relay.relay.envelope import cloudevent_headers, is_uri_reference, native_headers, own_headers
from outbox_relay.relay.failures import (
    TOPIC_HELD,
    WITHDRAWN,
    Failure,
    Scope,
    TooLarge,
    Unpublishable,
    quoted,
)
from outbox_relay.wire import CLOUDEVENTS, NATIVE

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from outbox_relay.relay.envelope import Envelope, Header
    from outbox_relay.relay.failures import Outcome

_KAFKAS_OWN = {"__consumer_offsets", "__transaction_state", "__share_group_state"}  # a broker takes none of ours there
_TOPIC_NAME = re.compile(r"[a-zA-Z0-9._-]{1,249}")

Key = tuple[str, str]
OnPoison = Literal["park", "skip"]

_NO_HEADERS: Mapping[str, str] = {}
_JSON: Header = ("content-type", "application/json")
_BYTES: Header = ("content-type", "application/octet-stream")


class Message(NamedTuple):
    """
    One row of the outbox as a lane reads it; a named tuple because a hundred thousand are made a second.

    `payload` is the text of the jsonb column, never parsed again. `headers` is the text of a JSON object.
    `stored_bytes` is what payload and headers take, in the table or as text; a message that takes more than
    `readable_bytes` comes without them. `is_behind_parked` and `is_behind_waiting` say that an earlier message of its
    key is in outbox_pending.
    """

    sequence_no: int
    shard: int
    message_id: str
    aggregate_type: str
    aggregate_id: str
    event_type: str
    payload: str | None
    payload_bytes: bytes | None
    headers: str | None
    created_at_ms: int
    stored_bytes: int
    is_unordered: bool
    is_behind_parked: bool
    is_behind_waiting: bool

    @property
    def key(self) -> Key:
        """What the order promise is about: messages of the same type and id."""
        return self.aggregate_type, self.aggregate_id


class Record(NamedTuple):
    """What is handed to Kafka for a message; made by `tuple.__new__`, which takes half as long."""

    topic: str
    key: str
    value: str | bytes | None
    headers: list[Header]
    timestamp_ms: int


@dataclass(frozen=True, slots=True)
class Addressing:
    """
    Where messages go and what they say about themselves.

    Attributes:
        template: Topic name, with `{aggregate_type}` to fill in.
        topics: Topics of aggregate types that do not follow the template.
        allowed: The only topics that may be written to; empty means all.
        source: Which outbox messages come from; together with `sequence_no` it names a message for ever.
        envelope: How the headers say what a message is.
        replay: Name of the replay that the messages are part of; empty, they are published for the first time.
        readable_bytes: Messages that take more bytes than this come without their contents and cannot be sent.

    Raises:
        ConfigurationError: The source is none that a CloudEvent may have.
    """

    template: str = "{aggregate_type}.events"
    topics: Mapping[str, str] = field(default_factory=dict)
    allowed: frozenset[str] = frozenset()
    source: str = ""
    envelope: Envelope = "native"
    replay: str = ""
    readable_bytes: int = 8_000_000

    def __post_init__(self) -> None:
        if self.envelope == "cloudevents" and not is_uri_reference(self.source):
            raise ConfigurationError(
                f'the source "{self.source}" is no URI-reference, as that of a CloudEvent has to be: set'
                " OUTBOX_RELAY_SOURCE to a URI, or to a name without spaces"
            )

    def topic(self, aggregate_type: str) -> str:
        """
        Give the topic of *aggregate_type*.

        Raises:
            Unpublishable: Kafka allows no such name, or the settings do not allow this topic.
        """
        topic = self.topics.get(aggregate_type) or self.template.replace("{aggregate_type}", aggregate_type)
        if not is_topic_name(topic):
            raise Unpublishable(
                f"aggregate type {quoted(aggregate_type)} makes the topic {quoted(topic)}, which Kafka does not allow:"
                " a name has 1 to 249 of a-z A-Z 0-9 . _ -; map the type to a topic with OUTBOX_RELAY_TOPIC_MAP",
            )
        if topic in _KAFKAS_OWN:
            raise Unpublishable(f'topic "{topic}" is Kafka\'s own: map the type to another with OUTBOX_RELAY_TOPIC_MAP')
        if self.allowed and topic not in self.allowed:
            raise Unpublishable(f'topic "{topic}" is not among OUTBOX_RELAY_ALLOWED_TOPICS')
        return topic

    def record(self, message: Message, *, topic: str) -> Record:
        """
        Make the Kafka record of *message*; its payload and its own headers go out as they are.

        Raises:
            Unpublishable: A header, the size or the time stamp is none that Kafka accepts.
        """
        if message.headers is None:
            raise TooLarge(
                f"the message takes {message.stored_bytes:,} bytes, or more once its numbers are written out: shrink it"
                " or send a reference"
            )
        if message.created_at_ms <= 0:  # librdkafka takes 0 for "now"
            raise Unpublishable("created_at is not after 1970-01-01, as a Kafka timestamp has to be")
        own = own_headers(message.headers, envelope=self.envelope) if message.headers != "{}" else _NO_HEADERS
        if self.envelope == "native":
            names, headers = NATIVE, native_headers(message, source=self.source)
        else:
            names, headers = CLOUDEVENTS, cloudevent_headers(message, source=self.source)
        value: str | bytes | None = message.payload
        content_type = _JSON
        if value is None:
            value, content_type = message.payload_bytes, _BYTES
        if value is not None and "content-type" not in own:
            headers.append(content_type)
        if message.is_unordered:
            headers.append((names.unordered, "1"))
        if self.replay:
            headers.append((names.replay, self.replay))
        if own:
            headers += own.items()
        return tuple.__new__(Record, (topic, message.aggregate_id, value, headers, message.created_at_ms))


def is_topic_name(name: str) -> bool:
    """Tell whether Kafka allows *name* for a topic."""
    return _TOPIC_NAME.fullmatch(name) is not None and name not in {".", ".."}


@dataclass(frozen=True, slots=True)
class Prepared:
    """
    A batch made ready for Kafka.

    Attributes:
        records: What to send, in sequence order.
        indexes: Position in the batch of each record.
        outcomes: For each message of the batch what is known before sending: why it is not sent, or None.
    """

    records: list[Record]
    indexes: list[int]
    outcomes: list[Outcome]


def prepare(
    messages: Sequence[Message],
    *,
    addressing: Addressing,
    on_poison: OnPoison,
    held_types: Collection[str] = (),
    why_held_back: Callable[[Message], Failure | None] | None = None,
) -> Prepared:
    """
    Make records of *messages*, and find those that may not be sent, or that Kafka could never accept.

    Under "park" nothing is sent behind such a message of its key, nor behind one that is parked already.

    Args:
        held_types: Aggregate types whose topic is away.
        why_held_back: Tells why a message has to stay behind an earlier one of its key, or None; left out, none has to.
    """
    prepared = Prepared([], [], [None] * len(messages))
    topics: dict[str, str] = {}
    stopped_keys: set[Key] = set()
    for index, message in enumerate(messages):
        held_back = why_held_back(message) if why_held_back is not None else None
        if held_back is not None:
            prepared.outcomes[index] = held_back
        elif held_types and message.aggregate_type in held_types:
            prepared.outcomes[index] = TOPIC_HELD
        elif stopped_keys and message.key in stopped_keys and not message.is_unordered:
            prepared.outcomes[index] = WITHDRAWN
        else:
            try:
                topic = topics.get(message.aggregate_type)
                if topic is None:
                    topic = topics[message.aggregate_type] = addressing.topic(message.aggregate_type)
                prepared.records.append(addressing.record(message, topic=topic))
                prepared.indexes.append(index)
            except Unpublishable as error:
                prepared.outcomes[index] = Failure(Scope.MESSAGE, error.code, str(error))
                if on_poison == "park" and not message.is_unordered:
                    stopped_keys.add(message.key)
    return prepared
