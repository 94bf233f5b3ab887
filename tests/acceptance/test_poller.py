"""docs/from-a-poller.md: going over from a poller, and back, while applications write."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Literal

import pytest
from confluent_kafka import Producer

from tests.fixtures.accounts import CREATE, Accounts, arrived
from tests.fixtures.guides import Guide
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psycopg

    from tests.fixtures.pipeline import Pipeline

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

GUIDE = Guide(Path(__file__).parents[2] / "docs" / "from-a-poller.md")
TABLE = """
CREATE TABLE event_queue (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind text NOT NULL,
    key text NOT NULL,
    name text NOT NULL,
    body jsonb NOT NULL,
    status text NOT NULL DEFAULT 'new'
)
"""
TAKE = "SELECT id, key, body::text FROM event_queue WHERE status = 'new' ORDER BY id LIMIT 5 FOR UPDATE"
SETTLE = {
    "marks": "UPDATE event_queue SET status = 'sent' WHERE id = ANY(%s)",
    "deletes": "DELETE FROM event_queue WHERE id = ANY(%s)",
}

Sort = Literal["marks", "deletes"]


def forwarding(sort: Sort) -> str:
    """What the guide prepares for a poller of this sort."""
    function, removal = GUIDE.statements("Prepare")
    [hiding] = [line.strip() for line in function.splitlines() if line.strip().startswith("UPDATE")]
    return function if sort == "marks" else function.replace(hiding, removal.strip())


def poll(pipeline: Pipeline, topic: str, *, sort: Sort, stop: Event) -> None:
    producer = Producer({"bootstrap.servers": pipeline.kafka.bootstrap_servers, "enable.idempotence": True})
    with pipeline.database.connect() as connection:
        while not stop.wait(0.01):
            rows = connection.execute(TAKE).fetchall()
            for _, key, body in rows:
                producer.produce(topic, body, key)
            assert producer.flush(30) == 0
            connection.execute(SETTLE[sort].encode(), [[row[0] for row in rows]])
            connection.commit()


@contextmanager
def poller(pipeline: Pipeline, topic: str, *, sort: Sort) -> Iterator[None]:
    """A poller that sends nothing twice and is always behind, until the context is left."""
    stop = Event()
    thread = Thread(target=poll, args=(pipeline, topic), kwargs={"sort": sort, "stop": stop})
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def write_event(connection: psycopg.Connection, key: str, versions: range) -> None:
    inserted = connection.execute(
        "INSERT INTO event_queue (kind, key, name, body)"
        " SELECT 'account', %s, 'raised', jsonb_build_object('version', version)"
        " FROM unnest(%s::bigint[]) AS version RETURNING id",
        [key, list(versions)],
    ).fetchall()
    assert len(inserted) == len(versions)


@pytest.mark.parametrize("sort", ["marks", "deletes"])
def test_going_over_and_back_under_load_loses_doubles_and_reorders_nothing(
    pipeline: Pipeline, seed: int, sort: Sort
) -> None:
    database, topic = pipeline.database, pipeline.topic("account")
    pipeline.kafka.create_topic(topic, partitions=3)
    with database.connect(autocommit=True) as owner:
        owner.execute(TABLE)
        owner.execute(CREATE)
        owner.execute(forwarding(sort).encode())

    def is_finished() -> bool:
        [(waiting,)] = GUIDE.run("Let the poller finish", database=database)
        return bool(waiting == 0)

    with Accounts(database.dsn, write=write_event, seed=seed) as load:
        with poller(pipeline, topic, sort=sort):
            load.await_more(100)
            GUIDE.run("Cut over", database=database)
            load.await_more(100)
            eventually(is_finished, timeout=120)
        with pipeline.relays(1, kafka__partitioner="consistent"):
            load.await_more(100)
            GUIDE.run("Back to the poller", database=database)
            load.await_more(100)
            pipeline.await_settled()
            by_relay = len(pipeline.rows())
        with poller(pipeline, topic, sort=sort):
            load.await_more(100)
    with poller(pipeline, topic, sort=sort):
        eventually(is_finished, timeout=120)
    assert arrived(pipeline.kafka, topic) == load.versions()
    assert 200 <= by_relay <= sum(map(len, load.versions().values())) - 200
