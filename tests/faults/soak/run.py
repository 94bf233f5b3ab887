"""One soak, from the first write to the recorded history."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, takewhile
from random import Random
from threading import Event
from typing import TYPE_CHECKING

import psycopg

from outbox_relay.sandbox.history import History
from outbox_relay.sandbox.reading import count_partitions, count_unsettled, read_outbox, read_topics
from tests.faults.nemesis import FAULTS, PAIRABLE
from tests.faults.soak.relay import BATCH_SIZE, LANES
from tests.faults.soak.schedule import schedule
from tests.faults.soak.stage import RECOVERY_SECONDS, DidNotFire, comes_true, pause
from tests.fixtures.journal import read_effects
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from outbox_relay.sandbox.history import Record
    from tests.faults.soak.schedule import Step
    from tests.faults.soak.stage import Stage

WARM_UP_SECONDS = 5.0
LAST_SECONDS = 120.0
CHANCES = 5
WATCH_SECONDS = 0.2

SELECT_OLDEST_TRANSACTION = """
SELECT coalesce(max(extract(epoch FROM clock_timestamp() - xact_start)), 0)::float8
FROM pg_stat_activity
WHERE datname = current_database() AND application_name LIKE 'outbox-relay %'
"""


@dataclass(frozen=True, slots=True)
class Incident:
    """
    Faults that struck together; times are `time.monotonic()`.

    Attributes:
        fired: Those that left a sign of it.
        recovered_at: When all that was committed before the healing was settled; None if that took too long.
    """

    step: Step
    fired: tuple[str, ...]
    began_at: float
    healed_at: float
    recovered_at: float | None


@dataclass(slots=True)
class Soak:
    """
    What was recorded.

    Attributes:
        oldest_transaction_seconds: The highest age that a transaction of a relay was seen to have.
        skipped: How many messages were written where no relay looks, by the nemesis.
        found_skipped: How many relays have found there.
    """

    incidents: list[Incident] = field(default_factory=list)
    oldest_transaction_seconds: float = 0.0
    skipped: int = 0
    found_skipped: int = 0
    history: History = field(default_factory=lambda: History((), (), ()))


def soak(
    stage: Stage, result: Soak, *, faults: Collection[str], seed: int, seconds: float, tell: Callable[[str], None]
) -> None:
    """Strike for so long, heal everything, wait until all of it has gone through; fill in *result*, whatever fails."""
    stop = Event()
    with ThreadPoolExecutor(2) as threads:
        try:
            records = threads.submit(
                read_topics, stage.kafka.bootstrap_servers, topics=stage.pipeline.topics, stop=stop
            )
            watched = threads.submit(_watch_transactions, stage, stop=stop)
            for relay in stage.relays:
                relay.await_start()
            with stage.load:
                pause(WARM_UP_SECONDS)
                eventually(
                    partial(_is_settled, stage, stage.pipeline.last_number()),
                    timeout=LAST_SECONDS,
                    message="nothing flows",
                )
                steps = schedule(seed, faults=faults, pairable=PAIRABLE)
                _strike_for(seconds, stage, result, steps=steps, tell=tell)
            stage.pipeline.await_settled(timeout=LAST_SECONDS)
            comes_true(lambda: stage.found_skipped >= stage.skipped, seconds=RECOVERY_SECONDS)
            eventually(lambda: stage.is_consumed, timeout=LAST_SECONDS, message="the consumers are behind")
        finally:
            stop.set()
            result.oldest_transaction_seconds = watched.result()
            result.skipped, result.found_skipped = stage.skipped, stage.found_skipped
            result.history = _history(stage, records.result(), incidents=len(result.incidents))


def _strike_for(
    seconds: float, stage: Stage, result: Soak, *, steps: Iterator[Step], tell: Callable[[str], None]
) -> None:
    """Strike by *steps* for so long, and then give those a second chance that never fired."""
    end = time.monotonic() + seconds
    in_time = takewhile(lambda _step: time.monotonic() < end, steps)
    for step in chain(in_time, _second_chances(result)):
        incident = _strike(stage, step)
        result.incidents.append(incident)
        tell(_line(incident))
        stage.fail_if_one_ended()
        pause(step.pause_seconds)


def _second_chances(result: Soak) -> Iterator[Step]:
    """Repeat a step of each fault that has left no sign yet, some times: a single strike may have met nobody."""
    last_steps = {name: incident.step for incident in result.incidents for name in incident.step.faults}
    for _ in range(CHANCES):
        for name, step in last_steps.items():
            if not any(name in incident.fired for incident in result.incidents):
                yield step


def _strike(stage: Stage, step: Step) -> Incident:
    """Let the faults of *step* strike, heal them, and wait until what was committed meanwhile is settled."""
    fired: list[str] = []
    began_at = time.monotonic()
    with ExitStack() as struck:
        for number, name in enumerate(step.faults):
            struck.enter_context(_counted(stage, name, seed=step.seed + number, fired=fired))
        pause(step.hold_seconds)
    healed_at = time.monotonic()
    is_recovered = comes_true(partial(_is_settled, stage, stage.pipeline.last_number()), seconds=RECOVERY_SECONDS)
    return Incident(step, tuple(fired), began_at, healed_at, time.monotonic() if is_recovered else None)


@contextmanager
def _counted(stage: Stage, name: str, *, seed: int, fired: list[str]) -> Iterator[None]:
    try:
        with FAULTS[name](stage, Random(seed)):  # noqa: S311 -- a repeatable schedule
            yield
    except DidNotFire:
        return
    fired.append(name)


def _is_settled(stage: Stage, last_number: int) -> bool:
    with stage.pipeline.database.connect() as connection:
        return count_unsettled(connection, through=last_number) == 0


def _watch_transactions(stage: Stage, *, stop: Event) -> float:
    """Give the highest age of a relay's transaction, seen until the stop."""
    highest = 0.0
    while not stop.is_set():
        try:
            with stage.pipeline.database.connect(autocommit=True) as connection:
                while not stop.wait(WATCH_SECONDS):
                    [(age,)] = connection.execute(SELECT_OLDEST_TRANSACTION).fetchall()
                    highest = max(highest, age)
        except psycopg.OperationalError:
            stop.wait(WATCH_SECONDS)
    return highest


def _history(stage: Stage, records: Sequence[Record], *, incidents: int) -> History:
    servers, topics = stage.kafka.bootstrap_servers, stage.pipeline.topics
    with stage.pipeline.database.connect() as connection:
        rows, marks = read_outbox(connection)
    return History(
        writes=[*stage.load.writes, *stage.writes],
        rows=rows,
        records=records,
        rows_are_kept=False,
        marks=marks,
        partition_counts={topic: {count} for topic, count in count_partitions(servers, topics=topics).items()},
        holds=stage.holds,
        effects=read_effects(stage.inbox),
        most_duplicates=incidents * len(stage.relays) * LANES * BATCH_SIZE,
    )


def _line(incident: Incident) -> str:
    names = " + ".join(name if name in incident.fired else f"({name})" for name in incident.step.faults)
    took = incident.healed_at - incident.began_at
    recovery = (
        "not recovered" if incident.recovered_at is None else f"{incident.recovered_at - incident.healed_at:.1f} s"
    )
    return f"{names}: {took:.1f} s, recovered in {recovery}"
