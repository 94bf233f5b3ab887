"""The judge of a run: each verdict on a history of a few messages, then all of them on generated histories."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, fields, replace
from functools import reduce
from operator import xor
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox_relay.sandbox.history import (
    History,
    Hold,
    Mark,
    Outcome,
    Place,
    Record,
    Row,
    State,
    Write,
    commit_to_arrival_seconds,
    digest,
    expected_headers,
    headers_digest,
)
from outbox_relay.sandbox.judge import judge, partition_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

TOPIC = "t"
PARTITIONS = 3
HEADERS = headers_digest([("id", b"1")])


def write(message_id: str, *, key: str = "k", outcome: Outcome = Outcome.COMMITTED, ended_at: float = 0.0) -> Write:
    return Write(message_id, key, digest(b"value"), outcome, ended_at, HEADERS)


def row(message_id: str, sequence_no: int, *, key: str = "k", state: State = State.PUBLISHED) -> Row:
    return Row(message_id, key, sequence_no, state)


def record(
    message_id: str,
    sequence_no: int,
    *,
    offset: int,
    key: str = "k",
    is_unordered: bool = False,
    is_replay: bool = False,
) -> Record:
    return Record(
        topic=TOPIC,
        partition=partition_of(key, partitions=PARTITIONS),
        offset=offset,
        key=key,
        message_id=message_id,
        sequence_no=sequence_no,
        is_unordered=is_unordered,
        digest=digest(b"value"),
        arrived_at=1.0 + offset,
        aggregate_type="order",
        headers=HEADERS,
        is_replay=is_replay,
    )


def found(history: History) -> dict[str, object]:
    """Every word of the verdict that applies to something, and whether it is correct."""
    verdict = judge(history)
    words = {word.name: getattr(verdict, word.name) for word in fields(verdict) if word.name != "writes"}
    return {"is_correct": verdict.is_correct, **{name: value for name, value in words.items() if value}}


def test_committed_and_published_message_is_correct() -> None:
    history = History([write("a")], [row("a", 1)], [record("a", 1, offset=0)])
    assert found(history) == {"is_correct": True, "published": 1}


def test_counts_name_every_word_and_every_outcome() -> None:
    writes = [write("a"), write("b", outcome=Outcome.ROLLED_BACK), write("c", outcome=Outcome.UNKNOWN)]
    counts = judge(History(writes, [row("a", 1)], [record("a", 1, offset=0)])).counts()
    assert {word: count for word, count in counts.items() if count} == {
        "committed": 1,
        "rolled_back": 1,
        "unknown": 1,
        "published": 1,
    }


@pytest.mark.parametrize(
    "rows",
    [[row("a", 1, state=State.UNPUBLISHED)], [row("a", 1, state=State.WAITING)], []],
    ids=["unpublished", "waiting", "no row"],
)
def test_committed_message_that_is_not_in_kafka_is_lost(rows: list[Row]) -> None:
    assert found(History([write("a")], rows, [])) == {"is_correct": False, "lost": ("a",)}


@pytest.mark.parametrize(("state", "word"), [(State.PARKED, "parked"), (State.SKIPPED, "skipped")])
def test_message_that_was_put_aside_is_not_lost(state: State, word: str) -> None:
    assert found(History([write("a")], [row("a", 1, state=state)], [])) == {"is_correct": True, word: ("a",)}


def test_rolled_back_message_in_kafka_is_unexpected() -> None:
    history = History([write("a", outcome=Outcome.ROLLED_BACK)], [], [record("a", 1, offset=0)])
    assert found(history) == {"is_correct": False, "published": 1, "unexpected": ("a",)}


def test_second_record_of_a_message_is_duplicated_and_correct() -> None:
    records = [record("a", 1, offset=0), record("a", 1, offset=1), record("a", 1, offset=2)]
    history = History([write("a")], [row("a", 1)], records)
    assert found(history) == {"is_correct": True, "published": 1, "duplicated": ("a", "a")}


def test_duplicates_that_no_fault_accounts_for_are_excessive() -> None:
    records = [record("a", 1, offset=0), record("a", 1, offset=1), record("a", 1, offset=2)]
    history = History([write("a")], [row("a", 1)], records, most_duplicates=1)
    assert found(history) == {
        "is_correct": False,
        "published": 1,
        "duplicated": ("a", "a"),
        "excessive": ("a",),
    }


def test_replayed_record_is_no_duplicate() -> None:
    records = [record("a", 1, offset=0), record("a", 1, offset=1, is_replay=True)]
    history = History([write("a")], [row("a", 1)], records, most_duplicates=0)
    assert found(history) == {"is_correct": True, "published": 1, "replayed": ("a",)}


def test_replay_hides_no_loss() -> None:
    history = History([write("a")], [row("a", 1)], [record("a", 1, offset=0, is_replay=True)])
    assert found(history) == {"is_correct": False, "replayed": ("a",), "lost": ("a",), "false_mark": ("a",)}


def test_message_of_unknown_outcome_that_has_a_row_and_a_record_is_recovered() -> None:
    history = History([write("a", outcome=Outcome.UNKNOWN)], [row("a", 1)], [record("a", 1, offset=0)])
    assert found(history) == {"is_correct": True, "published": 1, "recovered": ("a",)}


def test_message_of_unknown_outcome_that_has_only_a_row_is_lost() -> None:
    history = History([write("a", outcome=Outcome.UNKNOWN)], [row("a", 1, state=State.UNPUBLISHED)], [])
    assert found(history) == {"is_correct": False, "lost": ("a",)}


@pytest.mark.parametrize(("rows_are_kept", "word"), [(True, "unexpected"), (False, "recovered")])
def test_message_of_unknown_outcome_without_a_row_is_unexpected_only_where_rows_are_kept(
    *, rows_are_kept: bool, word: str
) -> None:
    writes = [write("a", outcome=Outcome.UNKNOWN)]
    history = History(writes, [], [record("a", 1, offset=0)], rows_are_kept=rows_are_kept)
    assert found(history) == {"is_correct": not rows_are_kept, "published": 1, word: ("a",)}


def test_message_of_unknown_outcome_that_left_no_trace_is_correct() -> None:
    assert found(History([write("a", outcome=Outcome.UNKNOWN)], [], [])) == {"is_correct": True}


@pytest.mark.parametrize(
    ("offsets", "words"),
    [((1, 0), {"is_correct": False, "reordered": ("a",)}), ((0, 1), {"is_correct": True})],
)
def test_order_is_that_of_the_offsets_whatever_the_order_of_reading(
    offsets: tuple[int, int], words: dict[str, object]
) -> None:
    records = [record("b", 2, offset=offsets[1]), record("a", 1, offset=offsets[0])]
    history = History([write("a"), write("b")], [row("a", 1), row("b", 2)], records)
    assert found(history) == {"published": 2, **words}


@pytest.mark.parametrize(("key", "aggregate_type"), [("x", "order"), ("k", "parcel")])
def test_keys_of_one_partition_are_not_ordered_among_each_other(key: str, aggregate_type: str) -> None:
    behind = record("a", 1, offset=1)
    ahead = replace(record("b", 2, offset=0, key=key), aggregate_type=aggregate_type, partition=behind.partition)
    history = History([write("a"), write("b", key=key)], [row("a", 1), row("b", 2, key=key)], [ahead, behind])
    assert found(history) == {"is_correct": True, "published": 2}


def test_stale_duplicate_is_not_reordered() -> None:
    records = [record("a", 1, offset=0), record("b", 2, offset=1), record("a", 1, offset=2)]
    history = History([write("a"), write("b")], [row("a", 1), row("b", 2)], records)
    assert found(history) == {"is_correct": True, "published": 2, "duplicated": ("a",)}


def test_late_message_that_says_so_is_given_up_and_not_reordered() -> None:
    records = [record("b", 2, offset=0), record("a", 1, offset=1, is_unordered=True)]
    history = History([write("a"), write("b")], [row("a", 1), row("b", 2)], records)
    assert found(history) == {"is_correct": True, "published": 2, "given_up": ("a",)}


def test_mark_without_a_record_is_false_and_the_message_lost() -> None:
    history = History([write("a")], [row("a", 1)], [])
    assert found(history) == {"is_correct": False, "lost": ("a",), "false_mark": ("a",)}


ROWS = [
    row("a", 1),
    row("b", 2, state=State.PARKED),
    replace(row("c", 3), shard=1),
    row("d", 4),
    replace(row("e", 5), is_counted=False),
    row("f", 6, state=State.UNPUBLISHED),
]
MARKS = [Mark(0, 2, messages=2, checksum=1 ^ 2), Mark(0, 5, messages=1, checksum=4), Mark(1, 9, messages=1, checksum=3)]


def miscounted(rows: list[Row], marks: list[Mark] = MARKS, *, rows_are_kept: bool = True) -> tuple[object, ...]:
    return judge(History([], rows, [], marks=marks, rows_are_kept=rows_are_kept)).miscounted


def test_marks_that_count_the_rows_below_them_agree() -> None:
    assert miscounted(ROWS) == ()


@pytest.mark.parametrize(
    "mark",
    [
        Mark(0, 5, messages=0, checksum=0),
        Mark(0, 5, messages=2, checksum=4 ^ 5),
        Mark(0, 5, messages=1, checksum=7),
        Mark(0, 6, messages=1, checksum=4),
    ],
    ids=["none", "a late one", "another one", "too far"],
)
def test_mark_that_has_counted_other_messages_than_there_are_is_miscounted(mark: Mark) -> None:
    assert miscounted(ROWS, [MARKS[0], mark, MARKS[2]]) == ((0, mark.through),)


def test_row_that_appeared_below_a_mark_makes_the_mark_miscounted_wherever_rows_are_removed() -> None:
    rows = [*ROWS, replace(row("g", 7), shard=1)]
    assert miscounted(rows) == miscounted(rows, rows_are_kept=False) == ((1, 9),)


@pytest.mark.parametrize(("rows_are_kept", "found"), [(True, ((0, 2),)), (False, ())])
def test_missing_row_makes_its_mark_miscounted_only_where_rows_are_kept(
    *, rows_are_kept: bool, found: tuple[object, ...]
) -> None:
    assert miscounted(ROWS[1:], rows_are_kept=rows_are_kept) == found


def test_message_that_an_operator_skipped_may_be_missing_below_its_mark() -> None:
    rows = [row("a", 1), row("b", 2, state=State.SKIPPED), *ROWS[2:]]
    assert miscounted(rows) == ()


def test_row_that_replaced_another_one_makes_the_mark_miscounted() -> None:
    rows = [*ROWS[1:], replace(row("g", 7), shard=1), row("h", 0)]
    assert miscounted(rows, rows_are_kept=False) == ((0, 2), (1, 9))


@pytest.mark.parametrize(
    "wrong",
    [
        replace(record("a", 1, offset=0), digest=digest(b"other")),
        replace(record("a", 1, offset=0), headers=headers_digest([])),
        replace(record("a", 1, offset=0), key="other"),
        record("a", 2, offset=0),
    ],
    ids=["value", "headers", "key", "sequence_no"],
)
def test_record_that_differs_from_its_row_is_corrupted(wrong: Record) -> None:
    history = History([write("a")], [row("a", 1)], [wrong])
    assert found(history) == {"is_correct": False, "published": 1, "corrupted": ("a",)}


def test_corrupted_duplicate_is_found_behind_a_sound_first() -> None:
    records = [record("a", 1, offset=0), replace(record("a", 1, offset=1), digest=digest(b"other"))]
    history = History([write("a")], [row("a", 1)], records)
    assert found(history) == {"is_correct": False, "published": 1, "duplicated": ("a",), "corrupted": ("a",)}


@pytest.mark.parametrize(("counts", "is_correct"), [({3}, False), ({3, 6}, True)])
def test_record_fits_any_number_of_partitions_that_its_topic_had(counts: set[int], *, is_correct: bool) -> None:
    moved = replace(record("a", 1, offset=0, key="c"), partition=4)
    assert [partition_of("c", partitions=count) for count in (3, 6)] == [1, 4]
    history = History([write("a", key="c")], [], [moved], partition_counts={TOPIC: counts})
    words = {} if is_correct else {"misplaced": ("a",)}
    assert found(history) == {"is_correct": is_correct, "published": 1, **words}


def test_where_a_record_is_is_not_judged_without_the_number_of_partitions() -> None:
    elsewhere = replace(record("a", 1, offset=0), partition=99)
    assert found(History([write("a")], [row("a", 1)], [elsewhere])) == {"is_correct": True, "published": 1}


@pytest.mark.parametrize(
    ("key", "hash_value"),
    [
        ("21", -973932308),
        ("foobar", -790332482),
        ("abc", 479470107),
        ("a-little-bit-long-string", -985981536),
        ("a-little-bit-longer-string", -1486304829),
        ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
    ],
)
def test_partition_is_that_of_the_tests_of_kafkas_own_client(key: str, hash_value: int) -> None:
    assert partition_of(key, partitions=1_000_003) == (hash_value & 0x7FFFFFFF) % 1_000_003


@pytest.mark.parametrize(
    ("behind", "is_unheld"),
    [
        (record("b", 2, offset=5), True),
        (record("b", 2, offset=9), True),
        (record("b", 2, offset=4), False),
        (record("b", 2, offset=10), False),
        (record("b", 2, offset=5, is_unordered=True), False),
        (record("b", 2, offset=5, key="other"), False),
        (replace(record("b", 2, offset=5), aggregate_type="parcel"), False),
    ],
    ids=["at the park", "before the release", "before the park", "at the release", "unordered", "key", "type"],
)
def test_only_what_is_published_behind_a_message_while_it_is_parked_is_unheld(
    behind: Record, *, is_unheld: bool
) -> None:
    hold = Hold("order", "k", 1, begins={behind.place: 5}, ends={behind.place: 10})
    writes = [write("a"), write("b", key=behind.key)]
    history = History(writes, [row("a", 1, state=State.PARKED)], [behind], holds=[hold])
    assert found(history).get("unheld", ()) == (("b",) if is_unheld else ())


def test_message_that_is_parked_to_the_end_holds_its_key_to_the_end() -> None:
    hold = Hold("order", "k", 1, begins={})
    rows = [row("a", 1, state=State.PARKED), row("b", 2)]
    history = History([write("a"), write("b")], rows, [record("b", 2, offset=1_000)], holds=[hold])
    assert found(history) == {"is_correct": False, "published": 1, "parked": ("a",), "unheld": ("b",)}


@pytest.mark.parametrize(
    ("effects", "words"),
    [
        (["a", "b"], {}),
        (["a"], {"effect_lost": (("billing", "b"),)}),
        ([], {"effect_lost": (("billing", "a"), ("billing", "b"))}),
        (["a", "b", "a"], {"effect_repeated": (("billing", "a"),)}),
        (["b", "a"], {"effect_reordered": (("billing", "a"),)}),
        (["a", "b", "c"], {"effect_unexpected": (("billing", "c"),)}),
    ],
    ids=str,
)
def test_effects_are_exactly_what_is_published_once_and_in_order(effects: list[str], words: dict[str, object]) -> None:
    records = [record("a", 1, offset=0), record("b", 2, offset=1), record("a", 1, offset=2)]
    history = History(
        [write("a"), write("b")],
        [row("a", 1), row("b", 2)],
        records,
        effects={"billing": effects, "shipping": ["a", "b"]},
    )
    assert found(history) == {"is_correct": not words, "published": 2, "duplicated": ("a",), **words}


def test_late_message_that_says_so_may_have_its_effect_late() -> None:
    records = [record("b", 2, offset=0), record("a", 1, offset=1, is_unordered=True)]
    rows = [row("a", 1), row("b", 2)]
    history = History([write("a"), write("b")], rows, records, effects={"billing": ["b", "a"]})
    assert found(history) == {"is_correct": True, "published": 2, "given_up": ("a",)}


def test_latency_runs_from_the_commit_to_the_first_arrival() -> None:
    writes = [
        write("a", ended_at=0.5),
        write("rolled back", outcome=Outcome.ROLLED_BACK),
        write("unknown", outcome=Outcome.UNKNOWN),
        write("never arrived"),
    ]
    records = [record("a", 1, offset=2), record("a", 1, offset=1), record("unknown", 2, offset=3)]
    assert commit_to_arrival_seconds(History(writes, [], records)) == [1.5]


def test_digest_tells_a_tombstone_from_an_empty_value() -> None:
    assert digest(None) != digest(b"")


def test_headers_are_compared_but_for_their_order_and_what_a_writer_cannot_foresee() -> None:
    headers = [
        ("source", b"shop.public"),
        ("trace", b"1"),
        ("id", b"m"),
        ("sequence_no", b"7"),
        ("aggregate_type", b"order"),
        ("event_type", b"placed"),
        ("unordered", b"1"),
        ("replay", b"again"),
        ("content-type", b"application/json"),
    ]
    expected = expected_headers("m", aggregate_type="order", event_type="placed", own={"trace": "1"})
    assert headers_digest(headers) == expected
    for changed in ([*headers, ("trace", b"1")], headers[:1] + headers[2:], [("trace", b"2"), *headers[2:]]):
        assert headers_digest(changed) != expected


@dataclass(frozen=True, slots=True)
class Fate:
    """One generated transaction, what a correct relay does with it, and what operators do."""

    key: str
    outcome: Outcome = Outcome.COMMITTED
    state: State = State.PUBLISHED
    is_pruned: bool = False
    is_unordered: bool = False
    records: int = 1
    replays: int = 0


fates = st.lists(
    st.builds(
        Fate,
        key=st.sampled_from(["a", "b", "c", "da", "ad"]),
        outcome=st.sampled_from([Outcome.COMMITTED, Outcome.COMMITTED, Outcome.ROLLED_BACK, Outcome.UNKNOWN]),
        state=st.sampled_from([State.PUBLISHED, State.PUBLISHED, State.PARKED, State.SKIPPED]),
        is_pruned=st.booleans(),
        is_unordered=st.booleans(),
        records=st.integers(1, 3),
        replays=st.integers(0, 2),
    ),
    max_size=30,
)
# m1 and m2 of key "a" are published, m3 of "lone" too; m4 of "held" is parked and m5 waits behind it.
CAST = [
    Fate("a"),
    Fate("a"),
    Fate("lone"),
    Fate("held", state=State.PARKED),
    Fate("held", state=State.PARKED),
]


def correct_history(fates: list[Fate]) -> History:
    """CAST, then *fates*; late messages come at the end, duplicates and replays behind everything."""
    numbered = {f"m{number}": (number, fate) for number, fate in enumerate([*CAST, *fates], start=1)}
    kept = {name: fate for name, (_, fate) in numbered.items() if fate.outcome is not Outcome.ROLLED_BACK}
    published = [name for name, fate in kept.items() if fate.state is State.PUBLISHED]
    order = sorted(published, key=lambda name: (kept[name].is_unordered, numbered[name][0]))
    repeats = [name for name in order for _ in range(kept[name].records - 1)]
    replays = [name for name in order for _ in range(kept[name].replays)]
    records = [
        record(name, numbered[name][0], offset=0, key=kept[name].key, is_unordered=kept[name].is_unordered)
        for name in order + repeats + replays
    ]
    records[len(order + repeats) :] = [replace(each, is_replay=True) for each in records[len(order + repeats) :]]
    rows = [row(name, numbered[name][0], key=fate.key, state=fate.state) for name, fate in kept.items()]
    rows = [replace(each, is_counted=not kept[each.message_id].is_unordered) for each in rows]
    return History(
        [write(name, key=fate.key, outcome=fate.outcome) for name, (_, fate) in numbered.items()],
        [each for each in rows if not (kept[each.message_id].is_pruned and each.state is State.PUBLISHED)],
        appended(records),
        rows_are_kept=False,
        marks=marks_of(rows),
        partition_counts={TOPIC: {PARTITIONS}},
        holds=[Hold("order", "held", 4, begins={})],
        effects={"billing": order, "shipping": order},
        most_duplicates=len(repeats),
    )


def marks_of(rows: Sequence[Row]) -> list[Mark]:
    """A mark for every three rows."""
    marks = []
    for first in range(0, len(rows), 3):
        numbers = [each.sequence_no for each in rows[first : first + 3] if each.is_counted]
        marks.append(Mark(0, rows[first : first + 3][-1].sequence_no, len(numbers), reduce(xor, numbers, 0)))
    return marks


def appended(records: Iterable[Record]) -> list[Record]:
    """Give *records* the offsets of their order."""
    ends: defaultdict[Place, int] = defaultdict(int)
    placed = []
    for each in records:
        placed.append(replace(each, offset=ends[each.place]))
        ends[each.place] += 1
    return placed


def of_nobody(message_id: str, sequence_no: int) -> Record:
    return record(message_id, sequence_no, offset=1_000, key="a")


def with_effect(history: History, message_id: str) -> dict[str, Sequence[str]]:
    return {consumer: [*effects, message_id] for consumer, effects in history.effects.items()}


def without_record(history: History) -> History:
    return replace(
        history,
        rows=[replace(each, state=State.UNPUBLISHED) if each.message_id == "m1" else each for each in history.rows],
        records=[each for each in history.records if each.message_id != "m1"],
        effects={name: [each for each in effects if each != "m1"] for name, effects in history.effects.items()},
    )


def with_phantom(history: History) -> History:
    records = [*history.records, of_nobody("phantom", 1_000)]
    return replace(history, records=records, effects=with_effect(history, "phantom"))


def with_swapped_records(history: History) -> History:
    first, second, *others = history.records
    swapped = [replace(first, offset=second.offset), replace(second, offset=first.offset), *others]
    return replace(history, records=swapped)


def with_marked_row_of_nobody(history: History) -> History:
    return replace(history, rows=[*history.rows, row("nobody", 1_000)])


def with_row_that_no_mark_counted(history: History) -> History:
    marks = [Mark(0, 3, messages=2, checksum=2 ^ 3), *history.marks[1:]]
    return replace(history, marks=marks)


def with_changed_value(history: History) -> History:
    first, *others = history.records
    return replace(history, records=[replace(first, digest=digest(b"changed")), *others])


def with_dropped_header(history: History) -> History:
    first, *others = history.records
    return replace(history, records=[replace(first, headers=headers_digest([])), *others])


def with_moved_record(history: History) -> History:
    moved = [
        replace(each, partition=(each.partition + 1) % PARTITIONS, offset=1_000) if each.message_id == "m3" else each
        for each in history.records
    ]
    return replace(history, records=moved)


def with_published_successor(history: History) -> History:
    rows = [replace(each, state=State.PUBLISHED) if each.message_id == "m5" else each for each in history.rows]
    records = [*history.records, record("m5", 5, offset=1_000, key="held")]
    return replace(history, rows=rows, records=records, effects=with_effect(history, "m5"))


def with_one_more_duplicate(history: History) -> History:
    return replace(history, records=[*history.records, replace(history.records[0], topic="u")])


def with_effects(history: History, change: Callable[[Sequence[str]], Sequence[str]]) -> History:
    return replace(history, effects={**history.effects, "billing": change(history.effects["billing"])})


VIOLATIONS: dict[str, tuple[Callable[[History], History], str, object]] = {
    "record is missing": (without_record, "lost", "m1"),
    "record of nobody": (with_phantom, "unexpected", "phantom"),
    "records are swapped": (with_swapped_records, "reordered", "m1"),
    "row of nobody is marked": (with_marked_row_of_nobody, "false_mark", "nobody"),
    "row was not counted": (with_row_that_no_mark_counted, "miscounted", (0, 3)),
    "value is changed": (with_changed_value, "corrupted", "m1"),
    "header is dropped": (with_dropped_header, "corrupted", "m1"),
    "record is elsewhere": (with_moved_record, "misplaced", "m3"),
    "successor of a parked message": (with_published_successor, "unheld", "m5"),
    "one duplicate more": (with_one_more_duplicate, "excessive", "m1"),
    "effect is missing": (
        lambda history: with_effects(history, lambda effects: effects[1:]),
        "effect_lost",
        ("billing", "m1"),
    ),
    "effect is repeated": (
        lambda history: with_effects(history, lambda effects: [*effects, "m1"]),
        "effect_repeated",
        ("billing", "m1"),
    ),
    "effect of nothing": (
        lambda history: with_effects(history, lambda effects: [*effects, "nobody"]),
        "effect_unexpected",
        ("billing", "nobody"),
    ),
    "effects are swapped": (
        lambda history: with_effects(history, lambda effects: [effects[1], effects[0], *effects[2:]]),
        "effect_reordered",
        ("billing", "m1"),
    ),
}


def broken_promises(history: History) -> dict[str, object]:
    fine = {"is_correct", "published", "parked", "skipped", "recovered", "duplicated", "replayed", "given_up"}
    return {word: entries for word, entries in found(history).items() if word not in fine}


@given(fates)
def test_correct_history_breaks_no_promise(fates: list[Fate]) -> None:
    history = correct_history(fates)
    verdict = judge(history)
    assert (verdict.is_correct, broken_promises(history)) == (True, {})
    assert len(verdict.duplicated) + len(verdict.replayed) == len(history.records) - verdict.published


@pytest.mark.parametrize(("inject", "word", "entry"), VIOLATIONS.values(), ids=VIOLATIONS)
@given(fates=fates)
def test_single_violation_gives_exactly_its_own_word(
    inject: Callable[[History], History], word: str, entry: object, fates: list[Fate]
) -> None:
    history = inject(correct_history(fates))
    assert broken_promises(history) == {word: (entry,)}
    assert not judge(history).is_correct
