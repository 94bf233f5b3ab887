"""Marks: up to where each shard is settled, as a lane knows it during one stint."""

from __future__ import annotations

from functools import reduce
from operator import xor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from outbox_relay.relay.message import Message


class Marks:
    """
    Up to where each held shard is settled, during one stint.

    Attributes:
        through: The number by shard. At the beginning it is the newest mark in the database.
    """

    def __init__(self, newest: Mapping[int, int]) -> None:
        self.through = dict(newest)
        self._recorded = dict(newest)
        self._messages = dict.fromkeys(newest, 0)
        self._checksums = dict.fromkeys(newest, 0)

    def pass_over(self, messages: Sequence[Message]) -> None:
        """Move the mark of each shard to its last message, and count what it passes."""
        numbers_of: dict[int, list[int]] = {shard: [] for shard in self.through}
        for message in messages:
            numbers_of[message.shard].append(message.sequence_no)
        for shard, passed in numbers_of.items():
            if passed:
                self.through[shard] = passed[-1]
                self._messages[shard] += len(passed)
                self._checksums[shard] = reduce(xor, passed, self._checksums[shard])

    def pass_nothing(self, shard: int, *, through: int) -> None:
        """Move the mark of *shard* to a horizon up to which there was nothing to publish."""
        self.through[shard] = max(through, self.through[shard])

    def moved(self) -> list[tuple[int, int, int, int]]:
        """Return shard, number, messages and checksum of the marks that have moved."""
        return [
            (shard, through, self._messages[shard], self._checksums[shard])
            for shard, through in self.through.items()
            if through > self._recorded[shard]
        ]
