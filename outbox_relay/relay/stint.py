"""
Stint: what one transaction of a lane has done so far. It asks no database; the loop reads and writes for it.

A lane holds its shards for many batches, so that their marks are written once. What must be remembered from one batch
to the next is here, and dies with the stint: marks in memory are never older than the transaction that read them.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

from outbox_relay.relay.failures import BEHIND_PARKED, BEHIND_WAITING, WITHDRAWN
from outbox_relay.relay.settle import Aside

if TYPE_CHECKING:
    from collections.abc import Sequence

    from outbox_relay.relay.failures import Failure
    from outbox_relay.relay.marks import Marks
    from outbox_relay.relay.message import Key, Message, OnPoison
    from outbox_relay.relay.settle import Settlement

_SEQUENCE_NO = attrgetter("sequence_no")
_STORED_BYTES = attrgetter("stored_bytes")


class Stint:
    """
    The progress of one stint.

    Attributes:
        marks: Up to where the held shards are settled.
        messages: How many messages are decided and not recorded yet.
        stored_bytes: What they take.
        acknowledged: How many of them are in Kafka: they are sent again if the stint is not recorded.
    """

    def __init__(self, marks: Marks, *, on_poison: OnPoison, has_pending: bool) -> None:
        self.marks = marks
        self.messages = 0
        self.stored_bytes = 0
        self.acknowledged = 0
        self._on_poison = on_poison
        self._has_pending = has_pending
        self._decided: dict[int, Aside | None] = {}
        self._asides: list[Aside] = []
        self._ahead: dict[int, Message] = {}
        self._stopped: dict[Key, Failure] = {}

    @property
    def may_hold_back(self) -> bool:
        """Tell whether any message may have to stay behind an earlier one of its key."""
        return self._has_pending or bool(self._stopped)

    @property
    def has_ahead(self) -> bool:
        """Tell whether something was decided behind a message that is not: its mark cannot move there yet."""
        return bool(self._decided)

    def undecided(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return those of *messages*, read above the marks, that were not decided by an earlier batch of the stint."""
        if not self._decided:
            return messages
        return [message for message in messages if message.sequence_no not in self._decided]

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
        """
        Move the marks over *messages*, the whole batch that was read, as far as every message is decided.

        What is decided behind the first undecided message of a shard is remembered, so that it is not sent again.
        """
        self._count(settlement)
        if not settlement.unsettled and not self._ahead:
            self.marks.pass_over(messages)
            self._asides += settlement.parked
            self._asides += settlement.waiting
            return
        self._decided |= dict.fromkeys(message.sequence_no for message in settlement.published)
        self._decided |= {aside.message.sequence_no: aside for aside in (*settlement.parked, *settlement.waiting)}
        first_nos: dict[int, int] = {}
        for message in settlement.unsettled:
            first_nos.setdefault(message.shard, message.sequence_no)
        passed = [each for each in messages if each.sequence_no < first_nos.get(each.shard, each.sequence_no + 1)]
        self.marks.pass_over(passed)
        decided = [self._decided.pop(message.sequence_no) for message in passed]
        self._ahead |= {message.sequence_no: message for message in messages}
        for message in passed:
            del self._ahead[message.sequence_no]
        self._asides += [aside for aside in decided if aside is not None]

    def pass_the_rest(self) -> None:
        """
        Move the marks over all that was read: what would have to be sent again waits in outbox_pending instead.

        For the end of a stint: what Kafka has acknowledged behind it would be sent twice otherwise.
        """
        through = self.marks.through
        ahead = sorted(
            (message for message in self._ahead.values() if message.sequence_no > through[message.shard]),
            key=_SEQUENCE_NO,
        )
        self._ahead = {}
        rest = [self._decided.pop(message.sequence_no, _again(message)) for message in ahead]
        self.marks.pass_over(ahead)
        self._asides += [aside for aside in rest if aside is not None]

    def take_in_waiting(self, settlement: Settlement) -> None:
        """Count messages of outbox_pending, which the marks have passed already."""
        self._count(settlement)

    @property
    def asides(self) -> list[Aside]:
        """What the marks have passed although it is not in Kafka."""
        return self._asides

    @property
    def acknowledged_ahead(self) -> int:
        """How many messages are in Kafka that no mark has passed: they will be sent again."""
        return sum(aside is None for aside in self._decided.values())

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


def _again(message: Message) -> Aside:
    return Aside(message, "waiting", WITHDRAWN)
