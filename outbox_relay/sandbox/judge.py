"""
The judge of a run: what writers committed, what the table says and what Kafka holds, turned into verdicts.

The words are those of Jepsen's set checkers: lost, unexpected, duplicated, recovered. It does not know how the
relay works.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from dataclasses import dataclass, fields, replace
from functools import lru_cache, reduce
from operator import attrgetter, xor
from typing import TYPE_CHECKING

from outbox_relay.sandbox.history import Outcome, State

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from outbox_relay.sandbox.history import History, Hold, Mark, Record, Row, Write

    Messages = tuple[str, ...]
    Marks = tuple[tuple[int, int], ...]
    Effects = tuple[tuple[str, str], ...]

_BROKEN_PROMISES = (
    "lost",
    "unexpected",
    "reordered",
    "false_mark",
    "miscounted",
    "corrupted",
    "misplaced",
    "unheld",
    "excessive",
    "effect_lost",
    "effect_unexpected",
    "effect_repeated",
    "effect_reordered",
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """
    What became of the messages, as message ids, of marks, and of effects.

    A mark is a pair of shard and number, an effect one of consumer and message id.

    Attributes:
        published: Distinct messages in Kafka, whoever wrote them.
        parked: Committed, not in Kafka, and the relay says that it put them aside.
        skipped: Committed, not in Kafka, and the audit table says that an operator wanted it so.
        recovered: The writer does not know whether it committed; table and Kafka agree that it did.
        duplicated: One entry for each record beyond a message's first.
        replayed: One entry for each record that an operator had published once more.
        given_up: In Kafka with the header `unordered`: the relay did not wait for them and says so.
        lost: Committed, but neither in Kafka nor parked nor skipped.
        unexpected: In Kafka, although no transaction committed it.
        reordered: First of its message in Kafka, but behind a record of its key with a higher sequence number.
        false_mark: The marks say published, Kafka does not have it.
        miscounted: Marks that have counted other messages than there are.
        corrupted: Key, value, headers or sequence number in Kafka differ from what was written.
        misplaced: In another partition than that which Java's producers choose for the key.
        unheld: Published while an earlier message of its key was parked.
        excessive: Those duplicates that the faults of the run do not account for.
        effect_lost: Published, but without an effect of this consumer.
        effect_unexpected: An effect of what is not in Kafka.
        effect_repeated: One entry for each effect beyond a message's first.
        effect_reordered: After that of a later message of its key.
    """

    writes: Mapping[Outcome, int]
    published: int
    parked: Messages = ()
    recovered: Messages = ()
    duplicated: Messages = ()
    given_up: Messages = ()
    lost: Messages = ()
    unexpected: Messages = ()
    reordered: Messages = ()
    false_mark: Messages = ()
    miscounted: Marks = ()
    corrupted: Messages = ()
    skipped: Messages = ()
    replayed: Messages = ()
    misplaced: Messages = ()
    unheld: Messages = ()
    excessive: Messages = ()
    effect_lost: Effects = ()
    effect_unexpected: Effects = ()
    effect_repeated: Effects = ()
    effect_reordered: Effects = ()

    @property
    def is_correct(self) -> bool:
        """Whether every promise was kept; a duplicate that a fault accounts for breaks none."""
        return not self.broken_promises()

    def broken_promises(self) -> dict[str, int]:
        """How many messages, marks or effects each broken promise concerns; nothing when all were kept."""
        return {word: count for word in _BROKEN_PROMISES if (count := len(getattr(self, word)))}

    def counts(self) -> dict[str, int]:
        """How many messages, marks or effects each word applies to, by name."""
        counts = {outcome.value: self.writes.get(outcome, 0) for outcome in Outcome} | {"published": self.published}
        return counts | {word.name: len(getattr(self, word.name)) for word in fields(self)[2:]}


def judge(history: History) -> Verdict:
    """Compare what was committed with what was published. Linear in the history, but for a sort by offset."""
    writes = {write.message_id: write for write in history.writes}
    rows = {row.message_id: row for row in history.rows}
    records = sorted(history.records, key=attrgetter("topic", "partition", "offset"))
    deliveries = [record for record in records if not record.is_replay]
    replayed = tuple(record.message_id for record in records if record.is_replay)
    firsts = _first_of_each_message(deliveries)
    seen = firsts.keys() | set(replayed)

    committed = {message_id for message_id, write in writes.items() if write.outcome is Outcome.COMMITTED}
    unknown = {message_id for message_id, write in writes.items() if write.outcome is Outcome.UNKNOWN}
    recovered = unknown & seen & (rows.keys() if history.rows_are_kept else seen)
    missing = (committed | (unknown & rows.keys())) - firsts.keys()
    states = {message_id: rows[message_id].state for message_id in missing & rows.keys()}
    parked = {message_id for message_id, state in states.items() if state is State.PARKED}
    skipped = {message_id for message_id, state in states.items() if state is State.SKIPPED}
    duplicated = tuple(record.message_id for record in deliveries if firsts[record.message_id] is not record)

    verdict = Verdict(
        writes=Counter(write.outcome for write in history.writes),
        published=len(firsts),
        parked=_sorted(parked),
        recovered=_sorted(recovered),
        duplicated=duplicated,
        given_up=tuple(record.message_id for record in firsts.values() if record.is_unordered),
        lost=_sorted(missing - parked - skipped),
        unexpected=_sorted(seen - committed - recovered),
        reordered=_reordered(firsts.values()),
        false_mark=_sorted(row.message_id for row in _published(history.rows) if row.message_id not in firsts),
        miscounted=tuple(_miscounted(history)),
        corrupted=_sorted({r.message_id for r in records if _is_corrupted(r, writes=writes, rows=rows)}),
        skipped=_sorted(skipped),
        replayed=replayed,
        misplaced=_sorted(_misplaced(records, partition_counts=history.partition_counts)),
        unheld=_sorted(_unheld(deliveries, holds=history.holds)),
        excessive=() if history.most_duplicates is None else duplicated[history.most_duplicates :],
    )
    return _with_effects(verdict, history, firsts=firsts)


def partition_of(key: str, *, partitions: int) -> int:
    """Give the partition that Java's producers choose for a key."""
    return (_murmur2(key) & 0x7FFFFFFF) % partitions


