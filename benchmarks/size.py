"""What a message takes on the database's disk and in its write-ahead log."""

from __future__ import annotations

from dataclasses import dataclass

import psycopg

from benchmarks.bench import AGGREGATE_TYPE, KEYS, Bench, say
from benchmarks.relay import running_relays
from benchmarks.report import Figure, Table, by_case
from benchmarks.topic import temporary_topic

INSERT = """
INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload_bytes)
SELECT %(aggregate_type)s, 'customer-' || number %% %(keys)s, 'order_placed', %(payload)s
FROM generate_series(1, %(count)s) AS number
"""
SELECT_LOGGED = "SELECT pg_current_wal_insert_lsn() - '0/0'"
SELECT_SIZES = """
SELECT pg_table_size('outbox'), pg_indexes_size('outbox'), pg_total_relation_size('outbox_published')
"""


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes, all of them for one message; what is kept is that of a published message after a vacuum."""

    logged_by_insert: float
    logged_by_relay: float
    table: float
    indexes: float
    marks: float


FIGURES = (
    Figure("log: insert", "logged_by_insert"),
    Figure("log: publish", "logged_by_relay", digits=1),
    Figure("kept: table", "table"),
    Figure("kept: indexes", "indexes"),
    Figure("kept: marks", "marks", digits=1),
)


def measure(bench: Bench) -> list[Table]:
    """Insert, let a relay publish, vacuum, and look."""
    table = by_case(
        "What a message takes of the database",
        f"Bytes for each of {bench.plan.size_messages:,} messages, inserted by one statement, vacuumed, published by a "
        "relay, and vacuumed again. The log is counted from the end of a checkpoint on, so that it holds whole pages; "
        "without that of vacuum, which here is the first to read a row and so notes that it is committed. The marks "
        "are those of a backlog; steady traffic writes more, which the relay joins after a minute.",
        case="payload",
        figures=FIGURES,
        samples={f"{size:,}": [_measure(bench, payload_bytes=size)] for size in bench.plan.size_payload_bytes},
    )
    return [table]


def _measure(bench: Bench, *, payload_bytes: int) -> Size:
    say(f"size: {payload_bytes} bytes")
    count = bench.plan.size_messages
    parameters = {"aggregate_type": AGGREGATE_TYPE, "keys": KEYS, "count": count, "payload": bytes(payload_bytes)}
    with (
        bench.database() as dsn,
        temporary_topic(bench.kafka) as topic,
        psycopg.connect(dsn, autocommit=True) as connection,
    ):
        empty = _logged(connection)
        connection.execute(INSERT, parameters)
        inserted = _logged(connection)
        connection.execute("VACUUM outbox")
        vacuumed = _logged(connection)
        with running_relays(bench, dsn=dsn, topic=topic):
            topic.await_messages(count)
        published = _logged(connection)
        connection.execute("VACUUM outbox, outbox_published")
        [kept] = connection.execute(SELECT_SIZES).fetchall()
    return Size(*(total / count for total in (inserted - empty, published - vacuumed, *kept)))


def _logged(connection: psycopg.Connection) -> float:
    """Return the position of the write-ahead log, in bytes, after a checkpoint."""
    [(position,)] = connection.execute(SELECT_LOGGED).fetchall()
    connection.execute("CHECKPOINT")
    return float(position)
