"""What strikes when: drawn from a seed, and from nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

SHORTEST_HOLD_SECONDS, LONGEST_HOLD_SECONDS = 0.2, 3.0
LONGEST_PAUSE_SECONDS = 1.5
PAIRED = 1 / 3  # of the faults that can strike together


@dataclass(frozen=True, slots=True)
class Step:
    """
    Faults that strike together.

    Attributes:
        faults: Their names, in the order in which they strike; they are healed in the reverse order.
        hold_seconds: How long they last, at least.
        pause_seconds: How long everything is left alone after the recovery.
        seed: Of what the faults draw themselves.
    """

    faults: tuple[str, ...]
    hold_seconds: float
    pause_seconds: float
    seed: int


def schedule(seed: int, *, faults: Collection[str], pairable: Mapping[str, str]) -> Iterator[Step]:
    """
    Draw steps without end, the same ones for the same arguments.

    Each fault comes once before any comes again, so that in an hour the rare ones have their turn as often as others.

    Args:
        pairable: The faults of which some strike in the middle of another one that strikes elsewhere, and where each
            strikes.
    """
    chance = Random(seed)  # noqa: S311 -- a repeatable schedule
    while True:
        deck = sorted(faults)
        chance.shuffle(deck)
        while deck:
            first = deck.pop()
            others = [name for name in deck if name in pairable and pairable[name] != pairable.get(first)]
            if first in pairable and others and chance.random() < PAIRED:
                deck.remove(others[-1])
                yield _step(chance, first, others[-1])
            else:
                yield _step(chance, first)


def _step(chance: Random, *faults: str) -> Step:
    return Step(
        faults,
        hold_seconds=chance.uniform(SHORTEST_HOLD_SECONDS, LONGEST_HOLD_SECONDS),
        pause_seconds=chance.uniform(0, LONGEST_PAUSE_SECONDS),
        seed=chance.randrange(2**32),
    )
