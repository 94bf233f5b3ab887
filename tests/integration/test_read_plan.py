"""What the statements of a relay cost on large tables: their generic plans, with what they really read."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from psycopg import ClientCursor

from outbox_relay import database as relay_database
from outbox_relay.relay.claim import ClaimOptions, begin_statement
from outbox_relay.relay.shards import SHARDS
from outbox_relay.sql import numbers, statement
from tests.fixtures.postgres import create_database, drop_database

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from psycopg import Connection

    from outbox_relay.sandbox.postgres import PostgresServer
    from tests.fixtures.postgres import Database

pytestmark = pytest.mark.every_postgres

Node = dict[str, object]

BATCH = 1_008  # 63 of each shard
SETTLED, NEW, PENDING, MARKS = 100_000, 20_000, 10_000, 6_000
HELD = 10_000  # more messages that wait, for a topic that is away
DEAD = 4_000  # marks of each shard that a held snapshot keeps
ALL = numbers(range(SHARDS))

INSERT = """
    INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload)
    SELECT 'order', number %% 1000, 'placed', '{"n": 1}'
    FROM generate_series(1, %s) AS number
"""
INSERT_MARKS = """
    INSERT INTO outbox_published (shard, through, messages, checksum)
    SELECT shard, through, 1, 1
    FROM outbox_shard
    CROSS JOIN generate_series(%s::bigint, %s::bigint) AS through
"""
INSERT_PENDING = """
    INSERT INTO outbox_pending (shard, sequence_no, key_hash, aggregate_type, state, reason_code, reason)
    SELECT
        shard,
        sequence_no,
        hashtextextended(aggregate_type || ':' || aggregate_id, 0),
        aggregate_type,
        CASE WHEN sequence_no %% 2 = 0 THEN 'parked' ELSE 'waiting' END,
        'test',
        'test'
    FROM outbox
    WHERE sequence_no BETWEEN %s AND %s
"""
INSERT_HELD = """
    INSERT INTO outbox_pending (shard, sequence_no, key_hash, aggregate_type, state, reason_code, reason)
    SELECT number %% 16, number, number, 'basket', 'waiting', 'test', 'test'
    FROM generate_series(1, %s) AS number
