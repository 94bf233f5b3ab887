"""
Stint: what one transaction of a lane has done so far. It asks no database; the loop reads and writes for it.

A lane holds its shards for many batches, so that their marks are written once. What must be remembered from one batch
to the next is here, and dies with the stint: marks in memory are never older than the transaction that read them.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

from outbox_relay.relay.failures import BEHIND_PARKED, BEHIND_WAITING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from outbox_relay.relay.failures import Failure
    from outbox_relay.relay.marks import Marks
    from outbox_relay.relay.message import Key, Message, OnPoison
    from outbox_relay.relay.settle import Aside, Settlement

_STORED_BYTES = attrgetter("stored_bytes")


class Stint:
    """
    The progress of one stint.

    Attributes:
        marks: Up to where the held shards are settled.
        asides: What the marks have passed although it is not in Kafka.
        messages: How many messages are decided and not recorded yet.
        stored_bytes: What they take.
        acknowledged: How many of them are in Kafka: they are sent again if the stint is not recorded.
    """

    def __init__(self, marks: Marks, *, on_poison: OnPoison, has_pending: bool) -> None:
        self.marks = marks
        self.messages = 0
        self.stored_bytes = 0
        self.acknowledged = 0
        self.asides: list[Aside] = []
        self._on_poison = on_poison
        self._has_pending = has_pending
        self._stopped: dict[Key, Failure] = {}

    @property
    def may_hold_back(self) -> bool:
        """Tell whether any message may have to stay behind an earlier one of its key."""
        return self._has_pending or bool(self._stopped)

    def why_held_back(self, message: Message) -> Failure | None:
        """
        Return why *message* may not be sent now: an earlier one of its key was set aside.

        Under "skip" a parked message holds nothing back, but one that waits does.
        """
        if message.is_unordered:
            return None
        if message.is_behind_waiting:
            return BEHIND_WAITING
        behind_parked = BEHIND_PARKED if message.is_behind_parked and self._on_poison == "park" else None
        return self._stopped.get(message.key, behind_parked) if self._stopped else behind_parked

    def take_in(self, messages: Sequence[Message], settlement: Settlement) -> None:
        """Move the marks over *messages*, the whole batch that was read."""
        self._count(settlement)
        self.marks.pass_over(messages)
        self.asides += settlement.parked
        self.asides += settlement.waiting

    def take_in_waiting(self, settlement: Settlement) -> None:
        """Count messages of outbox_pending, which the marks have passed already."""
        self._count(settlement)

    def _count(self, settlement: Settlement) -> None:
        published = settlement.published
        self.messages += len(published) + len(settlement.parked) + len(settlement.waiting)
        self.stored_bytes += sum(map(_STORED_BYTES, published))
        self.acknowledged += len(published)
        if self._on_poison == "park":
            self._stop_keys(settlement.parked, BEHIND_PARKED)
        self._stop_keys(settlement.waiting, BEHIND_WAITING)

    def _stop_keys(self, asides: Sequence[Aside], failure: Failure) -> None:
        for aside in asides:
            if not aside.message.is_unordered:
                self._stopped.setdefault(aside.message.key, failure)
