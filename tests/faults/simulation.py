"""
The relay's loop as it is, on a table and a broker that a test decides about, by a clock that it tells.

Each lane is a greenlet instead of a thread, which stands still wherever it waits for the world: at a connection, a
claim, a publication, a settlement or a pause. The test answers one of them at a time, with a success or with a fault,
so that lanes meet in every order and a run can be repeated. Nothing of the loop is imitated, only what is around it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from math import ceil
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import structlog
from greenlet import greenlet

from outbox_relay.observe.metrics import Metrics
from outbox_relay.observe.telemetry import Telemetry
from outbox_relay.relay import loop, session
from outbox_relay.relay.claim import SHARDS, Batch, ClaimOptions, Floors
from outbox_relay.relay.failures import NO_REPORT, WITHDRAWN, Failure, Outcome, Scope
from outbox_relay.relay.loop import Lane, LaneOptions
from outbox_relay.relay.message import Addressing
from tests.fixtures.outbox import PLAIN

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Collection, Iterable, Sequence

    import pytest
    from psycopg import Connection

    from outbox_relay.relay.message import Key, Message, OnPoison, Record
    from outbox_relay.relay.publish import Publisher
    from outbox_relay.relay.settle import Settlement
    from outbox_relay.relay.watch import HorizonWatch

CLAIM = ClaimOptions(messages=6, shards=2)
METRICS = Metrics()
SILENT = structlog.wrap_logger(None, processors=[], wrapper_class=structlog.make_filtering_bound_logger("critical"))
UNPUBLISHABLE_TYPE = "no topic"  # there is none of such a name
CLOSED = Failure(Scope.TOPIC, "TOPIC_AUTHORIZATION_FAILED", "not allowed")
WRITTEN_WITHOUT_REPORT = replace(NO_REPORT, reason="the message was written, its report was lost")


@dataclass(frozen=True, slots=True)
class Connect:
    """A lane asks for a connection."""


@dataclass(frozen=True, slots=True)
class Pause:
    """It wants to wait so long, or until the horizon is beyond a number."""

    seconds: float
    number: int | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """It asks for messages."""

    options: ClaimOptions
    through: int
    floors: Floors
    held_types: Collection[str]


@dataclass(frozen=True, slots=True)
class Probe:
    """It asks the brokers whether they are there, and these topics."""

    topics: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Publish:
    """It hands over records."""

    records: Sequence[Record]


@dataclass(frozen=True, slots=True)
class Settle:
    """It wants its decision to be written and committed."""

    settlement: Settlement


Question = Connect | Pause | Claim | Probe | Publish | Settle


@dataclass(slots=True)
class Row:
    """A row of the outbox: published, parked, neither yet, or gone, for it was rolled back or skipped."""

    message: Message
    is_committed: bool = True
    is_published: bool = False
    is_parked: bool = False
    is_gone: bool = False

    @property
    def waits(self) -> bool:
        """Whether a relay should publish it."""
        return self.is_committed and not (self.is_published or self.is_parked or self.is_gone)


@dataclass(eq=False)
class Writer:
    """An open transaction; given up on, it is no longer waited for."""

    numbers: list[int]
    is_given_up: bool = False


@dataclass(eq=False)
class World:
    """The table, as far as it is promised anything about, what Kafka has, and the time. It checks each step."""

    on_poison: OnPoison
    rows: dict[int, Row] = field(default_factory=dict)
    open_writers: list[Writer] = field(default_factory=list)
    late_writers_ended: int = 0
    owners: dict[int, SimulatedLane] = field(default_factory=dict)
    generations: list[int] = field(default_factory=lambda: [0] * SHARDS)
    in_kafka: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    closed_topics: set[str] = field(default_factory=set)
    last_first_delivery: defaultdict[Key, int] = field(default_factory=lambda: defaultdict(int))
    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    @property
    def through(self) -> int:
        """The horizon: below the first number of whoever is still waited for."""
        awaited = [writer.numbers[0] for writer in self.open_writers if not writer.is_given_up]
        return min([number - 1 for number in awaited], default=len(self.rows))

    @property
    def waiting(self) -> list[Row]:
        return [row for row in self.rows.values() if row.waits]

    def parked_before(self, message: Message) -> bool:
        """Whether an earlier message of the key is parked."""
        return any(
            row.is_parked and row.message.key == message.key and number < message.sequence_no
            for number, row in self.rows.items()
        )

    def insert(self, *places: tuple[Key, int]) -> Writer:
        """Draw numbers for messages of these keys, each with its shard, in a transaction that stays open."""
        writer = Writer([])
        for (aggregate_type, aggregate_id), shard in places:
            number = len(self.rows) + 1
            message = PLAIN._replace(
                id=1000 + number,
                sequence_no=number,
                shard=shard,
                aggregate_type=aggregate_type,
                aggregate_id=aggregate_id,
            )
            self.rows[number] = Row(message, is_committed=False)
            writer.numbers.append(number)
        self.open_writers.append(writer)
        return writer

    def end(self, writer: Writer, *, commits: bool) -> None:
        self.open_writers.remove(writer)
        self.late_writers_ended += writer.is_given_up
        for number in writer.numbers:
            self.rows[number].is_committed = commits
            self.rows[number].is_gone = not commits
            if writer.is_given_up:
                self.mark_unordered(self.rows[number])

    @staticmethod
    def mark_unordered(row: Row) -> None:
        row.message = row.message._replace(is_unordered=True)

    def release_parked(self, key: Key) -> None:
        """What an operator does: all parked messages of a key are unpublished again."""
        for row in self.rows.values():
            if row.is_parked and row.message.key == key:
                row.is_parked = False
                self.generations[row.message.shard] += 1
                if self.on_poison == "skip":
                    self.mark_unordered(row)

    def skip_parked(self, row: Row) -> None:
        """The other thing an operator does: this message is never published."""
        row.is_parked, row.is_gone = False, True
        self.generations[row.message.shard] += 1

    def claim(self, lane: SimulatedLane, asked: Claim) -> Batch:
        """Give *lane* some shards that nobody else holds, and their first messages."""
        known = {name: json.loads(f"[{text[1:-1]}]") for name, text in asked.floors.parameters().items()}
        work: dict[int, list[Message]] = {shard: [] for shard in range(SHARDS)}
        for row in self.waiting:
            message = row.message
            is_known = known["generations"][message.shard] == self.generations[message.shard]
            floor = known["floors"][message.shard] if is_known else 0
            if message.sequence_no > asked.through or message.aggregate_type in asked.held_types:
                continue
            if message.sequence_no > floor:
                work[message.shard].append(message._replace(is_behind_parked=self.parked_before(message)))
            else:
                assert message.is_unordered, "a floor hides a message that did not come late"
        owned = [shard for shard, messages in work.items() if messages and shard not in self.owners]
        owned = sorted(owned, key=lambda shard: work[shard][0].sequence_no)[: asked.options.shards]
        self.owners |= dict.fromkeys(owned, lane)
        limit = ceil(asked.options.messages / max(1, len(owned)))
        return Batch(
            messages=sorted(message for shard in owned for message in work[shard][:limit]),
            generations=list(self.generations),
            drained=[shard for shard, messages in work.items() if not messages],
            waiting=[shard for shard, messages in work.items() if messages and shard not in owned],
        )

    def publish(self, lane: SimulatedLane, records: Sequence[Record], fates: Iterable[Outcome]) -> list[Outcome]:
        """
        Give each record one of *fates*, in turn, unless its topic is closed.

        Per key nothing is written behind one that failed for good.
        """
        outcomes: list[Outcome] = []
        stopped: set[str] = set()
        for record, fate in zip(records, cycle(fates), strict=False):
            outcome = WITHDRAWN if record.key in stopped else CLOSED if record.topic in self.closed_topics else fate
            if outcome is None or outcome is WRITTEN_WITHOUT_REPORT:
                self.take(lane, record)
            else:
                stopped.add(record.key)
                if outcome.scope is Scope.MESSAGE:
                    self.refused.add(number_of(record))
            outcomes.append(outcome)
        return outcomes

    def take(self, lane: SimulatedLane, record: Record) -> None:
        """Write a record, and check what is promised of each."""
        number = number_of(record)
        row = self.rows[number]
        assert row.is_committed, "a phantom was published"
        assert self.owners.get(row.message.shard) is lane, "a message was published by a lane that does not hold it"
        assert self.on_poison == "skip" or not self.parked_before(row.message), "published behind a parked message"
        if number not in self.in_kafka and not row.message.is_unordered:
            assert number > self.last_first_delivery[row.message.key], "a later message of the key came first"
            self.last_first_delivery[row.message.key] = number
        self.in_kafka.add(number)

    def settle(self, lane: SimulatedLane, settlement: Settlement) -> dict[int, int]:
        """Write a decision and commit."""
        for message in settlement.published:
            assert message.sequence_no in self.in_kafka, "a message was marked that Kafka does not have"
            self.rows[message.sequence_no].is_published = True
        parked = [each.message for each in settlement.parked]
        for message in parked:
            has_reason = message.sequence_no in self.refused or message.aggregate_type == UNPUBLISHABLE_TYPE
            assert has_reason or self.parked_before(message), "a message was parked that Kafka may still take"
            self.rows[message.sequence_no].is_parked = True
        shards = {message.shard for message in parked}
        for shard in shards:
            self.generations[shard] += 1
        self.free(lane)
        return {shard: self.generations[shard] for shard in shards}

    def free(self, lane: SimulatedLane) -> None:
        """End the transaction of *lane*: its shards are anybody's."""
        self.owners = {shard: owner for shard, owner in self.owners.items() if owner is not lane}


