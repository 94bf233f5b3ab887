"""A lane on a real database, with a publisher that answers what the test wants: what the loop makes of it."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import pytest
import structlog

from outbox_relay import database as relay_database
from outbox_relay.errors import AnswerTooLarge
from outbox_relay.observe.metrics import Metrics
from outbox_relay.observe.telemetry import Telemetry
from outbox_relay.relay import loop
from outbox_relay.relay.claim import claim
from outbox_relay.relay.failures import WITHDRAWN
from outbox_relay.relay.loop import Lane, LaneOptions
from outbox_relay.relay.message import Addressing
from outbox_relay.relay.watch import HorizonWatch, WatchOptions
from tests.fixtures.outbox import insert
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from psycopg import Connection

    from outbox_relay.relay.claim import Batch
    from outbox_relay.relay.failures import Outcome
    from outbox_relay.relay.message import Record
    from outbox_relay.relay.publish import Publisher
    from tests.fixtures.postgres import Database

FAILURES_UNTIL_ALONE = 4  # 5,000 messages, 312, 19, one


class Answers:
    """Stands in for the publisher: the first batches become what was asked for, all others are acknowledged."""

    def __init__(self, *batches: list[Outcome]) -> None:
        self.producers_rebuilt = 0
        self.sizes: list[int] = []
        self._batches = list(batches)

    def probe(self) -> None: ...

    def changed_partitions(self) -> dict[str, int]:
        return {}

    def close(self) -> None: ...

    def publish(self, records: Sequence[Record], *, deadline: float) -> list[Outcome]:
        assert deadline > 0
        self.sizes.append(len(records))
        if not self._batches:
            return [None] * len(records)
        self.producers_rebuilt += 1
        return self._batches.pop(0)


@pytest.fixture
def writer(database: Database) -> Iterator[Connection]:
    with database.connect() as connection:
        yield connection


@contextmanager
def running(database: Database, answers: Answers, metrics: Metrics) -> Iterator[None]:
    """A lane and its horizon; both are stopped at the end."""
    telemetry = Telemetry(logger=structlog.get_logger(), metrics=metrics, topic_of=Addressing().topic)
    connect = partial(relay_database.connect, database.dsn, application_name="lane")
    watch = HorizonWatch(options=WatchOptions(), connect=connect, telemetry=telemetry)
    stop = threading.Event()
    lane = Lane(
        "lane-1",
        options=LaneOptions(),
        connect=connect,
        publisher=cast("Publisher", answers),
        watch=watch,
        telemetry=telemetry,
        stop=stop,
    )
    threads = [threading.Thread(target=part.run) for part in (watch, lane)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        watch.stop()
        for thread in threads:
            thread.join()


def published(connection: Connection) -> int:
    [(count,)] = connection.execute("SELECT count(*) FROM outbox WHERE published_at IS NOT NULL").fetchall()
    connection.rollback()
    return int(count)


def test_what_kafka_has_behind_a_failure_of_its_key_is_counted_as_sent_again(
    database: Database, writer: Connection
) -> None:
    insert(writer, "a", "b", "b", "b")
    writer.commit()
    answers, metrics = Answers([None, WITHDRAWN, None, None]), Metrics()
    with running(database, answers, metrics):
        eventually(lambda: published(writer) == 4)
    assert answers.sizes == [4, 3]
    count = metrics.registry.get_sample_value
    assert count("outbox_relay_republished_messages_total", {"cause": "order"}) == 2
    assert count("outbox_relay_commit_to_ack_seconds_count") == 4


def test_producers_that_were_rebuilt_are_counted_once(database: Database, writer: Connection) -> None:
    insert(writer, "a")
    writer.commit()
    answers, metrics = Answers([WITHDRAWN], [WITHDRAWN]), Metrics()
    with running(database, answers, metrics):
        eventually(lambda: published(writer) == 1)
        count = metrics.registry.get_sample_value
        eventually(lambda: count("outbox_relay_rebuilt_producers_total") == 2)
    assert answers.sizes == [1, 1, 1]


def test_a_message_that_another_lane_has_parked_meanwhile_puts_no_blame_on_the_next_one(
    database: Database, writer: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert(writer, "a", "b", "a")
    writer.commit()
    met: list[str] = []

    def claim_behind_the_other_lane(connection: Connection, **options: Any) -> Batch:  # noqa: ANN401 -- those of claim
        if len(met) < FAILURES_UNTIL_ALONE:
            met.append("the guilty one")
            raise AnswerTooLarge("as by a message that another lane parks now")
        return claim(connection, **options)

    monkeypatch.setattr(loop, "claim", claim_behind_the_other_lane)
    with running(database, Answers(), Metrics()):
        eventually(lambda: published(writer) == 3)


def test_a_message_that_no_server_can_write_out_is_parked_and_holds_up_no_other(
    database: Database, writer: Connection
) -> None:
    insert(writer, *map(str, range(20)), "guilty", *map(str, range(20)))
    numbers = ", ".join(["1e131071"] * 8_500)  # 100 kB as jsonb, 1.1 GB as text
    writer.execute("UPDATE outbox SET payload = %s WHERE aggregate_id = 'guilty'", [f"[{numbers}]"])
    writer.commit()
    with running(database, Answers(), Metrics()):
        eventually(lambda: published(writer) == 40, timeout=120)
        eventually(lambda: writer.execute("SELECT FROM outbox WHERE parked_at IS NOT NULL").rowcount == 1, timeout=120)
    [(reason,)] = writer.execute("SELECT parked_reason FROM outbox WHERE parked_at IS NOT NULL").fetchall()
    assert "once its numbers are written out" in reason
