"""A parked message that is larger than anything else may be."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from outbox_relay import database as relay_database
from outbox_relay.operate.parked import Note, ParkedMessages
from tests.fixtures.marks import set_aside
from tests.fixtures.outbox import insert
from tests.fixtures.postgres import login

if TYPE_CHECKING:
    from tests.fixtures.postgres import Database

BYTES = 135_000_000  # as JSON, in hex, longer than a string may be in a jsonb


def test_a_message_larger_than_any_json_string_is_skipped_with_its_payload(database: Database) -> None:
    with (
        login(database, group="outbox_operator") as name,
        closing(relay_database.connect(database.server.dsn(database.name, user=name), application_name="x")) as session,
        database.connect(autocommit=True) as writer,
    ):
        insert(writer, "7")
        writer.execute("UPDATE outbox SET payload_bytes = decode(repeat('00', %s), 'hex')", [BYTES])
        set_aside(writer, 1)
        operator = ParkedMessages(session, schema="public", lock_timeout=30, statement_timeout=60)
        operator.skip([1], note=Note(why="too large"), release_rest=False, are_overtaken=False)
        kept = writer.execute("SELECT length(payload_bytes) FROM outbox_audit").fetchall()
    assert kept == [(BYTES,)]
