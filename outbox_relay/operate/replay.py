"""Replay: publish messages once more that are published already, while relays run, and record who did it and why."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from psycopg import ClientCursor

from outbox_relay.database import translated_errors
from outbox_relay.errors import KafkaUnavailable, OperationRefused
from outbox_relay.relay.failures import Scope, Unpublishable
from outbox_relay.relay.message import Message
from outbox_relay.sql import statement

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from datetime import datetime

    from psycopg import Connection
    from psycopg.rows import TupleRow

    from outbox_relay.operate.parked import Note
    from outbox_relay.relay.failures import Failure, Outcome
    from outbox_relay.relay.message import Addressing, Key, Record
    from outbox_relay.relay.publish import Publisher

LARGEST_NUMBER = 2**63 - 1

_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")

_MOST_NUMBERS = 5_000  # that one statement looks at
_MOST_CHUNK_MESSAGES = 500
_MOST_CHUNK_BYTES = 8 * 1024 * 1024
_CHUNKS_PER_SECOND = 10
_NO_CONTENTS = -1  # readable bytes: no message has so few


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
        """Return the text that tells this selection from others."""
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
        published_through: The newest mark of each shard when it began; what was published later is no part of it.
        progress: How far it came before; None if it has not begun.
        topics: How many messages go to each topic.
        first: The message with the lowest number; None if there is nothing to replay.
        last: The message with the highest number.
    """

    name: str
    selection: Selection
    published_through: Sequence[int]
    progress: Progress | None
    topics: Mapping[str, int]
    first: Message | None
    last: Message | None

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
        """Return the seconds to wait before the next *messages*, so that those before them have had their time."""
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
    published_through, progress = outbox.begun(name, selection)
    plan = Plan(
        name=name,
        selection=selection,
        published_through=published_through,
        progress=progress,
        topics={},
        first=None,
        last=None,
    )
    readdressed = _readdressed(addressing, plan=plan)
    topics: Counter[str] = Counter()
    first = last = None
    for messages in outbox.read(plan, most=_MOST_NUMBERS, readable_bytes=_NO_CONTENTS):
        for message in _published_to(selection.topics, messages, addressing=addressing):
            topics[_topic(message, addressing=readdressed)] += 1
            first, last = first or message, message
    return replace(plan, topics=topics, first=first, last=last)


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
    Publish what *plan* found, in sequence order, and return how far it came.

    The records are those of the first time, with one header more: `replay`. No row of the outbox is locked or changed,
    and no transaction is open while Kafka answers. Whatever ends it early, a replay planned with the same name goes on
    behind what was recorded; the last few messages may be published twice under that name.

    Args:
        pause: Waits for so many seconds and returns True if the replay is to end, which is recorded.
        on_progress: Is called after every few messages.

    Raises:
        OperationRefused: The name has been taken since, or Kafka refuses a message or a topic.
        KafkaUnavailable: Kafka did not acknowledge some messages in time.
        DatabaseUnavailable: The connection broke.
        DatabaseConflict: A lock or a time-out ended a look.
    """
    outbox = _Outbox(connection, options)
    sender = _Sender(publisher, _readdressed(addressing, plan=plan))
    sender.check(plan.topics)
    if plan.progress is None:
        outbox.record(plan, note)
    progress = plan.progress or Progress()
    pace = Pace(options.rate)
    for found in outbox.read(plan, most=options.chunk_messages, readable_bytes=addressing.readable_bytes):
        messages = _published_to(plan.selection.topics, found, addressing=addressing)
        if pause(pace.pause_before(len(messages), now=time.monotonic())):
            return progress
        if messages:
            sender.send(messages, deadline=time.monotonic() + options.publish_deadline)
            progress = Progress(progress.messages + len(messages), messages[-1].sequence_no)
            outbox.advance(plan.name, progress)
            on_progress(progress)
    progress = replace(progress, is_finished=True)
    outbox.advance(plan.name, progress)
    return progress


def readable(messages: Sequence[Message], *, readable_bytes: int) -> Sequence[Message]:
    """Return *messages* up to the first one that came without its contents although it is small enough."""
    for index, message in enumerate(messages):
        if message.headers is None and message.stored_bytes <= readable_bytes:
            return messages[:index]
    return messages


def unacknowledged(messages: Sequence[Message], outcomes: Sequence[Outcome]) -> list[Message]:
    """Return the messages of each key from the first one on that was not acknowledged."""
    open_keys: set[Key] = set()
    rest: list[Message] = []
    for message, outcome in zip(messages, outcomes, strict=True):
        if outcome is not None:
            open_keys.add(message.key)
        if message.key in open_keys:
            rest.append(message)
    return rest


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

        A broker that refuses a batch for one message withdraws the others. They are sent again, and with them the later
        ones of their keys that it acknowledged.
        """
        while messages:
            outcomes = self._publisher.publish([self._record(message) for message in messages], deadline=deadline)
            for message, failure in zip(messages, outcomes, strict=True):
                if failure is not None and (failure.scope is not Scope.BATCH or time.monotonic() >= deadline):
                    raise _stopped(message, failure)
            messages = unacknowledged(messages, outcomes)

    def _record(self, message: Message) -> Record:
        try:
            return self._addressing.record(message, topic=self._addressing.topic(message.aggregate_type))
        except Unpublishable as error:
            raise OperationRefused(f"message {message.sequence_no} cannot be published: {error}") from error


