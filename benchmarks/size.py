"""What a message takes on the database's disk and in its write-ahead log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import psycopg

from benchmarks.bench import AGGREGATE_TYPE, KEYS, Bench, say
from benchmarks.relay import running_relays
from benchmarks.report import Table
from benchmarks.topic import temporary_topic

if TYPE_CHECKING:
    from outbox_relay.relay.settle import SettleMode

INSERT = """
INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload_bytes)
SELECT %(aggregate_type)s, 'customer-' || number %% %(keys)s, 'order_placed', %(payload)s
FROM generate_series(1, %(count)s) AS number
"""
SELECT_LOGGED = "SELECT pg_current_wal_insert_lsn() - '0/0'"
SELECT_SIZES = "SELECT pg_table_size('outbox'), pg_indexes_size('outbox')"


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes, all of them for one message; `table` and `indexes` after settling and a vacuum."""

    logged_by_insert: float
    logged_by_settling: float
    table: float
    indexes: float


def measure(bench: Bench) -> list[Table]:
    """Insert, let a relay settle in both modes, vacuum, and look."""
    count = bench.plan.size_messages
    rows = []
    for payload_bytes in bench.plan.size_payload_bytes:
        mark, delete = (_measure(bench, payload_bytes=payload_bytes, settle=mode) for mode in ("mark", "delete"))
        figures = (
            mark.logged_by_insert,
            mark.logged_by_settling,
            delete.logged_by_settling,
            mark.table,
            mark.indexes,
        )
        rows.append((f"{payload_bytes:,}", *(f"{figure:,.0f}" for figure in figures)))
    table = Table(
        "What a message takes of the database",
        f"Bytes for each of {count:,} messages, inserted by one statement and settled by a relay; kept are those that "
        "are marked, after a vacuum. The log is counted from the end of a checkpoint on, so that it holds whole pages.",
        ("payload", "log: insert", "log: mark", "log: delete", "kept: table", "kept: indexes"),
        rows,
    )
    return [table]


def _measure(bench: Bench, *, payload_bytes: int, settle: SettleMode) -> Size:
    say(f"size: {payload_bytes} bytes, {settle}")
    count = bench.plan.size_messages
    parameters = {
        "aggregate_type": AGGREGATE_TYPE,
        "keys": KEYS,
        "count": count,
        "payload": bytes(payload_bytes),
    }
    with (
        bench.database() as dsn,
        temporary_topic(bench.kafka) as topic,
        psycopg.connect(dsn, autocommit=True) as connection,
    ):
        empty = _logged(connection)
        connection.execute(INSERT, parameters)
        inserted = _logged(connection)
        settings = {"OUTBOX_RELAY_SETTLE": settle}
        with running_relays(dsn=dsn, kafka=bench.kafka, topic=topic, settings=settings):
            topic.await_messages(count)
        settled = _logged(connection)
        connection.execute("VACUUM outbox")
        [(table, indexes)] = connection.execute(SELECT_SIZES).fetchall()
    return Size(*(total / count for total in (inserted - empty, settled - inserted, table, indexes)))


def _logged(connection: psycopg.Connection) -> float:
    """Give the position of the write-ahead log, in bytes, after a checkpoint."""
    [(position,)] = connection.execute(SELECT_LOGGED).fetchall()
    connection.execute("CHECKPOINT")
    return float(position)
