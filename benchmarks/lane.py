"""What a lane asks of the database, without a relay around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outbox_relay.relay.claim import Claim, ClaimOptions, claim_shards
from outbox_relay.relay.horizon import read_last_number
from outbox_relay.relay.read import Limits, read_messages
from outbox_relay.relay.shards import SHARDS
from outbox_relay.relay.watch import Reached

if TYPE_CHECKING:
    import psycopg

    from outbox_relay.relay.message import Message

SCHEMA = "public"


def reach(connection: psycopg.Connection) -> Reached:
    """Return the last number drawn as the horizon: nobody else writes."""
    return Reached(*read_last_number(connection, schema=SCHEMA))


def claim(connection: psycopg.Connection, reached: Reached) -> Claim:
    """Begin a transaction and lock all shards; *connection* is in autocommit mode."""
    return claim_shards(
        connection,
        options=ClaimOptions(schema=SCHEMA),
        reached=reached,
        candidates=range(SHARDS),
        most=SHARDS,
        takes_all=True,
        looks_for_waiting=False,
    )


def read(
    connection: psycopg.Connection, claimed: Claim, reached: Reached, *, limits: Limits | None = None
) -> list[Message]:
    """Return the next messages above the marks."""
    batch = read_messages(connection, claimed, schema=SCHEMA, through=reached.through, limits=limits or Limits())
    return batch.messages
