"""What it costs to find out which writers are open, beside transactions that hold many locks elsewhere."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import psycopg

from benchmarks.bench import Bench, say
from benchmarks.report import Table, spread
from outbox_relay.relay.horizon import list_writers, observe

if TYPE_CHECKING:
    from collections.abc import Callable

TABLES = tuple(f"elsewhere_{number}" for number in range(40))


def measure(bench: Bench) -> list[Table]:
    """Open more and more transactions, and time both looks beside each number of them."""
    plan = bench.plan
    rows = []
    with bench.database() as dsn, psycopg.connect(dsn, autocommit=True) as connection, ExitStack() as bystanders:
        for name in TABLES:
            connection.execute(f"CREATE TABLE {name} ()")
        opened = 0
        for wanted in plan.open_transactions:
            say(f"horizon: {wanted} open transactions")
            for _ in range(wanted - opened):
                _hold_locks(bystanders.enter_context(psycopg.connect(dsn)))
            opened = wanted
            observing = _milliseconds(lambda: observe(connection, schema="public"), count=plan.looks)
            listing = _milliseconds(lambda: list_writers(connection, schema="public"), count=plan.looks)
            locks = f"{wanted * len(TABLES):,}"
            rows.append((str(wanted), locks, spread(observing, digits=2), spread(listing, digits=2)))
    table = Table(
        "Looking for open writers",
        f"{plan.looks} looks each, with `max_connections = 400`. Every open transaction has an id and holds a lock on "
        f"{len(TABLES)} tables that are not the outbox. `observe` is what every poll with news costs, `list_writers` "
        "what is spent when a transaction has been open for more than 10 ms.",
        ("open transactions", "locks held", "`observe` ms", "`list_writers` ms"),
        rows,
    )
    return [table]


def _hold_locks(connection: psycopg.Connection) -> None:
    """Begin a transaction as a long job elsewhere would."""
    connection.execute("SELECT pg_current_xact_id()")
    connection.execute(f"LOCK TABLE {', '.join(TABLES)} IN ROW EXCLUSIVE MODE")


def _milliseconds(look: Callable[[], object], *, count: int) -> list[float]:
    milliseconds = []
    for _ in range(count):
        started = time.monotonic()
        look()
        milliseconds.append((time.monotonic() - started) * 1000)
    return milliseconds
