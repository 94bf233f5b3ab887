"""Whatever happens to lanes, in whatever order: each decision keeps the promises, and in the end all is settled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from outbox_relay.errors import DatabaseConflict, DatabaseUnavailable, KafkaUnavailable
from outbox_relay.relay.failures import NO_REPORT, Failure, Outcome, Scope
from tests.faults.simulation import (
    CLOSED,
    UNPUBLISHABLE_TYPE,
    WRITTEN_WITHOUT_REPORT,
    Claim,
    Connect,
    Pause,
    Probe,
    Publish,
    Settle,
    SimulatedLane,
    World,
    put_in_place,
)

if TYPE_CHECKING:
    from outbox_relay.relay.message import Key, OnPoison
    from tests.faults.simulation import Question

LANES = 3
MOST_STEPS = 12
MOST_ROUNDS = 500  # a topic is probed every 30 s at last, and lanes look up once a second

PLACES: tuple[tuple[Key, int], ...] = (
    (("order", "1"), 0),
    (("order", "2"), 0),
    (("payment", "3"), 0),
    (("order", "4"), 1),
    ((UNPUBLISHABLE_TYPE, "5"), 1),
    (("payment", "6"), 2),
)
FATES: tuple[Outcome, ...] = (
    None,
    WRITTEN_WITHOUT_REPORT,
    NO_REPORT,
    Failure(Scope.MESSAGE, "MSG_SIZE_TOO_LARGE", "too large"),
    Failure(Scope.BATCH, "OUT_OF_ORDER_SEQUENCE_NUMBER", "of a batch"),
    Failure(Scope.CONNECTION, "_TRANSPORT", "away"),
)
CONFLICT = DatabaseConflict("lock time-out")
LOST = DatabaseUnavailable("the connection broke")
AWAY = KafkaUnavailable("no broker answered")

one_of_the_lanes = st.integers(0, LANES - 1)
any_number = st.integers(0, 2**16)
some_places = st.lists(st.sampled_from(PLACES), min_size=1, max_size=5)


class Faults(RuleBasedStateMachine):
    """Lanes that are answered with successes and faults, writers and operators; the world checks each step."""

    @initialize(on_poison=st.sampled_from(["park", "park", "skip"]))
    def begin(self, on_poison: OnPoison) -> None:
        self.patches = pytest.MonkeyPatch()
        self.world = World(on_poison)
        put_in_place(self.world, self.patches)
        self.lanes = [SimulatedLane(self.world) for _ in range(LANES)]

    def teardown(self) -> None:
        self.world.closed_topics.clear()
        for writer in list(self.world.open_writers):
            self.world.end(writer, commits=True)
        try:
            for _ in range(MOST_ROUNDS):
                for lane in self.lanes if self.world.waiting else []:
                    self.go_on(lane)
            assert self.world.waiting == [], "a message was left behind"
        finally:
            for lane in self.lanes:
                lane.kill()
            self.patches.undo()

    @rule(places=some_places)
    def write(self, places: list[tuple[Key, int]]) -> None:
        self.world.end(self.world.insert(*places), commits=True)

    @rule(places=some_places)
    def write_and_stay_open(self, places: list[tuple[Key, int]]) -> None:
        self.world.insert(*places)

    @precondition(lambda self: self.world.open_writers)
    @rule(number=any_number, commits=st.booleans())
    def end_writer(self, number: int, *, commits: bool) -> None:
        writers = self.world.open_writers
        self.world.end(writers[number % len(writers)], commits=commits)

    @precondition(lambda self: any(not writer.is_given_up for writer in self.world.open_writers))
    @rule()
    def give_up_on_a_writer(self) -> None:
        next(writer for writer in self.world.open_writers if not writer.is_given_up).is_given_up = True

    @rule(number=one_of_the_lanes, steps=st.integers(1, 10))
    def let_a_lane_work(self, number: int, steps: int) -> None:
        for _ in range(steps):
            self.go_on(self.lanes[number])

    @rule(number=one_of_the_lanes, question=st.sampled_from([Claim, Publish, Settle]))
    def leave_a_lane_waiting(self, number: int, question: type[Question]) -> None:
        self.reach(question, lane=self.lanes[number])

    @rule(number=one_of_the_lanes, fates=st.lists(st.sampled_from(FATES), min_size=1, max_size=6))
    def fail_some_messages(self, number: int, fates: list[Outcome]) -> None:
        lane = self.lanes[number]
        if publish := self.reach(Publish, lane=lane):
            assert isinstance(publish, Publish)
            lane.answer(self.world.publish(lane, publish.records, fates))

    @rule(number=one_of_the_lanes, question=st.sampled_from([Publish, Probe]))
    def lose_kafka(self, number: int, question: type[Question]) -> None:
        if self.reach(question, lane=self.lanes[number]):
            self.lanes[number].fail(AWAY)

    @rule(topic=st.sampled_from(["order.events", "payment.events"]))
    def close_or_open_a_topic(self, topic: str) -> None:
        self.world.closed_topics ^= {topic}

    @rule(
        number=one_of_the_lanes,
        question=st.sampled_from([Claim, Settle]),
        error=st.sampled_from([CONFLICT, LOST]),
    )
    def fail_a_statement(self, number: int, question: type[Question], error: Exception) -> None:
        if self.reach(question, lane=self.lanes[number]):
            self.lanes[number].fail(error)

    @rule(number=one_of_the_lanes)
    def lose_the_reply_to_a_commit(self, number: int) -> None:
        lane = self.lanes[number]
        settle = self.reach(Settle, lane=lane)
        if isinstance(settle, Settle) and not lane.has_lost_its_transaction:
            self.world.settle(lane, settle.settlement)
            lane.fail(LOST)

    @rule(number=one_of_the_lanes)
    def end_an_idle_transaction(self, number: int) -> None:
        if self.reach(Settle, lane=self.lanes[number]):
            self.lanes[number].end_transaction()

    @rule(number=one_of_the_lanes)
    def kill(self, number: int) -> None:
        self.lanes[number].kill()
        self.lanes[number] = SimulatedLane(self.world)

    @rule(number=any_number, skips=st.booleans())
    def decide_on_a_parked_message(self, number: int, *, skips: bool) -> None:
        """An operator waits for a shard that a relay holds; here, until another time."""
        free = [row for row in self.world.rows.values() if row.is_parked and row.message.shard not in self.world.owners]
        if free and skips:
            self.world.skip_parked(free[number % len(free)])
        elif free:
            self.world.release_parked(free[number % len(free)].message.key)

    def reach(self, question: type[Question], *, lane: SimulatedLane) -> Question | None:
        """Let *lane* work until it asks this question; None if it does not for a while."""
        for _ in range(MOST_STEPS):
            if isinstance(lane.question, question):
                return lane.question
            self.go_on(lane)
        return None

    def go_on(self, lane: SimulatedLane) -> None:
        """Give the answer of a world without faults."""
        match lane.question:
            case Connect():
                lane.answer(None)
            case Pause(seconds, number):
                if number is None or self.world.through <= number:
                    self.world.now += seconds
                lane.answer(None)
            case Probe(topics):
                lane.answer(dict.fromkeys(self.world.closed_topics.intersection(topics), CLOSED))
            case Claim() as asked:
                lane.answer(self.world.claim(lane, asked))
            case Publish(records):
                lane.answer(self.world.publish(lane, records, [None]))
            case Settle() if lane.has_lost_its_transaction:
                lane.fail(LOST)
            case Settle(settlement):
                lane.answer(self.world.settle(lane, settlement))


def test_no_order_of_faults_breaks_a_promise_of_the_loop() -> None:
    run_state_machine_as_test(
        Faults,
        settings=settings(
            max_examples=500,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
