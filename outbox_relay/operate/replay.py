"""Replay: publish messages once more that are published already, while relays run, and record who did it and why."""

from __future__ import annotations

import json
import re
import time
from bisect import bisect_left
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from heapq import heappush, heappushpop
from typing import TYPE_CHECKING, NamedTuple

from psycopg import ClientCursor

from outbox_relay.database import translated_errors
from outbox_relay.errors import KafkaUnavailable, OperationRefused
from outbox_relay.relay.failures import Scope, Unpublishable
from outbox_relay.relay.message import Message
from outbox_relay.relay.settle import decide
from outbox_relay.sql import numbers, statement

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from datetime import datetime

    from psycopg import Connection
    from psycopg.rows import TupleRow

    from outbox_relay.operate.parked import Note
    from outbox_relay.relay.failures import Failure
    from outbox_relay.relay.message import Addressing, Record
    from outbox_relay.relay.publish import Publisher

LARGEST_NUMBER = 2**63 - 1

_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")

# A writer draws the id of a message and right after it the number. So a message has at most as many before it by id
# that follow it by number as there were other writers between their two draws: never more than max_connections.
_MOST_WRITERS = 10_000
_MARGIN_MESSAGES = 100_000  # that are inserted while one writer is between its two draws, at the very most
_ROWS_LOOKED_AT = 5_000
_MOST_CHUNK_MESSAGES = 500
_MOST_CHUNK_BYTES = 8 * 1024 * 1024
_CHUNKS_PER_SECOND = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """
    Which published messages, and where they go; all that is given has to apply, and nothing given is all of them.

    Attributes:
        keys: Aggregate types and ids.
        aggregate_types: Of one of these.
        topics: Of the types that are published to one of these, by today's settings.
        first_no: Lowest sequence number.
        last_no: Highest sequence number.
        since: Created at this time or later.
        until: Created before this time.
        to_topic: Where all of them go; None: where they went before.
    """

    keys: tuple[tuple[str, str], ...] = ()
    aggregate_types: tuple[str, ...] = ()
    topics: tuple[str, ...] = ()
    first_no: int = 1
    last_no: int = LARGEST_NUMBER
    since: datetime | None = None
    until: datetime | None = None
    to_topic: str | None = None

    def as_json(self) -> str:
        """Give the text that tells this selection from others."""
        return json.dumps(asdict(self), default=str)


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """
    How fast to go, and the server's time-outs for each transaction, in seconds.

    Attributes:
        schema: Where the outbox is.
        rate: Most messages a second.
        publish_deadline: From sending some messages to the last acknowledgement of them.
    """

    schema: str = "public"
    rate: float = 1000.0
    publish_deadline: float = 15.0
    lock_timeout: float = 2.0
    statement_timeout: float = 30.0
    transaction_timeout: float = 30.0

    @property
    def chunk_messages(self) -> int:
        """How many messages go out together: a tenth of a second's, so that they come evenly."""
        return max(1, min(_MOST_CHUNK_MESSAGES, int(self.rate / _CHUNKS_PER_SECOND)))


class Found(NamedTuple):
    """A message to be replayed, without its payload; in the order of its number."""

    sequence_no: int
    id: int
    aggregate_type: str
    created_at: datetime
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class Progress:
    """
    How far a replay has come.

    Attributes:
        messages: Acknowledged by Kafka.
        reached_no: Everything selected up to this number was acknowledged.
    """

    messages: int = 0
    reached_no: int = 0
    is_finished: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """
    What a replay will do, or what is left of one that was interrupted.

    Attributes:
        published_before: What was published later is no part of it.
        progress: How far it came before; None if it has not begun.
        topics: How many messages go to each topic.
        aggregate_types: Of the messages.
        first: The message with the lowest number; None if there is nothing to replay.
        last: The message with the highest number.
    """

    name: str
    selection: Selection
    published_before: datetime
    progress: Progress | None
    topics: Mapping[str, int]
    aggregate_types: Sequence[str]
    first: Found | None
    last: Found | None

    @property
    def messages(self) -> int:
        """How many are to be published."""
        return sum(self.topics.values())


