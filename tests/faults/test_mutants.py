"""The judge is judged: it finds each kind of damage in a relay that does it, and none in the real one."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import pytest
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from outbox_relay.sandbox.history import History, Hold, Outcome, State
from outbox_relay.sandbox.judge import judge
from outbox_relay.sandbox.reading import read_ends
from tests.faults.mutants import MUTANTS
from tests.fixtures.consumer_process import guards
from tests.fixtures.daemon import Daemon
from tests.fixtures.journal import create_journal, note, read_effects
from tests.fixtures.ledger import Desk, publish, running
from tests.fixtures.load import (
    commit_messages,
    commit_poison,
    commit_with_number,
    insert_messages,
    own_headers,
    payload_of,
)
from tests.fixtures.outbox import message
from tests.fixtures.pipeline import flaws, short_times
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from outbox_relay.sandbox.history import Write
    from tests.fixtures.consumer_process import Guard
    from tests.fixtures.ledger import Ledger
    from tests.fixtures.pipeline import Pipeline

pytestmark = [pytest.mark.kafka, pytest.mark.outside("the image has no mutants")]

Start = Callable[..., Daemon]

PUBLISHED = State.PUBLISHED
LONG_SECONDS = 60
REQUEST_SECONDS = 10
RECONCILING_SECONDS = 20


def another_relay_is_about_to_publish_the_first_message(pipeline: Pipeline, start: Start) -> History:
    """And stands still, until PostgreSQL ends its transaction. What is not locked is there for the taking."""
    owner = pipeline.database.dsn  # who may lock rows
    failpoint = {"failpoints": "after_read=stop@1", "allow_failpoints": "true", **short_times(publish_deadline=13)}
    with pipeline.database.connect() as writer:
        writes = commit_messages(writer, "order-1", "order-1")
        with start(lanes=1, batch_size=1, database_url=owner, **failpoint) as slow:
            slow.wait_for_event("failpoint_reached")
            eventually(lambda: pipeline.open_transactions() == 1)
            writes += commit_messages(writer, "payment-1")
            with start(lanes=1, database_url=owner):
                eventually(lambda: pipeline.states()[-1] is PUBLISHED)
            slow.resume()
            pipeline.await_settled()
            eventually(lambda: len(pipeline.records()) == len(writes))
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


def a_batch_is_refused_as_a_whole(pipeline: Pipeline, start: Start) -> History:
    """Its messages are small enough, one by one."""
    limit = ConfigEntry("max.message.bytes", "1000", incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, pipeline.topic("order"), incremental_configs=[limit])
    admin = pipeline.kafka.admin()  # held, or its answers are lost with it
    admin.incremental_alter_configs([resource])[resource].result(REQUEST_SECONDS)
    with pipeline.database.connect() as writer:
        writes = commit_messages(writer, *["order-1"] * 30)
        with start(lanes=1, kafka__compression_type="none"):
            pipeline.await_settled()
    return pipeline.history(writes)


def messages_of_one_key_are_written(pipeline: Pipeline, start: Start) -> History:
    with pipeline.database.connect() as writer:
        writes = commit_messages(writer, *["order-1"] * 5)
        with start(lanes=1):
            pipeline.await_settled()
    return pipeline.history(writes)


def a_message_is_overtaken_by_another_commit(pipeline: Pipeline, start: Start) -> History:
    with start(ordering_timeout=LONG_SECONDS) as relay:
        relay.wait_for_event("relay_started")
        writes = overtake(pipeline, relay)
    return pipeline.history(writes)


def the_numbers_begin_anew_under_a_running_relay(pipeline: Pipeline, start: Start) -> History:
    with start(ordering_timeout=LONG_SECONDS) as relay, pipeline.database.connect() as admin:
        commit_messages(admin, *["payment-1"] * 10)
        pipeline.await_settled()
        admin.execute("TRUNCATE outbox RESTART IDENTITY")
        admin.commit()
        writes = overtake(pipeline, relay)
    return without_payments(pipeline.history(writes))


def the_numbers_begin_anew_between_horizon_and_claim(pipeline: Pipeline, start: Start) -> History:
    failpoint = {"failpoints": "before_claim=stop@2", "allow_failpoints": "true"}
    with pipeline.database.connect() as admin:
        commit_messages(admin, *["payment-1"] * 10)
        with start(lanes=1, ordering_timeout=LONG_SECONDS, **failpoint) as relay:
            relay.wait_for_event("failpoint_reached")
            pipeline.await_settled()
            admin.execute("TRUNCATE outbox RESTART IDENTITY")
            admin.commit()
            writes = overtake(pipeline, relay)
    return without_payments(pipeline.history(writes))


def overtake(pipeline: Pipeline, relay: Daemon) -> list[Write]:
    """Commit the second number of a key, then the first, but not before the relay has decided about the second."""
    with pipeline.database.connect() as slow, pipeline.database.connect() as quick:
        writes = committed(insert_messages(slow, "order-1"))
        writes += commit_messages(quick, "order-1")
        relay.resume()
        eventually(
            lambda: PUBLISHED in pipeline.states() or relay.events_named("horizon_held"),
            message="the relay neither publishes nor waits",
        )
        slow.commit()
    pipeline.await_settled()
    return writes


def without_payments(history: History) -> History:
    """Leave out what was published before the table was emptied."""
    return replace(history, records=[record for record in history.records if record.key != "payment-1"])


def two_relays_take_turns(pipeline: Pipeline, start: Start) -> History:
    """The first one stands still, and holds nothing, while the second one publishes."""
    with pipeline.database.connect() as writer:
        writes = commit_messages(writer, "order-1")
        with start(lanes=1, failpoints="before_claim=stop@2", allow_failpoints="true") as first:
            first.wait_for_event("failpoint_reached")
            pipeline.await_settled()
            writes += commit_messages(writer, "order-1")
            with start(lanes=1):
                pipeline.await_settled()
            writes += commit_messages(writer, "order-1")
            first.resume()
            pipeline.await_settled()
    return replace(pipeline.history(writes), most_duplicates=0)


def a_writer_is_given_up_on(pipeline: Pipeline, start: Start) -> History:
    """It writes again afterwards, above the marks."""
    with start(ordering_timeout=1) as relay, pipeline.database.connect() as late, pipeline.database.connect() as other:
        writes = committed(insert_messages(late, "order-1"))
        writes += commit_messages(other, "order-1")
        relay.wait_for_event("writer_given_up")
        pipeline.await_settled()
        writes += committed(insert_messages(late, "order-1"))
        late.commit()
        relay.wait_for_event("late_messages_found")
        pipeline.await_settled()
    return replace(pipeline.history(writes), most_duplicates=0)


def a_row_is_inserted_below_a_mark(pipeline: Pipeline, start: Start) -> History:
    """By the owner of the table, who can give any number; the relay gets time to find it."""
    with pipeline.database.connect() as writer, start():
        writes = commit_messages(writer, "order-1")
        insert_messages(writer, "order-1")
        writer.rollback()
        writes += commit_messages(writer, "order-1")
        pipeline.await_settled()
        writes.append(commit_with_number(writer, "order-1", number=2))
        with suppress(TimeoutError):
            eventually(lambda: len(pipeline.records()) == len(writes), timeout=RECONCILING_SECONDS)
        pipeline.await_settled()
    return pipeline.history(writes)


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


def committed(writes: list[Write]) -> list[Write]:
    """Messages of a transaction that will be committed."""
    return [replace(write, outcome=Outcome.COMMITTED) for write in writes]


@dataclass(frozen=True, slots=True)
class Case:
    """A mutant, the run in which it does its damage, and the promises that it breaks there."""

    mutant: str
    scenario: Callable[[Pipeline, Start], History]
    damage: dict[str, int]


SKIPPED = {"lost": 1, "false_mark": 1, "miscounted": 1}
CASES = [
    Case("never_reconciles", a_row_is_inserted_below_a_mark, SKIPPED),
    Case("skips_locked_rows", another_relay_is_about_to_publish_the_first_message, {"reordered": 1}),
    Case("marks_before_the_acknowledgement", the_relay_is_killed_after_the_mark, {"lost": 2, "false_mark": 2}),
    Case("marks_the_whole_batch", one_message_of_a_batch_is_refused, {"lost": 2, "false_mark": 2}),
    Case("forgets_what_is_parked", one_message_of_a_batch_is_refused, {"lost": 2, "false_mark": 2}),
    Case("forgets_what_waits", a_batch_is_refused_as_a_whole, {"lost": 30, "false_mark": 30}),
    Case("leaves_a_hole_in_what_it_reads", messages_of_one_key_are_written, SKIPPED),
    Case("keeps_its_marks_from_one_stint_to_the_next", two_relays_take_turns, {"miscounted": 1, "excessive": 1}),
    Case("has_no_horizon", a_message_is_overtaken_by_another_commit, SKIPPED),
    Case("ignores_the_epoch", the_numbers_begin_anew_between_horizon_and_claim, SKIPPED),
    Case("keeps_the_horizon_of_other_numbers", the_numbers_begin_anew_under_a_running_relay, SKIPPED),
    Case("counts_late_messages", a_writer_is_given_up_on, {"miscounted": 1, "excessive": 1}),
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


def test_reconciling_publishes_what_a_mutant_has_left_out(pipeline: Pipeline) -> None:
    with pipeline.database.connect() as writer:
        writes = commit_messages(writer, *["order-1"] * 5)
        command = [sys.executable, "-m", "tests.faults.mutants", "leaves_a_hole_in_what_it_reads"]
        with Daemon(pipeline.environment(lanes=1), command=command):
            pipeline.await_settled()
        assert judge(pipeline.history(writes)).broken_promises() == SKIPPED
        with pipeline.relay() as relay:
            found = relay.wait_for_event("skipped_messages_found")
            pipeline.await_settled()
    assert found["messages"] == len(writes)  # nobody can tell which of them it was
    assert flaws(pipeline.judge(writes)) == {"given_up": 1, "duplicated": 4}


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
