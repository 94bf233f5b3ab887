"""What a stint remembers between batches: each rule on a few messages, then its promises on generated ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import cycle
from operator import xor
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outbox_relay.relay.failures import BEHIND_PARKED, BEHIND_WAITING, NO_REPORT, WITHDRAWN, Failure, Scope
from outbox_relay.relay.marks import Marks
from outbox_relay.relay.message import Addressing, prepare
from outbox_relay.relay.settle import Aside, Settlement, decide
from outbox_relay.relay.stint import Stint
from tests.fixtures.outbox import message

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from outbox_relay.relay.failures import Outcome
    from outbox_relay.relay.message import Key, Message, OnPoison
    from outbox_relay.relay.settle import PendingState

REFUSED = Failure(Scope.MESSAGE, "MSG_SIZE_TOO_LARGE", "Broker: Message size too large")
AWAY = Failure(Scope.TOPIC, "UNKNOWN_TOPIC_OR_PART", "Broker: Unknown topic or partition")
SHARD_OF = {"a": 0, "b": 0, "c": 1}
ON_POISON: list[OnPoison] = ["park", "skip"]


def of(number: int, key: str = "a") -> Message:
    return message(number, key)._replace(shard=SHARD_OF[key])


def new_stint(*, on_poison: OnPoison = "park", has_pending: bool = False) -> Stint:
    return Stint(Marks({0: 0, 1: 0}), on_poison=on_poison, has_pending=has_pending)


def take_in(
    stint: Stint, messages: Sequence[Message], outcomes: Sequence[Outcome], *, on_poison: OnPoison = "park"
) -> None:
    """Let *stint* take in a batch with these outcomes."""
    stint.take_in(messages, decide(messages, outcomes, on_poison=on_poison))


def numbers(messages: Iterable[Message]) -> list[int]:
    return [each.sequence_no for each in messages]


def test_marks_pass_what_is_published() -> None:
    stint = new_stint()
    take_in(stint, [of(1), of(2, "c"), of(3)], [None, None, None])
    assert (stint.marks.moved(), stint.asides) == ([(0, 3, 2, 1 ^ 3), (1, 2, 1, 2)], [])


@pytest.mark.parametrize(
    ("failure", "state"), [(REFUSED, "parked"), (AWAY, "waiting"), (NO_REPORT, "waiting"), (WITHDRAWN, "waiting")]
)
def test_marks_pass_a_message_that_is_set_aside(failure: Failure, state: PendingState) -> None:
    stint = new_stint()
    take_in(stint, [of(1), of(2, "b")], [failure, None])
    assert (stint.marks.through[0], stint.asides) == (2, [Aside(of(1), state, failure)])


def test_messages_count_and_the_bytes_of_those_that_kafka_has() -> None:
    stint = new_stint()
    take_in(stint, [of(1), of(2, "b"), of(3, "c")], [None, WITHDRAWN, REFUSED])
    assert (stint.messages, stint.acknowledged, stint.stored_bytes) == (3, 1, of(1).stored_bytes)


@pytest.mark.parametrize(("failure", "expected"), [(REFUSED, BEHIND_PARKED), (AWAY, BEHIND_WAITING)])
def test_later_messages_of_a_key_stay_behind_one_that_was_set_aside(failure: Failure, expected: Failure) -> None:
    stint = new_stint()
    take_in(stint, [of(1), of(2, "b")], [failure, None])
    assert [stint.why_held_back(each) for each in (of(3), of(4, "b"), of(5, "c"))] == [expected, None, None]


def test_nothing_can_be_held_back_before_something_was_set_aside() -> None:
    stints = [new_stint(), new_stint(), new_stint(has_pending=True)]
    take_in(stints[1], [of(1)], [AWAY])
    assert [stint.may_hold_back for stint in stints] == [False, True, True]


def test_under_skip_later_messages_pass_one_that_is_parked() -> None:
    stint = new_stint(on_poison="skip", has_pending=True)
    take_in(stint, [of(1)], [REFUSED], on_poison="skip")
    assert [stint.why_held_back(each) for each in (of(2), of(3)._replace(is_behind_parked=True))] == [None, None]


def test_a_message_is_held_back_by_what_the_database_says_of_its_key() -> None:
    stint = new_stint(has_pending=True)
    assert stint.may_hold_back
    behind_parked, behind_waiting = of(1)._replace(is_behind_parked=True), of(2)._replace(is_behind_waiting=True)
    assert [stint.why_held_back(each) for each in (behind_parked, behind_waiting, of(3))] == [
        BEHIND_PARKED,
        BEHIND_WAITING,
        None,
    ]


@pytest.mark.parametrize("on_poison", ON_POISON)
def test_a_message_behind_a_parked_one_and_one_that_waits_waits_for_the_second(on_poison: OnPoison) -> None:
    stint = new_stint(on_poison=on_poison, has_pending=True)
    behind_both = of(1)._replace(is_behind_parked=True, is_behind_waiting=True)
    assert stint.why_held_back(behind_both) is BEHIND_WAITING
    take_in(stint, [of(2, "c")], [AWAY], on_poison=on_poison)
    assert stint.why_held_back(of(3, "c")._replace(is_behind_parked=True)) is BEHIND_WAITING


def test_an_unordered_message_is_not_held_back_and_holds_back_none() -> None:
    stint = new_stint(has_pending=True)
    late = of(1)._replace(is_unordered=True)
    stint.take_in_waiting(decide([late], [AWAY], on_poison="park"))
    assert stint.why_held_back(of(2)) is None
    stint.take_in_waiting(decide([of(2)], [AWAY], on_poison="park"))
    assert stint.why_held_back(late) is None


def test_waiting_messages_count_and_move_no_mark() -> None:
    stint = new_stint(has_pending=True)
    stint.take_in_waiting(decide([of(1), of(2, "b"), of(3, "c")], [None, AWAY, WITHDRAWN], on_poison="park"))
    assert (stint.messages, stint.acknowledged, stint.marks.moved(), stint.asides) == (3, 1, [], [])


@dataclass
class Outbox:
    """
    The rows, the marks and the pending messages, as a lane would find them and leave them behind.

    Attributes:
        rows: All messages; those that are unordered are of writers that were given up on.
        marks: By shard, as recorded.
        pending: State of the messages that the marks have passed and that are not in Kafka.
        published: Messages that are recorded as published.
    """

    on_poison: OnPoison
    rows: list[Message]
    marks: dict[int, int] = field(default_factory=lambda: {0: 0, 1: 0})
    pending: dict[int, PendingState] = field(default_factory=dict)
    published: set[int] = field(default_factory=set)

    def read(self, marks: Marks, *, most: int) -> list[Message]:
        """The next messages of each shard, with what is pending of their keys."""
        found = []
        for shard, through in marks.through.items():
            above = [each for each in self.rows if each.shard == shard and each.sequence_no > through]
            found += [each for each in above if not each.is_unordered][:most]
        return [self.with_flags(each) for each in sorted(found)]

    def read_waiting(self, *, most: int) -> list[Message]:
        """The oldest waiting messages."""
        found = [each for each in self.rows if self.pending.get(each.sequence_no) == "waiting"]
        return [self.with_flags(each)._replace(is_behind_waiting=False) for each in found[:most]]

    def with_flags(self, message: Message) -> Message:
        states = (
            set() if message.is_unordered else {self.pending.get(each.sequence_no) for each in self.before(message)}
        )
        return message._replace(is_behind_parked="parked" in states, is_behind_waiting="waiting" in states)

    def before(self, message: Message) -> list[Message]:
        """Earlier messages of its key that it must not overtake."""
        if message.is_unordered:
            return []
        earlier = [each for each in self.rows if each.key == message.key and each.sequence_no < message.sequence_no]
        return [each for each in earlier if not each.is_unordered]

    def collect_late(self) -> None:
        """Let the messages of writers that were given up on wait, those that did not before."""
        for each in self.rows:
            if each.is_unordered and each.sequence_no not in self.published:
                self.pending.setdefault(each.sequence_no, "waiting")


class Lane:
    """One stint on an outbox, with outcomes that the test chooses; it checks what it meets."""

    def __init__(self, before: Outbox, *, outcomes: Iterator[Outcome]) -> None:
        self.stint = Stint(Marks(before.marks), on_poison=before.on_poison, has_pending=bool(before.pending))
        self._before = before
        self._outbox = replace(before, pending=dict(before.pending), published=set(before.published))
        self._outcomes = outcomes
        self._acknowledged: set[int] = set()
        self._refused: set[int] = set()
        self._aside: dict[int, PendingState] = {}

    def send_waiting(self, *, most: int) -> None:
        settlement = self._send(self._outbox.read_waiting(most=most))
        for each in settlement.published:
            del self._outbox.pending[each.sequence_no]
        self._outbox.pending |= {aside.message.sequence_no: aside.state for aside in settlement.parked}
        self._outbox.published.update(numbers(settlement.published))
        self.stint.take_in_waiting(settlement)

    def send_next(self, *, most: int) -> None:
        messages = self._outbox.read(self.stint.marks, most=most)
        settlement = self._send(messages)
        self._aside |= {each.message.sequence_no: each.state for each in (*settlement.parked, *settlement.waiting)}
        self.stint.take_in(messages, settlement)
        assert {each.sequence_no for each in self._passed()} <= self._acknowledged | self._aside.keys()

    def record(self) -> Outbox:
        """The outbox after the stint."""
        passed = numbers(self._passed())
        assert sorted(aside.message.sequence_no for aside in self.stint.asides) == [
            number for number in passed if number not in self._acknowledged
        ]
        assert self.stint.marks.moved() == self._expected_marks()
        self._outbox.pending |= {aside.message.sequence_no: aside.state for aside in self.stint.asides}
        self._outbox.published |= self._acknowledged.intersection(passed)
        return replace(self._outbox, marks=dict(self.stint.marks.through))

    def _send(self, messages: Sequence[Message]) -> Settlement:
        """Send what may be sent; as the producer does, acknowledge nothing behind a failure of its key."""
        prepared = prepare(
            messages,
            addressing=Addressing(),
            on_poison=self._outbox.on_poison,
            why_held_back=self.stint.why_held_back if self.stint.may_hold_back else None,
        )
        stopped: set[Key] = set()
        for index in prepared.indexes:
            sent = messages[index]
            prepared.outcomes[index] = WITHDRAWN if sent.key in stopped else next(self._outcomes)
            if prepared.outcomes[index] is None:
                self._check_order(sent)
                self._acknowledged.add(sent.sequence_no)
            elif prepared.outcomes[index] is REFUSED and self._outbox.on_poison == "skip":
                self._refused.add(sent.sequence_no)
            else:
                stopped.add(sent.key)
        return decide(messages, prepared.outcomes, on_poison=self._outbox.on_poison)

    def _check_order(self, sent: Message) -> None:
        """No message is sent twice, nor before an earlier one of its key, unless that one is skipped."""
        done = self._acknowledged | self._outbox.published
        assert sent.sequence_no not in done
        if self._outbox.on_poison == "skip":
            done |= self._refused | {each for each, state in self._outbox.pending.items() if state == "parked"}
        assert {each.sequence_no for each in self._outbox.before(sent)} <= done

    def _expected_marks(self) -> list[tuple[int, int, int, int]]:
        by_shard: dict[int, list[int]] = {0: [], 1: []}
        for each in self._passed():
            by_shard[each.shard].append(each.sequence_no)
        return [(shard, passed[-1], len(passed), reduce(xor, passed)) for shard, passed in by_shard.items() if passed]

    def _passed(self) -> list[Message]:
        since, through = self._before.marks, self.stint.marks.through
        return [
            each
            for each in self._outbox.rows
            if not each.is_unordered and since[each.shard] < each.sequence_no <= through[each.shard]
        ]


def begun(rows: Sequence[Row], *, settled: int, on_poison: OnPoison) -> Outbox:
    """An outbox of which the first messages, *settled* at most, were worked off by earlier stints."""
    messages = [of(number, row.key)._replace(is_unordered=row.is_late) for number, row in enumerate(rows, start=1)]
    outbox = Outbox(on_poison, messages)
    stopped: dict[Key, PendingState] = {}
    for each, row in zip(messages[: min(settled, len(rows) // 2)], rows, strict=False):
        state = row.state if each.is_unordered else stopped.get(each.key, row.state)
        if state is None:
            outbox.published.add(each.sequence_no)
        else:
            outbox.pending[each.sequence_no] = state
        if state is not None and not each.is_unordered and (state == "waiting" or on_poison == "park"):
            stopped[each.key] = state
        outbox.marks[each.shard] = each.sequence_no
    return outbox


class Row(NamedTuple):
    """
    A message of the test.

    Attributes:
        is_late: Its writer was given up on.
        state: What becomes of it before the test begins, if it is settled then and not behind another one of its key.
    """

    key: str
    is_late: bool
    state: PendingState | None


class Work(NamedTuple):
    """
    What happens in a stint.

    Attributes:
        outcomes: Of the messages that are sent, again and again.
        most_waiting: The most messages that are read of those that wait.
        batches: The most messages of each batch.
        is_recorded: Whether the stint comes to its end.
    """

    outcomes: list[Outcome]
    most_waiting: int
    batches: list[int]
    is_recorded: bool


all_rows = st.lists(
    st.builds(
        Row,
        key=st.sampled_from(["a", "a", "a", "b", "c"]),
        is_late=st.sampled_from([False] * 5 + [True]),
        state=st.sampled_from([None, None, "parked", "waiting"]),
    ),
    min_size=4,
    max_size=16,
)
all_work = st.lists(
    st.builds(
        Work,
        outcomes=st.lists(st.sampled_from([None, None, REFUSED, AWAY, NO_REPORT, WITHDRAWN]), min_size=1, max_size=8),
        most_waiting=st.sampled_from([0, 1, 20]),
        batches=st.lists(st.integers(1, 4), min_size=1, max_size=5),
        is_recorded=st.sampled_from([True, True, True, False]),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=400, deadline=None)
@given(all_rows, st.integers(0, 6), all_work, st.sampled_from(ON_POISON))
def test_whatever_kafka_answers_marks_are_true_and_keys_stay_in_order(
    rows: list[Row], settled: int, all_work: list[Work], on_poison: OnPoison
) -> None:
    outbox = begun(rows, settled=settled, on_poison=on_poison)
    in_the_end = Work([None], most_waiting=len(rows), batches=[len(rows)], is_recorded=True)
    for work in (*all_work, in_the_end):
        outbox.collect_late()
        lane = Lane(outbox, outcomes=cycle(work.outcomes))
        lane.send_waiting(most=work.most_waiting)
        for most in work.batches:
            lane.send_next(most=most)
        if work.is_recorded:
            outbox = lane.record()
    parked = {number for number, state in outbox.pending.items() if state == "parked"}
    assert outbox.published | parked == set(range(1, len(rows) + 1))
