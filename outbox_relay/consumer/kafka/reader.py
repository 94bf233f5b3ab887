"""The loop's side to Kafka: fetches records, holds partitions back, commits how far they are done."""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING

import confluent_kafka
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from outbox_relay.consumer.kafka.offsets import Partition
from outbox_relay.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from confluent_kafka import Message as Record

_log = logging.getLogger("outbox_relay.consumer")

_POLL_SECONDS = 0.2
_OURS = {
    "enable.auto.commit": (False, "offsets are committed after the effects, or a crash would lose messages"),
    "enable.auto.offset.store": (False, "offsets are committed after the effects, or a crash would lose messages"),
    "enable.partition.eof": (True, "the end of a partition shows that it is being read, and may be paused"),
}
OLDEST_VERSION = 2, 13, 2  # of librdkafka; see its changelog
_TRUE, _FALSE = {"true", "t", "1"}, {"false", "f", "0"}


def checked(config: Mapping[str, object]) -> dict[str, object]:
    """
    Complete librdkafka's settings in *config*.

    Raises:
        ConfigurationError: `group.id` is missing, a setting that is ours has another value, or librdkafka is so old
            that the end of one partition in a batch moves the position in another, past messages.
    """
    text, number = confluent_kafka.libversion()
    if tuple(number.to_bytes(4)[:3]) < OLDEST_VERSION:
        raise ConfigurationError(
            f"librdkafka {text} can pass over messages: pip install 'outbox-relay[kafka]', which needs "
            f"{'.'.join(map(str, OLDEST_VERSION))} or newer"
        )
    if not config.get("group.id"):
        raise ConfigurationError("group.id is not set: name the group that shares the topics among its members")
    for name, (value, reason) in _OURS.items():
        if name in config and str(config[name]).lower() not in (_TRUE if value else _FALSE):
            raise ConfigurationError(f"{name} = {config[name]!r} is refused: {reason}; remove it")
    ours = {name: value for name, (value, _) in _OURS.items()}
    return {"auto.offset.reset": "earliest", "logger": _log, **config, **ours}


def partition_of(record: Record) -> Partition:
    """Give the partition that *record* comes from."""
    return Partition(record.topic() or "", record.partition() or 0)


