"""What a record's headers mean; the writer, the relay and the consumer agree on it here."""

from __future__ import annotations

from typing import Final, NamedTuple


class HeaderNames(NamedTuple):
    """What the headers are called that say the same in both envelopes."""

    message_id: str
    event_type: str
    aggregate_type: str
    sequence_no: str
    source: str
    unordered: str
    replay: str


NATIVE: Final = HeaderNames(
    message_id="id",
    event_type="event_type",
    aggregate_type="aggregate_type",
    sequence_no="sequence_no",
    source="source",
    unordered="unordered",
    replay="replay",
)

# Attributes of the specification and of its extension "sequence"; the others are extensions of our own.
CLOUDEVENTS: Final = HeaderNames(
    message_id="ce_id",
    event_type="ce_type",
    aggregate_type="ce_aggregatetype",
    sequence_no="ce_sequence",
    source="ce_source",
    unordered="ce_unordered",
    replay="ce_replay",
)
CE_SPECVERSION: Final = "ce_specversion"
CE_SUBJECT: Final = "ce_subject"
CE_TIME: Final = "ce_time"

RESERVED_HEADERS: Final = frozenset({*NATIVE, *CLOUDEVENTS, CE_SPECVERSION, CE_SUBJECT, CE_TIME})
"""Headers that the relay sets, in either envelope; a message's own have other names."""
