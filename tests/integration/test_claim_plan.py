"""What a claim costs on a table with many published messages: its plan, with what it really read."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from outbox_relay import database as relay_database
from outbox_relay.relay.claim import SHARDS, ClaimOptions, Floors, begin_statement, claim_parameters
from outbox_relay.sql import statement
from tests.fixtures.postgres import both_layouts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from tests.fixtures.postgres import Database

pytestmark = [pytest.mark.every_postgres, both_layouts]

BATCH = 1000
CLAIM_INDEXES = {"outbox_unpublished_idx", "outbox_parked_idx"}  # the second to see that no key is parked

INSERT = """
    INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload, published_at)
    SELECT 'order', number %% 1000, 'placed', '{"n": 1}', CASE WHEN %s THEN now() END
    FROM generate_series(1, %s) AS number
"""


# The indexes that scans of messages can use, those of partitions under the name of the whole outbox's.
SELECT_INDEXES = """
    SELECT indexrelid::regclass::text, coalesce(inhparent, indexrelid)::regclass::text
    FROM pg_index
    LEFT JOIN pg_inherits ON inhrelid = indexrelid
    WHERE indrelid::regclass::text LIKE 'outbox%'
"""


class Plan:
    """One claim's plan, with what it really read."""

    def __init__(self, root: dict[str, object], *, indexes: dict[object, str]) -> None:
        self._root = root
        self._indexes = indexes

    @property
    def rows(self) -> int:
        """Rows of the result: messages, and one for each shard without any."""
        return number(self._root["Actual Rows"])

    @property
    def pages(self) -> int:
        """Pages touched, wherever they came from."""
        return number(self._root["Shared Hit Blocks"]) + number(self._root["Shared Read Blocks"])

    @property
    def indexes_of_messages(self) -> set[object]:
        """Through what messages are found; a table scanned without an index is None."""
        return {self._indexes.get(node.get("Index Name")) for node in self._scans_of_messages()}

    @property
    def messages_read(self) -> int:
        """Messages that the scans came upon, taken or not."""
        return sum(
            (number(node["Actual Rows"]) + number(node.get("Rows Removed by Filter", 0))) * number(node["Actual Loops"])
            for node in self._scans_of_messages()
        )

    def _scans_of_messages(self) -> Iterator[dict[str, object]]:
        return (node for node in nodes(self._root) if re.fullmatch(r"outbox(_p\d+)?", str(node.get("Relation Name"))))


def nodes(root: dict[str, object]) -> Iterator[dict[str, object]]:
    yield root
    below = root.get("Plans", [])
    assert isinstance(below, list)
    for child in below:
        yield from nodes(child)


def number(value: object) -> int:
    assert isinstance(value, int | float)
    return round(value)


@pytest.fixture
def admin(database: Database) -> Iterator[Connection]:
    with database.connect(autocommit=True) as connection:
        yield connection


@pytest.fixture
def lane(database: Database) -> Iterator[Connection]:
    with relay_database.connect(database.dsn, application_name="lane") as connection:
        yield connection


def explained_claim(lane: Connection, *, floors: Floors) -> Plan:
    """Claim a batch as a lane does, have it explained, and give it back."""
    options = ClaimOptions(messages=BATCH)
    parameters = claim_parameters(options, through=10**6, floors=floors)
    lane.execute(begin_statement(options))
    explain = b"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) " + statement("claim", schema="public")
    [([explained],)] = lane.execute(explain, parameters).fetchall()
    lane.rollback()
    return Plan(explained["Plan"], indexes=dict(lane.execute(SELECT_INDEXES).fetchall()))


def everything_settled_through(settled_through: int) -> Floors:
    floors = Floors()
    for shard in range(SHARDS):
        floors.remember(shard, generation=0, settled_through=settled_through)
    return floors


@pytest.mark.parametrize(
    ("is_vacuumed", "floors"),
    [(True, Floors()), (False, everything_settled_through(100_000))],
    ids=["vacuumed, first claim of a lane", "without statistics, later claim"],
)
def test_a_claim_reads_its_batch_and_not_the_published_messages(
    admin: Connection, lane: Connection, *, is_vacuumed: bool, floors: Floors
) -> None:
    admin.execute(INSERT, [True, 100_000])
    admin.execute(INSERT, [False, 20_000])
    if is_vacuumed:
        admin.execute("VACUUM ANALYZE outbox")
    plan = explained_claim(lane, floors=floors)
    assert BATCH <= plan.rows < BATCH + SHARDS
    assert plan.indexes_of_messages == CLAIM_INDEXES
    assert plan.messages_read <= plan.rows + 2 * SHARDS
    assert plan.pages < 4 * plan.rows


def test_floors_spare_a_claim_the_dead_entries_that_a_held_snapshot_keeps(
    database: Database, admin: Connection, lane: Connection
) -> None:
    with database.connect() as holder:
        holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        holder.execute("SELECT FROM outbox")
        admin.execute(INSERT, [False, 50_000])
        admin.execute("UPDATE outbox SET published_at = now()")
        admin.execute(INSERT, [False, 20_000])
        admin.execute("VACUUM ANALYZE outbox")
        without_floors = explained_claim(lane, floors=Floors())
        plan = explained_claim(lane, floors=everything_settled_through(50_000))
    assert without_floors.pages > 10_000
    assert plan.indexes_of_messages == CLAIM_INDEXES
    assert plan.messages_read <= plan.rows + 2 * SHARDS
    assert plan.pages < 4 * plan.rows
