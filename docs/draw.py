"""
Draw the pictures of docs/dashboard.md from a recorded run: python -m docs.draw.

It takes three minutes, and needs what the acceptance tests need and matplotlib: real relays, PostgreSQL, Kafka and
Prometheus. The panels are the dashboard's, with their own queries.
"""  # noqa: INP001 -- a script beside the pages

from __future__ import annotations

import re
import time
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

from tests.fixtures.kafka import running_cluster
from tests.fixtures.load import Load, Plan, insert_messages
from tests.fixtures.postgres import binaries_of, chosen_versions, create_database, running_server, temporary_directory
from tests.fixtures.stand import JOB, Stand
from tests.monitoring.files import ALERTS, Panel, panels, queried, sped_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from tests.fixtures.prometheus import Prometheus, Series

PICTURES = Path(__file__).parent / "pictures"
STEP_SECONDS = 1.0
COLUMN_INCHES, LINE_INCHES = 0.5, 0.38
MARGIN_LINES = 3.6  # of a panel, for its title and its legend
INSERT_LARGE = (
    "INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload_bytes) VALUES (%s, '1', 'sent', %s)"
)


@dataclass(frozen=True, slots=True)
class Run:
    """A recorded run: Unix times of its ends, and of each incident."""

    start: float
    end: float
    incidents: list[float]


def record(stand: Stand) -> Run:
    """Write for two and a half minutes while Kafka is killed, a message is too large, and a writer stays open."""
    incidents = []
    with Load(stand.database.dsn, plan=Plan(writers=2, keys=60), seed=1):
        start = time.time()
        _let_run_until(start + 30)
        incidents.append(time.time())
        stand.kafka.kill()
        _let_run_until(start + 50)
        stand.kafka.restart()
        incidents.append(time.time())
        _let_run_until(start + 85)
        incidents.append(time.time())
        with stand.database.connect() as connection:
            connection.execute(INSERT_LARGE, ["parcel", bytes(2_000_000)])
        _let_run_until(start + 105)
        incidents.append(time.time())
        with closing(stand.database.connect(application_name="checkout")) as writer:
            insert_messages(writer, "order-1")
            _let_run_until(start + 125)
        _let_run_until(start + 150)
    return Run(start, time.time(), incidents)


def _let_run_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.time()))


def draw(run: Run, prometheus: Prometheus) -> None:
    """Draw each row of graphs as it is laid out, into a picture named like the row."""
    graphs = [panel for panel in panels() if panel.kind != "stat" and panel.row != "Consumers"]
    for row, of_row in groupby(graphs, key=attrgetter("row")):
        _draw_row(row, list(of_row), run=run, prometheus=prometheus)


def _draw_row(row: str, graphs: Sequence[Panel], *, run: Run, prometheus: Prometheus) -> None:
    top = min(graph.place.y for graph in graphs)
    lines = max(graph.place.y + graph.place.h for graph in graphs) - top
    figure = plt.figure(figsize=(24 * COLUMN_INCHES, lines * LINE_INCHES))
    for graph in graphs:
        at = graph.place
        box = (
            (at.x + 1.2) / 24,
            1 - (at.y - top + at.h - 2.4) / lines,
            (at.w - 1.6) / 24,
            (at.h - MARGIN_LINES) / lines,
        )
        axes = figure.add_axes(box)
        axes.set_title(graph.title, loc="left", pad=12)
        DRAW[graph.kind](axes, graph, run=run, prometheus=prometheus)
        _mark_incidents(axes, run)
    figure.savefig(PICTURES / f"{row.lower().replace(' ', '-')}.png", dpi=80, pil_kwargs={"optimize": True})
    plt.close(figure)


def _mark_incidents(axes: Axes, run: Run) -> None:
    for number, moment in enumerate(run.incidents, start=1):
        axes.axvline(moment - run.start, color="#c4162a", linewidth=0.8, linestyle=":")
        axes.text(
            moment - run.start, 1.01, str(number), color="#c4162a", ha="center", transform=axes.get_xaxis_transform()
        )
    axes.set_xlim(0, run.end - run.start)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda second, _: f"{second:g} s"))


