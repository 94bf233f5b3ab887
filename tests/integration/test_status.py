"""What an operator sees of one outbox."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from outbox_relay import database as relay_database
from outbox_relay.errors import SchemaMismatch
from outbox_relay.operate.status import MOST_COUNTED, Shard, Status, read_status
from outbox_relay.relay.horizon import record_unordered
from tests.fixtures.marks import mark, set_aside
from tests.fixtures.outbox import insert
from tests.fixtures.postgres import both_layouts, login

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from tests.fixtures.postgres import Database

pytestmark = [pytest.mark.every_postgres, both_layouts]


@pytest.fixture
def operator(database: Database) -> Iterator[Connection]:
    with database.connect(autocommit=True) as connection:
        yield connection


def test_an_empty_outbox_has_nothing_to_tell(operator: Connection) -> None:
    assert read_status(operator, schema="public") == Status(
        unpublished=0,
        oldest_age_seconds=0.0,
        oldest_no=None,
        waiting=0,
        waiting_reasons={},
        longest_wait_seconds=0.0,
        parked=0,
        parked_keys=0,
        uncollected_writers=0,
        unreconciled_seconds=0.0,
        writers=[],
        lockers=[],
        shards=[Shard(shard, None, None, None, None, None) for shard in range(16)],
    )


def test_the_grants_of_a_relay_or_of_an_operator_are_enough(database: Database) -> None:
    for group in ("outbox_relay", "outbox_operator"):
        with login(database, group=group) as name, database.connect(autocommit=True, user=name) as connection:
            assert read_status(connection, schema="public").unpublished == 0


def test_what_waits_and_what_is_parked_is_counted_apart(operator: Connection) -> None:
    insert(operator, *["1"] * 7)
    set_aside(operator, 2, 3, state="parked")
    set_aside(operator, 4, state="waiting", reason_code="late")
    set_aside(operator, 5, 6, state="waiting", reason_code="UNKNOWN_TOPIC_OR_PART")
    mark(operator, through=6)
    status = read_status(operator, schema="public")
    assert (status.unpublished, status.waiting, status.parked, status.parked_keys) == (4, 3, 2, 1)
    assert list(status.waiting_reasons.items()) == [("UNKNOWN_TOPIC_OR_PART", 2), ("late", 1)]


def test_the_same_id_of_another_type_is_another_parked_key(operator: Connection) -> None:
    insert(operator, "1")
    insert(operator, "1", aggregate_type="basket")
    set_aside(operator, 1, 2)
    mark(operator)
    assert read_status(operator, schema="public").parked_keys == 2


def test_the_age_is_that_of_the_first_message_that_waits(operator: Connection) -> None:
    insert(operator, "1", created_at="2001-01-01")
    mark(operator)
    insert(operator, "2", created_at="2001-01-02")
    operator.execute("UPDATE outbox SET created_at = now() - interval '90 seconds' WHERE sequence_no = 2")
    insert(operator, "1", "2", "7")
    status = read_status(operator, schema="public")
    assert 90 <= status.oldest_age_seconds < 120
    assert status.oldest_no == 2


def test_each_shard_tells_how_far_it_has_come(operator: Connection) -> None:
    insert(operator, "1", "1", "1")
    set_aside(operator, 2, state="waiting")
    [(number,)] = operator.execute("SELECT shard FROM outbox LIMIT 1").fetchall()
    mark(operator, through=2, age_seconds=90)
    found = read_status(operator, schema="public").shards[number]
    assert (found.shard, found.published_through, found.last_no, found.next_no) == (number, 2, 3, 2)
    assert found.published_seconds_ago is not None
    assert 90 <= found.published_seconds_ago < 120


def test_counting_stops_at_its_limit(operator: Connection) -> None:
    operator.execute(
        """
        INSERT INTO outbox (aggregate_type, aggregate_id, event_type)
        SELECT 'order', '1', 'placed' FROM generate_series(1, %s)
        """,
        [MOST_COUNTED + 1],
    )
    assert read_status(operator, schema="public").unpublished == MOST_COUNTED


def test_a_given_up_writer_is_told_when_it_has_ended_and_nobody_has_collected_its_messages(
    database: Database, operator: Connection
) -> None:
    with database.connect() as writer:
        insert(writer, "1")
        [(xid,)] = writer.execute("SELECT pg_current_xact_id()::text").fetchall()
        record_unordered(operator, schema="public", xids=[int(xid)])
        assert read_status(operator, schema="public").uncollected_writers == 0
        writer.commit()
    assert read_status(operator, schema="public").uncollected_writers == 1


def test_open_writers_are_named_and_relays_and_bystanders_are_not(database: Database, operator: Connection) -> None:
    insert(operator, "1")
    with (
        database.connect(application_name="checkout") as writer,
        database.connect() as bystander,
        relay_database.connect(database.dsn, application_name="outbox-relay lane-1") as lane,
    ):
        bystander.execute("SELECT pg_current_xact_id()")
        lane.execute("BEGIN")
        lane.execute("SELECT FROM outbox_shard FOR UPDATE")
        mark(lane)
        insert(writer, "2")
        status = read_status(operator, schema="public")
        [found] = status.writers
        assert (found.application_name, found.pid) == ("checkout", writer.info.backend_pid)
        assert status.lockers == []
        lane.rollback()


def test_whoever_holds_shards_and_is_no_relay_is_named_once_and_only_while_he_holds_them(
    database: Database, operator: Connection
) -> None:
    with database.connect(application_name="by hand") as person:
        person.execute("SELECT FROM outbox_shard WHERE shard < 3 FOR UPDATE")
        [found] = read_status(operator, schema="public").lockers
        assert (found.application_name, found.pid) == ("by hand", person.info.backend_pid)
        person.commit()
        assert read_status(operator, schema="public").lockers == []


def test_an_outbox_that_is_not_there_is_a_mismatch_and_names_the_remedy(operator: Connection) -> None:
    with pytest.raises(SchemaMismatch, match="outbox-relay migrate apply"):
        read_status(operator, schema="nowhere")