def _first_of_each_message(records: Iterable[Record]) -> dict[str, Record]:
    firsts: dict[str, Record] = {}
    for record in records:
        firsts.setdefault(record.message_id, record)
    return firsts


def _reordered(firsts: Iterable[Record]) -> Messages:
    """Order is promised per key within a partition: a changed number of partitions splits a key's history."""
    newest: dict[tuple[str, int, str, str], int] = {}
    reordered = []
    for record in firsts:
        if record.is_unordered:
            continue
        place = (record.topic, record.partition, record.aggregate_type, record.key)
        if record.sequence_no < newest.get(place, record.sequence_no):
            reordered.append(record.message_id)
        else:
            newest[place] = record.sequence_no
    return tuple(reordered)


def _is_corrupted(record: Record, *, writes: Mapping[str, Write], rows: Mapping[str, Row]) -> bool:
    write, row = writes.get(record.message_id), rows.get(record.message_id)
    return (
        write is not None
        and (record.key, record.digest, record.headers) != (write.key, write.digest, write.headers or record.headers)
    ) or (row is not None and (record.key, record.sequence_no) != (row.key, row.sequence_no))


def _miscounted(history: History) -> Iterator[tuple[int, int]]:
    """Compare each mark with the rows above the one before it; what somebody has taken out may be missing."""
    rows: defaultdict[int, list[Row]] = defaultdict(list)
    for row in sorted(history.rows, key=attrgetter("sequence_no")):
        rows[row.shard].append(row)
    reached: defaultdict[int, int] = defaultdict(int)
    for mark in history.marks:
        begin, end = reached[mark.shard], bisect_left(rows[mark.shard], mark.through + 1, key=attrgetter("sequence_no"))
        if not _agrees(mark, rows[mark.shard][begin:end], rows_are_kept=history.rows_are_kept):
            yield mark.shard, mark.through
        reached[mark.shard] = end


