"""What a record's headers mean; the writer, the relay and the consumer agree on it here."""

from __future__ import annotations

from typing import Final

RESERVED_HEADERS: Final = frozenset({"id", "event_type", "aggregate_type", "sequence_no", "source", "unordered"})
"""Headers that the relay sets; a message's own have other names."""
