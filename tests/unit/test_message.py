"""What a message becomes on the wire, and what Kafka could never accept, as tables of cases."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from outbox_relay.relay.failures import (
    BEHIND_PARKED,
    TOPIC_HELD,
    WITHDRAWN,
    Failure,
    Scope,
    Unpublishable,
)
from outbox_relay.relay.message import Addressing, Prepared, Record, prepare
from tests.fixtures.outbox import PLAIN

if TYPE_CHECKING:
    from collections.abc import Mapping

    from outbox_relay.relay.envelope import Header
    from outbox_relay.relay.failures import Outcome
    from outbox_relay.relay.message import Message, OnPoison

ADDRESSING = Addressing(source="shop.public")
TOPIC = "order.events"

COMMON: list[Header] = [
    ("id", "8c4f0b0e-5d1c-4e64-9f0b-5f1d0d3f7a11"),
    ("event_type", "placed"),
    ("aggregate_type", "order"),
    ("sequence_no", "1"),
    ("source", "shop.public"),
]
JSON_CONTENT: Header = ("content-type", "application/json")


def reason(message: Message, *, addressing: Addressing = ADDRESSING) -> str:
    """Why *message* cannot be published."""
    with pytest.raises(Unpublishable) as refused:
        addressing.record(message, topic=TOPIC)
    return str(refused.value)


def test_a_message_becomes_a_record_with_its_payload_untouched() -> None:
    assert ADDRESSING.record(PLAIN, topic=TOPIC) == Record(
        topic="order.events",
        key="4711",
        value='{"total": 1.50}',
        headers=[*COMMON, JSON_CONTENT],
        timestamp_ms=1_700_000_000_123,
    )


def test_a_binary_payload_goes_out_as_it_is() -> None:
    record = ADDRESSING.record(PLAIN._replace(payload=None, payload_bytes=b"\x00\xff"), topic=TOPIC)
    assert record.value == b"\x00\xff"
    assert record.headers == [*COMMON, ("content-type", "application/octet-stream")]


def test_an_empty_binary_payload_is_no_tombstone() -> None:
    assert ADDRESSING.record(PLAIN._replace(payload=None, payload_bytes=b""), topic=TOPIC).value == b""


def test_no_payload_is_a_tombstone_without_a_content_type() -> None:
    record = ADDRESSING.record(PLAIN._replace(payload=None), topic=TOPIC)
    assert (record.value, record.headers) == (None, COMMON)


def test_a_json_null_is_no_tombstone() -> None:
    assert ADDRESSING.record(PLAIN._replace(payload="null"), topic=TOPIC).value == "null"


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"traceparent": "00-ab-cd-01"}, [JSON_CONTENT, ("traceparent", "00-ab-cd-01")]),
        ({"grüße": "schön ✓"}, [JSON_CONTENT, ("grüße", "schön ✓")]),
        ({"empty": ""}, [JSON_CONTENT, ("empty", "")]),
        ({"content-type": "application/avro"}, [("content-type", "application/avro")]),
    ],
    ids=["traceparent", "unicode", "empty", "content type of its own"],
)
def test_own_headers_follow_ours(own: Mapping[str, str], expected: list[Header]) -> None:
    assert ADDRESSING.record(PLAIN._replace(headers=json.dumps(own)), topic=TOPIC).headers == [*COMMON, *expected]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"attempt": 3}, 'header "attempt" is 3: a header is a string'),
        ({"attempt": None}, 'header "attempt" is null: a header is a string'),
        ({"attempt": True}, 'header "attempt" is true: a header is a string'),
        ({"trace": {"id": "x"}}, 'header "trace" is {"id": "x"}: a header is a string'),
        ({"tags": ["a" * 200]}, f'header "tags" is ["{"a" * 98}: a header is a string'),
        *(
            ({name: "x"}, f'header "{name}" is set by the relay: choose another name')
            for name in ("id", "event_type", "aggregate_type", "sequence_no", "source", "unordered")
        ),
    ],
)
def test_a_header_that_is_no_string_or_ours_is_refused(own: Mapping[str, object], expected: str) -> None:
    assert reason(PLAIN._replace(headers=json.dumps(own))) == expected


@pytest.mark.parametrize("value", ["[" * 100_000 + "]" * 100_000, "1" + "0" * 5_000], ids=["nested", "long"])
def test_a_header_that_python_cannot_read_is_refused(value: str) -> None:
    assert "the headers cannot be read" in reason(PLAIN._replace(headers=f'{{"deep": {value}}}'))


def test_a_message_that_others_may_have_overtaken_says_so() -> None:
    overtaken = PLAIN._replace(is_unordered=True)
    assert ADDRESSING.record(overtaken, topic=TOPIC).headers == [*COMMON, JSON_CONTENT, ("unordered", "1")]


@pytest.mark.parametrize(
    ("addressing", "aggregate_type", "topic"),
    [
        (Addressing(), "order", "order.events"),
        (Addressing(), "A-b_c.9", "A-b_c.9.events"),
        (Addressing(), "a" * 242, "a" * 242 + ".events"),
        (Addressing(template="shop.{aggregate_type}.v1"), "order", "shop.order.v1"),
        (Addressing(template="everything"), "order", "everything"),
        (Addressing(template="{aggregate_type}"), "{aggregate_id}", None),
        (Addressing(topics={"order": "orders"}), "order", "orders"),
        (Addressing(topics={"order": "orders"}), "basket", "basket.events"),
        (Addressing(topics={"Bestellung groß": "orders"}), "Bestellung groß", "orders"),
        (Addressing(allowed=frozenset({"order.events"})), "order", "order.events"),
        (Addressing(topics={"order": "orders"}, allowed=frozenset({"orders"})), "order", "orders"),
        (Addressing(), "", ".events"),
        (Addressing(), "a" * 243, None),
        (Addressing(), "two words", None),
        (Addressing(), "größe", None),
        (Addressing(), "order/1", None),
        (Addressing(), "order\n", None),
        (Addressing(template="{aggregate_type}"), "order\n", None),
        (Addressing(template="{aggregate_type}"), "", None),
        (Addressing(template="{aggregate_type}"), ".", None),
        (Addressing(template="{aggregate_type}"), "..", None),
        (Addressing(template="{aggregate_type}"), "...", "..."),
    ],
)
def test_the_topic_comes_from_the_map_or_the_template_and_is_a_legal_name(
    addressing: Addressing, aggregate_type: str, topic: str | None
) -> None:
    if topic is None:
        with pytest.raises(Unpublishable, match="which Kafka does not allow"):
            addressing.topic(aggregate_type)
    else:
        assert addressing.topic(aggregate_type) == topic


def test_an_illegal_topic_names_the_type_the_rule_and_the_remedy() -> None:
    with pytest.raises(Unpublishable) as refused:
        ADDRESSING.topic("two words")
    assert str(refused.value) == (
        'aggregate type "two words" makes the topic "two words.events", which Kafka does not allow: a name has'
        " 1 to 249 of a-z A-Z 0-9 . _ -; map the type to a topic with OUTBOX_RELAY_TOPIC_MAP"
    )


@pytest.mark.parametrize("topic", ["__consumer_offsets", "__transaction_state"])
def test_a_topic_of_kafkas_own_is_refused(topic: str) -> None:
    with pytest.raises(Unpublishable, match="is Kafka's own: map the type to another"):
        Addressing(template="{aggregate_type}").topic(topic)


def test_what_a_reason_quotes_stays_on_one_line_and_has_an_end() -> None:
    with pytest.raises(Unpublishable) as refused:
        ADDRESSING.topic("two\nlines" + "x" * 10_000)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1_000


def test_a_topic_that_is_not_allowed_is_refused() -> None:
    with pytest.raises(Unpublishable) as refused:
        Addressing(allowed=frozenset({"basket.events"})).topic("order")
    assert str(refused.value) == 'topic "order.events" is not among OUTBOX_RELAY_ALLOWED_TOPICS'


def test_a_message_from_before_1970_is_refused() -> None:
    assert ADDRESSING.record(PLAIN._replace(created_at_ms=1), topic=TOPIC).timestamp_ms == 1
    too_early = "created_at is not after 1970-01-01, as a Kafka timestamp has to be"
    assert [reason(PLAIN._replace(created_at_ms=ms)) for ms in (0, -1)] == [too_early, too_early]


def test_a_message_that_came_without_its_contents_is_refused() -> None:
    assert reason(PLAIN._replace(stored_bytes=8_000_001, payload=None, headers=None)) == (
        "the message takes 8,000,001 bytes, or more once its numbers are written out: shrink it or send a reference"
    )


FIRST = PLAIN._replace(sequence_no=1)
BAD_HEADER = PLAIN._replace(sequence_no=2, headers='{"n": 1}')
OTHER = PLAIN._replace(sequence_no=3, aggregate_id="other")
LATER = PLAIN._replace(sequence_no=4)
BEHIND = PLAIN._replace(sequence_no=5, aggregate_id="parked before")
BAD_TOPIC = PLAIN._replace(sequence_no=6, aggregate_type="basket")
UNPUBLISHABLE = Failure(Scope.MESSAGE, "unpublishable", 'header "n" is 1: a header is a string')
NOT_ALLOWED = Failure(Scope.MESSAGE, "unpublishable", 'topic "basket.events" is not among OUTBOX_RELAY_ALLOWED_TOPICS')


def behind_parked(message: Message) -> Failure | None:
    """What a stint says: nothing else was set aside before."""
    return BEHIND_PARKED if message.aggregate_id == BEHIND.aggregate_id else None


@pytest.mark.parametrize(
    ("on_poison", "indexes", "outcomes"),
    [
        ("park", [0, 2], [None, UNPUBLISHABLE, None, WITHDRAWN, BEHIND_PARKED, NOT_ALLOWED]),
        ("skip", [0, 2, 3], [None, UNPUBLISHABLE, None, None, BEHIND_PARKED, NOT_ALLOWED]),
    ],
)
def test_nothing_is_sent_behind_a_message_that_cannot_be_unless_it_is_skipped(
    on_poison: OnPoison, indexes: list[int], outcomes: list[Outcome]
) -> None:
    batch = [FIRST, BAD_HEADER, OTHER, LATER, BEHIND, BAD_TOPIC]
    addressing = Addressing(allowed=frozenset({TOPIC}))
    expected = Prepared([addressing.record(batch[index], topic=TOPIC) for index in indexes], indexes, outcomes)
    assert prepare(batch, addressing=addressing, on_poison=on_poison, why_held_back=behind_parked) == expected


def test_a_bad_message_behind_a_parked_one_is_behind_it_first_of_all() -> None:
    behind = BAD_HEADER._replace(aggregate_id=BEHIND.aggregate_id)
    prepared = prepare([behind], addressing=ADDRESSING, on_poison="park", why_held_back=behind_parked)
    assert prepared == Prepared([], [], [BEHIND_PARKED])


@pytest.mark.parametrize("on_poison", ["park", "skip"])
def test_an_unordered_message_that_cannot_be_sent_holds_up_no_other(on_poison: OnPoison) -> None:
    late = BAD_HEADER._replace(is_unordered=True)
    prepared = prepare([late, LATER], addressing=ADDRESSING, on_poison=on_poison)
    assert (prepared.indexes, prepared.outcomes) == ([1], [UNPUBLISHABLE, None])


def test_an_unordered_message_is_sent_behind_one_that_cannot_be() -> None:
    late = LATER._replace(is_unordered=True)
    prepared = prepare([BAD_HEADER, late], addressing=ADDRESSING, on_poison="park")
    assert (prepared.indexes, prepared.outcomes) == ([1], [UNPUBLISHABLE, None])


def test_messages_of_a_held_topic_are_not_sent_and_not_even_looked_at() -> None:
    prepared = prepare([FIRST, BAD_HEADER, BAD_TOPIC], addressing=ADDRESSING, on_poison="park", held_types={"order"})
    assert (prepared.indexes, prepared.outcomes) == ([2], [TOPIC_HELD, TOPIC_HELD, None])


def test_what_takes_too_many_bytes_is_parked_under_kafkas_name_for_it() -> None:
    too_large = PLAIN._replace(stored_bytes=8_000_001, payload=None, headers=None)
    [outcome] = prepare([too_large], addressing=ADDRESSING, on_poison="park").outcomes
    assert outcome is not None
    assert (outcome.scope, outcome.code) == (Scope.MESSAGE, "MSG_SIZE_TOO_LARGE")
