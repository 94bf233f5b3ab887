"""Offsets in the consumer's own database, moved in the transaction of the effects."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from outbox_relay.queries import Query, execute
from outbox_relay.sql import statement

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from outbox_relay.queries import Queries, Session


class Partition(NamedTuple):
    """One partition of a topic."""

    topic: str
    number: int


class Step(NamedTuple):
    """A partition's way through one transaction; it is expected at None when it has never been consumed."""

    expected_offset: int | None
    next_offset: int


class Offsets:
    """
    Says where each partition is to be read from, in the table `inbox_offset`.

    Kept in the transaction of the effects they cannot differ from them, so nothing is delivered again after a crash,
    and whoever goes on consuming a partition that another has taken over has no effect.

    Args:
        consumer: Whose offsets; several consumers share the table and do not see each other's.
        schema: Where the table is; None leaves it to search_path.
    """

    def __init__(self, consumer: str, *, schema: str | None = None) -> None:
        self.consumer = consumer
        self.schema = schema

    def read(self, session: Session, partitions: Collection[Partition]) -> dict[Partition, int]:
        """Give the next offset of those *partitions* that were consumed before."""
        return execute(session, self._read(partitions))

    def move(self, session: Session, steps: Mapping[Partition, Step]) -> set[Partition]:
        """Move each partition if it is where it is expected; give those that are not, and were left there."""
        return execute(session, self._move(steps))

    def _read(self, partitions: Collection[Partition]) -> Queries[dict[Partition, int]]:
        rows = yield Query(statement("consumer_offset_read", schema=self.schema), self._parameters(partitions))
        return {Partition(topic, number): next_offset for topic, number, next_offset in rows}

    def _move(self, steps: Mapping[Partition, Step]) -> Queries[set[Partition]]:
        parameters = self._parameters(steps) | {
            "expected_offsets": [step.expected_offset for step in steps.values()],
            "next_offsets": [step.next_offset for step in steps.values()],
        }
        rows = yield Query(statement("consumer_offset_move", schema=self.schema), parameters)
        return steps.keys() - {Partition(*row) for row in rows}

    def _parameters(self, partitions: Collection[Partition]) -> dict[str, object]:
        return {
            "consumer": self.consumer,
            "topics": [partition.topic for partition in partitions],
            "partitions": [partition.number for partition in partitions],
        }
