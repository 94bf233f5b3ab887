"""What a `SequenceInbox` makes of a batch, for all batches."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from outbox_relay.consumer import Batch, Message
from outbox_relay.consumer.sequence import Key, decide
from tests.fixtures.messages import a_message

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Set as AbstractSet
    from uuid import UUID

KEYS = [Key("shop", topic, 0, type_, "1") for topic in ("a", "b") for type_ in ("order", "basket")]


def of_key(key: Key, number: int, *, is_unordered: bool) -> Message:
    message = a_message(number, key=key.key, is_unordered=is_unordered)
    return replace(message, source=key.source, topic=key.topic, aggregate_type=key.aggregate_type)


MESSAGES = st.lists(
    st.builds(of_key, st.sampled_from(KEYS), st.integers(1, 6), is_unordered=st.sampled_from([False, False, True])),
    max_size=20,
)
MARKS = st.dictionaries(st.sampled_from(KEYS), st.integers(0, 6))
UNSEEN = st.sets(st.integers(1, 6).map(lambda number: a_message(number).message_id))


def key_of(message: Message) -> Key:
    return Key(message.source, message.topic, message.partition, message.aggregate_type, message.key)


def verdict(earlier: list[Message], message: Message, *, marks: Mapping[Key, int], unseen: AbstractSet[UUID]) -> str:
    """The definition, from the whole history each time."""
    if message.is_unordered:
        has_come = any(other.is_unordered and other.message_id == message.message_id for other in earlier)
        return "duplicates" if has_come or message.message_id not in unseen else "fresh"
    before = [other.sequence_no for other in earlier if not other.is_unordered and key_of(other) == key_of(message)]
    mark = max([marks.get(key_of(message), 0), *before])
    if message.sequence_no > mark:
        return "fresh"
    return "duplicates" if message.sequence_no == mark else "stale"


@given(MESSAGES, MARKS, UNSEEN)
def test_each_message_is_what_the_definition_says(
    messages: list[Message], marks: dict[Key, int], unseen: set[UUID]
) -> None:
    expected = Batch()
    for index, message in enumerate(messages):
        getattr(expected, verdict(messages[:index], message, marks=marks, unseen=unseen)).append(message)
    assert decide(messages, marks=marks, unseen=unseen) == expected


@given(MESSAGES, MARKS, UNSEEN)
def test_what_is_passed_in_stays_as_it_was(messages: list[Message], marks: dict[Key, int], unseen: set[UUID]) -> None:
    before = dict(marks), set(unseen)
    decide(messages, marks=marks, unseen=unseen)
    assert (marks, unseen) == before
