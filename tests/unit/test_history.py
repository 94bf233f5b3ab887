"""The judge of a run: each verdict on a history of a few messages, then all of them on generated histories."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox_relay.sandbox.history import (
    History,
    Outcome,
    Record,
    Row,
    State,
    Verdict,
    Write,
    commit_to_arrival_seconds,
    digest,
    judge,
)

PARTITIONS = 3


def write(message_id: str, *, key: str = "k", outcome: Outcome = Outcome.COMMITTED, ended_at: float = 0.0) -> Write:
    return Write(message_id=message_id, key=key, digest=digest(b"value"), outcome=outcome, ended_at=ended_at)


def row(message_id: str, sequence_no: int, *, key: str = "k", state: State = State.PUBLISHED) -> Row:
    return Row(message_id=message_id, key=key, sequence_no=sequence_no, state=state)


def record(
    message_id: str,
    sequence_no: int,
    *,
    offset: int,
    key: str = "k",
    is_unordered: bool = False,
    value: bytes = b"value",
) -> Record:
    return Record(
        topic="t",
        partition=sum(key.encode()) % PARTITIONS,
        offset=offset,
        key=key,
        message_id=message_id,
        sequence_no=sequence_no,
        is_unordered=is_unordered,
        digest=digest(value),
        arrived_at=1.0 + offset,
    )


def verdict(
    *,
    committed: int = 0,
    rolled_back: int = 0,
    unknown: int = 0,
    published: int = 0,
    parked: tuple[str, ...] = (),
    recovered: tuple[str, ...] = (),
    duplicated: tuple[str, ...] = (),
    given_up: tuple[str, ...] = (),
    lost: tuple[str, ...] = (),
    unexpected: tuple[str, ...] = (),
    reordered: tuple[str, ...] = (),
    false_mark: tuple[str, ...] = (),
    corrupted: tuple[str, ...] = (),
) -> Verdict:
    counts = {Outcome.COMMITTED: committed, Outcome.ROLLED_BACK: rolled_back, Outcome.UNKNOWN: unknown}
    return Verdict(
        writes={outcome: count for outcome, count in counts.items() if count},
        published=published,
        parked=parked,
        recovered=recovered,
        duplicated=duplicated,
        given_up=given_up,
        lost=lost,
        unexpected=unexpected,
        reordered=reordered,
        false_mark=false_mark,
        corrupted=corrupted,
    )


def test_committed_and_published_message_is_correct() -> None:
    judged = judge(History([write("a")], [row("a", 1)], [record("a", 1, offset=0)]))
    assert judged == verdict(committed=1, published=1)
    assert judged.is_correct


def test_committed_message_that_is_not_in_kafka_is_lost() -> None:
    judged = judge(History([write("a")], [row("a", 1, state=State.UNPUBLISHED)], []))
    assert judged == verdict(committed=1, lost=("a",))
    assert not judged.is_correct


def test_committed_message_without_a_row_is_lost() -> None:
    assert judge(History([write("a")], [], [])) == verdict(committed=1, lost=("a",))


def test_parked_message_is_not_lost() -> None:
    judged = judge(History([write("a")], [row("a", 1, state=State.PARKED)], []))
    assert judged == verdict(committed=1, parked=("a",))
    assert judged.is_correct


def test_rolled_back_message_in_kafka_is_unexpected() -> None:
    judged = judge(History([write("a", outcome=Outcome.ROLLED_BACK)], [], [record("a", 1, offset=0)]))
    assert judged == verdict(rolled_back=1, published=1, unexpected=("a",))
    assert not judged.is_correct


def test_message_that_nobody_wrote_is_unexpected() -> None:
    assert judge(History([], [], [record("a", 1, offset=0)])) == verdict(published=1, unexpected=("a",))


def test_second_record_of_a_message_is_duplicated_and_correct() -> None:
    records = [record("a", 1, offset=0), record("a", 1, offset=1), record("a", 1, offset=2)]
    judged = judge(History([write("a")], [row("a", 1)], records))
    assert judged == verdict(committed=1, published=1, duplicated=("a", "a"))
    assert judged.is_correct


def test_message_of_unknown_outcome_that_has_a_row_and_a_record_is_recovered() -> None:
    judged = judge(History([write("a", outcome=Outcome.UNKNOWN)], [row("a", 1)], [record("a", 1, offset=0)]))
    assert judged == verdict(unknown=1, published=1, recovered=("a",))


def test_message_of_unknown_outcome_that_has_only_a_row_is_lost() -> None:
    rows = [row("a", 1, state=State.UNPUBLISHED)]
    judged = judge(History([write("a", outcome=Outcome.UNKNOWN)], rows, []))
    assert judged == verdict(unknown=1, lost=("a",))


@pytest.mark.parametrize(
    ("rows_are_kept", "expected"),
    [
        (True, verdict(unknown=1, published=1, unexpected=("a",))),
        (False, verdict(unknown=1, published=1, recovered=("a",))),
    ],
)
def test_message_of_unknown_outcome_without_a_row_is_unexpected_only_where_rows_are_kept(
    *, rows_are_kept: bool, expected: Verdict
) -> None:
    writes = [write("a", outcome=Outcome.UNKNOWN)]
    assert judge(History(writes, [], [record("a", 1, offset=0)], rows_are_kept=rows_are_kept)) == expected


def test_message_of_unknown_outcome_that_left_no_trace_is_correct() -> None:
    assert judge(History([write("a", outcome=Outcome.UNKNOWN)], [], [])) == verdict(unknown=1)


def test_message_behind_a_later_one_of_its_key_is_reordered() -> None:
    judged = judge(
        History(
            [write("a"), write("b")],
            [row("a", 1), row("b", 2)],
            [record("b", 2, offset=0), record("a", 1, offset=1)],
        )
    )
    assert judged == verdict(committed=2, published=2, reordered=("a",))
    assert not judged.is_correct


def test_order_is_that_of_the_offsets_whatever_the_order_of_reading() -> None:
    judged = judge(
        History(
            [write("a"), write("b")],
            [row("a", 1), row("b", 2)],
            [record("b", 2, offset=1), record("a", 1, offset=0)],
        )
    )
    assert judged == verdict(committed=2, published=2)


def test_keys_of_one_partition_are_not_ordered_among_each_other() -> None:
    records = [record("b", 2, offset=0, key="ad"), record("a", 1, offset=1, key="da")]
    assert records[0].partition == records[1].partition
    judged = judge(
        History([write("a", key="da"), write("b", key="ad")], [row("a", 1, key="da"), row("b", 2, key="ad")], records)
    )
    assert judged == verdict(committed=2, published=2)


def test_stale_duplicate_is_not_reordered() -> None:
    records = [record("a", 1, offset=0), record("b", 2, offset=1), record("a", 1, offset=2)]
    judged = judge(History([write("a"), write("b")], [row("a", 1), row("b", 2)], records))
    assert judged == verdict(committed=2, published=2, duplicated=("a",))


def test_late_message_that_says_so_is_given_up_and_not_reordered() -> None:
    records = [record("b", 2, offset=0), record("a", 1, offset=1, is_unordered=True)]
    judged = judge(History([write("a"), write("b")], [row("a", 1), row("b", 2)], records))
    assert judged == verdict(committed=2, published=2, given_up=("a",))
    assert judged.is_correct


def test_mark_without_a_record_is_false_and_the_message_lost() -> None:
    judged = judge(History([write("a")], [row("a", 1)], []))
    assert judged == verdict(committed=1, lost=("a",), false_mark=("a",))


@pytest.mark.parametrize(
    "wrong",
    [
        record("a", 1, offset=0, value=b"other"),
        record("a", 1, offset=0, key="other"),
        record("a", 2, offset=0),
    ],
    ids=["value", "key", "sequence_no"],
)
def test_record_that_differs_from_its_row_is_corrupted(wrong: Record) -> None:
    assert judge(History([write("a")], [row("a", 1)], [wrong])) == verdict(committed=1, published=1, corrupted=("a",))


def test_corrupted_duplicate_is_found_behind_a_sound_first() -> None:
    records = [record("a", 1, offset=0), record("a", 1, offset=1, value=b"other")]
    judged = judge(History([write("a")], [row("a", 1)], records))
    assert judged == verdict(committed=1, published=1, duplicated=("a",), corrupted=("a",))


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


@dataclass(frozen=True, slots=True)
class Fate:
    """One generated transaction and what a correct relay does with it."""

    key: str
    outcome: Outcome
    is_parked: bool
    is_unordered: bool
    records: int


fates = st.lists(
    st.builds(
        Fate,
        key=st.sampled_from(["a", "b", "c", "da", "ad"]),
        outcome=st.sampled_from([Outcome.COMMITTED, Outcome.COMMITTED, Outcome.ROLLED_BACK, Outcome.UNKNOWN]),
        is_parked=st.booleans(),
        is_unordered=st.booleans(),
        records=st.integers(1, 3),
    ),
    max_size=30,
)


def correct_history(fates: list[Fate]) -> History:
    """Two committed messages of one key, then *fates*: late ones at the end, duplicates behind everything."""
    plain = Fate(key="a", outcome=Outcome.COMMITTED, is_parked=False, is_unordered=False, records=1)
    numbered = {f"m{number}": (number, fate) for number, fate in enumerate([plain, plain, *fates], start=1)}
    kept = {
        name: (number, fate) for name, (number, fate) in numbered.items() if fate.outcome is not Outcome.ROLLED_BACK
    }
    published = {name: (number, fate) for name, (number, fate) in kept.items() if not fate.is_parked}
    order = sorted(published, key=lambda name: (published[name][1].is_unordered, published[name][0]))
    order += [name for name in order for _ in range(published[name][1].records - 1)]
    return History(
        [write(name, key=fate.key, outcome=fate.outcome) for name, (_, fate) in numbered.items()],
        [
            row(name, number, key=fate.key, state=State.PARKED if fate.is_parked else State.PUBLISHED)
            for name, (number, fate) in kept.items()
        ],
        _appended(order, published),
    )


def _appended(order: list[str], published: dict[str, tuple[int, Fate]]) -> list[Record]:
    ends: defaultdict[int, int] = defaultdict(int)
    records = []
    for name in order:
        number, fate = published[name]
        appended = record(name, number, offset=0, key=fate.key, is_unordered=fate.is_unordered)
        records.append(replace(appended, offset=ends[appended.partition]))
        ends[appended.partition] += 1
    return records


@given(fates)
def test_correct_history_has_no_violation(fates: list[Fate]) -> None:
    history = correct_history(fates)
    judged = judge(history)
    assert judged.is_correct
    assert len(judged.duplicated) == len(history.records) - judged.published


@given(fates)
def test_dropped_records_are_lost_and_their_marks_false(fates: list[Fate]) -> None:
    history = correct_history(fates)
    judged = judge(replace(history, records=[r for r in history.records if r.message_id != "m1"]))
    assert (judged.lost, judged.false_mark) == (("m1",), ("m1",))


@given(fates)
def test_records_of_a_rolled_back_transaction_are_unexpected(fates: list[Fate]) -> None:
    history = correct_history(fates)
    writes = [replace(w, outcome=Outcome.ROLLED_BACK) if w.message_id == "m1" else w for w in history.writes]
    assert judge(replace(history, writes=writes)).unexpected == ("m1",)


@given(fates)
def test_swapped_records_of_a_key_are_reordered(fates: list[Fate]) -> None:
    history = correct_history(fates)
    first, second, *others = history.records
    swapped = [replace(first, offset=second.offset), replace(second, offset=first.offset), *others]
    assert judge(replace(history, records=swapped)).reordered == ("m1",)


@given(fates)
def test_changed_value_is_corrupted(fates: list[Fate]) -> None:
    history = correct_history(fates)
    changed = [replace(r, digest=digest(b"changed")) if r.message_id == "m1" else r for r in history.records]
    assert judge(replace(history, records=changed)).corrupted == ("m1",)


@given(fates)
def test_repeated_record_is_duplicated_and_breaks_no_promise(fates: list[Fate]) -> None:
    history = correct_history(fates)
    repeated = replace(history.records[0], offset=1_000)
    judged = judge(replace(history, records=[*history.records, repeated]))
    assert judged.is_correct
    assert len(judged.duplicated) == len(judge(history).duplicated) + 1
