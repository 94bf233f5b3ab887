"""Progress: whether messages move, as told by the first message of each shard."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from outbox_relay.relay.survey import Head


class _Place(NamedTuple):
    """Where a message comes first; the type is empty for the next message of the shard."""

    shard: int
    waiting_type: str


@dataclass(slots=True)
class Progress:
    """
    Since when each shard has had the same next message, and the same first waiting one of a type; it is told the time.

    Age alone would not tell a relay that stands still from one that catches up after an outage, nor from a writer that
    commits after ten minutes. While messages move, whoever publishes them, the first one of each shard changes. If
    somebody else holds a shard, it does not.

    Attributes:
        known_until: When what is known here is out of date.
    """

    known_until: float
    _since: dict[_Place, tuple[int, float]] = field(default_factory=dict)

    def saw(self, heads: Iterable[Head], *, now: float, until: float) -> None:
        """Take in the first messages of the shards that have any which could be published now."""
        before = self._since if now < self.known_until else {}
        since = {}
        for head in heads:
            place = _Place(head.shard, head.aggregate_type if head.state == "waiting" else "")
            first_no, first_seen_at = before.get(place, (None, now))
            since[place] = (head.sequence_no, first_seen_at if first_no == head.sequence_no else now)
        self._since = since
        self.known_until = until

    def why_stuck(self, *, now: float, max_age: float) -> list[str]:
        """Tell where nothing has moved for longer than *max_age* seconds, as far as that is known."""
        stuck = [(at, place, number) for place, (number, at) in self._since.items() if now - at > max_age]
        if not stuck or now > self.known_until:
            return []
        at, (shard, waiting_type), number = min(stuck)
        has_been = "waited first in" if waiting_type else "been the next of"
        return [f"message {number} has {has_been} shard {shard} for {now - at:.0f} s; {len(stuck)} stand still"]