@dataclass(slots=True)
class Pace:
    """Keeps to *rate* messages a second; it is told the time."""

    rate: float
    next_at: float = 0.0

    def pause_before(self, messages: int, *, now: float) -> float:
        """Give the seconds to wait before the next *messages*, so that those before them have had their time."""
        start = max(now, self.next_at)
        self.next_at = start + messages / self.rate
        return start - now


def is_name(text: str) -> bool:
    """Tell whether a replay may be called *text*."""
    return _NAME.fullmatch(text) is not None


def plan_replay(
    connection: Connection, *, options: ReplayOptions, name: str, selection: Selection, addressing: Addressing
) -> Plan:
    """
    Look what *selection* comes to; a replay of this *name* that was interrupted will go on where it stopped.

    *connection* is in autocommit mode, here and for `publish_again`.

    Raises:
        OperationRefused: The name was used for another selection or is finished, or a topic may not be written to.
        DatabaseUnavailable: The connection broke.
        DatabaseConflict: A lock or a time-out ended a look.
        SchemaMismatch: The migrations are not applied, or the role lacks `outbox_operator`.
    """
    outbox = _Outbox(connection, options)
    published_before, progress = outbox.begun(name, selection)
    after_no = progress.reached_no if progress else 0
    counts: Counter[str] = Counter()
    firsts: dict[str, Found] = {}
    lasts: dict[str, Found] = {}
    for found in outbox.find(
        selection,
        published_before=published_before,
        after_no=after_no,
        aggregate_types=selection.aggregate_types or None,
    ):
        aggregate_type = found.aggregate_type
        counts[aggregate_type] += 1
        firsts[aggregate_type] = min(found, firsts.get(aggregate_type, found))
        lasts[aggregate_type] = max(found, lasts.get(aggregate_type, found))
    types = [each for each in counts if not selection.topics or _topic(each, addressing) in selection.topics]
    return Plan(
        name=name,
        selection=selection,
        published_before=published_before,
        progress=progress,
        topics=_topics(counts, types, addressing=_readdressed(addressing, selection=selection, name=name)),
        aggregate_types=types,
        first=min((firsts[each] for each in types), default=None),
        last=max((lasts[each] for each in types), default=None),
    )


def publish_again(
    connection: Connection,
    *,
    plan: Plan,
    options: ReplayOptions,
    addressing: Addressing,
    publisher: Publisher,
    note: Note,
    pause: Callable[[float], bool],
    on_progress: Callable[[Progress], None],
) -> Progress:
    """
    Publish what *plan* found, in sequence order, and give how far it came.

    The records are those of the first time, with one header more: `replay`. No row is locked or changed, and no
    transaction is open while Kafka answers. Whatever ends it early, a replay planned with the same name goes on behind
    what was recorded; the last few messages may be published twice under that name.

    Args:
        pause: Waits for so many seconds; True ends the replay, which is recorded.
        on_progress: Is told after every few messages.

    Raises:
        OperationRefused: The name has been taken since, or Kafka refuses a message or a topic.
        KafkaUnavailable: Kafka did not acknowledge some messages in time.
        DatabaseUnavailable: The connection broke.
        DatabaseConflict: A lock or a time-out ended a look.
    """
    outbox = _Outbox(connection, options)
    sender = _Sender(publisher, _readdressed(addressing, selection=plan.selection, name=plan.name))
    sender.check(plan.topics)
    if plan.progress is None:
        outbox.record(plan, note)
    progress = plan.progress or Progress()
    pace = Pace(options.rate)
    for chunk in chunks(in_order(outbox.find_planned(plan)), messages=options.chunk_messages):
        if pause(pace.pause_before(len(chunk), now=time.monotonic())):
            return progress
        messages = outbox.read(chunk, readable_bytes=addressing.readable_bytes)
        sender.send(messages, deadline=time.monotonic() + options.publish_deadline)
        progress = Progress(progress.messages + len(messages), chunk[-1].sequence_no)
        outbox.advance(plan.name, progress)
        on_progress(progress)
    progress = replace(progress, is_finished=True)
    outbox.advance(plan.name, progress)
    return progress