class Reader:
    """
    One member of a consumer group, used by one thread.

    Rebalances are told by librdkafka only inside `fetch` and `close`, when no record is being processed: so of a
    partition that goes away nothing is in hand but what the same `fetch` has just taken, and that is dropped.

    Nothing is paused or sought in a partition before a record, or its end, was seen: until librdkafka has begun to
    read it, either would make it forget to (librdkafka issues 2190 and 5591). And nothing is resumed that was not
    paused: it could be read from somewhere else, or not at all (4686).

    Attributes:
        reading: Partitions that are ours and being read.
    """

    def __init__(
        self, config: Mapping[str, object], topics: Sequence[str], *, on_gone: Callable[[Partition], None]
    ) -> None:
        self.reading: set[Partition] = set()
        self._positions: dict[Partition, int] = {}
        self._uncommitted: set[Partition] = set()
        self._held_until: dict[Partition, float] = {}
        self._gone: set[Partition] = set()
        self._on_gone = on_gone
        self._client = confluent_kafka.Consumer(dict(config))
        self._client.subscribe(list(topics), on_revoke=self._hand_over, on_lost=self._forget)

    def fetch(self, limit: int) -> list[Record]:
        """
        Wait up to 0.2 s for a record, and give it with those that have arrived behind it, at most *limit*.

        Raises:
            KafkaException: The client has failed for good, or a callback of the user's did.
        """
        first = self._client.poll(self._release_due())
        if first is None:
            return []
        self._gone.clear()
        fetched = self._client.consume(limit - 1, 0)
        if partition_of(first) not in self._gone:
            fetched.insert(0, first)
        records = [record for record in fetched if self._is_record(record)]
        for record in records:
            self._positions.setdefault(partition_of(record), record.offset() or 0)
        return records

    def done(self, positions: Mapping[Partition, int]) -> None:
        """Note that everything before *positions* need not be read again; `commit` tells Kafka."""
        self._positions.update(positions)
        self._uncommitted.update(positions)

    def commit(self) -> None:
        """Tell Kafka what is done. What it does not take is committed with the next batch, or delivered again."""
        if not self._uncommitted:
            return
        offsets = [TopicPartition(*partition, self._positions[partition]) for partition in self._uncommitted]
        try:
            answers = self._client.commit(offsets=offsets, asynchronous=False)
        except KafkaException as error:
            _log.warning("offsets not committed, messages may be delivered again: %s", error.args[0].str())
        else:
            self._uncommitted = {Partition(refused.topic, refused.partition) for refused in answers if refused.error}

    def hold(self, partitions: Iterable[Partition], *, seconds: float = math.inf) -> None:
        """Read nothing from *partitions* for so long, or until `release`; then go on where they are not done yet."""
        for partition in set(partitions) - self._held_until.keys():
            position = TopicPartition(*partition, self._positions[partition])
            self._client.pause([position])  # before seeking: it moves the position behind what was fetched
            self._client.seek(position)
            self._held_until[partition] = time.monotonic() + seconds

    def release(self) -> None:
        """Let those partitions flow again that are held without a limit."""
        self._held_until = {
            partition: 0.0 if until == math.inf else until for partition, until in self._held_until.items()
        }

    def is_held(self, partition: Partition) -> bool:
        """Whether nothing is read from *partition* for now."""
        return partition in self._held_until

    def move(self, partition: Partition, offset: int) -> None:
        """Go on reading *partition* at *offset*, all before which is done."""
        self._client.seek(TopicPartition(*partition, offset))
        self.done({partition: offset})

    def close(self) -> None:
        """Leave the group, so that others take over at once."""
        self._client.close()

    def _release_due(self) -> float:
        """Let partitions flow whose time is over; give the seconds until the next one's, 0.2 at most."""
        now = time.monotonic()
        due = [partition for partition, until in self._held_until.items() if until <= now]
        if due:
            self._client.resume([TopicPartition(*partition) for partition in due])
        for partition in due:
            del self._held_until[partition]
        return min([_POLL_SECONDS, *(until - now for until in self._held_until.values())])

    def _is_record(self, fetched: Record) -> bool:
        """Tell a record from an event; an event that ends everything is raised, what librdkafka mends is logged."""
        error = fetched.error()
        if error is None or error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 -- librdkafka's name
            self.reading.add(partition_of(fetched))
            return error is None
        if error.fatal():
            raise KafkaException(error)
        _log.warning("Kafka reports %s: %s", error.name(), error.str())
        return False

    def _hand_over(self, client: confluent_kafka.Consumer, revoked: list[TopicPartition]) -> None:
        """
        Commit what Kafka has refused so far, before partitions go to another member.

        While a group agrees on its new members, Kafka takes no offsets of the old generation (ILLEGAL_GENERATION,
        REBALANCE_IN_PROGRESS). Under the cooperative protocol members consume meanwhile, so that this happens at
        nearly every rebalance. Here the member is of a generation that may commit, and still owns the partitions.
        """
        self.commit()
        self._forget(client, revoked)

    def _forget(self, client: confluent_kafka.Consumer, revoked: list[TopicPartition]) -> None:
        """Drop all that is known of partitions that are ours no longer; their offsets are for their new owner."""
        for gone in revoked:
            partition = Partition(gone.topic, gone.partition)
            if partition in self._held_until:  # or it would still be paused when it comes back
                client.resume([gone])
            self._gone.add(partition)
            self.reading.discard(partition)
            self._uncommitted.discard(partition)
            self._positions.pop(partition, None)
            self._held_until.pop(partition, None)
            self._on_gone(partition)
