"""The judge is judged: it finds each kind of damage in a relay that does it, and none in the real one."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import pytest

from outbox_relay.sandbox.history import History, Hold, Outcome, State
from outbox_relay.sandbox.judge import judge
from outbox_relay.sandbox.reading import read_ends
from tests.faults.mutants import MUTANTS
from tests.fixtures.consumer_process import guards
from tests.fixtures.daemon import Daemon
from tests.fixtures.journal import create_journal, note, read_effects
from tests.fixtures.ledger import Desk, publish, running
from tests.fixtures.load import commit_messages, commit_poison, insert_messages, own_headers, payload_of
from tests.fixtures.outbox import message
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from psycopg import Connection

    from outbox_relay.sandbox.history import Write
    from tests.fixtures.consumer_process import Guard
    from tests.fixtures.ledger import Ledger
    from tests.fixtures.pipeline import Pipeline

pytestmark = [pytest.mark.kafka, pytest.mark.outside("the image has no mutants")]

Start = Callable[..., Daemon]

PUBLISHED = State.PUBLISHED
LONG_SECONDS = 60


def another_relay_has_claimed_the_first_message(pipeline: Pipeline, start: Start) -> History:
    """And stands still; what comes behind that message is there for the taking."""
    with pipeline.database.connect() as writer:
        writes = commit_messages(writer, "order-1", "order-1")
        with start(lanes=1, batch_size=1, failpoints="after_claim=stop@1", allow_failpoints="true") as slow:
            slow.wait_for_event("failpoint_reached")
            eventually(lambda: pipeline.open_transactions() == 1)
            writes += commit_messages(writer, "payment-1")
            with start(lanes=1):
                eventually(lambda: pipeline.states()[-1] is PUBLISHED)
            slow.resume()
            pipeline.await_settled()
    return pipeline.history(writes)


def the_relay_is_killed_after_the_mark(pipeline: Pipeline, start: Start) -> History:
    """Its producer would like to wait for more to send."""
    with start(kafka__linger_ms=24_000), pipeline.database.connect() as writer:
        writes = commit_messages(writer, "order-1", "payment-1")
        pipeline.await_settled()
    return pipeline.history(writes)


def one_message_of_a_batch_is_refused(pipeline: Pipeline, start: Start) -> History:
    with pipeline.database.connect() as writer:
        writes = commit_messages(writer, "order-1", "order-2")
        writes += [commit_poison(writer, "order-1"), *commit_messages(writer, "order-1", "order-2")]
        with start(lanes=1):
            pipeline.await_settled()
    return pipeline.history(writes)


def a_message_is_overtaken_by_another_commit(pipeline: Pipeline, start: Start) -> History:
    with (
        start(ordering_timeout=LONG_SECONDS, sweep_interval=0.2) as relay,
        pipeline.database.connect() as slow,
        pipeline.database.connect() as quick,
    ):
        writes = overtake(pipeline, relay, slow=slow, quick=quick)
        pipeline.await_settled()
    return pipeline.history(writes)


def a_message_appears_below_the_last_number(pipeline: Pipeline, start: Start) -> History:
    """The relay gets every chance to notice it: later messages of the key, each of them in a claim of its own."""
    with (
        start(lanes=1, ordering_timeout=LONG_SECONDS, sweep_interval=0.2) as relay,
        pipeline.database.connect() as slow,
        pipeline.database.connect() as quick,
    ):
        writes = overtake(pipeline, relay, slow=slow, quick=quick)
        for _ in range(5):
            writes += commit_messages(quick, "order-1")
            eventually(lambda: pipeline.states()[-1] is PUBLISHED)
        relay.terminate()
        assert relay.wait() == 0
    return pipeline.history(writes)


def overtake(pipeline: Pipeline, relay: Daemon, *, slow: Connection, quick: Connection) -> list[Write]:
    """Commit the second number of a key, then the first, but not before the relay has decided about the second."""
    relay.wait_for_event("relay_started")
    late = insert_messages(slow, "order-1")
    writes = commit_messages(quick, "order-1")
    eventually(
        lambda: PUBLISHED in pipeline.states() or relay.events_named("horizon_held"),
        message="the relay neither publishes nor waits",
    )
    slow.commit()
    return [replace(write, outcome=Outcome.COMMITTED) for write in late] + writes


def a_key_is_parked(pipeline: Pipeline, start: Start) -> History:
    with start(), pipeline.database.connect() as writer:
        poison = commit_poison(writer, "order-1")
        pipeline.await_settled()
        assert pipeline.states() == [State.PARKED]
        begins = read_ends(pipeline.kafka.bootstrap_servers, topics=pipeline.topics)
        writes = [poison, *commit_messages(writer, "order-1")]
        pipeline.await_settled()
    number = pipeline.rows()[0].sequence_no
    return replace(pipeline.history(writes), holds=[Hold("order", "order-1", number, begins=begins)])


def messages_of_many_keys_are_written(pipeline: Pipeline, start: Start) -> History:
    with pipeline.database.connect() as writer:
        writes = commit_messages(writer, *(f"order-{number}" for number in range(20)))
        with start():
            pipeline.await_settled()
    return replace(pipeline.history(writes), most_duplicates=0)


@dataclass(frozen=True, slots=True)
class Case:
    """A mutant, the run in which it does its damage, and the promises that it breaks there."""

    mutant: str
    scenario: Callable[[Pipeline, Start], History]
    damage: dict[str, int]


CASES = [
    Case("skips_locked_rows", another_relay_has_claimed_the_first_message, {"reordered": 1}),
    Case(
        "marks_before_the_acknowledgement",
        the_relay_is_killed_after_the_mark,
        {"lost": 2, "false_mark": 2},
    ),
    Case("marks_the_whole_batch", one_message_of_a_batch_is_refused, {"lost": 2, "false_mark": 2}),
    Case("has_no_horizon", a_message_is_overtaken_by_another_commit, {"reordered": 1}),
    Case("reads_by_offset", a_message_appears_below_the_last_number, {"lost": 1}),
    Case("ignores_parked_messages", a_key_is_parked, {"unheld": 1}),
    Case("sends_everything_twice", messages_of_many_keys_are_written, {"excessive": 20}),
    Case("drops_a_header", messages_of_many_keys_are_written, {"corrupted": 20}),
    Case("partitions_as_librdkafka_does", messages_of_many_keys_are_written, {"misplaced": 15}),
]

SCENARIOS = list(dict.fromkeys(case.scenario for case in CASES))


def test_every_mutant_is_put_to_the_test() -> None:
    assert {case.mutant for case in CASES} == MUTANTS.keys()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.mutant)
def test_mutant_breaks_exactly_the_promises_that_it_was_made_to_break(pipeline: Pipeline, case: Case) -> None:
    def start(**settings: str | float) -> Daemon:
        command = [sys.executable, "-m", "tests.faults.mutants", case.mutant]
        return Daemon(pipeline.environment(**settings), command=command)

    assert judge(case.scenario(pipeline, start)).broken_promises() == case.damage


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_the_real_relay_breaks_no_promise_in_the_same_run(
    pipeline: Pipeline, scenario: Callable[[Pipeline, Start], History]
) -> None:
    assert judge(scenario(pipeline, pipeline.relay)).broken_promises() == {}


@pytest.mark.parametrize(("is_dual", "damage"), [(True, {"unexpected": 1}), (False, {})])
def test_application_that_writes_to_kafka_itself_publishes_what_it_rolls_back(
    pipeline: Pipeline, damage: dict[str, int], *, is_dual: bool
) -> None:
    with pipeline.relays(1), pipeline.database.connect() as writer:
        writes = insert_messages(writer, "order-1")
        if is_dual:
            [write] = writes
            sent = message(1, "order-1")._replace(
                message_id=write.message_id,
                event_type="happened",
                payload=payload_of(write.message_id),
                headers=json.dumps(own_headers(write.message_id)),
            )
            publish(pipeline.kafka, pipeline.topic("order"), [sent])
        writer.rollback()
        writes += commit_messages(writer, "order-1")
        pipeline.await_settled()
    assert judge(pipeline.history(writes)).broken_promises() == damage


@pytest.mark.parametrize(("guard", "damage"), [("nothing", {"effect_repeated": 3}), ("inbox", {}), ("sequence", {})])
def test_consumer_without_an_inbox_repeats_the_effects_of_a_batch_whose_relay_was_killed(
    pipeline: Pipeline, ledger: Ledger, guard: Guard, damage: dict[str, int]
) -> None:
    writes = publish_twice(pipeline)
    create_journal(ledger.database)
    history = pipeline.history(writes)
    desk = Desk(pipeline.kafka, ledger, *pipeline.topics)
    with running(desk.consumer(handle=partial(note, consumer="billing"), **guards(guard))):
        desk.await_consumed(len(history.records))
    verdict = judge(replace(history, effects=read_effects(ledger.database)))
    assert (verdict.broken_promises(), len(verdict.duplicated)) == (damage, 3)


def publish_twice(pipeline: Pipeline) -> list[Write]:
    """Three messages, by a relay that dies before it has marked them and by another one."""
    with pipeline.database.connect() as writer:
        writes = commit_messages(writer, "order-1", "order-1", "payment-1")
    with pipeline.relay(lanes=1, failpoints="before_settle=kill", allow_failpoints="true") as relay:
        assert relay.wait() == -signal.SIGKILL
    with pipeline.relay():
        pipeline.await_settled()
    return writes
