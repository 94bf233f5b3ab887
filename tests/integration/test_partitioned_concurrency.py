"""Writers, relays, operators and pruners at once, while partitions come and go: no writer fails, nothing is lost."""

from __future__ import annotations

import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import pytest

from outbox_relay import database as relay_database
from outbox_relay.errors import DatabaseConflict
from outbox_relay.operate import migrate
from outbox_relay.relay.claim import ClaimOptions, Floors, claim
from outbox_relay.relay.prune import PruneOptions, first_kept_id, open_partition, prune_batch, prune_partition
from outbox_relay.relay.settle import Parked, Settlement, settle
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from tests.fixtures.postgres import Database

pytestmark = [pytest.mark.every_postgres, pytest.mark.slow]

WRITERS, RELAYS, PRUNERS = 4, 2, 2
TRANSACTIONS = 200  # of each writer
OPTIONS = PruneOptions(older_than_seconds=0.02, messages=20)
CLAIM = ClaimOptions(messages=40, shards=4, lock_timeout=5.0)

INSERT = """
INSERT INTO outbox (aggregate_type, aggregate_id, event_type)
SELECT 'order', %s::int, 'placed' FROM generate_series(1, %s)
RETURNING message_id::text
"""


class Histories:
    """What was committed, what relays have marked, and what happened to partitions."""

    def __init__(self, database: Database, *, seed: int) -> None:
        self.seed = seed
        self.committed: set[str] = set()
        self.marked: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.written = threading.Event()
        self._database = database

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        with closing(relay_database.connect(self._database.dsn, application_name="actor")) as connection:
            yield connection

    def write(self, number: int) -> None:
        """Commit some messages or take them back, sometimes late; any error of a writer fails the test."""
        chance = random.Random(f"{self.seed} writer {number}")  # noqa: S311 -- to be repeated from its seed
        with self.connection() as connection:
            for _ in range(TRANSACTIONS):
                connection.execute("BEGIN")
                rows = connection.execute(INSERT, [chance.randrange(50), chance.randint(1, 5)]).fetchall()
                if chance.random() < 0.1:
                    connection.execute("SELECT pg_sleep(0.15)")
                if chance.random() < 0.1:
                    connection.execute("ROLLBACK")
                    continue
                connection.execute("COMMIT")
                self.committed.update(message_id for (message_id,) in rows)

    def relay(self, number: int) -> None:
        """Mark most of what is claimed, park some, until all is written and nothing is left."""
        chance = random.Random(f"{self.seed} relay {number}")  # noqa: S311 -- to be repeated from its seed
        with self.connection() as connection:
            while not (self.written.is_set() and self.is_drained(connection)):
                try:
                    batch = claim(connection, options=CLAIM, through=2**62, floors=Floors())
                    parked = [message for message in batch.messages if chance.random() < 0.02]
                    published = [message for message in batch.messages if message not in parked]
                    if batch.messages:
                        settlement = Settlement(published, [Parked(message, "bad") for message in parked])
                        settle(connection, schema="public", settlement=settlement, mode="mark")
                        self.marked.update(message.message_id for message in published)
                        self.counts["parked"] += len(parked)
                except DatabaseConflict:
                    connection.rollback()
                    self.counts["relay conflicts"] += 1

    def release(self) -> None:
        """Make whole shards of parked messages unpublished again, as an operator does."""
        with self.connection() as connection:
            for shard in self.until_drained(connection):
                try:
                    with relay_database.translated_errors(), connection.transaction():
                        connection.execute("SET LOCAL lock_timeout = '1s'")
                        connection.execute("SELECT FROM outbox_shard WHERE shard = %s FOR UPDATE", [shard])
                        connection.execute(
                            "UPDATE outbox SET parked_at = NULL, parked_reason = NULL"
                            " WHERE shard = %s AND parked_at IS NOT NULL",
                            [shard],
                        )
                        connection.execute(
                            "UPDATE outbox_shard SET generation = generation + 1 WHERE shard = %s", [shard]
                        )
                except DatabaseConflict:
                    self.counts["operator conflicts"] += 1

    def prune(self) -> None:
        """Open a partition each time, drop those that may go, and remove rows from the others."""
        with self.connection() as connection:
            for _ in self.until_drained(connection):
                try:
                    open_partition(connection, options=OPTIONS)
                    before = first_kept_id(connection, options=OPTIONS)
                    dropped = prune_partition(connection, options=OPTIONS)
                    if dropped is not None and not dropped.is_last:
                        self.counts["dropped partitions"] += 1
                        self.counts["dropped messages"] += dropped.messages
                        continue
                    batch = prune_batch(connection, options=OPTIONS, after=0, before=before)
                    self.counts["removed rows"] += 0 if batch is None else batch.messages
                except DatabaseConflict:
                    connection.rollback()
                    self.counts["pruner conflicts"] += 1

    def until_drained(self, connection: Connection) -> Iterator[int]:
        """Count round the shards."""
        turn = 0
        while not (self.written.is_set() and self.is_drained(connection)):
            yield turn % 16
            turn += 1

    def is_drained(self, connection: Connection) -> bool:
        return not connection.execute("SELECT FROM outbox WHERE published_at IS NULL LIMIT 1").fetchall()

    def remaining(self) -> set[str]:
        with self.connection() as connection:
            return {row[0] for row in connection.execute("SELECT message_id::text FROM outbox").fetchall()}


def test_nothing_is_lost_while_partitions_come_and_go(database: Database) -> None:
    seed = random.randrange(10**6)  # noqa: S311 -- no secret
    print(f"seed {seed}")  # noqa: T201 -- shown when it fails
    with database.connect(autocommit=True) as admin:
        migrate.apply(admin, schema="public", line="partitioned")
        admin.execute("UPDATE outbox_partition SET open_for = '20 milliseconds'")
        histories = Histories(database, seed=seed)
        with ThreadPoolExecutor(WRITERS + RELAYS + PRUNERS + 1) as threads:
            writers = [threads.submit(histories.write, number) for number in range(WRITERS)]
            others = [threads.submit(histories.relay, number) for number in range(RELAYS)]
            others += [threads.submit(histories.prune) for _ in range(PRUNERS)]
            others.append(threads.submit(histories.release))
            eventually(lambda: all(writer.done() for writer in writers), timeout=120)
            histories.written.set()
            for actor in (*writers, *others):
                actor.result()
    assert set(histories.marked) == histories.committed
    assert histories.marked.total() == len(histories.marked)
    assert histories.remaining() <= histories.committed
    assert min(histories.counts[name] for name in ("dropped partitions", "dropped messages", "parked")) > 0
