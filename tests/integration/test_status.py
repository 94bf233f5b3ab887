"""What an operator sees of one outbox."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from outbox_relay import database as relay_database
from outbox_relay.errors import SchemaMismatch
from outbox_relay.operate.status import MOST_COUNTED, Status, read_status
from outbox_relay.relay.claim import ClaimOptions, Floors, claim
from tests.fixtures.outbox import insert
from tests.fixtures.postgres import both_layouts

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
    assert read_status(operator, schema="public") == Status(0, 0.0, 0, 0, [])


def test_what_waits_and_what_is_parked_is_counted_apart(operator: Connection) -> None:
    insert(operator, "1", "1", "2", "7", "7", "7")
    operator.execute("UPDATE outbox SET published_at = now() WHERE sequence_no = 1")
    operator.execute("UPDATE outbox SET parked_at = now() WHERE sequence_no IN (3, 4, 5)")
    status = read_status(operator, schema="public")
    assert (status.unpublished, status.parked, status.parked_keys) == (2, 3, 2)


def test_the_same_id_of_another_type_is_another_parked_key(operator: Connection) -> None:
    insert(operator, "1")
    insert(operator, "1", aggregate_type="basket")
    operator.execute("UPDATE outbox SET parked_at = now()")
    assert read_status(operator, schema="public").parked_keys == 2


def test_the_age_is_that_of_the_first_message_that_waits(operator: Connection) -> None:
    insert(operator, "1", created_at="2001-01-01")
    insert(operator, "2", created_at="2001-01-02")
    operator.execute("UPDATE outbox SET published_at = now() WHERE sequence_no = 1")
    operator.execute("UPDATE outbox SET created_at = now() - interval '90 seconds' WHERE sequence_no = 2")
    insert(operator, "1", "2", "7")
    assert 90 <= read_status(operator, schema="public").oldest_age_seconds < 120


def test_counting_stops_at_its_limit(operator: Connection) -> None:
    operator.execute(
        """
        INSERT INTO outbox (aggregate_type, aggregate_id, event_type)
        SELECT 'order', '1', 'placed' FROM generate_series(1, %s)
        """,
        [MOST_COUNTED + 1],
    )
    assert read_status(operator, schema="public").unpublished == MOST_COUNTED


def test_open_writers_are_named_and_relays_and_bystanders_are_not(database: Database, operator: Connection) -> None:
    insert(operator, "1")
    with (
        database.connect(application_name="checkout") as writer,
        database.connect() as bystander,
        relay_database.connect(database.dsn, application_name="lane") as lane,
    ):
        bystander.execute("SELECT pg_current_xact_id()")
        [message] = claim(lane, options=ClaimOptions(), through=1, floors=Floors()).messages
        lane.execute("UPDATE outbox SET published_at = now() WHERE id = %s", [message.id])
        insert(writer, "2")
        [found] = read_status(operator, schema="public").writers
        assert (found.application_name, found.pid) == ("checkout", writer.info.backend_pid)
        lane.rollback()


def test_an_outbox_that_is_not_there_is_a_mismatch_and_names_the_remedy(operator: Connection) -> None:
    with pytest.raises(SchemaMismatch, match="outbox-relay migrate apply"):
        read_status(operator, schema="nowhere")
