"""Collectors for what Prometheus' own classes cannot do: count a batch at once, and forget what is out of date."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from outbox_relay.relay.survey import Backlog, Upkeep


class BatchHistogram(Collector):
    """
    A histogram of durations that takes those of a batch at once.

    `Histogram.observe` takes a lock and looks for the bucket each time, which for every message costs as much as
    sending it.
    """

    def __init__(self, name: str, text: str, *, bounds: tuple[float, ...]) -> None:
        self._name = name
        self._text = text
        self._bounds = bounds
        self._lock = threading.Lock()
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, began_ms: Iterable[int], *, ended_ms: float) -> None:
        """Count the time from each of *began_ms* to *ended_ms*, milliseconds of the same clock; none is negative."""
        began = sorted(began_ms)
        if began[-1] > ended_ms:
            began = [min(began_at, ended_ms) for began_at in began]  # type: ignore[misc]  # whole numbers, mostly
        earlier = [bisect_left(began, ended_ms - 1000 * bound) for bound in self._bounds]
        with self._lock:
            for index, count in enumerate([*earlier, 0]):
                self._counts[index] += len(began) - count
            self._sum += (len(began) * ended_ms - sum(began)) / 1000

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Give the buckets, each with the count of all durations up to its bound."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        buckets = list(zip([*map(str, self._bounds), "+Inf"], counts, strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=total)


class SurveyedGauges(Collector):
    """
    What a survey found in the database.

    A figure that was not read again in time is left out: the last one would look like the present one, for as long as
    the database is away.

    Args:
        single: Name and description of each gauge; an attribute of the same name has its value.
        by_table: The same for the gauges with the label `table`.
    """

    def __init__(self, *, prefix: str, single: Mapping[str, str], by_table: Mapping[str, str]) -> None:
        self._prefix = prefix
        self._single = single
        self._by_table = by_table
        self._found: dict[type, tuple[Backlog | Upkeep, float]] = {}

    def show(self, found: Backlog | Upkeep, *, until: float) -> None:
        """Take the place of what was found of this kind before; *until* is a `time.monotonic()`."""
        self._found[type(found)] = found, until

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Give all gauges, those that are not known without a sample."""
        now = time.monotonic()
        shown = [found for found, until in list(self._found.values()) if now < until]
        for name, text in self._single.items():
            values = [getattr(found, name) for found in shown if hasattr(found, name)]
            yield GaugeMetricFamily(f"{self._prefix}_{name}", text, value=next(iter(values), None))
        tables = [table for found in shown for table in getattr(found, "tables", ())]
        for name, text in self._by_table.items():
            family = GaugeMetricFamily(f"{self._prefix}_{name}", text, labels=["table"])
            for table in tables:
                family.add_metric([table.name], getattr(table, name))
            yield family
