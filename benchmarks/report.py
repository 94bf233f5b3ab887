"""Tables of figures, as markdown."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import confluent_kafka
import psycopg

from outbox_relay import __version__
from outbox_relay.sandbox.kafka import KAFKA_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

SHOWN_SETTINGS = (
    "fsync",
    "full_page_writes",
    "synchronous_commit",
    "shared_buffers",
    "max_wal_size",
    "max_connections",
)
SELECT_SETTINGS = "SELECT name, current_setting(name) FROM unnest(%(names)s::text[]) AS name"


@dataclass(frozen=True, slots=True)
class Table:
    """What a scenario found, and in a few sentences how."""

    title: str
    method: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def markdown(self) -> str:
        """Return it as a section; text to the left in the first column, figures to the right."""
        lines = [self.columns, ("---", *["---:"] * (len(self.columns) - 1)), *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"## {self.title}\n\n{self.method}\n\n{table}\n"


@dataclass(frozen=True, slots=True)
class Figure:
    """
    What is shown of samples.

    Attributes:
        head: What stands above it.
        name: The attribute of a sample, or of an attribute of it: "use.marks".
    """

    head: str
    name: str
    digits: int = 0

    def values(self, samples: Iterable[object]) -> list[float]:
        """Return the figure of each sample."""
        return [float(attrgetter(self.name)(sample)) for sample in samples]

    def cell(self, samples: Iterable[object]) -> str:
        """Return it as text, see `spread`."""
        return spread(self.values(samples), digits=self.digits)


def by_case(
    title: str, method: str, *, case: str, figures: Sequence[Figure], samples: Mapping[str, Sequence[object]]
) -> Table:
    """Return a table with a row for each case, under the head *case*, and a column for each figure."""
    columns = (case, *(figure.head for figure in figures))
    rows = [(name, *(figure.cell(measured) for figure in figures)) for name, measured in samples.items()]
    return Table(title, method, columns, rows)


def spread(values: Sequence[float], *, digits: int = 0) -> str:
    """Return the median, and behind it the least and the most when there is more than one value."""
    middle, least, most = (f"{value:,.{digits}f}" for value in (median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({least} - {most})"


def share(values: Sequence[float], *, of: Sequence[float]) -> str:
    """Return the ratio of two medians in percent."""
    return f"{median(values) / median(of):.1%}"


def document(tables: Iterable[Table], *, dsn: str, repeat: int) -> str:
    """Return the whole report; it has no date, so that two runs can be compared line by line."""
    return "\n".join([_header(dsn, repeat=repeat), *(table.markdown() for table in tables)])


def _header(dsn: str, *, repeat: int) -> str:
    with psycopg.connect(dsn) as connection:
        postgres = connection.info.parameter_status("server_version")
        settings = connection.execute(SELECT_SETTINGS, {"names": list(SHOWN_SETTINGS)}).fetchall()
    facts = {
        "outbox-relay": __version__,
        "PostgreSQL": f"{postgres}, {', '.join(f'{name} = {value}' for name, value in settings)}",
        "Kafka": f"{KAFKA_VERSION}, one broker on this machine with a heap of 512 MB",
        "librdkafka": f"{confluent_kafka.libversion()[0]} (confluent-kafka {confluent_kafka.version()})",
        "psycopg": f"{psycopg.__version__} ({psycopg.pq.__impl__})",
        "Python": platform.python_version(),
        "Machine": f"{len(os.sched_getaffinity(0))} cores ({_processor()}), shared by everything that is measured",
        "Figures": f"median (least - most); rounds: {repeat}, unless the table says otherwise",
    }
    return "# Benchmark results\n\n" + "".join(f"- {name}: {fact}\n" for name, fact in facts.items())


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
