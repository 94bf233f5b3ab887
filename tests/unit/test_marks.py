"""How far marks move, and what they count on the way."""

from __future__ import annotations

from functools import reduce
from operator import xor
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from outbox_relay.relay.marks import Marks
from tests.fixtures.outbox import message

if TYPE_CHECKING:
    from outbox_relay.relay.message import Message


def of_shard(shard: int, *numbers: int) -> list[Message]:
    return [message(number)._replace(shard=shard) for number in numbers]


def test_a_mark_moves_to_the_last_message_of_its_shard_and_counts_what_it_passed() -> None:
    marks = Marks({3: 10, 5: 0})
    marks.pass_over([*of_shard(3, 12), *of_shard(5, 13), *of_shard(3, 14, 15)])
    assert marks.through == {3: 15, 5: 13}
    assert marks.moved() == [(3, 15, 3, 12 ^ 14 ^ 15), (5, 13, 1, 13)]


def test_a_mark_counts_over_all_batches_of_a_stint() -> None:
    marks = Marks({3: 10})
    marks.pass_over(of_shard(3, 11, 12))
    marks.pass_over(of_shard(3, 20))
    assert marks.moved() == [(3, 20, 3, 11 ^ 12 ^ 20)]


def test_a_mark_that_has_not_moved_is_not_recorded() -> None:
    marks = Marks({3: 10, 5: 0})
    marks.pass_over([])
    marks.pass_over(of_shard(5, 1))
    assert marks.moved() == [(5, 1, 1, 1)]


def test_a_mark_that_passes_nothing_counts_nothing() -> None:
    marks = Marks({3: 10})
    marks.pass_nothing(3, through=90)
    assert marks.moved() == [(3, 90, 0, 0)]


def test_a_mark_never_goes_back_to_an_older_horizon() -> None:
    marks = Marks({3: 10})
    marks.pass_nothing(3, through=9)
    assert (marks.through, marks.moved()) == ({3: 10}, [])


@given(st.lists(st.lists(st.integers(0, 3), max_size=10), max_size=10))
def test_marks_count_each_message_of_each_shard_exactly_once(batches_of_shards: list[list[int]]) -> None:
    marks = Marks(dict.fromkeys(range(4), 0))
    numbers: dict[int, list[int]] = {shard: [] for shard in range(4)}
    last_no = 0
    for shards in batches_of_shards:
        passed = [message(number)._replace(shard=shard) for number, shard in enumerate(shards, start=last_no + 1)]
        last_no += len(passed)
        marks.pass_over(passed)
        for each in passed:
            numbers[each.shard].append(each.sequence_no)
    assert marks.moved() == [
        (shard, passed[-1], len(passed), reduce(xor, passed)) for shard, passed in numbers.items() if passed
    ]