def _draw_lines(axes: Axes, graph: Panel, *, run: Run, prometheus: Prometheus) -> None:
    """Draw the lines of a graph; those that are 0 all the time get no legend."""
    lines = {}
    for expression, legend in zip(graph.expressions, graph.legends, strict=True):
        for series in _ask(expression, run=run, prometheus=prometheus):
            lines[_filled_in(legend, series)] = {at - run.start: float(value) for at, value in series["values"]}
    shown = {name: points for name, points in lines.items() if any(points.values())}
    seconds = sorted({second for points in shown.values() for second in points})
    if graph.is_stacked:
        axes.stackplot(seconds, *([p.get(at, 0.0) for at in seconds] for p in shown.values()), labels=shown, alpha=0.6)
    else:
        for name, points in shown.items():
            axes.plot(seconds, [points.get(at, float("nan")) for at in seconds], linewidth=1.1, label=name)
    if graph.is_log and shown:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _with_unit(value, unit=graph.unit)))
    if shown:
        columns = max(1, graph.place.w // 3)
        below = -1.0 / (graph.place.h - MARGIN_LINES)
        axes.legend(loc="upper left", bbox_to_anchor=(-0.02, below), ncols=columns, borderaxespad=0, columnspacing=1)
    else:
        axes.text(0.5, 0.5, "0" if lines else "no data", transform=axes.transAxes, ha="center", color="#808080")


def _draw_states(axes: Axes, graph: Panel, *, run: Run, prometheus: Prometheus) -> None:
    """Draw a bar for each time that an alert fired."""
    found = _ask(graph.expressions[0], run=run, prometheus=prometheus)
    names = [_filled_in(graph.legends[0], series) for series in found]
    for line, series in enumerate(found):
        bars = [(at - run.start, STEP_SECONDS) for at, _ in series["values"]]
        axes.broken_barh(bars, (line - 0.35, 0.7), color="#e02f44")
    axes.set_yticks(range(len(names)), [""] * len(names))
    for line, name in enumerate(names):
        axes.text(1, line, name, va="center")
    axes.invert_yaxis()


def _draw_heatmap(axes: Axes, graph: Panel, *, run: Run, prometheus: Prometheus) -> None:
    """Draw how many messages fell into each bucket; the buckets of the answer count all up to their bound."""
    found = sorted(_ask(graph.expressions[0], run=run, prometheus=prometheus), key=_bound)
    counts = [{at: float(value) for at, value in series["values"]} for series in found]
    moments = sorted(counts[-1])
    upto = [[count.get(at, 0.0) for at in moments] for count in counts]
    cells = [
        upto[0],
        *([b - a for a, b in zip(low, high, strict=True)] for low, high in pairwise(upto)),
    ]
    shown = [[cell if cell > 0 else float("nan") for cell in row] for row in cells]
    axes.pcolormesh([at - run.start for at in moments], range(len(found)), shown, cmap="Oranges", norm="log")
    axes.set_yticks(range(len(found)), [series["metric"]["le"] for series in found])
    axes.grid(visible=False)


DRAW = {"timeseries": _draw_lines, "heatmap": _draw_heatmap, "state-timeline": _draw_states}


def _ask(expression: str, *, run: Run, prometheus: Prometheus) -> list[Series]:
    return prometheus.query_range(queried(expression, job=JOB), start=run.start, end=run.end, step=STEP_SECONDS)


def _bound(series: Series) -> float:
    return float(series["metric"]["le"])


def _filled_in(legend: str, series: Series) -> str:
    return re.sub(r"{{(\w+)}}", lambda label: series["metric"].get(label[1], ""), legend)


def _with_unit(value: float, *, unit: str) -> str:
    """Shorten a number as the dashboard does."""
    if unit == "s":
        return f"{value:g} s" if value >= 1 or value == 0 else f"{1000 * value:g} ms"
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{prefix}"
    return f"{value:g}"


def main() -> None:
    """Record a run and draw it."""
    mpl.use("Agg")
    plt.rcParams.update({"font.size": 7.5, "axes.titlesize": 9, "axes.grid": True, "grid.color": "#e4e4e4"})
    plt.rcParams.update({"legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False})
    PICTURES.mkdir(exist_ok=True)
    [major] = chosen_versions("newest")
    with temporary_directory() as directory, running_server(major) as server, running_cluster(brokers=1) as kafka:
        stand = Stand(
            directory,
            database=create_database(server),
            kafka=kafka,
            rules=sped_up(ALERTS.read_text(encoding="utf-8")),
            binaries=binaries_of(major),
        )
        with stand:
            draw(record(stand), stand.prometheus)


if __name__ == "__main__":
    main()