def in_order(found: Iterable[Found], *, most_ahead: int = _MOST_WRITERS) -> Iterator[Found]:
    """Give *found* in sequence order; before each of them come at most *most_ahead* that belong behind it."""
    waiting: list[Found] = []
    for each in found:
        if len(waiting) < most_ahead:
            heappush(waiting, each)
        else:
            yield heappushpop(waiting, each)
    yield from sorted(waiting)


def chunks(found: Iterable[Found], *, messages: int, stored_bytes: int = _MOST_CHUNK_BYTES) -> Iterator[list[Found]]:
    """Divide *found* into lists of at most so many messages and bytes; one message is always taken."""
    chunk: list[Found] = []
    size = 0
    for each in found:
        if chunk and (len(chunk) == messages or size + each.stored_bytes > stored_bytes):
            yield chunk
            chunk, size = [], 0
        chunk.append(each)
        size += each.stored_bytes
    if chunk:
        yield chunk


class _Sender:
    """Publishes messages as a relay does, until all of them are acknowledged."""

    def __init__(self, publisher: Publisher, addressing: Addressing) -> None:
        self._publisher = publisher
        self._addressing = addressing

    def check(self, topics: Iterable[str]) -> None:
        """Raise OperationRefused if one of *topics* cannot be written to, KafkaUnavailable if nobody answers."""
        self._publisher.probe()
        for failure in self._publisher.unavailable(topics).values():
            raise OperationRefused(failure.reason)

    def send(self, messages: Sequence[Message], *, deadline: float) -> None:
        """
        Publish *messages* in their order.

        A broker refuses a batch for one message of it: the others are sent again, of each key from the first one on
        that was not acknowledged.
        """
        while messages:
            outcomes = self._publisher.publish([self._record(message) for message in messages], deadline=deadline)
            for message, failure in zip(messages, outcomes, strict=True):
                if failure is not None and (failure.scope is not Scope.BATCH or time.monotonic() >= deadline):
                    raise _stopped(message, failure)
            messages = decide(messages, outcomes, on_poison="park").unsettled

    def _record(self, message: Message) -> Record:
        try:
            return self._addressing.record(message, topic=self._addressing.topic(message.aggregate_type))
        except Unpublishable as error:
            raise OperationRefused(f"message {message.id} cannot be published: {error}") from error


