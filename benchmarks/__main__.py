"""`python -m benchmarks`: run the scenarios that are named, or all, and write one report."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import drain, horizon, hour, idle, inbox, latency, layout, published, size, snapshot, versions
from benchmarks.bench import Bench, running_bench
from benchmarks.installation import installed_revision
from benchmarks.plan import FULL, QUICK
from benchmarks.report import document

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from benchmarks.report import Table

RESULTS = Path(__file__).with_name("results")

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
    parser.add_argument("--against", metavar="REVISION", help="compare this checkout with a git revision instead")
    parser.add_argument("--output", type=Path, help="where the report goes")
    given = parser.parse_args()
    if unknown := set(given.scenarios) - SCENARIOS.keys():
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    if given.against and given.scenarios:
        parser.error("--against has scenarios of its own: name none")
    plan = QUICK if given.quick else FULL
    plan = replace(plan, repeat=given.repeat or plan.repeat)
    with installed_revision(given.against) if given.against else nullcontext() as other, running_bench(plan) as bench:
        tables = versions.compare(bench, other) if other else run(bench, given.scenarios or SCENARIOS)
        text = document(tables, dsn=bench.server.dsn(), repeat=plan.repeat)
    output = given.output or RESULTS / ("versions.md" if given.against else "latest.md")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    print(text)


def run(bench: Bench, names: Iterable[str]) -> list[Table]:
    """Run the scenarios in *names* one after the other."""
    return [table for name in names for table in SCENARIOS[name](bench)]


if __name__ == "__main__":
    main()
