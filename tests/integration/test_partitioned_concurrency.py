"""Writers, relays, operators and pruners at once, while partitions come and go: no writer fails, nothing is lost."""

from __future__ import annotations

import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import pytest
import structlog

from outbox_relay import database as relay_database
from outbox_relay.errors import DatabaseConflict
from outbox_relay.observe.metrics import Metrics
from outbox_relay.observe.telemetry import Telemetry
from outbox_relay.operate import migrate
from outbox_relay.relay.claim import ClaimOptions, claim_shards
from outbox_relay.relay.failures import Failure, Scope
from outbox_relay.relay.late import collect_late
from outbox_relay.relay.message import Addressing
from outbox_relay.relay.prune import PruneOptions, prune_all, prune_unordered
from outbox_relay.relay.read import Limits, read_messages, read_waiting
from outbox_relay.relay.settle import Aside, forget_waiting, record_marks, set_aside
from outbox_relay.relay.watch import HorizonWatch, WatchOptions
from tests.fixtures.marks import disagreeing_marks
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from outbox_relay.relay.claim import Claim
    from outbox_relay.relay.message import Message
    from outbox_relay.relay.reconcile import Repair
    from tests.fixtures.postgres import Database

pytestmark = [pytest.mark.every_postgres, pytest.mark.slow]

WRITERS, RELAYS, PRUNERS = 4, 2, 2
TRANSACTIONS = 200  # of each writer
OPTIONS = PruneOptions(older_than_seconds=0.02, messages=20, most_messages=40)
CLAIM = ClaimOptions(lock_timeout=5.0)
LIMITS = Limits(messages=40)
BAD = Failure(Scope.MESSAGE, "bad", "bad")

INSERT = """
INSERT INTO outbox (aggregate_type, aggregate_id, event_type)
SELECT 'order', %s::int, 'placed' FROM generate_series(1, %s)
RETURNING message_id::text
"""
NOT_PUBLISHED = "SELECT FROM outbox_message WHERE state <> 'published' LIMIT 1"


class Histories:
    """What was committed, what relays have published, and what happened to partitions."""

    def __init__(self, database: Database, *, seed: int, watch: HorizonWatch) -> None:
        self.seed = seed
        self.committed: set[str] = set()
        self.published: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.written = threading.Event()
        self._database = database
        self._watch = watch

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
        """Publish most of what is claimed, park some, until all is written and nothing is left."""
        chance = random.Random(f"{self.seed} relay {number}")  # noqa: S311 -- to be repeated from its seed
        with self.connection() as connection:
            for _ in self.until_drained(connection):
                reached = self._watch.wait_beyond(0, timeout=0.1)
                try:
                    claim = claim_shards(
                        connection,
                        options=CLAIM,
                        reached=reached,
                        candidates=range(16),
                        most=4,
                        takes_all=False,
                        looks_for_waiting=True,
                    )
                    if claim.held and claim.is_of_epoch:
                        self.publish(connection, claim, through=reached.through, chance=chance)
                except DatabaseConflict:
                    connection.rollback()
                    self.counts["relay conflicts"] += 1

    def publish(self, connection: Connection, claim: Claim, *, through: int, chance: random.Random) -> None:
        waiting = read_waiting(connection, claim, schema="public", held_types=(), limits=LIMITS)
        forget_waiting(connection, [*waiting.messages, *waiting.gone], schema="public")
        batch = read_messages(connection, claim, schema="public", through=through, limits=LIMITS)
        parked = [message for message in batch.messages if chance.random() < 0.02]
        set_aside(connection, [Aside(message, "parked", BAD) for message in parked], schema="public")
        claim.marks.pass_over(batch.messages)
        for shard in claim.marks.through.keys() - batch.shards:
            claim.marks.pass_nothing(shard, through=through)
        record_marks(connection, claim.marks, schema="public")
        self.count_published([message for message in (*waiting.messages, *batch.messages) if message not in parked])
        self.counts["parked"] += len(parked)
        self.counts["late"] += sum(message.is_unordered for message in waiting.messages)

    def count_published(self, messages: list[Message]) -> None:
        self.published.update(message.message_id for message in messages)

    def collect(self) -> None:
        """Collect what writers wrote that were given up on."""
        with self.connection() as connection:
            for _ in self.until_drained(connection):
                collect_late(connection, options=CLAIM)

    def release(self) -> None:
        """Let whole shards of parked messages be sent, as an operator does."""
        with self.connection() as connection:
            for shard in self.until_drained(connection):
                try:
                    with relay_database.translated_errors(), connection.transaction():
                        connection.execute("SET LOCAL lock_timeout = '1s'")
                        connection.execute("SELECT FROM outbox LIMIT 0")
                        connection.execute("SELECT FROM outbox_shard WHERE shard = %s FOR UPDATE", [shard])
                        connection.execute("UPDATE outbox_pending SET state = 'waiting' WHERE shard = %s", [shard])
                except DatabaseConflict:
                    self.counts["operator conflicts"] += 1

    def prune(self) -> None:
        """Open a partition each time, drop those that may go, and remove rows from the others."""
        after: dict[int, int] = {}
        with self.connection() as connection:
            for turn in self.until_drained(connection):
                try:
                    for batch in prune_all(connection, options=OPTIONS, after=after, on_repair=self.note_repair):
                        if batch is not None:
                            after |= batch.pruned
                            self.counts["removed by rows" if batch.pruned else "dropped"] += batch.messages
                    self.counts["forgotten writers"] += prune_unordered(connection, options=OPTIONS)
                except DatabaseConflict:
                    connection.rollback()
                    self.counts["pruner conflicts"] += 1
                if turn == 0:
                    after.clear()

    def note_repair(self, repair: Repair) -> None:
        self.counts["skipped"] += repair.messages

    def until_drained(self, connection: Connection) -> Iterator[int]:
        """Count round the shards."""
        turn = 0
        while not (self.written.is_set() and not connection.execute(NOT_PUBLISHED).fetchall()):
            yield turn % 16
            turn += 1


