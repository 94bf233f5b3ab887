"""The saga's state machine and its judge: no order of messages, and no cooked book, gets past them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.saga.machine import COMMANDS, NEXT_STATES, Event, State, decide, start
from examples.saga.messages import Order
from examples.saga.payment import SHOP
from examples.saga.verdict import Books, Stock, violations

ENDS = {State.COMPLETED, State.COMPENSATED}
UNDOING = (State.CANCELLING, State.RELEASING, State.REFUNDING)
CONFIRMED = {State.CANCELLING: Event.CANCELLED, State.RELEASING: Event.RELEASED, State.REFUNDING: Event.REFUNDED}


def path(*events: Event) -> list[State]:
    """The states that the events lead through; those that nobody waits for lead nowhere."""
    states = [start().state]
    for event in events:
        transition = decide(states[-1], event)
        states.append(transition.state if transition else states[-1])
    return states


def test_an_order_that_nobody_refuses_is_charged_reserved_and_shipped() -> None:
    assert path(Event.CHARGED, Event.RESERVED, Event.SHIPPED) == [
        State.CHARGING,
        State.RESERVING,
        State.SHIPPING,
        State.COMPLETED,
    ]


def test_a_refused_step_takes_back_those_before_it_in_reverse() -> None:
    assert path(Event.CHARGED, Event.RESERVED, Event.SHIP_REFUSED, Event.RELEASED, Event.REFUNDED)[3:] == [
        State.RELEASING,
        State.REFUNDING,
        State.COMPENSATED,
    ]


def test_a_step_that_timed_out_is_itself_taken_back_too() -> None:
    assert path(Event.CHARGED, Event.RESERVED, Event.TIMED_OUT)[-1] is State.CANCELLING
    assert path(Event.CHARGED, Event.TIMED_OUT)[-1] is State.RELEASING
    assert path(Event.TIMED_OUT)[-1] is State.REFUNDING


@pytest.mark.parametrize("late", [Event.CHARGED, Event.CHARGE_REFUSED])
def test_an_answer_after_the_saga_gave_up_does_not_bring_it_back(late: Event) -> None:
    assert path(Event.TIMED_OUT, late)[-1] is State.REFUNDING


@pytest.mark.parametrize("state", UNDOING)
def test_compensation_ends_by_nothing_but_its_confirmation(state: State) -> None:
    moved_by = {event for event in Event if (found := decide(state, event)) and found.state is not state}
    assert moved_by == {CONFIRMED[state]}
    repeated = decide(state, Event.TIMED_OUT)
    assert repeated is not None
    assert repeated.command == COMMANDS[state]


def test_every_state_but_the_ends_has_a_command_and_a_deadline() -> None:
    entered = [start(), *(found for pair in product(State, Event) if (found := decide(*pair)))]
    assert {transition.state for transition in entered} == set(State)
    for transition in entered:
        is_end = transition.state in ENDS
        assert (transition.command is None, transition.timeout is None) == (is_end, is_end)


@given(st.lists(st.sampled_from(Event), max_size=40))
def test_whatever_happens_an_end_can_be_reached_and_is_never_left(events: list[Event]) -> None:
    states = path(*events)
    for before, after in pairwise(states):
        assert before not in ENDS or after is before
    state = states[-1]
    for _ in State:
        transition = decide(state, CONFIRMED.get(state, Event.TIMED_OUT))
        state = transition.state if transition else state
    assert state in ENDS


FIRST = Order(order_id=UUID(int=1), customer="ada", item="lamp", quantity=2, cents=300, address="Quito")
SECOND = Order(order_id=UUID(int=2), customer="ada", item="lamp", quantity=1, cents=150, address="Lagos")

BEFORE = Books(orders=[], states={}, accounts={SHOP: 0, "ada": 1000}, stock={"lamp": Stock(5, 0)}, shipments={})
AFTER = Books(
    orders=[FIRST, SECOND],
    states={FIRST.order_id: State.COMPLETED, SECOND.order_id: State.COMPENSATED},
    accounts={SHOP: 300, "ada": 700},
    stock={"lamp": Stock(3, 2)},
    shipments={FIRST.order_id: "Quito"},
)


def test_books_that_are_what_the_completed_orders_make_of_them_are_right() -> None:
    assert violations(BEFORE, AFTER) == []


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (replace(AFTER, states={FIRST.order_id: State.COMPLETED}), f"order {SECOND.order_id} is None"),
        (
            replace(AFTER, states={**AFTER.states, SECOND.order_id: State.REFUNDING}),
            f"order {SECOND.order_id} is refunding",
        ),
        (replace(AFTER, accounts={SHOP: 450, "ada": 700}), "cents of shop: 450 instead of 300"),
        (replace(AFTER, accounts={SHOP: 300, "ada": 550}), "cents of ada: 550 instead of 700"),
        (replace(AFTER, accounts={**AFTER.accounts, "eve": 1}), "cents of eve: 1 instead of None"),
        (
            replace(AFTER, stock={"lamp": Stock(2, 3)}),
            "stock of lamp: Stock(available=2, reserved=3) instead of Stock(available=3, reserved=2)",
        ),
        (replace(AFTER, shipments={}), f"shipment of {FIRST.order_id}: None instead of Quito"),
        (
            replace(AFTER, shipments={**AFTER.shipments, SECOND.order_id: "Lagos"}),
            f"shipment of {SECOND.order_id}: Lagos instead of None",
        ),
    ],
)
def test_each_kind_of_broken_books_is_found(broken: Books, sentence: str) -> None:
    assert violations(BEFORE, broken) == [sentence]


def test_every_state_can_be_reached() -> None:
    assert {State.CHARGING, *NEXT_STATES.values()} == set(State)
