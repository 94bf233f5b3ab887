"""Relays in the simulation: threads that ask the test for all that they wait for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import structlog
from greenlet import getcurrent, greenlet

from outbox_relay.observe.metrics import Metrics
from outbox_relay.observe.telemetry import Telemetry
from outbox_relay.relay import horizon, late, loop, relay, session, shards, watch
from outbox_relay.relay.horizon import LastNumber, Observation
from outbox_relay.relay.loop import LaneOptions
from outbox_relay.relay.message import Addressing
from outbox_relay.relay.read import Limits
from outbox_relay.relay.relay import Relay, RelayOptions
from outbox_relay.relay.watch import WatchOptions
from tests.faults.simulation.world import Connection

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from typing import Any

    import pytest
    from psycopg import Connection as DatabaseConnection

    from outbox_relay.relay.claim import ShardWork
    from outbox_relay.relay.message import Record
    from outbox_relay.relay.publish import Publisher
    from outbox_relay.relay.watch import Reached
    from tests.faults.simulation.world import World

LANES = 2
LIMITS = Limits(messages=32)  # two of each shard, if all are held
STINT_MESSAGES = 30
ORDERING_TIMEOUT = 20.0
METRICS = Metrics()
SILENT = structlog.wrap_logger(None, processors=[], wrapper_class=structlog.make_filtering_bound_logger("critical"))


@dataclass(frozen=True, slots=True)
class Connect:
    """A thread asks for a connection."""


@dataclass(frozen=True, slots=True)
class Pause:
    """It wants to wait so long, or until something is so."""

    seconds: float
    is_over: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Statement:
    """It sends a statement of this name; `execute` does what PostgreSQL does then."""

    name: str
    connection: Connection
    execute: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Probe:
    """It asks the brokers whether they are there, and these topics."""

    topics: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Publish:
    """It hands over records."""

    records: Sequence[Record]


Question = Connect | Pause | Statement | Probe | Publish


class Thread:
    """
    In the place of `threading.Thread`. `answer` and `fail` let it go on to its next question.

    Attributes:
        question: What it waits for; None when it has ended.
        connection: The newest that it was given.
    """

    question: Question | None = None
    connection: Connection

    def __init__(self, *, target: Callable[[], None], name: str, daemon: bool) -> None:
        assert daemon, "a thread would keep the process from its end"
        self.name = name
        self._greenlet = greenlet(target)
        self._greenlet.thread = self

    def start(self) -> None:
        self.question = self._greenlet.switch()

    def answer(self, answer: object) -> None:
        """Called by the test: give an answer and wait for the next question."""
        self.question = self._greenlet.switch(answer)

    def fail(self, error: Exception) -> None:
        """Called by the test: let what was asked for fail, and wait for the next question."""
        self.question = self._greenlet.throw(error)

    def kill(self) -> None:
        self._greenlet.throw()


def ask(question: Question) -> object:
    """Called by a thread: wait for the world."""
    return getcurrent().parent.switch(question)


class SimulatedRelay:
    """A process."""

    def __init__(self, world: World) -> None:
        self._world = world
        addressing = Addressing()
        telemetry = _Telemetry(addressing.topic)
        self.unforeseen = telemetry.unforeseen
        self._relay = Relay(
            options=RelayOptions(
                lanes=LANES,
                lane=LaneOptions(
                    limits=LIMITS,
                    addressing=addressing,
                    on_poison=world.on_poison,
                    stint_messages=STINT_MESSAGES,
                    busy_shards=1,
                ),
                watch=WatchOptions(ordering_timeout=ORDERING_TIMEOUT),
            ),
            connect=self._connect,
            make_publisher=lambda: cast("Publisher", _Publisher()),
            telemetry=telemetry,
        )
        self.threads = {thread.name: cast("Thread", thread) for thread in self._relay._threads}  # noqa: SLF001 -- ours
        self._relay.start()

    @property
    def lanes(self) -> list[Thread]:
        return [thread for name, thread in self.threads.items() if name.startswith("lane")]

    @property
    def has_ended(self) -> bool:
        return all(thread.question is None for thread in self.threads.values())

    def drain(self) -> None:
        self._relay.drain()

    def kill(self) -> None:
        """End it where it is; as with a process, its connections are closed."""
        for thread in self.threads.values():
            thread.kill()

    def _connect(self, _thread: str) -> DatabaseConnection:
        ask(Connect())
        connection = Connection(self._world)
        self._world.connections.append(connection)
        getcurrent().thread.connection = connection
        return cast("DatabaseConnection", connection)


class _Telemetry(Telemetry):
    """Keeps the errors that nobody foresaw; the loop would go on after one."""

    def __init__(self, topic_of: Callable[[str], str]) -> None:
        super().__init__(logger=SILENT, metrics=METRICS, topic_of=topic_of)
        self.unforeseen: list[Exception] = []

    def thread_failed(self, thread: str, error: Exception) -> None:
        super().thread_failed(thread, error)
        self.unforeseen.append(error)


class _Publisher:
    producers_rebuilt = 0

    def probe(self) -> None:
        ask(Probe())

    def changed_partitions(self) -> dict[str, int]:
        return {}

    def unavailable(self, topics: Sequence[str]) -> object:
        return ask(Probe(topics))

    def publish(self, records: Sequence[Record], *, deadline: float) -> object:
        assert deadline > 0
        return ask(Publish(records)) if records else []

    def close(self) -> None: ...


class _Reconciler:
    """Does nothing, for it would mend what others do wrong: marks and rows have to agree without it."""

    def __init__(self, **_parts: object) -> None: ...

    def run(self) -> None: ...

    def begin_anew(self) -> None: ...


class _Event:
    """In the place of `threading.Event`."""

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout: float) -> bool:
        if not self._is_set:
            ask(Pause(timeout, self.is_set))
        return self._is_set


class _Condition:
    """In the place of `threading.Condition`; threads are switched at questions only, so that it need not lock."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_exception: object) -> None: ...

    def wait_for(self, predicate: Callable[[], bool], timeout: float) -> bool:
        if not predicate():
            ask(Pause(timeout, predicate))
        return predicate()

    def notify_all(self) -> None: ...