class _Outbox:
    """The statements of a replay, each in a short transaction of its own."""

    def __init__(self, connection: Connection, options: ReplayOptions) -> None:
        self._connection = connection
        self._options = options

    def begun(self, name: str, selection: Selection) -> tuple[datetime, Progress | None]:
        """Give since when a replay counts nothing more as published, and how far it came if it has begun before."""
        with self._transaction():
            rows = self._rows("begun", {"name": name, "selection": selection.as_json()})
            [(_, _, now)] = self._rows("span", {})
        if not rows:
            return now, None
        [(is_same, published_before, messages, reached_no, finished_at)] = rows
        if not is_same:
            raise OperationRefused(
                f"replay {name} has another selection: repeat that one to go on, or use a new --name"
            )
        if finished_at is not None:
            raise OperationRefused(f"replay {name} was finished at {finished_at:%Y-%m-%d %H:%M:%S%z}: use a new --name")
        return published_before, Progress(messages, reached_no)

    def find_planned(self, plan: Plan) -> Iterator[Found]:
        """Find what was found for *plan*."""
        return self.find(
            plan.selection,
            published_before=plan.published_before,
            after_no=plan.progress.reached_no if plan.progress else 0,
            aggregate_types=plan.aggregate_types,
        )

    def find(
        self,
        selection: Selection,
        *,
        published_before: datetime,
        after_no: int,
        aggregate_types: Sequence[str] | None,
    ) -> Iterator[Found]:
        """Walk the primary key, as far as the numbers reach, and give what is to be replayed in the order of ids."""
        first_no = max(selection.first_no, after_no + 1)
        after, last = self._ids(first_no, selection.last_no)
        parameters = {
            "rows": _ROWS_LOOKED_AT,
            "last": last,
            "published_before": published_before,
            "first_no": first_no,
            "last_no": selection.last_no,
            "since": selection.since,
            "until": selection.until,
            "aggregate_types": None if aggregate_types is None else list(aggregate_types),
            "key_types": [aggregate_type for aggregate_type, _ in selection.keys] or None,
            "key_ids": [aggregate_id for _, aggregate_id in selection.keys] or None,
        }
        while True:
            with self._transaction():
                rows = self._rows("find", parameters | {"after": after})
            through = rows[0][0]
            if through is None:
                return
            yield from (Found._make(row[1:]) for row in rows if row[1] is not None)
            after = through

    def read(self, found: Sequence[Found], *, readable_bytes: int) -> list[Message]:
        """Give the messages whole, less those that were pruned since they were found."""
        parameters = {"ids": numbers(each.id for each in found), "readable_bytes": readable_bytes}
        with self._transaction():
            return [Message._make(row) for row in self._rows("read", parameters)]

    def record(self, plan: Plan, note: Note) -> None:
        """Record that *plan* begins; raise OperationRefused if another one has taken its name meanwhile."""
        parameters = {
            "name": plan.name,
            "operator": note.operator,
            "why": note.why,
            "selection": plan.selection.as_json(),
            "published_before": plan.published_before,
        }
        with self._transaction():
            rows = self._rows("record", parameters)
        if not rows:
            raise OperationRefused(f"replay {plan.name} has just been begun by somebody else: use a new --name")

    def advance(self, name: str, progress: Progress) -> None:
        """Record how far the replay has come."""
        parameters = {"name": name, **asdict(progress)}
        with self._transaction():
            text = statement("replay_advance", schema=self._options.schema)
            ClientCursor(self._connection).execute(text, parameters)

    def _ids(self, first_no: int, last_no: int) -> tuple[int, int]:
        """Give the id behind which, and the one up to which, the messages with these numbers are."""
        with self._transaction():
            [(lowest, highest, _)] = self._rows("span", {})
        ids = range(lowest, highest + 1)
        first = lowest + bisect_left(ids, first_no, key=self._number_from) if first_no > 1 else lowest
        last = lowest + bisect_left(ids, last_no, key=self._number_from) if last_no < LARGEST_NUMBER else highest
        parameters = {"first": first, "last": last, "lowest": lowest, "highest": highest, "rows": _MARGIN_MESSAGES}
        with self._transaction():
            [(after, through)] = self._rows("around", parameters)
        return after, through

    def _number_from(self, lowest_id: int) -> int:
        with translated_errors():
            rows = self._rows("number", {"id": lowest_id})
        return int(rows[0][0]) if rows else LARGEST_NUMBER  # pruned meanwhile

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with translated_errors():
            self._connection.execute(_begin_statement(self._options))
            yield
            self._connection.commit()

    def _rows(self, name: str, parameters: Mapping[str, object]) -> list[TupleRow]:
        return self._connection.execute(statement(f"replay_{name}", schema=self._options.schema), parameters).fetchall()


@lru_cache
def _begin_statement(options: ReplayOptions) -> bytes:
    return statement("replay_begin", schema=options.schema) % {
        b"lock_timeout_ms": round(options.lock_timeout * 1000),
        b"statement_timeout_ms": round(options.statement_timeout * 1000),
        b"transaction_timeout_ms": round(options.transaction_timeout * 1000),
    }


def _readdressed(addressing: Addressing, *, selection: Selection, name: str) -> Addressing:
    """Give *addressing* with the name of the replay, and with the one topic for everything if there is one."""
    if selection.to_topic is not None:
        addressing = replace(addressing, template=selection.to_topic, topics={})
    return replace(addressing, replay=name)


def _topics(counts: Mapping[str, int], types: Iterable[str], *, addressing: Addressing) -> Counter[str]:
    topics: Counter[str] = Counter()
    for aggregate_type in types:
        try:
            topics[addressing.topic(aggregate_type)] += counts[aggregate_type]
        except Unpublishable as error:
            raise OperationRefused(str(error)) from error
    return topics


def _topic(aggregate_type: str, addressing: Addressing) -> str | None:
    try:
        return addressing.topic(aggregate_type)
    except Unpublishable:
        return None


def _stopped(message: Message, failure: Failure) -> OperationRefused | KafkaUnavailable:
    said = f"message {message.id} was not acknowledged: {failure.text}"
    is_refused = failure.scope in {Scope.MESSAGE, Scope.TOPIC}
    return OperationRefused(said) if is_refused else KafkaUnavailable(said)
