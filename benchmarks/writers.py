"""Writers at a steady rate: one-row transactions of `pgbench`."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from uuid import UUID

from benchmarks.bench import AGGREGATE_TYPE, KEYS
from outbox_relay.sandbox.history import Outcome, Write

if TYPE_CHECKING:
    from benchmarks.bench import Bench

WRITERS = 16

# Client and count make the message id, by which a line of the log finds its record.
SCRIPT = f"""\
\\set count :count + 1
\\set customer random(1, {KEYS})
INSERT INTO outbox (message_id, aggregate_type, aggregate_id, event_type, payload)
VALUES (
    (lpad(to_hex(:client_id::bigint), 8, '0') || lpad(to_hex(:count::bigint), 24, '0'))::uuid,
    '{AGGREGATE_TYPE}',
    'customer-' || :customer::bigint,
    'order_placed',
    '{{"order": "{"0123456789abcdef" * 11}0123456789a"}}'
);
"""


def write_steadily(bench: Bench, dsn: str, *, rate: int, seconds: float) -> None:
    """Write at *rate* for *seconds*."""
    with TemporaryDirectory() as name:
        _run(bench, dsn, rate=rate, seconds=seconds, directory=Path(name))


def logged_writes(bench: Bench, dsn: str, *, rate: int, seconds: float) -> list[Write]:
    """Write at *rate* for *seconds*, and return every commit."""
    with TemporaryDirectory() as name:
        directory = Path(name)
        _run(bench, dsn, "--log", "--log-prefix=transactions", rate=rate, seconds=seconds, directory=directory)
        [log] = directory.glob("transactions.*")
        return _writes(log)


def _run(bench: Bench, dsn: str, *options: str, rate: int, seconds: float, directory: Path) -> None:
    (directory / "script.sql").write_text(SCRIPT)
    load = ("--rate", str(rate), "--time", str(round(seconds)), "--client", str(WRITERS), "--protocol=prepared")
    bench.pgbench(dsn, *load, "--no-vacuum", "--define=count=0", "--file=script.sql", *options, directory=directory)


def _writes(log: Path) -> list[Write]:
    """Read a log of pgbench: client, count, microseconds, script, and when it ended in seconds and microseconds."""
    since_epoch = time.time() - time.monotonic()
    counts: Counter[int] = Counter()
    writes = []
    for line in log.read_text().splitlines():
        client, _, _, _, seconds, microseconds, *_ = map(int, line.split())
        counts[client] += 1
        message_id = str(UUID(int=(client << 96) + counts[client]))
        ended_at = seconds + microseconds / 1e6 - since_epoch
        writes.append(Write(message_id, key="", digest=b"", outcome=Outcome.COMMITTED, ended_at=ended_at))
    return writes