def put_in_place(world: World, patches: pytest.MonkeyPatch) -> None:
    """Give relays the clock, the dice, the threads and the statements of *world*."""
    threading = SimpleNamespace(Thread=Thread, Event=_Event, Condition=_Condition)
    for module in (relay, watch, shards):
        patches.setattr(module, "threading", threading)
    for module in (loop, relay, session, watch):
        patches.setattr(module, "time", world)
    for module in (loop, session):
        patches.setattr(module, "random", SimpleNamespace(Random=partial(Random, 0)))
    patches.setattr(relay, "Reconciler", _Reconciler)
    patches.setattr(loop, "claim_shards", partial(_claim, world))
    patches.setattr(loop, "record_marks", partial(_in_transaction, "record_marks", world.record))
    for name in ("read_messages", "read_waiting", "forget_waiting", "set_aside"):
        patches.setattr(loop, name, partial(_in_transaction, name, getattr(world, name)))
    patches.setattr(late, "collect_late", partial(_alone, "collect_late", world.collect_late))
    patches.setattr(session, "read_last_number", partial(_alone, "read_last_number", partial(_last_number, world)))
    patches.setattr(horizon, "read_last_number", partial(_alone, "read_last_number", partial(_last_number, world)))
    patches.setattr(horizon, "observe", partial(_observe, world))
    patches.setattr(horizon, "list_writers", partial(_alone, "list_writers", partial(_list_writers, world)))
    patches.setattr(horizon, "list_given_up", partial(_alone, "list_given_up", partial(_list_given_up, world)))
    patches.setattr(horizon, "describe", lambda _connection, **_named: [])
    patches.setattr(horizon, "record_unordered", partial(_record_unordered, world))
    patches.setattr(horizon, "check_tables", partial(_alone, "check_tables", lambda: None))


def _in_transaction(
    name: str,
    execute: Callable[..., object],
    connection: Connection,
    *values: Any,  # noqa: ANN401 -- of the statement
    schema: str,
    **named: Any,  # noqa: ANN401 -- likewise
) -> object:
    assert schema == "public"
    is_nothing = name in {"forget_waiting", "set_aside"} and not values[0]
    return None if is_nothing else ask(Statement(name, connection, partial(execute, connection, *values, **named)))


def _alone(name: str, execute: Callable[[], object], connection: Connection, **_named: object) -> object:
    return ask(Statement(name, connection, execute))


def _claim(
    world: World,
    connection: Connection,
    *,
    options: object,
    reached: Reached,
    candidates: Collection[int],
    most: int,
    takes_all: bool,
    looks_for_waiting: bool,
    held_types: Collection[str],
) -> object:
    """Locks are taken by a statement that may have begun before others committed."""
    assert options is not None
    probe = partial(
        world.probe, candidates, reached=reached, looks_for_waiting=looks_for_waiting, held_types=set(held_types)
    )
    probes = cast("list[ShardWork]", ask(Statement("probe", connection, probe)))
    lock = partial(world.lock, connection, probes, reached=reached, most=most, takes_all=takes_all)
    return ask(Statement("lock", connection, lock))


def _last_number(world: World) -> LastNumber:
    return LastNumber(world.tables.last_no, world.epoch)


def _observe(world: World, connection: Connection, **_named: object) -> Observation:
    """The second statement sees what has ended since the first one."""
    number, epoch = cast("LastNumber", ask(Statement("last_number", connection, partial(_last_number, world))))
    running = ask(Statement("snapshot", connection, lambda: frozenset(writer.xid for writer in world.open_writers)))
    return Observation(number, cast("frozenset[int]", running), epoch)


def _list_writers(world: World) -> frozenset[int]:
    return frozenset(writer.xid for writer in world.open_writers if writer.numbers)


def _list_given_up(world: World) -> frozenset[int]:
    return frozenset(xid for xid, record in world.tables.unordered.items() if record.to_no is None)


def _record_unordered(world: World, connection: Connection, *, xids: Collection[int], **_named: object) -> None:
    ask(Statement("record_unordered", connection, partial(world.record_unordered, frozenset(xids))))
