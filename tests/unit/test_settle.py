"""What a batch comes to: each rule on a few messages, then the promises on generated batches."""

from __future__ import annotations

from collections import defaultdict
from itertools import chain
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox_relay.relay.failures import (
    BEHIND_PARKED,
    BEHIND_WAITING,
    NO_REPORT,
    TOPIC_HELD,
    WITHDRAWN,
    Failure,
    Outcome,
    Scope,
)
from outbox_relay.relay.settle import Aside, Settlement, decide
from tests.fixtures.outbox import message

if TYPE_CHECKING:
    from outbox_relay.relay.message import Key, Message, OnPoison

REFUSED = Failure(Scope.MESSAGE, "MSG_SIZE_TOO_LARGE", "Broker: Message size too large")
MISSING_TOPIC = Failure(Scope.TOPIC, "UNKNOWN_TOPIC_OR_PART", "Broker: Unknown topic or partition")
ON_POISON: list[OnPoison] = ["park", "skip"]


def parked(message: Message, failure: Failure) -> Aside:
    return Aside(message, "parked", failure)


def waiting(message: Message, failure: Failure) -> Aside:
    return Aside(message, "waiting", failure)


def test_everything_acknowledged_is_published() -> None:
    messages = [message(1), message(2)]
    assert decide(messages, [None, None], on_poison="park") == Settlement(published=messages)


@pytest.mark.parametrize("failure", [NO_REPORT, MISSING_TOPIC, TOPIC_HELD, BEHIND_WAITING, WITHDRAWN])
def test_what_kafka_does_not_take_now_waits_with_the_later_messages_of_its_key(failure: Failure) -> None:
    first, failed, other, later = message(1), message(2), message(3, "other"), message(4)
    decided = decide([first, failed, other, later], [None, failure, None, None], on_poison="park")
    assert decided == Settlement(
        published=[first, other], waiting=[waiting(failed, failure), waiting(later, BEHIND_WAITING)]
    )


def test_the_same_id_of_another_type_is_another_key() -> None:
    failed, other = message(1), message(2, aggregate_type="basket")
    decided = decide([failed, other], [NO_REPORT, None], on_poison="park")
    assert decided == Settlement(published=[other], waiting=[waiting(failed, NO_REPORT)])


def test_a_refused_message_is_parked_with_the_brokers_words_and_the_later_ones_of_its_key_behind_it() -> None:
    first, refused, other, later = message(1), message(2), message(3, "other"), message(4)
    decided = decide([first, refused, other, later], [None, REFUSED, None, None], on_poison="park")
    assert decided == Settlement(
        published=[first, other], parked=[parked(refused, REFUSED), parked(later, BEHIND_PARKED)]
    )


def test_a_message_behind_one_parked_earlier_is_parked() -> None:
    behind = message(1)
    assert decide([behind], [BEHIND_PARKED], on_poison="park") == Settlement(parked=[parked(behind, BEHIND_PARKED)])


def test_under_skip_only_the_refused_message_is_parked() -> None:
    refused, later = message(1), message(2)
    decided = decide([refused, later], [REFUSED, None], on_poison="skip")
    assert decided == Settlement(published=[later], parked=[parked(refused, REFUSED)])


@pytest.mark.parametrize("on_poison", ON_POISON)
@pytest.mark.parametrize("failure", [NO_REPORT, WITHDRAWN])
def test_a_refused_message_behind_one_that_waits_waits_for_it(failure: Failure, on_poison: OnPoison) -> None:
    first, refused = message(1), message(2)
    decided = decide([first, refused], [failure, REFUSED], on_poison=on_poison)
    assert decided == Settlement(waiting=[waiting(first, failure), waiting(refused, BEHIND_WAITING)])


@pytest.mark.parametrize("failure", [REFUSED, NO_REPORT, WITHDRAWN])
def test_an_unordered_message_holds_up_no_later_one_of_its_key(failure: Failure) -> None:
    late, later = message(1)._replace(is_unordered=True), message(2)
    assert decide([late, later], [failure, None], on_poison="park").published == [later]


@pytest.mark.parametrize("failure", [REFUSED, NO_REPORT, WITHDRAWN])
def test_an_unordered_message_is_held_up_by_no_earlier_one_of_its_key(failure: Failure) -> None:
    failed, late = message(1), message(2)._replace(is_unordered=True)
    assert decide([failed, late], [failure, None], on_poison="park").published == [late]


