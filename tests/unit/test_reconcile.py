"""What a difference between a mark and the rows means."""

from __future__ import annotations

from functools import reduce
from operator import xor
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox_relay.relay.reconcile import Interval

if TYPE_CHECKING:
    from collections.abc import Collection

SOME = st.sets(st.integers(1, 10**6), max_size=12)


def interval(*, counted: Collection[int], found: Collection[int], uncounted: Collection[int] = ()) -> Interval:
    """An interval whose mark counted some numbers, with what is found there and which of it is surely uncounted."""
    return Interval(
        shard=0,
        from_no=0,
        through=10**6,
        messages=len(counted),
        checksum=reduce(xor, counted, 0),
        before_xid="1000",
        found_messages=len(found),
        found_checksum=reduce(xor, found, 0),
        uncounted_messages=len(uncounted),
        uncounted_checksum=reduce(xor, uncounted, 0),
    )


@pytest.mark.parametrize(
    ("counted", "found", "uncounted", "damage"),
    [
        ({1, 2}, {1, 2}, set(), "none"),
        ({1, 2}, {1}, set(), "none"),
        ({1, 2}, set(), set(), "none"),
        ({1, 2}, {1, 2, 3}, {3}, "some"),
        ({1, 2}, {1, 3}, {3}, "some"),
        ({1, 2}, {3}, {3}, "some"),
        ({1, 2}, {1, 2, 3}, set(), "all"),
        ({1, 2}, {1, 3}, set(), "all"),
        ({1, 2}, {1, 2, 3, 4}, {4}, "all"),
        (set(), {1}, set(), "all"),
        (set(), {1}, {1}, "some"),
    ],
)
def test_what_is_published_again(counted: set[int], found: set[int], uncounted: set[int], damage: str) -> None:
    assert interval(counted=counted, found=found, uncounted=uncounted).damage == damage


@given(counted=SOME, deleted=SOME)
def test_deleted_messages_are_never_damage(counted: set[int], deleted: set[int]) -> None:
    assert interval(counted=counted, found=counted - deleted).damage == "none"


@given(counted=SOME, deleted=SOME, skipped=SOME)
def test_messages_that_are_surely_uncounted_are_found_whatever_was_deleted(
    counted: set[int], deleted: set[int], skipped: set[int]
) -> None:
    skipped -= counted
    found = interval(counted=counted, found=(counted - deleted) | skipped, uncounted=skipped)
    assert found.damage == ("some" if skipped else "none")
    assert found.affected_messages == len(skipped)


@given(counted=SOME, deleted=SOME, skipped=SOME)
def test_skipped_messages_that_cannot_be_told_apart_hide_only_behind_more_deleted_ones(
    counted: set[int], deleted: set[int], skipped: set[int]
) -> None:
    skipped, deleted = skipped - counted, deleted & counted
    found = interval(counted=counted, found=(counted - deleted) | skipped)
    is_hidden = len(deleted) > len(skipped) or (
        len(deleted) == len(skipped) and reduce(xor, deleted, 0) == reduce(xor, skipped, 0)
    )
    assert (found.damage == "none") is is_hidden
