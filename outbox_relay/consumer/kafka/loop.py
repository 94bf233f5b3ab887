"""
The loop: a batch of records, one transaction, then the offsets.

    fetch -> BEGIN -> (offsets) -> inbox -> effects -> COMMIT -> commit the offsets to Kafka -> again

Whatever fails is rolled back, and its partitions are read again from where they are not done. This file alone decides
what a failure means.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import psycopg
from psycopg import Connection

from outbox_relay.consumer.kafka.offsets import Partition, Step
from outbox_relay.consumer.kafka.reader import Reader, checked, partition_of
from outbox_relay.consumer.message import Message
from outbox_relay.consumer.record import message_from
from outbox_relay.errors import CommitOutcomeUnknown, ConfigurationError, ForeignRecord, PoisonMessage
from outbox_relay.transactions import Retry, transact

if TYPE_CHECKING:
    import threading
    from collections.abc import Mapping

    from confluent_kafka import Message as Record

    from outbox_relay.consumer.inbox import Batch
    from outbox_relay.consumer.kafka.offsets import Offsets
    from outbox_relay.queries import Session

_log = logging.getLogger("outbox_relay.consumer")

# What the server says when it takes no work from anybody: connections, resources, shutting down, disk, read-only.
_AWAY_STATES = ("08", "53", "57P", "58", "25006")

_RETRY = Retry(attempts=5, base_seconds=0.2, cap_seconds=10.0)
_WHOLE_RETRY = Retry(outcome_seconds=1.0)  # the inbox, or the offsets, tell later what became of a lost COMMIT

T = TypeVar("T")

Handle: TypeAlias = Callable[[Connection[Any], Sequence[Message]], object]
"""Does the effects of messages, which come in the order of their partitions, in the open transaction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Poison:
    """
    A record that could not be processed.

    Attributes:
        record: As it came from Kafka.
        message: None when no relay has written the record.
        error: What the last attempt failed with; a ForeignRecord when there is no message.
        attempts: How often it was tried.
    """

    record: Record
    message: Message | None
    error: Exception
    attempts: int