def number_of(record: Record) -> int:
    """The number of the message that *record* was made of."""
    return int(str(dict(record.headers)["sequence_no"]))


class SimulatedLane:
    """A relay of one lane. `question` is what it waits for; `answer` and `fail` let it go on to the next one."""

    def __init__(self, world: World) -> None:
        self.has_lost_its_transaction = False
        self._world = world
        addressing = Addressing()
        telemetry = _Telemetry(addressing.topic)
        self.unforeseen = telemetry.unforeseen
        lane = Lane(
            "lane-1",
            options=LaneOptions(claim=CLAIM, addressing=addressing, on_poison=world.on_poison),
            connect=self._connect,
            publisher=cast("Publisher", _Publisher(self)),
            watch=cast("HorizonWatch", _Watch(self, world)),
            telemetry=telemetry,
            stop=cast("threading.Event", _Stop(self)),
        )
        self._lane = greenlet(lane.run)
        self.question: Question = self._lane.switch()

    def ask(self, question: Question) -> object:
        """Called by the lane: wait for the world."""
        assert self._lane.parent is not None
        return self._lane.parent.switch(question)

    def answer(self, answer: object) -> None:
        """Called by the test: give an answer and wait for the next question."""
        self.question = self._lane.switch(answer)
        assert self.unforeseen == []

    def fail(self, error: Exception) -> None:
        """Called by the test: let what was asked for fail, and wait for the next question."""
        self.question = self._lane.throw(error)
        assert self.unforeseen == []

    def kill(self) -> None:
        """End it where it is; as with a process, its connection is closed."""
        self._lane.throw()

    def end_transaction(self) -> None:
        """What PostgreSQL does to a lane that has been idle for too long, or has lost its connection."""
        self._world.free(self)
        self.has_lost_its_transaction = True

    def _connect(self) -> Connection:
        self.ask(Connect())
        self.has_lost_its_transaction = False
        return cast("Connection", _Connection(self, self._world))


