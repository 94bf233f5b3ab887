"""What a batch comes to: each rule on a few messages, then the promises on generated batches."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox_relay.relay.failures import BEHIND_PARKED, NO_REPORT, WITHDRAWN, Failure, Outcome, Scope
from outbox_relay.relay.settle import Parked, Settlement, decide
from tests.fixtures.outbox import message

if TYPE_CHECKING:
    from outbox_relay.relay.message import Key, Message, OnPoison

REFUSED = Failure(Scope.MESSAGE, "MSG_SIZE_TOO_LARGE", "Broker: Message size too large")
MISSING_TOPIC = Failure(Scope.TOPIC, "UNKNOWN_TOPIC_OR_PART", "Broker: Unknown topic or partition")


def test_everything_acknowledged_is_published() -> None:
    messages = [message(1), message(2)]
    assert decide(messages, [None, None], on_poison="park") == Settlement(published=messages)


@pytest.mark.parametrize("failure", [NO_REPORT, WITHDRAWN, MISSING_TOPIC])
def test_what_failed_for_now_holds_up_only_later_messages_of_its_key(failure: Failure) -> None:
    first, failed, other, later = message(1), message(2), message(3, "other"), message(4)
    decided = decide([first, failed, other, later], [None, failure, None, None], on_poison="park")
    assert decided == Settlement(published=[first, other], unsettled=[failed, later])


def test_the_same_id_of_another_type_is_another_key() -> None:
    failed, other = message(1), message(2, aggregate_type="basket")
    decided = decide([failed, other], [NO_REPORT, None], on_poison="park")
    assert decided == Settlement(published=[other], unsettled=[failed])


def test_a_refused_message_is_parked_with_the_brokers_words_and_its_successors_with_its_number() -> None:
    first, refused, other, later = message(1), message(2), message(3, "other"), message(4)
    decided = decide([first, refused, other, later], [None, REFUSED, None, None], on_poison="park")
    assert decided == Settlement(
        published=[first, other],
        parked=[
            Parked(refused, "MSG_SIZE_TOO_LARGE: Broker: Message size too large"),
            Parked(later, BEHIND_PARKED.text),
        ],
    )


def test_a_message_behind_one_parked_earlier_is_parked() -> None:
    behind = message(1)
    decided = decide([behind], [BEHIND_PARKED], on_poison="park")
    assert decided == Settlement(parked=[Parked(behind, "behind_parked: an earlier message of the key is parked")])


def test_under_skip_only_the_refused_message_is_parked() -> None:
    refused, later = message(1), message(2)
    decided = decide([refused, later], [REFUSED, None], on_poison="skip")
    assert decided == Settlement(
        published=[later], parked=[Parked(refused, "MSG_SIZE_TOO_LARGE: Broker: Message size too large")]
    )


@pytest.mark.parametrize("on_poison", ["park", "skip"])
def test_a_refused_message_behind_an_unsettled_one_waits_for_it(on_poison: OnPoison) -> None:
    open_, refused = message(1), message(2)
    decided = decide([open_, refused], [NO_REPORT, REFUSED], on_poison=on_poison)
    assert decided == Settlement(unsettled=[open_, refused])


keys = st.sampled_from(["a", "b", "c"])
outcomes = st.sampled_from([None, None, None, REFUSED, BEHIND_PARKED, NO_REPORT, WITHDRAWN, MISSING_TOPIC])
batches = st.lists(st.tuples(keys, outcomes), max_size=30)


def decided(batch: list[tuple[str, Outcome]], *, on_poison: OnPoison) -> tuple[list[Message], Settlement]:
    messages = [message(number, key) for number, (key, _) in enumerate(batch, start=1)]
    return messages, decide(messages, [outcome for _, outcome in batch], on_poison=on_poison)


def fates_by_key(messages: list[Message], settlement: Settlement) -> dict[Key, str]:
    """What became of the messages of each key in order, a letter each: published, parked or unsettled (p, x, u)."""
    letters = dict.fromkeys(settlement.published, "p")
    letters |= dict.fromkeys((parked.message for parked in settlement.parked), "x")
    letters |= dict.fromkeys(settlement.unsettled, "u")
    fates: defaultdict[Key, str] = defaultdict(str)
    for each in messages:
        fates[each.key] += letters[each]
    return fates


@given(batches, st.sampled_from(["park", "skip"]))
def test_every_message_is_in_exactly_one_list_in_sequence_order(
    batch: list[tuple[str, Outcome]], on_poison: OnPoison
) -> None:
    messages, settlement = decided(batch, on_poison=on_poison)
    parked = [each.message for each in settlement.parked]
    assert sorted(settlement.published + parked + settlement.unsettled) == messages
    assert all(part == sorted(part) for part in (settlement.published, parked, settlement.unsettled))


@given(batches, st.sampled_from(["park", "skip"]))
def test_only_acknowledged_messages_are_published_and_only_refused_ones_parked_under_skip(
    batch: list[tuple[str, Outcome]], on_poison: OnPoison
) -> None:
    messages, settlement = decided(batch, on_poison=on_poison)
    outcome_of = {each: outcome for each, (_, outcome) in zip(messages, batch, strict=True)}
    assert all(outcome_of[each] is None for each in settlement.published)
    if on_poison == "skip":
        refused = [outcome_of[parked.message] for parked in settlement.parked]
        assert all(outcome is not None and outcome.scope is Scope.MESSAGE for outcome in refused)


@given(batches)
def test_under_park_a_key_is_published_up_to_its_first_failure_and_then_all_parked_or_all_left(
    batch: list[tuple[str, Outcome]],
) -> None:
    messages, settlement = decided(batch, on_poison="park")
    for fates in fates_by_key(messages, settlement).values():
        behind_published = fates.lstrip("p")
        assert len(set(behind_published)) <= 1


@given(batches)
def test_under_skip_a_key_goes_on_behind_a_parked_message_and_not_behind_an_open_one(
    batch: list[tuple[str, Outcome]],
) -> None:
    messages, settlement = decided(batch, on_poison="skip")
    for fates in fates_by_key(messages, settlement).values():
        assert set(fates.lstrip("px")) <= {"u"}


@given(batches)
def test_the_first_failure_of_a_key_decides_its_fate(batch: list[tuple[str, Outcome]]) -> None:
    messages, settlement = decided(batch, on_poison="park")
    parked = {each.message.key for each in settlement.parked}
    left = {each.key for each in settlement.unsettled}
    first_failures: dict[Key, Failure] = {}
    for each, (_, outcome) in zip(messages, batch, strict=True):
        if outcome is not None:
            first_failures.setdefault(each.key, outcome)
    assert parked == {key for key, failure in first_failures.items() if failure.scope is Scope.MESSAGE}
    assert left == first_failures.keys() - parked
