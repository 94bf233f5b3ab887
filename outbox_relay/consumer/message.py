"""A message as a consumer gets it, whatever Kafka client brought it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from uuid import UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """
    One delivery of a message that a relay has published.

    Attributes:
        message_id: The same in every delivery; what an `Inbox` deduplicates on.
        source: Which outbox it comes from.
        sequence_no: Rises with each message of a key, unless *is_unordered*.
        key: The aggregate's id, on which Kafka's partition depends.
        payload: The bytes of the record; None is a tombstone.
        headers: The row's own headers and the relay's, as text.
        created_at: When the row was inserted, the same in every delivery.
        is_unordered: Newer messages of the key may have overtaken it.
        replay: Name of the replay that has published it once more; None in every other delivery.
    """

    message_id: UUID
    source: str
    sequence_no: int
    aggregate_type: str
    event_type: str
    key: str
    payload: bytes | None
    headers: Mapping[str, str]
    created_at: datetime
    topic: str
    partition: int
    offset: int
    is_unordered: bool = False
    replay: str | None = None
