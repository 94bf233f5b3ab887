"""What people do by hand to rows of the outbox comes to what docs/textbook.md says of it, while a relay runs."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.daemon import Daemon, outbox_relay
from tests.fixtures.load import commit_messages
from tests.fixtures.outbox import insert
from tests.fixtures.postgres import both_layouts, login
from tests.fixtures.topics import read_topic
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from tests.fixtures.pipeline import Pipeline

pytestmark = [pytest.mark.kafka, both_layouts]


@pytest.fixture
def admin(pipeline: Pipeline) -> Iterator[Connection]:
    with pipeline.database.connect(autocommit=True) as connection:
        yield connection


@pytest.fixture
def operator(pipeline: Pipeline) -> Iterator[Connection]:
    with (
        login(pipeline.database, group="outbox_operator") as name,
        pipeline.database.connect(autocommit=True, user=name) as connection,
    ):
        yield connection


def relay_of(pipeline: Pipeline) -> Daemon:
    """A relay that drops no partition of the test, of which all but the newest count as closed long ago."""
    return pipeline.relay(retention=0)


def sent(pipeline: Pipeline) -> list[int]:
    """The numbers of all records, in their order."""
    return sorted(record.sequence_no for record in pipeline.records())


def values(pipeline: Pipeline) -> list[str | bytes | None]:
    return [record.value() for record in read_topic(pipeline.kafka.bootstrap_servers, pipeline.topic("order"))]


def reconciled(pipeline: Pipeline) -> str:
    """What comparing all messages with the marks prints; it exits with 5 if any was skipped."""
    done = subprocess.run(
        outbox_relay("reconcile"),
        env=os.environ | {"OUTBOX_RELAY_DATABASE_URL": pipeline.database.relay_dsn},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def test_a_relay_waits_for_nobody_who_has_locked_messages(pipeline: Pipeline, admin: Connection) -> None:
    numbers = insert(admin, *map(str, range(30)))
    with pipeline.database.connect() as consumer:
        consumer.execute("SELECT FROM outbox ORDER BY sequence_no FOR UPDATE SKIP LOCKED")
        with relay_of(pipeline):
            pipeline.await_settled()
    assert sent(pipeline) == numbers


def test_what_is_deleted_is_not_sent_and_alarms_nobody(
    pipeline: Pipeline, admin: Connection, operator: Connection
) -> None:
    numbers = insert(admin, *map(str, range(30)))
    operator.execute("DELETE FROM outbox WHERE sequence_no IN (3, 7)")
    with relay_of(pipeline) as relay:
        pipeline.await_settled()
        operator.execute("DELETE FROM outbox WHERE sequence_no IN (4, 8)")
        numbers += insert(admin, "new")
        pipeline.await_settled()
        assert reconciled(pipeline) == "27 messages compared, none was skipped\n"
        relay.terminate()
        assert relay.wait() == 0
    assert sent(pipeline) == [number for number in numbers if number not in {3, 7}]
    assert relay.events_named("skipped_messages_found") == []


def test_what_a_message_says_can_be_changed_until_it_is_sent(
    pipeline: Pipeline, admin: Connection, operator: Connection
) -> None:
    insert(admin, "1", payload={"version": 1})
    operator.execute("UPDATE outbox SET payload = '{\"version\": 2}'")
    with relay_of(pipeline):
        pipeline.await_settled()
        operator.execute("UPDATE outbox SET payload = '{\"version\": 3}'")
        insert(admin, "1", payload={"version": 4})
        pipeline.await_settled()
    assert values(pipeline) == [b'{"version": 2}', b'{"version": 4}']


def test_after_a_truncate_the_relay_goes_on_with_what_is_new(pipeline: Pipeline, admin: Connection) -> None:
    numbers = insert(admin, *map(str, range(30)))
    with relay_of(pipeline):
        pipeline.await_settled()
        admin.execute("TRUNCATE outbox")
        numbers += insert(admin, *map(str, range(30)))
        eventually(lambda: len(sent(pipeline)) == len(numbers))
    assert sent(pipeline) == numbers


def test_messages_that_wait_or_are_parked_may_be_deleted(
    pipeline: Pipeline, admin: Connection, operator: Connection
) -> None:
    with relay_of(pipeline), pipeline.database.connect() as writer:
        waiting = insert(admin, "1", aggregate_type="basket")
        parked = insert(admin, "1", headers={"id": "the relay's own"})
        eventually(lambda: pending(admin) == {"waiting": waiting, "parked": parked})
        operator.execute("DELETE FROM outbox")
        commit_messages(writer, *["order-2"] * 3)
        pipeline.kafka.create_topic(pipeline.topic("basket"))
        eventually(lambda: pending(admin) == {"parked": parked})
    assert sent(pipeline) == [3, 4, 5]


def pending(admin: Connection) -> dict[str, list[int]]:
    rows = admin.execute("SELECT state, array_agg(sequence_no) FROM outbox_pending GROUP BY state").fetchall()
    return dict(rows)