@pytest.fixture
def watch(database: Database) -> Iterator[HorizonWatch]:
    """A horizon that gives up on slow writers."""
    connect = partial(relay_database.connect, database.dsn, application_name="horizon")
    telemetry = Telemetry(logger=structlog.get_logger(), metrics=Metrics(), topic_of=Addressing().topic)
    watch = HorizonWatch(options=WatchOptions(ordering_timeout=0.1), connect=connect, telemetry=telemetry)
    thread = threading.Thread(target=watch.run)
    thread.start()
    yield watch
    watch.stop()
    thread.join()


def test_nothing_is_lost_while_partitions_come_and_go(database: Database, watch: HorizonWatch) -> None:
    seed = random.randrange(10**6)  # noqa: S311 -- no secret
    print(f"seed {seed}")  # noqa: T201 -- shown when it fails
    with database.connect(autocommit=True) as admin:
        migrate.apply(admin, schema="public", line="partitioned")
        admin.execute("UPDATE outbox_partition SET open_for = '20 milliseconds'")
        histories = Histories(database, seed=seed, watch=watch)
        with ThreadPoolExecutor(WRITERS + RELAYS + PRUNERS + 2) as threads:
            writers = [threads.submit(histories.write, number) for number in range(WRITERS)]
            others = [threads.submit(histories.relay, number) for number in range(RELAYS)]
            others += [threads.submit(histories.prune) for _ in range(PRUNERS)]
            others += [threads.submit(histories.release), threads.submit(histories.collect)]
            eventually(lambda: all(writer.done() for writer in writers), timeout=120)
            histories.written.set()
            for actor in (*writers, *others):
                actor.result()
        assert disagreeing_marks(admin) == []
        remaining = admin.execute("SELECT message_id::text FROM outbox").fetchall()
    print(histories.counts)  # noqa: T201 -- shown when it fails
    assert set(histories.published) == histories.committed
    assert histories.published.total() == len(histories.published)
    assert {message_id for (message_id,) in remaining} <= histories.committed
    assert histories.counts["skipped"] == 0
    assert min(histories.counts[name] for name in ("dropped", "parked", "late")) > 0