"""


class Plan:
    """The plan of a statement, with what it really read."""

    def __init__(self, root: Node) -> None:
        self._nodes = list(nodes(root))
        self.pages = number(root["Shared Hit Blocks"]) + number(root["Shared Read Blocks"])

    def scans(self, table: str) -> list[Node]:
        """The scans of *table* or of one of its partitions."""
        name = re.compile(rf"{table}(_p\d+)?")
        return [node for node in self._nodes if name.fullmatch(str(node.get("Relation Name")))]

    def rows_read(self, table: str) -> int:
        """Rows that the scans of *table* came upon, taken or not."""
        read = 0
        for node in self.scans(table):
            found = number(node["Actual Rows"]) + number(node.get("Rows Removed by Filter", 0))
            read += found * number(node["Actual Loops"])
        return read

    @property
    def tables_scanned(self) -> set[object]:
        """Tables that are read from end to end."""
        return {node["Relation Name"] for node in self._nodes if node["Node Type"] == "Seq Scan"}

    @property
    def most_sorted(self) -> int:
        """The most rows that come together in one sort or hash."""
        gathering = [node for node in self._nodes if node["Node Type"] in {"Sort", "Incremental Sort", "Hash"}]
        return max((number(below["Actual Rows"]) for node in gathering for below in children(node)), default=0)


def nodes(root: Node) -> Iterator[Node]:
    yield root
    for child in children(root):
        yield from nodes(child)


def children(node: Node) -> list[Node]:
    below = node.get("Plans", [])
    assert isinstance(below, list)
    return below


def number(value: object) -> int:
    assert isinstance(value, int | float)
    return round(value)


@pytest.fixture(scope="module", params=["outbox", "partitioned"])
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["fresh statistics", "statistics of empty tables"])
def large(postgres: PostgresServer, layout: str, request: pytest.FixtureRequest) -> Iterator[Database]:
    """Many settled messages, some new ones, many marks and pending messages; an old snapshot keeps what is deleted."""
    created = create_database(postgres, line=layout)
    with created.connect(autocommit=True) as admin, created.connect() as holder:
        admin.execute("ANALYZE")
        holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        holder.execute("SELECT FROM outbox")
        admin.execute(INSERT, [SETTLED])
        admin.execute(INSERT_MARKS, [1, MARKS])
        admin.execute("DELETE FROM outbox_published WHERE through <= %s", [DEAD])
        admin.execute(INSERT_MARKS, [SETTLED, SETTLED])
        admin.execute(INSERT_PENDING, [SETTLED - 2 * PENDING + 1, SETTLED - PENDING])
        admin.execute(INSERT_HELD, [HELD])
        admin.execute("INSERT INTO outbox_unordered (transaction_id, from_no) VALUES ('500', %s)", [SETTLED])
        admin.execute(INSERT, [NEW])
        if request.param == "fresh statistics":
            admin.execute("VACUUM ANALYZE")
        yield created
    drop_database(created)


@pytest.fixture
def lane(large: Database) -> Iterator[Connection]:
    with relay_database.connect(large.dsn, application_name="lane") as connection:
        yield connection


def explained(lane: Connection, name: str, **parameters: object) -> Plan:
    """Execute a statement as a lane does, planned once for all parameters, have it explained, and roll it back."""
    text = statement(name, schema="public").decode().removesuffix("COMMIT").rstrip().removesuffix(";")
    names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", text)))
    for position, parameter in enumerate(names, start=1):
        text = text.replace(f"%({parameter})s", f"${position}")
    lane.execute(begin_statement(ClaimOptions()))
    lane.execute(f"PREPARE explained AS {text}".replace("%%", "%").encode())
    given = f"({', '.join(['%s'] * len(names))})" if names else ""
    explain = f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) EXECUTE explained {given}"
    values = [parameters[parameter] for parameter in names]
    [([found],)] = ClientCursor(lane).execute(explain.encode(), values).fetchall()
    lane.rollback()
    lane.execute("DEALLOCATE explained")
    return Plan(found["Plan"])


READ_LIMITS: Mapping[str, object] = {"batch_size": BATCH, "batch_bytes": 8 * 2**20, "readable_bytes": 8 * 10**6}


def test_a_claim_looks_at_one_message_and_one_mark_of_each_shard(lane: Connection) -> None:
    claim = explained(
        lane,
        "claim_shards",
        through=10**6,
        candidates=ALL,
        most=SHARDS,
        takes_all=True,
        looks_for_waiting=True,
        held_types=["basket"],
    )
    marks = explained(lane, "claim_marks", shards=ALL)
    assert claim.tables_scanned | marks.tables_scanned <= {"outbox_shard", "outbox_sequence_no_seq"}
    assert claim.rows_read("outbox") == claim.rows_read("outbox_published") == SHARDS
    assert marks.rows_read("outbox_published") == marks.rows_read("outbox_pending") == SHARDS
    assert {node["Scan Direction"] for node in marks.scans("outbox_published")} == {"Backward"}
    assert claim.rows_read("outbox_pending") <= 4 * SHARDS
    assert claim.most_sorted <= 2 * SHARDS
    assert marks.pages < 20 * SHARDS
    assert claim.pages < 40 * SHARDS


def test_a_read_reads_its_batch_and_nothing_that_is_settled(lane: Connection) -> None:
    marks = numbers([SETTLED] * SHARDS)
    plan = explained(
        lane, "read_messages", shards=ALL, marks=marks, have_pending=[True] * SHARDS, through=10**6, **READ_LIMITS
    )
    assert plan.tables_scanned <= {"outbox_unordered"}
    assert plan.rows_read("outbox") == BATCH
    assert plan.rows_read("outbox_pending") <= 2 * BATCH
    assert plan.most_sorted == 0
    assert plan.pages < 10 * BATCH


def test_messages_that_wait_are_read_in_a_batch_however_many_there_are(lane: Connection) -> None:
    plan = explained(lane, "read_waiting", shards=ALL, held_types=["basket"], **READ_LIMITS)
    assert plan.tables_scanned == set()
    assert plan.rows_read("outbox") == BATCH
    assert plan.rows_read("outbox_pending") < BATCH + 6 * SHARDS
    assert plan.most_sorted <= BATCH
    assert plan.pages < 15 * BATCH


def test_settling_reads_only_what_it_settles(lane: Connection) -> None:
    pending = "SELECT shard, sequence_no FROM outbox_pending WHERE aggregate_type = 'order' ORDER BY 2 LIMIT 300"
    some = lane.execute(pending).fetchall()
    shards, settled = (numbers(column) for column in zip(*some, strict=True))
    aside = explained(
        lane,
        "settle_aside",
        shards=shards,
        numbers=settled,
        states=["parked"] * 300,
        reason_codes=["test"] * 300,
        reasons=["test"] * 300,
        are_unordered=[False] * 300,
    )
    waiting = explained(lane, "settle_waiting", shards=shards, numbers=settled)
    assert aside.tables_scanned | waiting.tables_scanned == set()
    assert aside.rows_read("outbox") == waiting.rows_read("outbox_pending") == 300


def test_what_the_horizon_asks_about_marks_is_read_from_their_high_end(lane: Connection) -> None:
    for plan in (
        explained(lane, "record_unordered", xids=["500"]),
        explained(lane, "list_disagreements", schema="public"),
    ):
        assert plan.tables_scanned <= {"outbox_shard", "outbox_sequence_no_seq", "pg_sequence"}
        assert plan.rows_read("outbox_published") == SHARDS
        assert {node["Scan Direction"] for node in plan.scans("outbox_published")} == {"Backward"}
        assert plan.pages < 20 * SHARDS


def test_whether_anything_is_left_is_told_by_the_first_message_that_is(lane: Connection) -> None:
    plan = explained(lane, "find_left", through=10**6)
    assert plan.rows_read("outbox") == 1
    assert plan.rows_read("outbox_pending") == 0


def test_late_messages_are_looked_for_in_the_range_of_their_numbers_only(lane: Connection) -> None:
    plan = explained(lane, "collect_late", numbers=5_000)
    assert abs(plan.rows_read("outbox") - 5_000) < SHARDS  # it is told as an average of the shards, rounded
    assert not {name for name in plan.tables_scanned if str(name).startswith("outbox_p")}
