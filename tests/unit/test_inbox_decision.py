"""What a `SequenceInbox` makes of a batch, for all batches."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from outbox_relay.consumer import Batch, Message
from outbox_relay.consumer.inbox import id_of
from outbox_relay.consumer.sequence import Key, decide
from tests.fixtures.messages import a_message

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Set as AbstractSet
    from uuid import UUID

    from outbox_relay.consumer.inbox import Replays

KEYS = [Key("shop", topic, 0, type_, "1") for topic in ("a", "b") for type_ in ("order", "basket")]


def of_key(key: Key, number: int, *, is_unordered: bool, replay: str | None) -> Message:
    message = a_message(number, key=key.key, is_unordered=is_unordered, replay=replay)
    return replace(message, source=key.source, topic=key.topic, aggregate_type=key.aggregate_type)


MESSAGES = st.lists(
    st.builds(
        of_key,
        st.sampled_from(KEYS),
        st.integers(1, 6),
        is_unordered=st.sampled_from([False, False, True]),
        replay=st.sampled_from([None, None, "first", "second"]),
    ),
    max_size=20,
)
MARKS = st.dictionaries(st.sampled_from(KEYS), st.integers(0, 6))
UNSEEN = st.sets(
    st.builds(
        lambda number, replay, replays: id_of(a_message(number, replay=replay), replays=replays),
        st.integers(1, 6),
        st.sampled_from(["first", "second"]),
        st.sampled_from(["ignore", "apply"]),
    )
)
REPLAYS = st.sampled_from(["ignore", "apply"])


def key_of(message: Message) -> Key:
    return Key(message.source, message.topic, message.partition, message.aggregate_type, message.key)


def verdict(
    earlier: list[Message], message: Message, *, marks: Mapping[Key, int], unseen: AbstractSet[UUID], replays: Replays
) -> str:
    """The definition, from the whole history each time."""

    def is_applied(message: Message) -> bool:
        return replays == "apply" and message.replay is not None

    def identity(message: Message) -> tuple[UUID, str | None]:
        return message.message_id, message.replay if is_applied(message) else None

    if message.is_unordered or is_applied(message):
        by_id = [other for other in earlier if other.is_unordered or is_applied(other)]
        has_come = identity(message) in map(identity, by_id)
        return "duplicates" if has_come or id_of(message, replays=replays) not in unseen else "fresh"
    by_number = [other for other in earlier if not other.is_unordered and not is_applied(other)]
    before = [other.sequence_no for other in by_number if key_of(other) == key_of(message)]
    mark = max([marks.get(key_of(message), 0), *before])
    if message.sequence_no > mark:
        return "fresh"
    return "duplicates" if message.sequence_no == mark else "stale"


@given(MESSAGES, MARKS, UNSEEN, REPLAYS)
def test_each_message_is_what_the_definition_says(
    messages: list[Message], marks: dict[Key, int], unseen: set[UUID], replays: Replays
) -> None:
    expected = Batch()
    for index, message in enumerate(messages):
        word = verdict(messages[:index], message, marks=marks, unseen=unseen, replays=replays)
        getattr(expected, word).append(message)
    assert decide(messages, marks=marks, unseen=unseen, replays=replays) == expected


@given(MESSAGES, MARKS, UNSEEN, REPLAYS)
def test_what_is_passed_in_stays_as_it_was(
    messages: list[Message], marks: dict[Key, int], unseen: set[UUID], replays: Replays
) -> None:
    before = dict(marks), set(unseen)
    decide(messages, marks=marks, unseen=unseen, replays=replays)
    assert (marks, unseen) == before


def test_an_applied_replay_has_one_id_for_each_name_and_an_ignored_one_that_of_its_message() -> None:
    deliveries = [
        a_message(1),
        a_message(1, replay="first"),
        a_message(1, replay="second"),
        a_message(2, replay="first"),
    ]
    assert [id_of(each, replays="ignore") for each in deliveries] == [each.message_id for each in deliveries]
    assert len({id_of(each, replays="apply") for each in deliveries}) == 4
    # Rows that are there keep their meaning: what a name makes of an id never changes.
    assert str(id_of(deliveries[1], replays="apply")) == "ee81079f-820f-5569-870e-c7f87a28f330"
