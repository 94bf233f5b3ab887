"""Measuring several cases in turns, so that a slow minute of the machine falls on all of them alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

C = TypeVar("C")
S = TypeVar("S")


def in_rounds(cases: Iterable[C], measure: Callable[[C], S], *, repeat: int) -> dict[C, list[S]]:
    """Measure every case once in each of *repeat* rounds; return the samples of each case."""
    samples: dict[C, list[S]] = {case: [] for case in cases}
    for _ in range(repeat):
        for case, measured in samples.items():
            measured.append(measure(case))
    return samples