OnPoison: TypeAlias = Callable[[Connection[Any], Poison], object]
"""Puts a record aside, for example into a table of dead letters, in an open transaction of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchReport:
    """How many messages had their effects, were dropped as consumed before or as stale, or were put aside."""

    processed: int = 0
    duplicates: int = 0
    stale: int = 0
    poisoned: int = 0


class _Inbox(Protocol):
    """An `Inbox` or a `SequenceInbox`."""

    def accept_many(self, session: Session, messages: Sequence[Message], /) -> Batch: ...


class Consumer:
    """
    Consumes topics as a member of a group, with one effect per message.

    A batch is one transaction: the inbox drops what was consumed before, *handle* gets the rest. Only then are the
    offsets committed to Kafka. The transaction is repeated as a whole after a serialization failure or a deadlock, and
    a lost COMMIT is looked into (see `outbox_relay.transactions.transact`).

    While the database is away, the partitions are paused and the member stays in its group. A batch that *handle*
    fails on is rolled back and done again message by message: the guilty one is tried *retry.attempts* times, while its
    partition waits and the others flow; then it is poison. So is a foreign record, at once.

    Limits: a batch must be done within `max.poll.interval.ms` (5 minutes by default), or the group gives its partitions
    to others: give the connection a `statement_timeout` and a `connect_timeout`. A message that breaks the connection
    itself is taken for a database that is away and is tried for ever. A foreign record that is delivered twice is put
    aside twice, unless *offsets* are kept. Order across partitions is not kept.

    Args:
        config: librdkafka's settings; `group.id` is required. `auto.offset.reset` is earliest unless given.
        topics: Names, or regular expressions that begin with `^`.
        connect: Opens a connection to the database of the effects, with the inbox's tables. It is kept, replaced when
            it breaks, and closed at the end; its settings and errors are the caller's.
        inbox: What tells the first delivery of a message from later ones.
        handle: Does the effects of up to *batch_messages* messages, of one alone after a failure. May be called again
            with the same messages: so it has no effect but those in the transaction.
        batch_messages: Most records of one transaction, at least 1. More make each cheaper, and are more to repeat.
        offsets: Keeps the offsets in the database too. They decide then where a partition is read from, Kafka's are
            for watching the lag only.
        retry: How often a message is tried, and the pauses after failures. The database is waited for without end.
        on_poison: Called with poison in a transaction that records its message as consumed; then the loop goes on.
            None: the loop ends with PoisonMessage.
        on_batch: Called after each batch, for metrics.

    Raises:
        ConfigurationError: `group.id` is missing, a setting that is the loop's own has another value, or librdkafka is
            older than 2.13.2.
    """

    def __init__(
        self,
        config: Mapping[str, object],
        topics: Sequence[str],
        *,
        connect: Callable[[], Connection[Any]],
        inbox: _Inbox,
        handle: Handle,
        batch_messages: int = 500,
        offsets: Offsets | None = None,
        retry: Retry = _RETRY,
        on_poison: OnPoison | None = None,
        on_batch: Callable[[BatchReport], object] | None = None,
    ) -> None:
        self._config = checked(config)
        self._topics = topics
        self._database = _Database(connect)
        self._inbox = inbox
        self._handle = handle
        self._batch_messages = batch_messages
        self._offsets = offsets
        self._retry = retry
        self._on_poison = on_poison
        self._on_batch = on_batch
        self._counts: Counter[str] = Counter()
        self._failures: dict[Partition, int] = {}
        self._expected: dict[Partition, int | None] = {}
        self._losses = 0
        self._away_until = 0.0

    def run(self, stop: threading.Event) -> None:
        """
        Consume until *stop* is set; the batch in hand is finished, its offsets are committed, and the group is left.

        That takes as long as the batch; should Kafka be away, up to `session.timeout.ms` longer.

        Raises:
            PoisonMessage: A message failed in every attempt, and there is no *on_poison*. All before it is committed.
            SchemaMismatch: The inbox's tables are missing, or a grant on them.
            KafkaException: The client has failed for good, or librdkafka refuses the settings.
            Exception: Whatever *on_poison* or *on_batch* raised.
        """
        with (
            closing(self._database),
            closing(Reader(self._config, self._topics, on_gone=self._forget)) as reader,
        ):
            while not stop.is_set():
                self._turn(reader)

    def _turn(self, reader: Reader) -> None:
        records = reader.fetch(self._batch_messages)
        partitions = {partition_of(record) for record in records}
        if self._losses:
            reader.hold(partitions)
            self._look_for_database(reader)
            return
        try:
            self._process(reader, self._placed(reader, records))
        except _DatabaseAway as away:
            self._lose_database(away)
            reader.hold(partitions)
        except _Fenced as fenced:
            _log.warning("rolled back, since another consumer has moved the offsets of %s", sorted(fenced.partitions))
            for partition in fenced.partitions:
                del self._expected[partition]
            reader.hold(partitions, seconds=0)
        finally:
            reader.commit()
            self._report()

    def _placed(self, reader: Reader, records: list[Record]) -> list[Record]:
        """Let partitions that have come to us go on where the database says; give the records that are still right."""
        unplaced = reader.reading - self._expected.keys()
        if self._offsets is None or not unplaced:
            return records
        offsets = self._offsets
        stored = self._database.transact(lambda connection: offsets.read(connection, unplaced))
        for partition in unplaced:
            self._expected[partition] = stored.get(partition)
        for partition, offset in stored.items():
            reader.move(partition, offset)
        return [record for record in records if partition_of(record) not in stored]

    def _process(self, reader: Reader, records: Sequence[Record]) -> None:
        """Do the effects of *records*: together, or one by one if one of them fails."""
        if any(partition_of(record) in self._failures for record in records):
            self._process_singly(reader, records)
            return
        try:
            self._process_together(reader, records)
        except (_Interruption, ConfigurationError):
            raise
        except Exception as error:  # noqa: BLE001 -- whatever the caller's code raises
            _log.info("a batch of %s messages failed, they are done one by one: %r", len(records), error)
            self._process_singly(reader, records)

    def _process_singly(self, reader: Reader, records: Sequence[Record]) -> None:
        for record in records:
            if reader.is_held(partition_of(record)):
                continue  # behind one that failed
            try:
                self._process_together(reader, [record])
            except (_Interruption, ConfigurationError):
                raise
            except Exception as error:  # noqa: BLE001 -- whatever the caller's code raises
                self._fail(reader, record, error)
            else:
                self._failures.pop(partition_of(record), None)

    def _process_together(self, reader: Reader, records: Sequence[Record]) -> None:
        if not records:
            return
        messages = [message_from(record) for record in records]
        batch = self._transact(reader, records, lambda connection: self._accept(connection, messages))
        self._counts += Counter(processed=len(batch.fresh), duplicates=len(batch.duplicates), stale=len(batch.stale))

    def _accept(self, connection: Connection[Any], messages: Sequence[Message]) -> Batch:
        batch = self._inbox.accept_many(connection, messages)
        if batch.fresh:
            self._handle(connection, batch.fresh)
        return batch

    def _transact(self, reader: Reader, records: Sequence[Record], work: Callable[[Connection[Any]], T]) -> T:
        """Give the result of *work*, committed with the offsets behind *records*."""
        ends = {partition_of(record): (record.offset() or 0) + 1 for record in records}

        def whole(connection: Connection[Any]) -> T:
            if self._offsets is not None:
                steps = {partition: Step(self._expected[partition], end) for partition, end in ends.items()}
                if elsewhere := self._offsets.move(connection, steps):
                    raise _Fenced(elsewhere)
            return work(connection)

        result = self._database.transact(whole)
        self._expected |= ends
        reader.done(ends)
        return result

    def _fail(self, reader: Reader, record: Record, error: Exception) -> None:
        """Let the partition of a failed record wait, or give the record up."""
        partition = partition_of(record)
        failures = self._failures.get(partition, 0) + 1
        if failures < self._retry.attempts and not isinstance(error, ForeignRecord):
            pause = self._retry.pause_seconds(failures, fraction=random.random())  # noqa: S311 -- jitter
            _log.warning("%s failed (attempt %s): %r", _place(record), failures, error)
            self._failures[partition] = failures
            reader.hold([partition], seconds=pause)
            return
        message = None if isinstance(error, ForeignRecord) else message_from(record)
        self._give_up(reader, Poison(record=record, message=message, error=error, attempts=failures))
        self._failures.pop(partition, None)

    def _give_up(self, reader: Reader, poison: Poison) -> None:
        on_poison = self._on_poison
        named = f"message {poison.message.message_id} at " if poison.message else ""
        said = f"{named}{_place(poison.record)} failed in {poison.attempts} attempts: {poison.error!r}"
        if on_poison is None:
            raise PoisonMessage(
                f"{said}; mend what it failed on, or give an on_poison to put it aside"
            ) from poison.error
        _log.error("put aside: %s", said)

        def put_aside(connection: Connection[Any]) -> bool:
            is_fresh = poison.message is None or self._inbox.accept_many(connection, [poison.message]).fresh != []
            if is_fresh:
                on_poison(connection, poison)
            return is_fresh

        is_fresh = self._transact(reader, [poison.record], put_aside)
        self._counts["poisoned" if is_fresh else "duplicates"] += 1

    def _forget(self, partition: Partition) -> None:
        self._failures.pop(partition, None)
        self._expected.pop(partition, None)

    def _lose_database(self, error: _DatabaseAway) -> None:
        self._losses += 1
        if self._losses == 1:
            _log.warning("the database is away, partitions are paused until it is back: %s", error)
        pause = self._retry.pause_seconds(self._losses, fraction=random.random())  # noqa: S311 -- jitter
        self._away_until = time.monotonic() + pause

    def _look_for_database(self, reader: Reader) -> None:
        """Try a transaction when it is time; if it commits, let the partitions flow again."""
        if time.monotonic() < self._away_until:
            return
        try:
            self._database.transact(lambda connection: connection.execute("SELECT"))
        except _DatabaseAway as away:
            self._lose_database(away)
            return
        _log.info("the database is back after %s failures", self._losses)
        self._losses = 0
        reader.release()

    def _report(self) -> None:
        if self._counts and self._on_batch:
            self._on_batch(BatchReport(**self._counts))
        self._counts.clear()


class _Interruption(Exception):
    """A transaction was rolled back for a reason that is none of its messages'."""


