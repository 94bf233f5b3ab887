"""The inbox by sequence number: keeps one mark per key instead of one row per message."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from outbox_relay.consumer.inbox import Accepting, Batch, id_of, record
from outbox_relay.queries import Query
from outbox_relay.sql import statement

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from collections.abc import Set as AbstractSet
    from uuid import UUID

    from outbox_relay.consumer.inbox import Replays
    from outbox_relay.consumer.message import Message
    from outbox_relay.queries import Queries


class SequenceInbox(Accepting):
    """
    Tells a message's first delivery from the later ones by its number, which rises with each message of a key.

    It keeps O(keys) rows instead of O(messages), needs no pruning, and drops what is older than the last message
    consumed of its key, as a relay that was paused for long may still deliver it. Transactions, twins, isolation
    levels and errors are as with `Inbox`; each method has a twin for asyncio whose name ends in `_async`.

    A message that is unordered is deduplicated by its id, in the table of `Inbox` and under the same consumer: prune
    it with `Inbox(consumer).prune`. So is one of a replay that is applied; it moves no mark. A batch with such messages
    takes two round trips.

    Limits: it relies on the relay's promise of order, so messages of a key that are written beside the relay, or by a
    relay whose `on_poison` is changed between "park" and "skip" while messages are in flight, are dropped or doubled.
    A message that is left for later is dropped as stale once a newer one of its key was consumed.
    A source database that is restored to an earlier point draws numbers again that were used before: change `source`
    in the relay's settings, or new messages look like old ones. A message that is published both before and after the
    partition count of its topic was raised has two marks and is consumed twice: let the relays drain and stop first.

    Args:
        consumer: Who consumes. Several consumers share a table and do not see each other's marks.
        schema: Where the tables are; None leaves it to search_path.
        replays: "ignore": a replayed message is a delivery like any other, so that nearly always its number is not
            above the mark. "apply": it is fresh once for each replay, whatever the mark.
    """

    def _accept(self, messages: Sequence[Message]) -> Queries[Batch]:
        by_number = [message for message in messages if has_mark(message, replays=self.replays)]
        by_id = [message for message in messages if not has_mark(message, replays=self.replays)]
        marks = yield from self._raise_marks(by_number)
        unseen = yield from record(by_id, consumer=self.consumer, schema=self.schema, replays=self.replays)
        return decide(messages, marks=marks, unseen=unseen, replays=self.replays)

    def _raise_marks(self, messages: Sequence[Message]) -> Queries[dict[Key, int]]:
        """Raise the marks of all keys in *messages*, and give what they were before."""
        if not messages:
            return {}
        highest = _highest(messages)
        sources, topics, partitions, aggregate_types, keys = zip(*highest, strict=True)
        parameters = {
            "consumer": self.consumer,
            "sources": list(sources),
            "topics": list(topics),
            "partitions": list(partitions),
            "aggregate_types": list(aggregate_types),
            "keys": list(keys),
            "sequence_nos": list(highest.values()),
        }
        rows = yield Query(statement("inbox_raise_marks", schema=self.schema), parameters)
        return {Key(*key): mark for *key, mark in rows}


class Key(NamedTuple):
    """
    What numbers rise within; a named tuple because one is made for each message.

    The type belongs to it because types may share a topic, the partition because a raised partition count splits the
    history of a key.
    """

    source: str
    topic: str
    partition: int
    aggregate_type: str
    key: str


def has_mark(message: Message, *, replays: Replays) -> bool:
    """Tell whether *message* is known by its number: one that is unordered, or an applied replay, is so by its id."""
    return not message.is_unordered and (replays == "ignore" or message.replay is None)


def decide(
    messages: Iterable[Message], *, marks: Mapping[Key, int], unseen: AbstractSet[UUID], replays: Replays
) -> Batch:
    """
    Tell what is fresh among *messages*, which come in the order of delivery.

    Args:
        marks: The last number consumed of each key before; a key without one is new.
        unseen: Ids that were not recorded before, of the messages that have no mark.
    """
    batch = Batch()
    reached = dict(marks)
    remaining = set(unseen)
    for message in messages:
        key = _key_of(message)
        if not has_mark(message, replays=replays):
            recorded_id = id_of(message, replays=replays)
            is_fresh = recorded_id in remaining
            remaining.discard(recorded_id)
            (batch.fresh if is_fresh else batch.duplicates).append(message)
        elif message.sequence_no > reached.get(key, 0):
            reached[key] = message.sequence_no
            batch.fresh.append(message)
        elif message.sequence_no == reached[key]:
            batch.duplicates.append(message)
        else:
            batch.stale.append(message)
    return batch


def _highest(messages: Iterable[Message]) -> dict[Key, int]:
    highest: dict[Key, int] = {}
    for message in messages:
        key = _key_of(message)
        highest[key] = max(message.sequence_no, highest.get(key, 0))
    return highest


def _key_of(message: Message) -> Key:
    return Key(message.source, message.topic, message.partition, message.aggregate_type, message.key)
