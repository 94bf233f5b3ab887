"""What messages take of the parts beside the relay: processor time of the servers, log, dead rows and marks."""

from __future__ import annotations

import os
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg

from benchmarks.report import Figure
from outbox_relay.sandbox.waiting import eventually

if TYPE_CHECKING:
    from benchmarks.bench import Bench

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")

# Every updated or deleted row leaves a dead one; unlike n_dead_tup, these counts do not depend on when autovacuum came.
# A mark is a row of outbox_published, or an update of a message where a version keeps its marks in the messages.
SELECT_COUNTERS = """
SELECT
    (pg_current_wal_insert_lsn() - '0/0')::float8 AS wal_bytes,
    sum(n_tup_upd + n_tup_del)::float8 AS dead_rows,
    sum(CASE relname WHEN 'outbox_published' THEN n_tup_ins WHEN 'outbox' THEN n_tup_upd ELSE 0 END)::float8 AS marks
FROM pg_stat_user_tables
"""
SELECT_OTHERS = """
SELECT
FROM pg_stat_activity
WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()
"""


@dataclass(frozen=True, slots=True)
class Use:
    """
    What each message took.

    Attributes:
        postgres_microseconds: Processor time of all processes of the server.
        broker_microseconds: Processor time of the broker.
        wal_bytes: Of the write-ahead log.
        dead_rows: Updated and deleted rows, for 1,000 messages.
        marks: Written marks, for 1,000 messages.
    """

    postgres_microseconds: float
    broker_microseconds: float
    wal_bytes: float
    dead_rows: float
    marks: float

    def beyond(self, other: Use) -> Use:
        """Return what this is more than *other*."""
        return Use(*(mine - its for mine, its in zip(astuple(self), astuple(other), strict=True)))


# Of samples whose attribute `use` is a `Use`.
USE = (
    Figure("PostgreSQL us/message", "use.postgres_microseconds", digits=1),
    Figure("broker us/message", "use.broker_microseconds", digits=1),
    Figure("log bytes/message", "use.wal_bytes", digits=1),
    Figure("dead rows/1,000", "use.dead_rows", digits=1),
    Figure("marks/1,000", "use.marks", digits=1),
)


class Meter:
    """Counts what is taken from its making on."""

    def __init__(self, bench: Bench, dsn: str) -> None:
        self._bench = bench
        self._dsn = dsn
        self._before = self._read()

    def per_message(self, messages: int) -> Use:
        """
        Return what was taken so far for each of *messages*.

        Sessions report what they did when they end, so this waits until no other one is in the database.
        """
        eventually(self._is_alone, message="sessions stayed in the database")
        return Use(*(taken / messages for taken in astuple(self._read().beyond(self._before))))

    def _read(self) -> Use:
        """Return the counters as they stand, as if there were one message."""
        with psycopg.connect(self._dsn) as connection:
            [(wal_bytes, dead_rows, marks)] = connection.execute(SELECT_COUNTERS).fetchall()
        return Use(
            postgres_microseconds=tree_seconds(self._bench.server.pid) * 1e6,
            broker_microseconds=sum(map(process_seconds, self._bench.kafka.pids)) * 1e6,
            wal_bytes=wal_bytes,
            dead_rows=dead_rows * 1000,
            marks=marks * 1000,
        )

    def _is_alone(self) -> bool:
        with psycopg.connect(self._dsn) as connection:
            return not connection.execute(SELECT_OTHERS).fetchall()


def process_seconds(pid: int) -> float:
    """Return the processor time of all threads of a process, from its clock as clock_getcpuclockid(3) names it."""
    return time.clock_gettime(~pid << 3 | 2)


def tree_seconds(pid: int) -> float:
    """Return the processor time of a process and of all its children, those that have ended included."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    running = sum(_seconds_if_running(int(child)) for child in children)
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ended = sum(map(int, fields[13:15])) / _TICKS_PER_SECOND  # cutime and cstime
    return process_seconds(pid) + running + ended


def _seconds_if_running(pid: int) -> float:
    try:
        return process_seconds(pid)
    except OSError:  # it has ended since, and is among those that have
        return 0.0
