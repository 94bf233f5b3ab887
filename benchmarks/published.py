"""Whether a batch gets dearer with the number of published messages beside it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psycopg

from benchmarks.bench import Bench, insert_messages, publish_all, say
from benchmarks.lane import claim, reach, read
from benchmarks.report import Figure, Table, by_case
from benchmarks.usage import process_seconds
from outbox_relay.relay.read import Limits

if TYPE_CHECKING:
    from outbox_relay.relay.watch import Reached

UNPUBLISHED = 20_000


@dataclass(frozen=True, slots=True)
class Cost:
    """Milliseconds of claiming all shards and of reading a batch: until the answer, and of the session's processor."""

    claim: float
    claim_by_postgres: float
    read: float
    read_by_postgres: float


FIGURES = (
    Figure("ms/claim", "claim", digits=2),
    Figure("PostgreSQL", "claim_by_postgres", digits=2),
    Figure("ms/read", "read", digits=1),
    Figure("PostgreSQL", "read_by_postgres", digits=1),
)


def measure(bench: Bench) -> list[Table]:
    """Add published messages step by step, and time batches at each."""
    with bench.database() as dsn, psycopg.connect(dsn, autocommit=True) as connection:
        samples = {f"{rows:,}": _measure_rows(bench, connection, rows=rows) for rows in bench.plan.published_rows}
    table = by_case(
        "Batches beside published messages",
        f"{bench.plan.claims} claims of all shards, each with a read of {Limits().messages:,} out of {UNPUBLISHED:,} "
        "unpublished messages and rolled back. The published messages are older; every dozen of a shard has a mark. "
        "`PostgreSQL` is the processor time of the session.",
        case="published",
        figures=FIGURES,
        samples=samples,
    )
    return [table]


def _measure_rows(bench: Bench, connection: psycopg.Connection, *, rows: int) -> list[Cost]:
    """Publish what is there, fill up to *rows*, add what is to be read, and return the cost of each batch."""
    say(f"published: {rows} messages")
    publish_all(connection)
    [(present,)] = connection.execute("SELECT count(*) FROM outbox").fetchall()
    insert_messages(connection, count=rows - present, are_published=True)
    insert_messages(connection, count=UNPUBLISHED)
    with psycopg.connect(connection.info.dsn, autocommit=True) as lane:
        reached = reach(lane)
        return [_cost(lane, reached) for _ in range(bench.plan.claims)]


def _cost(connection: psycopg.Connection, reached: Reached) -> Cost:
    began, began_by_postgres = _clocks(connection)
    claimed = claim(connection, reached)
    claimed_at, claimed_by_postgres = _clocks(connection)
    messages = read(connection, claimed, reached)
    read_at, read_by_postgres = _clocks(connection)
    connection.rollback()
    if len(messages) < Limits().messages:
        raise RuntimeError(f"a read returned {len(messages)} messages, not {Limits().messages}")
    return Cost(
        claim=claimed_at - began,
        claim_by_postgres=claimed_by_postgres - began_by_postgres,
        read=read_at - claimed_at,
        read_by_postgres=read_by_postgres - claimed_by_postgres,
    )


def _clocks(connection: psycopg.Connection) -> tuple[float, float]:
    """Return the time and the processor time of the session, in milliseconds."""
    return time.monotonic() * 1000, process_seconds(connection.info.backend_pid) * 1000
