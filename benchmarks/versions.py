"""This checkout beside another revision, in turns on the same servers."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, TypeVar

from benchmarks import drain, latency
from benchmarks.report import Figure, Table
from benchmarks.rounds import in_rounds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from benchmarks.bench import Bench
    from benchmarks.installation import Installation

C = TypeVar("C")

DRAINS = (drain.Case(1, 2), drain.Case(2, 2))


def compare(bench: Bench, other: Installation) -> list[Table]:
    """Measure drains and latencies of *other* and of this checkout, which take turns in every case and round."""
    plan = bench.plan
    benches = {each.name: replace(bench, installation=each) for each in (other, bench.installation)}
    drains = _in_turns(benches, DRAINS, drain.drain, repeat=plan.repeat)
    latencies = _in_turns(benches, plan.latency_rates[:2], latency.measure_rate, repeat=plan.repeat)
    return [
        *(
            _table(f"Drain of {plan.drain_messages:,} messages, {case} lanes", drain.FIGURES, samples)
            for case, samples in drains.items()
        ),
        *(
            _table(f"{rate:,} transactions a second", (*latency.LATENCY, *latency.TAKEN), samples)
            for rate, samples in latencies.items()
        ),
    ]


def _in_turns(
    benches: Mapping[str, Bench], cases: Iterable[C], measure: Callable[[Bench, C], object], *, repeat: int
) -> dict[C, dict[str, list[object]]]:
    """Return the samples by case and by name of the installation."""
    turns = [(case, name) for case in cases for name in benches]
    measured = in_rounds(turns, lambda turn: measure(benches[turn[1]], turn[0]), repeat=repeat)
    samples: dict[C, dict[str, list[object]]] = {}
    for (case, name), values in measured.items():
        samples.setdefault(case, {})[name] = values
    return samples


def _table(title: str, figures: Sequence[Figure], samples: Mapping[str, Sequence[object]]) -> Table:
    """Return a table with a row for each figure, whose last cell is the ratio of the medians."""
    before, after = samples.values()
    return Table(
        title,
        "As in the scenario of the same kind, both with default settings and each in its own schema.",
        ("figure", *samples, "ratio"),
        [
            (
                figure.head,
                *(figure.cell(measured) for measured in samples.values()),
                _ratio(median(figure.values(after)), of=median(figure.values(before))),
            )
            for figure in figures
        ],
    )


def _ratio(value: float, *, of: float) -> str:
    return f"{value / of:.2f}" if of else "-"
