"""Whatever happens to relays, in whatever order: each decision keeps the promises, and in the end all is settled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from outbox_relay.errors import DatabaseConflict, KafkaUnavailable
from outbox_relay.relay.failures import NO_REPORT, Failure, Outcome, Scope
from tests.faults.simulation.relays import (
    LANES,
    Connect,
    Pause,
    Probe,
    Publish,
    SimulatedRelay,
    Statement,
    put_in_place,
)
from tests.faults.simulation.world import CLOSED, LOST, REFUSED, UNPUBLISHABLE_TYPE, WRITTEN_WITHOUT_REPORT, World

if TYPE_CHECKING:
    from outbox_relay.relay.message import Key, OnPoison
    from tests.faults.simulation.relays import Question, Thread

RELAYS = 2
MOST_STEPS = 15
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
    None,
    None,
    WRITTEN_WITHOUT_REPORT,
    NO_REPORT,
    REFUSED,
    Failure(Scope.BATCH, "OUT_OF_ORDER_SEQUENCE_NUMBER", "of a batch"),
    Failure(Scope.BATCH, "_INVALID_DIFFERENT_RECORD", "of a batch"),
    Failure(Scope.CONNECTION, "_TRANSPORT", "away"),
)
CONFLICT = DatabaseConflict("lock time-out")
AWAY = KafkaUnavailable("no broker answered")
STATEMENTS = ("probe", "lock", "read_messages", "read_waiting", "set_aside", "forget_waiting", "record_marks")
BESIDE = ("observe", "snapshot", "record_unordered", "collect_late")

one_of_the_relays = st.integers(0, RELAYS - 1)
one_of_the_lanes = st.integers(0, RELAYS * LANES - 1)
any_number = st.integers(0, 2**16)
some_places = st.lists(st.sampled_from(PLACES), min_size=1, max_size=8)
some_fates = st.lists(st.sampled_from(FATES), min_size=1, max_size=7)
leaps = st.sampled_from([0, 1, 32])


class Faults(RuleBasedStateMachine):
    """Relays that are answered with successes and faults, writers and operators; the world checks each step."""

    @initialize(on_poison=st.sampled_from(["park", "skip"]))
    def begin(self, on_poison: OnPoison) -> None:
        self.patches, self.relays = pytest.MonkeyPatch(), list[SimulatedRelay]()
        self.fates: list[Outcome] = [None]
        self.world = World(on_poison)
        put_in_place(self.world, self.patches)
        self.relays += [SimulatedRelay(self.world) for _ in range(RELAYS)]
        self.write([place for place in PLACES for _ in range(2)])
        self.let_everything_work(10)

    def teardown(self) -> None:
        try:
            self.world.closed_topics.clear()
            self.fates = [None]
            for writer in list(self.world.open_writers):
                self.world.end(writer, commits=True)
            for _ in range(MOST_ROUNDS):
                if not self.world.unsettled:
                    break
                for thread in self.threads:
                    self.go_on(thread)
            assert self.world.unsettled == [], "a message was left behind"
            self.world.check_marks()
        finally:
            for relay in self.relays:
                relay.kill()
            self.patches.undo()

    @property
    def threads(self) -> list[Thread]:
        return [thread for relay in self.relays for thread in relay.threads.values()]

    @property
    def lanes(self) -> list[Thread]:
        return [lane for relay in self.relays for lane in relay.lanes]

    @rule(places=some_places)
    def write(self, places: list[tuple[Key, int]]) -> None:
        self.world.end(self.world.insert(*places), commits=True)

    @rule(places=some_places, number=any_number)
    def write_poison(self, places: list[tuple[Key, int]], number: int) -> None:
        """One of the messages is refused each time."""
        writer = self.world.insert(*places)
        poison = writer.numbers[number % len(places)]
        self.world.poison.add(self.world.tables.rows[poison].message.message_id)
        self.world.end(writer, commits=True)

    @rule(places=some_places)
    def write_and_stay_open(self, places: list[tuple[Key, int]]) -> None:
        self.world.insert(*places)

    @rule(places=some_places)
    def write_crosswise(self, places: list[tuple[Key, int]]) -> None:
        """The higher numbers are committed first."""
        self.world.insert(*places)
        self.write(places)

    @rule()
    def write_elsewhere_and_stay_open(self) -> None:
        self.world.insert()

    @precondition(lambda self: self.world.open_writers)
    @rule(number=any_number, places=some_places)
    def write_more(self, number: int, places: list[tuple[Key, int]]) -> None:
        writers = [writer for writer in self.world.open_writers if writer.numbers]
        if writers:
            self.world.insert_more(writers[number % len(writers)], *places)

    @precondition(lambda self: self.world.open_writers)
    @rule(number=any_number, commits=st.booleans())
    def end_writer(self, number: int, *, commits: bool) -> None:
        writers = self.world.open_writers
        self.world.end(writers[number % len(writers)], commits=commits)

    @rule(steps=st.integers(1, 40))
    def let_everything_work(self, steps: int) -> None:
        for _ in range(steps):
            for thread in self.threads:
                self.go_on(thread)

    @rule(number=one_of_the_relays, name=st.sampled_from(["horizon", "late"]), steps=st.integers(1, 5))
    def let_a_thread_work(self, number: int, name: str, steps: int) -> None:
        for _ in range(steps):
            self.go_on(self.relays[number].threads[name])

    @rule(number=one_of_the_lanes, steps=st.integers(1, 10))
    def let_a_lane_work(self, number: int, steps: int) -> None:
        for _ in range(steps):
            self.go_on(self.lanes[number])

    @rule(number=one_of_the_lanes, name=st.sampled_from([*STATEMENTS, "publish"]))
    def leave_a_lane_waiting(self, number: int, name: str) -> None:
        self.reach(name, thread=self.lanes[number])

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0, 60.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.world.now += seconds

    @rule(number=one_of_the_lanes, places=some_places, fates=some_fates)
    def fail_some_messages(self, number: int, places: list[tuple[Key, int]], fates: list[Outcome]) -> None:
        lane = self.lanes[number]
        self.write(places)
        if self.reach("publish", thread=lane):
            assert isinstance(lane.question, Publish)
            lane.answer(self.world.publish(lane.connection, lane.question.records, fates))

    @rule(fates=some_fates)
    def let_messages_fail_from_now_on(self, fates: list[Outcome]) -> None:
        self.fates = fates

    @rule(number=one_of_the_lanes, question=st.sampled_from(["publish", "probe brokers"]))
    def lose_kafka(self, number: int, question: str) -> None:
        if self.reach(question, thread=self.lanes[number]):
            self.lanes[number].fail(AWAY)

    @rule(topic=st.sampled_from(["order.events", "payment.events"]))
    def close_or_open_a_topic(self, topic: str) -> None:
        self.world.closed_topics ^= {topic}

    @rule(number=one_of_the_lanes, name=st.sampled_from(STATEMENTS), error=st.sampled_from([CONFLICT, LOST]))
    def fail_a_statement(self, number: int, name: str, error: Exception) -> None:
        if self.reach(name, thread=self.lanes[number]):
            self.break_off(self.lanes[number], error)

    @rule(number=any_number, name=st.sampled_from(BESIDE), error=st.sampled_from([CONFLICT, LOST]))
    def fail_a_statement_beside_the_lanes(self, number: int, name: str, error: Exception) -> None:
        beside = [thread for thread in self.threads if thread not in self.lanes]
        thread = beside[number % len(beside)]
        if self.reach(name, thread=thread):
            self.break_off(thread, error)

    @rule(number=one_of_the_lanes)
    def lose_the_reply_to_a_commit(self, number: int) -> None:
        self.lose_the_reply("record_marks", thread=self.lanes[number])

    @rule(number=one_of_the_relays)
    def lose_the_reply_to_a_collection(self, number: int) -> None:
        self.lose_the_reply("collect_late", thread=self.relays[number].threads["late"])

    @rule(number=one_of_the_lanes)
    def end_an_idle_transaction(self, number: int) -> None:
        if self.reach("record_marks", thread=self.lanes[number]):
            self.world.lose(self.lanes[number].connection)

    @rule(number=one_of_the_relays)
    def kill(self, number: int) -> None:
        self.relays[number].kill()
        self.relays[number] = SimulatedRelay(self.world)

    @rule(number=one_of_the_relays)
    def terminate(self, number: int) -> None:
        """It takes no more, records what it has in hand and ends: nothing of that is rolled back."""
        relay = self.relays[number]
        before = set(self.world.rolled_back)
        relay.drain()
        for _ in range(MOST_ROUNDS):
            for thread in relay.threads.values():
                self.go_on(thread)
        assert relay.has_ended
        assert self.world.rolled_back == before, "a relay that was stopped in order rolled something back"
        self.relays[number] = SimulatedRelay(self.world)

    @rule(
        what=st.sampled_from(["replicate", "replicate", "crash", "fail over", "truncate", "restart"]),
        leap=leaps,
        number=one_of_the_lanes,
    )
    def change_the_server(self, what: str, leap: int, number: int) -> None:
        """
        One of the lanes knows a horizon and is about to claim.

        What is under way to Kafka arrives first: it would expire before others take over the shards.
        """
        self.reach("probe", thread=self.lanes[number])
        for lane in self.lanes:
            if isinstance(lane.question, Publish) and what != "replicate":
                self.go_on(lane)
        if what == "crash":
            self.world.come_back(self.world.flushed, leap=leap)
        elif what == "fail over":
            self.world.come_back(self.world.replicated, leap=leap)
        elif what == "replicate":
            self.world.replicate()
        elif not (self.world.owners or self.world.open_writers):
            self.world.truncate(restarts=what == "restart")

    @rule(number=any_number, decision=st.sampled_from(["release", "skip", "delete"]))
    def decide_on_a_pending_message(self, number: int, decision: str) -> None:
        """An operator waits for a shard that a relay holds; here, until another time."""
        tables = self.world.tables
        parked = [
            tables.rows[each]
            for each, pending in tables.pending.items()
            if pending.state == "parked" or decision == "delete"
        ]
        free = [row for row in parked if row.message.shard not in self.world.owners]
        if free:
            message = free[number % len(free)].message
            if decision == "release":
                self.world.release_parked(message.key)
            else:
                self.world.delete_pending(message.sequence_no, with_its_row=decision == "skip")

    def reach(self, name: str, *, thread: Thread) -> bool:
        """Let *thread* work, and the horizon move, until it asks for this; False if it does not for a while."""
        [relay] = [relay for relay in self.relays if thread in relay.threads.values()]
        for _ in range(MOST_STEPS):
            if name_of(thread.question) == name:
                return True
            self.go_on(thread)
            self.go_on(relay.threads["horizon"])
        return False

    def break_off(self, thread: Thread, error: Exception) -> None:
        """Fail the statement that *thread* has sent; it ends the transaction."""
        if error is LOST:
            self.world.lose(thread.connection)
        else:
            self.world.free(thread.connection)
        thread.fail(error)

    def lose_the_reply(self, name: str, *, thread: Thread) -> None:
        if self.reach(name, thread=thread) and not thread.connection.is_lost:
            assert isinstance(thread.question, Statement)
            thread.question.execute()
            self.world.lose(thread.connection)
            thread.fail(LOST)

    def go_on(self, thread: Thread) -> None:
        """Give the answer of a world without faults but those of messages."""
        match thread.question:
            case Connect():
                thread.answer(None)
            case Pause(seconds, is_over):
                if not is_over():
                    self.world.now += seconds
                thread.answer(None)
            case Probe(topics):
                thread.answer(dict.fromkeys(self.world.closed_topics.intersection(topics), CLOSED))
            case Publish(records):
                thread.answer(self.world.publish(thread.connection, records, self.fates))
            case Statement(connection=connection) if connection.is_lost:
                thread.fail(LOST)
            case Statement(execute=execute):
                thread.answer(execute())
        unforeseen = [error for relay in self.relays for error in relay.unforeseen]
        if unforeseen:
            raise unforeseen[0]


def name_of(question: Question | None) -> str:
    match question:
        case Statement(name=name):
            return name
        case Publish():
            return "publish"
        case Probe():
            return "probe brokers"
    return ""


def test_no_order_of_faults_breaks_a_promise_of_a_relay() -> None:
    run_state_machine_as_test(
        Faults,
        settings=settings(
            max_examples=300,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
