"""The horizon's decisions: first rule by rule, then on generated histories of transactions that a model judges."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from outbox_relay.relay.horizon import Horizon, Observation, _running

TIMEOUT = 5.0
PATIENCE = 0.010
EPOCH = 3 * 2**32


def new_horizon() -> Horizon:
    return Horizon(TIMEOUT, PATIENCE)


def seen(last_no: int, *running: int) -> Observation:
    return Observation(last_no, frozenset(running))


def test_the_last_number_is_the_horizon_when_nobody_runs() -> None:
    horizon = new_horizon()
    horizon.observe(seen(10), now=0.0)
    assert horizon.through == 10


def test_a_running_transaction_is_awaited_until_it_has_ended() -> None:
    horizon = new_horizon()
    horizon.observe(seen(10, 500), now=0.0)
    assert horizon.through == 0
    horizon.observe(seen(10), now=0.1)
    assert horizon.through == 10


def test_a_transaction_that_began_later_holds_up_only_later_numbers() -> None:
    horizon = new_horizon()
    horizon.observe(seen(10, 500), now=0.0)
    horizon.observe(seen(20, 500, 501), now=0.1)
    horizon.observe(seen(20, 501), now=0.2)
    assert horizon.through == 10
    horizon.observe(seen(20), now=0.3)
    assert horizon.through == 20


def test_a_bystander_costs_one_look_and_no_stall() -> None:
    horizon = new_horizon()
    horizon.observe(seen(10, 500), now=0.0)
    assert not horizon.wants_look(now=PATIENCE / 2)
    assert horizon.wants_look(now=PATIENCE)
    horizon.looked({501}, now=PATIENCE, cost=0.0)
    assert horizon.through == 10


def test_a_known_bystander_is_looked_up_without_patience() -> None:
    horizon = new_horizon()
    horizon.observe(seen(10, 500), now=0.0)
    horizon.looked((), now=0.0, cost=0.0)
    horizon.observe(seen(11, 500), now=1.0)
    assert horizon.through == 10
    assert horizon.wants_look(now=1.0)


def test_a_bystander_that_has_ended_is_forgotten() -> None:
    horizon = new_horizon()
    horizon.observe(seen(10, 500), now=0.0)
    horizon.looked((), now=0.0, cost=0.0)
    horizon.observe(seen(10), now=1.0)
    horizon.observe(seen(11, 500 + 2**32), now=2.0)
    assert not horizon.wants_look(now=2.0)


def test_a_writer_in_the_look_is_awaited_by_the_low_half_of_its_id() -> None:
    horizon = new_horizon()
    writer = EPOCH + 500
    horizon.observe(seen(10, writer), now=0.0)
    horizon.looked({500}, now=PATIENCE, cost=0.0)
    assert horizon.through == 0
    horizon.observe(seen(10), now=0.1)
    assert horizon.through == 10


def test_nobody_is_looked_up_when_nothing_waits() -> None:
    horizon = new_horizon()
    horizon.observe(seen(10), now=0.0)
    assert not horizon.wants_look(now=100.0)


@pytest.mark.parametrize("cost", [0.001, 0.011, 0.4])
def test_looks_take_a_tenth_of_the_time_at_most(cost: float) -> None:
    horizon = new_horizon()
    horizon.observe(seen(10, 500), now=0.0)
    now = spent = 0.0
    while now < 10.0:
        if horizon.wants_look(now=now):
            now += cost
            spent += cost
            horizon.looked({500}, now=now, cost=cost)
        now += 0.001
    assert 0 < spent <= now / 10 + cost


def test_a_writer_is_overdue_after_the_ordering_timeout_and_not_before() -> None:
    horizon = new_horizon()
    horizon.observe(seen(10, 500), now=1.0)
    assert horizon.overdue(now=1.0 + TIMEOUT - 0.001) == frozenset()
    assert horizon.overdue(now=1.0 + TIMEOUT) == {500}


def test_a_writer_that_was_given_up_holds_up_nothing_any_more() -> None:
    horizon = new_horizon()
    horizon.observe(seen(10, 500), now=0.0)
    horizon.give_up({500})
    assert horizon.through == 10
    horizon.observe(seen(20, 500), now=6.0)
    assert horizon.through == 20


def test_the_end_of_a_writer_that_was_given_up_is_counted_once() -> None:
    horizon = new_horizon()
    horizon.observe(seen(10, 500), now=0.0)
    horizon.give_up({500})
    horizon.observe(seen(20, 500), now=6.0)
    assert horizon.late_writers_ended == 0
    horizon.observe(seen(20), now=7.0)
    horizon.observe(seen(20), now=8.0)
    assert (horizon.late_writers_ended, horizon.given_up) == (1, set())


def test_giving_up_one_writer_still_awaits_the_others() -> None:
    horizon = new_horizon()
    horizon.observe(seen(10, 500, 501), now=0.0)
    horizon.give_up({500})
    assert horizon.through == 0


def test_held_for_is_the_age_of_the_oldest_number_that_waits() -> None:
    horizon = new_horizon()
    assert horizon.held_for(now=9.0) == 0.0
    horizon.observe(seen(10, 500), now=1.0)
    horizon.observe(seen(20, 500), now=2.0)
    assert horizon.held_for(now=4.0) == 3.0


def test_blockers_are_those_who_are_awaited_for_longer_than_the_patience() -> None:
    horizon = new_horizon()
    horizon.observe(seen(10, 500, 501), now=0.0)
    assert horizon.blockers(now=PATIENCE / 2) == 0
    horizon.observe(seen(20, 500, 501, 502), now=0.1)
    assert horizon.blockers(now=0.1) == 2
    assert horizon.blockers(now=0.2) == 3
    horizon.looked({501}, now=0.2, cost=0.0)
    assert horizon.blockers(now=0.2) == 1
    horizon.observe(seen(20), now=0.3)
    assert horizon.blockers(now=0.3) == 0


def test_a_number_below_the_horizon_starts_anew() -> None:
    horizon = new_horizon()
    horizon.observe(seen(1000), now=0.0)
    horizon.observe(seen(5, 500), now=1.0)
    assert horizon.through == 0
    horizon.observe(seen(5), now=2.0)
    assert horizon.through == 5


def test_a_number_below_one_that_waits_starts_anew() -> None:
    horizon = new_horizon()
    horizon.observe(seen(1000, 500), now=0.0)
    horizon.observe(seen(5, 501), now=1.0)
    assert horizon.through == 0


def test_numbers_that_wait_are_bounded_and_the_last_one_is_reached_all_the_same() -> None:
    horizon = new_horizon()
    for number in range(1, 1001):
        horizon.observe(seen(number, 500), now=number / 1000)
    assert len(horizon.candidates) < 20
    horizon.observe(seen(1000), now=2.0)
    horizon.observe(seen(1000), now=2.1)
    assert horizon.through == 1000


def test_reset_forgets_the_numbers_and_the_transactions_of_another_server() -> None:
    horizon = new_horizon()
    horizon.observe(seen(10), now=0.0)
    horizon.observe(seen(20, 500, 501), now=0.0)
    horizon.give_up({500})
    horizon.reset()
    assert (horizon.through, horizon.candidates, horizon.given_up) == (0, [], set())


@pytest.mark.parametrize(
    ("snapshot", "next_xid", "relay_xids", "expected"),
    [
        ("100:100:", 100, "", set()),
        ("90:100:90,95", 100, "", {90, 95}),
        ("90:100:90", 103, "", {90, 100, 101, 102}),
        ("90:100:90,95", 102, "95,101,7", {90, 100}),
        ("4294967290:4294967294:4294967290", 1, "", {4294967290, 4294967294, 4294967295, 4294967296}),
        ("4294967294:4294967294:", 2, "4294967295,1", {4294967294, 4294967296}),
        (f"{EPOCH + 600}:{EPOCH + 602}:{EPOCH + 600}", 604, "600,603", {EPOCH + 602}),
        ("8589934592:8589934592:", 1, "0", set()),
        ("90:2147483700:90", 2147483702 - 2**32, "", {90, 2147483700, 2147483701}),
    ],
    ids=[
        "nobody",
        "listed",
        "started since the last one completed",
        "relays left out of both",
        "next id beyond the wrap-around",
        "relays beyond the wrap-around",
        "relay named by the low half of its id",
        "first id of an epoch",
        "age that overflowed 31 bits",
    ],
)
def test_running_transactions_are_the_listed_and_those_up_to_the_next_id(
    snapshot: str, next_xid: int, relay_xids: str, expected: set[int]
) -> None:
    assert _running(snapshot, next_xid=next_xid, relay_xids=relay_xids) == expected


class Transactions(RuleBasedStateMachine):
    """
    Transactions that begin, draw numbers or none, and end in any order, while one horizon observes them.

    An observation is two reads, as on the server: of the last number, and later of the running transactions.
    """

    opened = Bundle("opened")

    def __init__(self) -> None:
        super().__init__()
        self.horizon = new_horizon()
        self.now = 0.0
        self.last_no = 0
        self.next_xid = 2**32 - 2  # soon beyond the 32 bits of pg_locks
        self.last_no_read: int | None = None
        self.numbers: dict[int, list[int]] = {}

    @rule(target=opened)
    def begin_writer_or_bystander(self) -> int:
        self.next_xid += 1
        self.numbers[self.next_xid] = []
        return self.next_xid

    @rule(xid=opened)
    def draw_number(self, xid: int) -> None:
        self.last_no += 1
        self.numbers[xid].append(self.last_no)

    @rule(xid=consumes(opened))
    def commit_or_roll_back(self, xid: int) -> None:
        del self.numbers[xid]

    @rule()
    def read_last_number(self) -> None:
        self.last_no_read = self.last_no

    @rule()
    def observe(self) -> None:
        """Take the snapshot of an observation; its last number was read now or some steps before."""
        last_no = self.last_no if self.last_no_read is None else self.last_no_read
        self.last_no_read = None
        self.horizon.observe(Observation(last_no, frozenset(self.numbers)), now=self.now)

    @rule(seconds=st.sampled_from([PATIENCE, TIMEOUT]))
    def look_later(self, seconds: float) -> None:
        self.now += seconds
        if self.horizon.wants_look(now=self.now):
            writers = {xid % 2**32 for xid, numbers in self.numbers.items() if numbers}
            self.horizon.looked(writers, now=self.now, cost=0.0)
            self.horizon.give_up(self.horizon.overdue(now=self.now))

    @invariant()
    def no_number_can_appear_at_or_below_the_horizon(self) -> None:
        for xid, numbers in self.numbers.items():
            if xid not in self.horizon.given_up:
                assert not [number for number in numbers if number <= self.horizon.through]

    @invariant()
    def the_horizon_is_not_beyond_the_last_number(self) -> None:
        assert self.horizon.through <= self.last_no

    def teardown(self) -> None:
        """When all have ended the horizon is the last number, after the numbers that waited and then the last one."""
        for _ in range(2):
            self.horizon.observe(Observation(self.last_no, frozenset()), now=self.now)
        assert self.horizon.through == self.last_no


TestTransactions = Transactions.TestCase
TestTransactions.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)
