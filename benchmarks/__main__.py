"""`python -m benchmarks`: run the scenarios that are named, or all, and write one report."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import drain, horizon, hour, idle, inbox, latency, layout, published, size, snapshot
from benchmarks.bench import Bench, running_bench
from benchmarks.plan import FULL, QUICK
from benchmarks.report import document

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from benchmarks.report import Table

RESULTS = Path(__file__).with_name("results") / "latest.md"

SCENARIOS: dict[str, Callable[[Bench], list[Table]]] = {
    "drain": drain.measure,
    "latency": latency.measure,
    "snapshot": snapshot.measure,
    "published": published.measure,
    "layout": layout.measure,
    "horizon": horizon.measure,
    "idle": idle.measure,
    "hour": hour.measure,
    "size": size.measure,
    "inbox": inbox.measure,
}


def main() -> None:
    """Parse the command line, run, write the report and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="small sizes, once: a few minutes, to see that it works")
    parser.add_argument("--repeat", type=int, help="how often everything is measured")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the report goes")
    given = parser.parse_args()
    if unknown := set(given.scenarios) - SCENARIOS.keys():
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    plan = QUICK if given.quick else FULL
    with running_bench(replace(plan, repeat=given.repeat or plan.repeat)) as bench:
        text = report(bench, given.scenarios or SCENARIOS)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(text)
    print(text)


def report(bench: Bench, names: Iterable[str]) -> str:
    """Run the scenarios in *names* one after the other; give the report."""
    tables = [table for name in names for table in SCENARIOS[name](bench)]
    return document(tables, dsn=bench.server.dsn(), repeat=bench.plan.repeat)


if __name__ == "__main__":
    main()