class _Outbox:
    """The statements of a replay, each in a short transaction of its own."""

    def __init__(self, connection: Connection, options: ReplayOptions) -> None:
        self._connection = connection
        self._options = options

    def begun(self, name: str, selection: Selection) -> tuple[Sequence[int], Progress | None]:
        """Return the newest mark of each shard when the replay began, and how far it came if it has begun before."""
        with self._transaction():
            rows = self._rows("begun", {"name": name, "selection": selection.as_json()})
            if not rows:
                [(published_through,)] = self._rows("marks", _keys(selection))
                return published_through, None
        [(is_same, published_through, messages, reached_no, finished_at)] = rows
        if not is_same:
            raise OperationRefused(
                f"replay {name} has another selection: repeat that one to go on, or use a new --name"
            )
        if finished_at is not None:
            raise OperationRefused(f"replay {name} was finished at {finished_at}: use a new --name")
        return published_through, Progress(messages, reached_no)

    def read(self, plan: Plan, *, most: int, readable_bytes: int) -> Iterator[Sequence[Message]]:
        """
        Return what is left of *plan*, in sequence order and in lists of at most *most* messages, some of them empty.

        A message that takes more than *readable_bytes* comes without its contents. Where nothing is found, the next
        statement looks at twice as many numbers.
        """
        selection = plan.selection
        parameters = _keys(selection) | {
            "batch_size": most,
            "batch_bytes": _MOST_CHUNK_BYTES,
            "readable_bytes": readable_bytes,
            "published_through": plan.published_through,
            "last_no": selection.last_no,
            "since": selection.since,
            "until": selection.until,
            "types": list(selection.aggregate_types) or None,
        }
        after_no = max(selection.first_no - 1, plan.progress.reached_no if plan.progress else 0)
        numbers = most
        while True:
            with self._transaction():
                rows = self._rows("read", parameters | {"after_no": after_no, "numbers": numbers})
            through_no = rows[0][0]
            if through_no is None:
                return
            found = [Message._make(row[1:]) for row in rows if row[1] is not None]
            messages = readable(found, readable_bytes=readable_bytes)
            yield messages
            after_no = messages[-1].sequence_no if messages else through_no
            numbers = most if messages else min(2 * numbers, _MOST_NUMBERS)

    def record(self, plan: Plan, note: Note) -> None:
        """Record that *plan* begins; raise OperationRefused if another one has taken its name meanwhile."""
        parameters = {
            "name": plan.name,
            "operator": note.operator,
            "why": note.why,
            "selection": plan.selection.as_json(),
            "published_through": plan.published_through,
        }
        with self._transaction():
            is_taken = self._write("record", parameters).fetchone() is None
        if is_taken:
            raise OperationRefused(f"replay {plan.name} has just been begun by somebody else: use a new --name")

    def advance(self, name: str, progress: Progress) -> None:
        """Record how far the replay has come."""
        with self._transaction():
            self._write("advance", {"name": name, **asdict(progress)})

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with translated_errors():
            self._connection.execute(_begin_statement(self._options))
            yield
            self._connection.commit()

    def _rows(self, name: str, parameters: Mapping[str, object]) -> list[TupleRow]:
        return self._connection.execute(statement(f"replay_{name}", schema=self._options.schema), parameters).fetchall()

    def _write(self, name: str, parameters: Mapping[str, object]) -> ClientCursor[TupleRow]:
        return ClientCursor(self._connection).execute(
            statement(f"replay_{name}", schema=self._options.schema), parameters
        )


@lru_cache
def _begin_statement(options: ReplayOptions) -> bytes:
    return statement("replay_begin", schema=options.schema) % {
        b"lock_timeout_ms": round(options.lock_timeout * 1000),
        b"statement_timeout_ms": round(options.statement_timeout * 1000),
        b"transaction_timeout_ms": round(options.transaction_timeout * 1000),
    }


def _keys(selection: Selection) -> dict[str, object]:
    return {
        "key_types": [aggregate_type for aggregate_type, _ in selection.keys] or None,
        "key_ids": [aggregate_id for _, aggregate_id in selection.keys] or None,
    }


def _readdressed(addressing: Addressing, *, plan: Plan) -> Addressing:
    """Return *addressing* with the name of the replay, and with the one topic for everything if there is one."""
    if plan.selection.to_topic is not None:
        addressing = replace(addressing, template=plan.selection.to_topic, topics={})
    return replace(addressing, replay=plan.name)


def _published_to(topics: Sequence[str], messages: Sequence[Message], *, addressing: Addressing) -> Sequence[Message]:
    """Return those of *messages* that were published to one of *topics*, by today's settings; no topics are all."""
    if not topics:
        return messages
    chosen = []
    for message in messages:
        with suppress(Unpublishable):
            if addressing.topic(message.aggregate_type) in topics:
                chosen.append(message)
    return chosen


def _topic(message: Message, *, addressing: Addressing) -> str:
    try:
        return addressing.topic(message.aggregate_type)
    except Unpublishable as error:
        raise OperationRefused(str(error)) from error


def _stopped(message: Message, failure: Failure) -> OperationRefused | KafkaUnavailable:
    said = f"message {message.sequence_no} was not acknowledged: {failure.text}"
    is_refused = failure.scope in {Scope.MESSAGE, Scope.TOPIC}
    return OperationRefused(said) if is_refused else KafkaUnavailable(said)