def _agrees(mark: Mark, passed: Sequence[Row], *, rows_are_kept: bool) -> bool:
    numbers = [row.sequence_no for row in passed if row.is_counted and row.state is not State.SKIPPED]
    if len(numbers) < mark.messages:
        return not rows_are_kept or any(row.state is State.SKIPPED for row in passed)
    return len(numbers) == mark.messages and reduce(xor, numbers, 0) == mark.checksum


def _misplaced(records: Iterable[Record], *, partition_counts: Mapping[str, Collection[int]]) -> set[str]:
    """The number of partitions may grow during a run; a record fits when it fits one of the numbers there were."""
    return {
        record.message_id
        for record in records
        if record.topic in partition_counts
        and all(
            record.partition != partition_of(record.key, partitions=count) for count in partition_counts[record.topic]
        )
    }


def _unheld(deliveries: Iterable[Record], *, holds: Iterable[Hold]) -> set[str]:
    held: defaultdict[tuple[str, str], list[Hold]] = defaultdict(list)
    for hold in holds:
        held[hold.aggregate_type, hold.key].append(hold)
    return {
        record.message_id
        for record in deliveries
        if not record.is_unordered
        and any(_forbids(hold, record) for hold in held.get((record.aggregate_type, record.key), ()))
    }


def _forbids(hold: Hold, record: Record) -> bool:
    place = record.place
    return (
        record.sequence_no > hold.sequence_no
        and record.offset >= hold.begins.get(place, 0)
        and (hold.ends is None or record.offset < hold.ends.get(place, 0))
    )


def _with_effects(verdict: Verdict, history: History, *, firsts: Mapping[str, Record]) -> Verdict:
    """Judge each consumer by what is published; its effects, too, may be late where a message is."""

    def found(find: Callable[[Sequence[str]], Iterable[str]]) -> Effects:
        return tuple(
            (consumer, message_id) for consumer, effects in history.effects.items() for message_id in find(effects)
        )

    return replace(
        verdict,
        effect_lost=found(lambda effects: _sorted(firsts.keys() - effects)),
        effect_unexpected=found(lambda effects: (each for each in effects if each not in firsts)),
        effect_repeated=found(_repeated),
        effect_reordered=found(
            lambda effects: _reordered(firsts[each] for each in dict.fromkeys(effects) if each in firsts)
        ),
    )


def _repeated(effects: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for message_id in effects:
        if message_id in seen:
            yield message_id
        seen.add(message_id)


def _published(rows: Iterable[Row]) -> Iterable[Row]:
    return (row for row in rows if row.state is State.PUBLISHED)


def _sorted(message_ids: Iterable[str]) -> Messages:
    return tuple(sorted(message_ids))


@lru_cache(maxsize=100_000)
def _murmur2(key: str) -> int:
    """Hash the UTF-8 of *key*, as `org.apache.kafka.common.utils.Utils.murmur2` does, but without a sign."""
    data = key.encode()
    factor, mask = 0x5BD1E995, 0xFFFFFFFF
    mixed = 0x9747B28C ^ len(data)
    whole = len(data) & ~3
    for position in range(0, whole, 4):
        word = int.from_bytes(data[position : position + 4], "little") * factor & mask
        mixed = mixed * factor & mask ^ (word ^ word >> 24) * factor & mask
    if rest := data[whole:]:
        mixed = (mixed ^ int.from_bytes(rest, "little")) * factor & mask
    mixed = (mixed ^ mixed >> 13) * factor & mask
    return mixed ^ mixed >> 15
