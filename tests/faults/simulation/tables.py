"""What PostgreSQL keeps, in the simulation: the rows of the relay's tables, and what they say of a message."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import reduce
from operator import xor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from outbox_relay.relay.message import Key, Message
    from outbox_relay.relay.settle import PendingState


@dataclass(slots=True)
class Row:
    """A row of the outbox, with the transaction that has written it; gone if it was rolled back or deleted."""

    message: Message
    xid: int
    is_committed: bool = False
    is_gone: bool = False

    @property
    def number(self) -> int:
        return self.message.sequence_no

    @property
    def is_there(self) -> bool:
        """Whether others see it."""
        return self.is_committed and not self.is_gone


@dataclass(frozen=True, slots=True)
class Pending:
    """A row of outbox_pending."""

    state: PendingState
    is_unordered: bool


@dataclass(slots=True)
class Unordered:
    """A row of outbox_unordered; its last number is known once its messages are collected."""

    from_no: int
    to_no: int | None = None


@dataclass(frozen=True, slots=True)
class Mark:
    """A row of outbox_published."""

    through: int
    messages: int
    checksum: int


def mark_of(rows: Sequence[Row], *, through: int) -> Mark:
    """The mark that counts these rows."""
    return Mark(through, len(rows), reduce(xor, (row.number for row in rows), 0))


@dataclass
class Tables:
    """The rows of all tables, by their numbers, shards or transactions, and what was given away last."""

    rows: dict[int, Row] = field(default_factory=dict)
    marks: dict[int, list[Mark]] = field(default_factory=dict)
    pending: dict[int, Pending] = field(default_factory=dict)
    unordered: dict[int, Unordered] = field(default_factory=dict)
    last_no: int = 0
    next_xid: int = 3

    def copy(self) -> Tables:
        return replace(
            self,
            rows={number: replace(row) for number, row in self.rows.items()},
            marks={shard: list(marks) for shard, marks in self.marks.items()},
            pending=dict(self.pending),
            unordered={xid: replace(record) for xid, record in self.unordered.items()},
        )

    def newest_mark(self, shard: int) -> int:
        return self.marks[shard][-1].through if self.marks.get(shard) else 0

    @property
    def highest_mark(self) -> int:
        return max((marks[-1].through for marks in self.marks.values()), default=0)

    def between(self, shard: int, *, after: int, through: int) -> Iterator[Row]:
        """The rows of a range of numbers, seen or not, in their order."""
        for number, row in sorted(self.rows.items()):
            if row.message.shard == shard and after < number <= through:
                yield row

    def earlier(self, row: Row) -> Iterator[Row]:
        """The rows of the same key with lower numbers."""
        for number, each in self.rows.items():
            if number < row.number and each.message.key == row.message.key:
                yield each

    def waiting(self, pending: dict[int, Pending]) -> Iterator[Row]:
        """The rows of those in *pending* that wait."""
        return (self.rows[number] for number, each in sorted(pending.items()) if each.state == "waiting")

    def parked(self, key: Key) -> list[int]:
        """The numbers of the messages of a key that are parked."""
        return [
            number
            for number, each in self.pending.items()
            if each.state == "parked" and self.rows[number].message.key == key
        ]

    def is_late(self, row: Row) -> bool:
        """Whether no mark may count it, for its writer was given up on."""
        record = self.unordered.get(row.xid)
        return (
            record is not None and row.number > record.from_no and (record.to_no is None or row.number <= record.to_no)
        )

    def is_settled(self, row: Row) -> bool:
        """Whether the tables say so."""
        if row.number in self.pending:
            return self.pending[row.number].state == "parked"
        if self.is_late(row):
            return self.unordered[row.xid].to_no is not None
        return row.number <= self.newest_mark(row.message.shard)
