"""Whether a claim gets dearer with the number of published rows beside it."""

from __future__ import annotations

import time

import psycopg

from benchmarks.bench import Bench, insert_messages, say
from benchmarks.report import Table, spread
from outbox_relay.relay.claim import ClaimOptions, Floors, claim
from outbox_relay.relay.horizon import read_last_no

UNPUBLISHED = 20_000


def measure(bench: Bench) -> list[Table]:
    """Add published rows step by step, and time claims at each."""
    with bench.database() as dsn, psycopg.connect(dsn, autocommit=True) as connection:
        milliseconds = {rows: _measure_rows(bench, connection, rows=rows) for rows in bench.plan.published_rows}
    batch = ClaimOptions().messages
    table = Table(
        "Claims beside published rows",
        f"{bench.plan.claims} claims of {batch:,} out of {UNPUBLISHED:,} unpublished messages without a floor, as a "
        "sweep makes them, each rolled back; the published rows are older.",
        ("published rows", "ms/claim", "us/message"),
        [
            (f"{rows:,}", spread(samples, digits=1), spread([sample / batch * 1000 for sample in samples], digits=1))
            for rows, samples in milliseconds.items()
        ],
    )
    return [table]


def _measure_rows(bench: Bench, connection: psycopg.Connection, *, rows: int) -> list[float]:
    """Publish what is there, fill up to *rows*, add what is to be claimed, and give the milliseconds of each claim."""
    say(f"published: {rows} rows")
    connection.execute("UPDATE outbox SET published_at = now() WHERE published_at IS NULL")
    [(present,)] = connection.execute("SELECT count(*) FROM outbox").fetchall()
    insert_messages(connection, count=rows - present, are_published=True)
    insert_messages(connection, count=UNPUBLISHED)
    with psycopg.connect(connection.info.dsn) as lane:
        through = read_last_no(lane, schema="public")
        lane.rollback()
        return [_claim_milliseconds(lane, through=through) for _ in range(bench.plan.claims)]


def _claim_milliseconds(connection: psycopg.Connection, *, through: int) -> float:
    options = ClaimOptions()
    started = time.monotonic()
    batch = claim(connection, options=options, through=through, floors=Floors())
    milliseconds = (time.monotonic() - started) * 1000
    connection.rollback()
    if len(batch.messages) < options.messages:
        raise RuntimeError(f"a claim took {len(batch.messages)} messages, not {options.messages}")
    return milliseconds