key_names = st.sampled_from(["a", "b", "c"])
outcomes = st.sampled_from([None, None, None, REFUSED, BEHIND_PARKED, NO_REPORT, TOPIC_HELD, WITHDRAWN, MISSING_TOPIC])
batches = st.lists(st.tuples(key_names, outcomes, st.sampled_from([False, False, True])), max_size=30)

Batch = list[tuple[str, Outcome, bool]]


def messages_of(batch: Batch) -> list[Message]:
    return [
        message(number, key)._replace(is_unordered=is_unordered)
        for number, (key, _, is_unordered) in enumerate(batch, start=1)
    ]


def decided(batch: Batch, *, on_poison: OnPoison) -> Settlement:
    return decide(messages_of(batch), [outcome for _, outcome, _ in batch], on_poison=on_poison)


def fates(settlement: Settlement) -> dict[Message, str]:
    """What became of each message, a letter each: published, parked or waiting (p, x, w)."""
    letters = dict.fromkeys(settlement.published, "p")
    letters |= {aside.message: "x" for aside in settlement.parked}
    return letters | {aside.message: "w" for aside in settlement.waiting}


def fates_by_key(batch: Batch, *, on_poison: OnPoison) -> list[str]:
    """What became of the ordered messages of each key, in their order."""
    letters = fates(decided(batch, on_poison=on_poison))
    words: defaultdict[Key, str] = defaultdict(str)
    for each in messages_of(batch):
        if not each.is_unordered:
            words[each.key] += letters[each]
    return list(words.values())


@given(batches, st.sampled_from(ON_POISON))
def test_every_message_is_in_exactly_one_list_in_sequence_order(batch: Batch, on_poison: OnPoison) -> None:
    settlement = decided(batch, on_poison=on_poison)
    asides = [[aside.message for aside in part] for part in (settlement.parked, settlement.waiting)]
    parts = [settlement.published, *asides]
    assert sorted(chain.from_iterable(parts)) == messages_of(batch)
    assert all(part == sorted(part) for part in parts)


@given(batches, st.sampled_from(ON_POISON))
def test_no_message_is_published_that_kafka_has_not_acknowledged(batch: Batch, on_poison: OnPoison) -> None:
    outcome_of = {each: outcome for each, (_, outcome, _) in zip(messages_of(batch), batch, strict=True)}
    assert {outcome_of[each] for each in decided(batch, on_poison=on_poison).published} <= {None}


@given(batches)
def test_under_park_nothing_of_a_key_is_published_behind_what_is_not(batch: Batch) -> None:
    for word in fates_by_key(batch, on_poison="park"):
        assert len(set(word.lstrip("p"))) <= 1


@given(batches)
def test_under_skip_nothing_of_a_key_is_published_behind_what_waits(batch: Batch) -> None:
    for word in fates_by_key(batch, on_poison="skip"):
        assert len(set(word.lstrip("px"))) <= 1


@given(batches, st.sampled_from(ON_POISON))
def test_the_first_failure_that_holds_up_a_key_decides_the_fate_of_the_rest(batch: Batch, on_poison: OnPoison) -> None:
    stopped: dict[str, str] = {}
    expected = []
    for key, outcome, is_unordered in batch:
        fate = "p" if outcome is None else "x" if outcome.scope is Scope.MESSAGE else "w"
        fate = fate if is_unordered else stopped.get(key, fate)
        expected.append(fate)
        if not is_unordered and fate != "p" and (fate != "x" or on_poison == "park"):
            stopped[key] = fate
    letters = fates(decided(batch, on_poison=on_poison))
    assert [letters[each] for each in messages_of(batch)] == expected


@given(batches, st.sampled_from(ON_POISON))
def test_what_is_set_aside_says_why_in_a_way_that_fits_its_state(batch: Batch, on_poison: OnPoison) -> None:
    settlement = decided(batch, on_poison=on_poison)
    assert {aside.state for aside in settlement.parked} <= {"parked"}
    assert {aside.failure.scope for aside in settlement.parked} <= {Scope.MESSAGE}
    assert {aside.state for aside in settlement.waiting} <= {"waiting"}
    assert {aside.failure.scope for aside in settlement.waiting} <= set(Scope) - {Scope.MESSAGE}