class _DatabaseAway(_Interruption):
    """Nothing can be done until the database is back."""


class _Fenced(_Interruption):
    """Somebody else has moved the offsets of *partitions*."""

    def __init__(self, partitions: set[Partition]) -> None:
        super().__init__(partitions)
        self.partitions = partitions


class _Database:
    """The loop's one connection, in the shape of a pool, so that `transact` can ask what became of a lost COMMIT."""

    def __init__(self, connect: Callable[[], Connection[Any]]) -> None:
        self._connect = connect
        self._connection: Connection[Any] | None = None
        self._is_lost = False

    def getconn(self) -> Connection[Any]:
        if self._connection is None:
            try:
                self._connection = self._connect()
            except psycopg.Error as error:
                raise _DatabaseAway(str(error)) from error
            self._is_lost = False
        return self._connection

    def putconn(self, connection: Connection[Any]) -> None:
        if connection.closed:
            self._connection = None
            self._is_lost = True

    def transact(self, work: Callable[[Connection[Any]], T]) -> T:
        """
        Give the result of *work*, committed.

        Raises:
            _DatabaseAway: There is no connection, or the server takes no work now, or it cannot be asked about a lost
                COMMIT: the inbox will tell, once it can be.
        """
        try:
            return transact(self, work, retry=_WHOLE_RETRY)
        except _Interruption:
            raise
        except Exception as error:
            if self._is_lost or isinstance(error, CommitOutcomeUnknown) or _is_away(error):
                self.close()
                raise _DatabaseAway(str(error)) from error
            raise

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _is_away(error: Exception) -> bool:
    return isinstance(error, psycopg.Error) and (error.sqlstate or "").startswith(_AWAY_STATES)


def _place(record: Record) -> str:
    return f"offset {record.offset()} of {record.topic()}[{record.partition()}]"
