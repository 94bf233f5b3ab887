"""Which lane holds which shards of a process, and how far they are drained."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from outbox_relay.relay.shards import SHARDS, Shards

ALL = list(range(SHARDS))


@pytest.fixture
def shards() -> Shards:
    return Shards()


def test_a_lane_takes_every_shard_that_no_other_lane_holds(shards: Shards) -> None:
    assert shards.take("one") == ALL
    shards.keep("one", [3, 5])
    assert shards.take("two") == [shard for shard in ALL if shard not in (3, 5)]


def test_a_lane_takes_its_own_shards_again(shards: Shards) -> None:
    shards.take("one")
    shards.keep("one", [3, 5])
    assert shards.take("one") == ALL


def test_keeping_frees_no_shard_of_another_lane(shards: Shards) -> None:
    shards.take("one")
    shards.keep("one", [3])
    shards.take("two")
    shards.keep("two", ())
    assert shards.take("three") == [shard for shard in ALL if shard != 3]


def test_nobody_waits_while_a_shard_is_free(shards: Shards) -> None:
    shards.take("one")
    assert not shards.await_free(timeout=0.0)
    shards.keep("one", ALL[1:])
    assert shards.await_free(timeout=0.0)


def test_whoever_waits_is_woken_by_the_first_shard_that_is_free(shards: Shards) -> None:
    shards.take("one")
    with ThreadPoolExecutor(1) as thread:
        woken = thread.submit(shards.await_free, timeout=30)
        shards.keep("one", ALL[1:])
        assert woken.result(30)


def test_nothing_is_drained_at_first(shards: Shards) -> None:
    assert shards.drained_through == 0


def test_all_is_drained_up_to_where_the_last_shard_is(shards: Shards) -> None:
    shards.drain(ALL, through=100)
    shards.drain(ALL[1:], through=200)
    assert shards.drained_through == 100


def test_shards_that_other_lanes_hold_are_none_of_a_lanes_business(shards: Shards) -> None:
    shards.drain(ALL, through=100)
    shards.take("one")
    shards.keep("one", [3])
    shards.drain([3], through=50)
    assert (shards.drained_for("one"), shards.drained_for("two"), shards.drained_through) == (50, 100, 50)


def test_where_other_lanes_hold_all_shards_nothing_is_known(shards: Shards) -> None:
    shards.drain(ALL, through=100)
    shards.take("one")
    assert shards.drained_for("two") == 0


def test_a_lower_horizon_counts_for_the_numbers_of_a_restarted_sequence_are_lower(shards: Shards) -> None:
    shards.drain(ALL, through=1000)
    shards.drain([7], through=5)
    assert shards.drained_through == 5


def test_forgetting_leaves_nothing_drained(shards: Shards) -> None:
    shards.drain(ALL, through=100)
    shards.forget()
    assert shards.drained_through == 0
