"""The schedule of a soak comes from its seed alone, and gives each fault its turn."""

from __future__ import annotations

from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from tests.faults.soak.schedule import Step, schedule

PAIRABLE = {"kill": "process", "freeze": "process", "cut": "network", "crash": "postgres"}
FAULTS = [*PAIRABLE, "prune", "replay", "prepare"]
SEEDS = st.integers(0, 2**32)


def first_steps(seed: int, count: int) -> list[Step]:
    return list(islice(schedule(seed, faults=FAULTS, pairable=PAIRABLE), count))


@given(seed=SEEDS)
def test_the_same_seed_gives_the_same_steps(seed: int) -> None:
    assert first_steps(seed, 50) == first_steps(seed, 50)


def test_different_seeds_give_different_steps() -> None:
    assert len({tuple(first_steps(seed, 20)) for seed in range(100)}) == 100


@given(seed=SEEDS)
def test_each_fault_has_its_turn_before_any_comes_again(seed: int) -> None:
    drawn = [name for step in first_steps(seed, 50) for name in step.faults]
    for begin in range(0, len(drawn) - len(FAULTS) + 1, len(FAULTS)):
        assert sorted(drawn[begin : begin + len(FAULTS)]) == sorted(FAULTS)


@given(seed=SEEDS)
def test_faults_that_strike_together_strike_at_different_places(seed: int) -> None:
    pairs = [step.faults for step in first_steps(seed, 200) if len(step.faults) == 2]
    assert [pair for pair in pairs if PAIRABLE[pair[0]] == PAIRABLE[pair[1]]] == []
    assert pairs