class _Telemetry(Telemetry):
    """Keeps the errors that nobody foresaw; the loop would go on after one."""

    def __init__(self, topic_of: Callable[[str], str]) -> None:
        super().__init__(logger=SILENT, metrics=METRICS, topic_of=topic_of)
        self.unforeseen: list[Exception] = []

    def thread_failed(self, thread: str, error: Exception) -> None:
        super().thread_failed(thread, error)
        self.unforeseen.append(error)


@dataclass(frozen=True)
class _Connection:
    lane: SimulatedLane
    world: World

    def rollback(self) -> None:
        self.world.free(self.lane)

    def close(self) -> None:
        self.world.free(self.lane)


@dataclass(frozen=True)
class _Publisher:
    lane: SimulatedLane
    producers_rebuilt: int = 0

    def probe(self) -> None:
        self.lane.ask(Probe())

    def changed_partitions(self) -> dict[str, int]:
        return {}

    def unavailable(self, topics: Sequence[str]) -> object:
        return self.lane.ask(Probe(topics))

    def publish(self, records: Sequence[Record], *, deadline: float) -> object:
        assert deadline > 0
        return self.lane.ask(Publish(records))

    def close(self) -> None: ...


@dataclass(frozen=True)
class _Watch:
    lane: SimulatedLane
    world: World

    @property
    def through(self) -> int:
        return self.world.through

    @property
    def late_writers_ended(self) -> int:
        return self.world.late_writers_ended

    def wait_beyond(self, number: int, *, timeout: float) -> int:
        if self.world.through <= number:
            self.lane.ask(Pause(timeout, number))
        return self.world.through

    def wake_one(self) -> None: ...

    def reset(self) -> None: ...


@dataclass(frozen=True)
class _Stop:
    lane: SimulatedLane

    def is_set(self) -> bool:
        return False

    def wait(self, seconds: float) -> None:
        self.lane.ask(Pause(seconds))


def put_in_place(world: World, patches: pytest.MonkeyPatch) -> None:
    """Give the loop the clock, the dice and the stages of *world*."""
    dice = SimpleNamespace(Random=partial(Random, 0))
    for module in (loop, session):
        patches.setattr(module, "time", world)
        patches.setattr(module, "random", dice)
    patches.setattr(session, "read_last_no", lambda _connection, schema: schema)
    patches.setattr(loop, "claim", _claim)
    patches.setattr(loop, "settle", _settle)


def _claim(
    connection: _Connection, *, options: ClaimOptions, through: int, floors: Floors, held_types: Collection[str]
) -> object:
    return connection.lane.ask(Claim(options, through, floors, held_types))


def _settle(connection: _Connection, *, schema: str, settlement: Settlement, mode: str) -> object:
    assert (schema, mode) == ("public", "mark")
    return connection.lane.ask(Settle(settlement))
