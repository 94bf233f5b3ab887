"""The claim on every PostgreSQL: whose shards it locks, what it knows of them, and when it is worth nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay import database as relay_database
from outbox_relay.errors import DatabaseConflict, DatabaseUnavailable
from outbox_relay.relay.claim import Claim, ClaimOptions, ShardWork, claim_shards
from outbox_relay.relay.horizon import read_last_number
from outbox_relay.relay.settle import record_marks
from outbox_relay.relay.shards import SHARDS
from outbox_relay.relay.watch import Reached
from tests.fixtures.marks import mark, set_aside
from tests.fixtures.outbox import insert
from tests.fixtures.postgres import both_layouts
from tests.fixtures.proxy import TcpProxy
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from psycopg import Connection

    from tests.fixtures.postgres import Database

pytestmark = [pytest.mark.every_postgres, both_layouts]

ALL = range(SHARDS)
ONE, TWO, SEVEN = 1, 2, 13  # the shards of these keys of the type "order"
GATE = 4711  # an advisory lock


@pytest.fixture
def connect(database: Database, relay_login: str) -> Iterator[Callable[[], Connection]]:
    """Make connections as a relay's lanes do; they are closed after the test."""
    with ExitStack() as opened:
        yield lambda: opened.enter_context(
            relay_database.connect(database.server.dsn(database.name, user=relay_login), application_name="lane")
        )


@pytest.fixture
def lane(connect: Callable[[], Connection]) -> Connection:
    return connect()


@pytest.fixture
def writer(database: Database) -> Iterator[Connection]:
    with database.connect(autocommit=True) as connection:
        yield connection


def horizon(connection: Connection) -> Reached:
    """The last number drawn, as if no writer were open."""
    return Reached(*read_last_number(connection, schema="public"))


def claim(
    lane: Connection,
    *,
    reached: Reached | None = None,
    candidates: Collection[int] = ALL,
    most: int = SHARDS,
    takes_all: bool = False,
    looks_for_waiting: bool = False,
    held_types: Collection[str] = (),
    lock_timeout: float = 2.0,
) -> Claim:
    return claim_shards(
        lane,
        options=ClaimOptions(lock_timeout=lock_timeout),
        reached=reached or horizon(lane),
        candidates=candidates,
        most=most,
        takes_all=takes_all,
        looks_for_waiting=looks_for_waiting,
        held_types=held_types,
    )


def held(claim: Claim) -> set[int]:
    return {work.shard for work in claim.held}


def missed(claim: Claim) -> set[int]:
    return {work.shard for work in claim.missed}


def is_idle(connection: Connection) -> bool:
    """Whether it has no transaction open."""
    return not connection.info.transaction_status


def locked_shards(connection: Connection) -> set[int]:
    """Shards that somebody else has locked."""
    free = connection.execute("SELECT shard FROM outbox_shard FOR UPDATE SKIP LOCKED").fetchall()
    return set(ALL) - {shard for (shard,) in free}


def test_a_claim_holds_the_shards_that_have_messages_above_their_marks(lane: Connection, writer: Connection) -> None:
    insert(writer, "1", "2")
    mark(writer)
    insert(writer, "2", "7")
    claimed = claim(lane)
    assert claimed.held == [
        ShardWork(TWO, first_no=3, has_waiting=False, is_held=True),
        ShardWork(SEVEN, first_no=4, has_waiting=False, is_held=True),
    ]
    assert (claimed.missed, claimed.marks.through, claimed.is_of_epoch) == ([], {TWO: 2, SEVEN: 0}, True)
    assert locked_shards(writer) == {TWO, SEVEN}


def test_a_message_beyond_the_horizon_is_no_work(lane: Connection, writer: Connection) -> None:
    insert(writer, "1")
    reached = horizon(lane)
    insert(writer, "2")
    assert held(claim(lane, reached=reached)) == {ONE}


def test_a_claim_without_work_holds_nothing_and_leaves_no_transaction_open(
    lane: Connection, writer: Connection
) -> None:
    insert(writer, "1")
    mark(writer)
    claimed = claim(lane, takes_all=True, looks_for_waiting=True)
    assert (claimed.held, claimed.missed, is_idle(lane), locked_shards(writer)) == ([], [], True, set())


def test_only_candidates_are_held_or_missed(lane: Connection, writer: Connection) -> None:
    insert(writer, "1", "2", "7")
    assert held(claim(lane, candidates=[TWO, 3])) == {TWO}
    lane.rollback()
    assert held(claim(lane, candidates=[TWO, 3], takes_all=True)) == {TWO, 3}


def test_a_busy_claim_holds_the_shards_with_the_oldest_messages_and_reports_the_others(
    lane: Connection, writer: Connection
) -> None:
    insert(writer, "7", "2", "1")
    claimed = claim(lane, most=2)
    assert (held(claimed), missed(claimed)) == ({SEVEN, TWO}, {ONE})
    assert locked_shards(writer) == {SEVEN, TWO}


def test_a_quiet_claim_holds_all_free_shards_once_one_has_work(lane: Connection, writer: Connection) -> None:
    insert(writer, "1")
    claimed = claim(lane, takes_all=True)
    assert (held(claimed), claimed.marks.through) == (set(ALL), dict.fromkeys(ALL, 0))


def test_shards_of_another_lane_are_skipped_and_missed_until_it_ends(
    connect: Callable[[], Connection], writer: Connection
) -> None:
    insert(writer, "1", "2", "7")
    first, second = connect(), connect()
    assert held(claim(first, most=2)) == {ONE, TWO}
    claimed = claim(second, takes_all=True)
    assert (held(claimed), missed(claimed)) == (set(ALL) - {ONE, TWO}, {ONE, TWO})
    second.rollback()
    first.close()  # as when its process is killed
    eventually(lambda: not locked_shards(writer))
    assert held(claim(second)) == {ONE, TWO, SEVEN}


def test_where_another_lane_has_all_the_work_nothing_is_held(
    connect: Callable[[], Connection], writer: Connection
) -> None:
    insert(writer, "1")
    first, second = connect(), connect()
    claim(first, takes_all=True)
    claimed = claim(second, takes_all=True)
    assert (claimed.held, missed(claimed), is_idle(second)) == ([], {ONE}, True)


def test_the_newest_mark_counts_whatever_was_recorded_before(lane: Connection, writer: Connection) -> None:
    for _ in range(3):
        insert(writer, "1", "1")
        mark(writer)
    insert(writer, "1")
    assert claim(lane).marks.through == {ONE: 6}


def test_a_mark_above_the_horizon_leaves_no_work(lane: Connection, writer: Connection) -> None:
    insert(writer, "1", "1")
    reached = horizon(lane)
    insert(writer, "1")
    mark(writer)
    assert claim(lane, reached=reached).held == []


def test_messages_that_wait_are_work_only_when_they_are_looked_for(lane: Connection, writer: Connection) -> None:
    numbers = insert(writer, "1", "2", "7")
    mark(writer)
    set_aside(writer, numbers[0], state="parked")
    set_aside(writer, numbers[1], state="waiting")
    assert claim(lane).held == []
    claimed = claim(lane, looks_for_waiting=True)
    assert claimed.held == [ShardWork(TWO, first_no=None, has_waiting=True, is_held=True)]
    assert claimed.has_waiting


def test_messages_that_wait_for_a_topic_that_is_away_are_no_work(lane: Connection, writer: Connection) -> None:
    waits = [*insert(writer, "1", "2"), *insert(writer, "1", aggregate_type="basket")]
    mark(writer)
    set_aside(writer, *waits, state="waiting")
    [(basket,)] = writer.execute("SELECT shard FROM outbox WHERE aggregate_type = 'basket'").fetchall()
    assert held(claim(lane, looks_for_waiting=True, held_types=["order", "bill"])) == {basket}


def test_shards_in_which_messages_wait_come_before_those_with_old_ones(lane: Connection, writer: Connection) -> None:
    set_aside(writer, *insert(writer, "7"), state="waiting")
    mark(writer)
    insert(writer, "1", "2", "7")
    claimed = claim(lane, most=2, looks_for_waiting=True)
    assert (held(claimed), missed(claimed)) == ({SEVEN, ONE}, {TWO})


def test_a_waiting_message_makes_a_quiet_claim_hold_all_free_shards(lane: Connection, writer: Connection) -> None:
    set_aside(writer, *insert(writer, "7"), state="waiting")
    mark(writer)
    assert held(claim(lane, takes_all=True, looks_for_waiting=True)) == set(ALL)


def test_a_claim_tells_which_of_its_shards_have_something_pending(lane: Connection, writer: Connection) -> None:
    numbers = insert(writer, "1", "2", "7")
    mark(writer)
    set_aside(writer, numbers[0], state="parked")
    set_aside(writer, numbers[1], state="waiting", is_unordered=True)
    insert(writer, "1", "2", "7")
    assert claim(lane).have_pending == {ONE, TWO}


@pytest.fixture
def slow(database: Database, connect: Callable[[], Connection]) -> Connection:
    """
    A lane whose claims stop between their snapshot and their first lock while somebody holds the advisory lock GATE.

    A row security policy is what a claim evaluates first on a row of outbox_shard, so it can be made to wait there.
    """
    lane = connect()
    [(pid,)] = lane.execute("SELECT pg_backend_pid()").fetchall()
    with database.connect(autocommit=True) as admin:
        admin.execute("ALTER TABLE outbox_shard ENABLE ROW LEVEL SECURITY")
        admin.execute(
            f"""
            CREATE POLICY gate ON outbox_shard
            USING (pg_backend_pid() <> {pid} OR pg_advisory_xact_lock_shared({GATE}) IS NOT NULL)
            """
        )
    return lane


@contextmanager
def stalled_claim(database: Database, slow: Connection) -> Iterator[Callable[[], Claim]]:
    """Begin a claim that has its snapshot and no lock yet; what is yielded lets it go on and returns it."""
    reached = horizon(slow)
    with database.connect(autocommit=True) as keeper, ThreadPoolExecutor(1) as thread:
        keeper.execute("SELECT pg_advisory_lock(%s)", [GATE])
        claimed = thread.submit(claim, slow, reached=reached, lock_timeout=20)
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'advisory' AND datname = current_database()"
        eventually(lambda: keeper.execute(waiting).fetchall() == [(1,)], message="the claim did not stall")

        def let_go() -> Claim:
            keeper.execute("SELECT pg_advisory_unlock(%s)", [GATE])
            return claimed.result(20)

        yield let_go


def test_a_snapshot_older_than_the_lock_does_not_hide_the_marks_of_the_previous_holder(
    database: Database, slow: Connection, connect: Callable[[], Connection], writer: Connection
) -> None:
    insert(writer, "1", "1", "2")
    other = connect()
    previous = claim(other, candidates=[ONE])
    with stalled_claim(database, slow) as let_go:
        previous.marks.pass_nothing(ONE, through=2)
        record_marks(other, previous.marks, schema="public")
        claimed = let_go()
    assert claimed.held[0] == ShardWork(ONE, first_no=1, has_waiting=False, is_held=True)
    assert claimed.marks.through == {ONE: 2, TWO: 0}


def test_a_snapshot_older_than_the_lock_does_not_hide_what_the_previous_holder_set_aside(
    database: Database, slow: Connection, connect: Callable[[], Connection], writer: Connection
) -> None:
    numbers = insert(writer, "1", "1")
    other = connect()
    previous = claim(other)
    with stalled_claim(database, slow) as let_go:
        set_aside(other, *numbers, state="parked")
        record_marks(other, previous.marks, schema="public")
        assert let_go().have_pending == {ONE}


def test_a_claim_by_the_horizon_of_another_server_is_worth_nothing(lane: Connection, writer: Connection) -> None:
    insert(writer, "1")
    reached = horizon(lane)
    assert reached.epoch is not None
    elsewhere = Reached(1, reached.epoch._replace(server_started_at=reached.epoch.server_started_at - 1))
    claimed = claim(lane, reached=elsewhere)
    assert (claimed.is_of_epoch, is_idle(lane), locked_shards(writer)) == (False, True, set())


@pytest.mark.parametrize(
    "restart", ["TRUNCATE outbox RESTART IDENTITY", "ALTER SEQUENCE outbox_sequence_no_seq RESTART"]
)
def test_a_claim_by_the_horizon_of_a_sequence_that_was_restarted_since_is_worth_nothing(
    lane: Connection, writer: Connection, restart: str
) -> None:
    insert(writer, "1")
    reached = horizon(lane)
    writer.execute(restart.encode())
    insert(writer, "2", "7")
    claimed = claim(lane, reached=reached)
    assert (claimed.is_of_epoch, is_idle(lane), locked_shards(writer)) == (False, True, set())


def test_a_claim_while_the_last_number_is_below_the_horizon_is_worth_nothing(
    lane: Connection, writer: Connection
) -> None:
    insert(writer, "1", "1")
    reached = horizon(lane)
    writer.execute("SELECT setval('outbox_sequence_no_seq', 2, false)")
    claimed = claim(lane, reached=reached)
    assert (claimed.is_of_epoch, is_idle(lane), locked_shards(writer)) == (False, True, set())


def test_a_claim_reads_committed_rows_whatever_the_default_of_its_role_is(
    database: Database, relay_login: str, writer: Connection
) -> None:
    writer.execute(f"ALTER ROLE \"{relay_login}\" SET default_transaction_isolation = 'serializable'")
    insert(writer, "1")
    dsn = database.server.dsn(database.name, user=relay_login)
    with relay_database.connect(dsn, application_name="lane") as lane:
        claim(lane)
        assert lane.execute("SHOW transaction_isolation").fetchall() == [("read committed",)]


def test_the_lock_of_a_claim_gives_the_relay_an_xid_that_the_shards_show(lane: Connection, writer: Connection) -> None:
    insert(writer, "1")
    claim(lane)
    [(xid,)] = lane.execute("SELECT pg_current_xact_id_if_assigned()::text").fetchall()
    assert writer.execute("SELECT xmax::text FROM outbox_shard WHERE shard = %s", [ONE]).fetchall() == [(xid,)]


def test_a_truncation_waits_for_a_stint_and_its_marks_are_gone_then(
    database: Database, lane: Connection, writer: Connection
) -> None:
    insert(writer, "1")
    claimed = claim(lane)
    with database.connect(autocommit=True) as admin, ThreadPoolExecutor(1) as thread:
        truncated = thread.submit(admin.execute, "TRUNCATE outbox")
        waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock'"
        eventually(lambda: writer.execute(waits).fetchall() == [(1,)])
        claimed.marks.pass_nothing(ONE, through=1)
        record_marks(lane, claimed.marks, schema="public")
        truncated.result(20)
        assert admin.execute("SELECT FROM outbox_published").fetchall() == []


def test_a_table_that_somebody_else_locks_ends_in_a_conflict_after_the_lock_timeout(
    database: Database, lane: Connection, writer: Connection
) -> None:
    insert(writer, "1")
    reached = horizon(lane)
    with database.connect() as admin:
        admin.execute("LOCK TABLE outbox")
        with pytest.raises(DatabaseConflict, match="lock timeout"):
            claim(lane, reached=reached, lock_timeout=0.05)
    lane.rollback()
    assert held(claim(lane)) == {ONE}


@pytest.mark.parametrize("statement", [b"FOR UPDATE", b"has_pending"], ids=["locks", "marks"])
def test_a_claim_that_is_cut_off_is_unavailable_and_holds_nothing(
    database: Database, connect: Callable[[], Connection], writer: Connection, statement: bytes
) -> None:
    insert(writer, "1")
    with TcpProxy("127.0.0.1", database.server.port) as proxy:
        dsn = make_conninfo(database.dsn, port=proxy.port)
        with relay_database.connect(dsn, application_name="lane") as cut_off:
            reached = horizon(cut_off)
            proxy.cut_before(statement)
            with pytest.raises(DatabaseUnavailable):
                claim(cut_off, reached=reached)
        assert proxy.fired == {"cut_before": 1}
    eventually(lambda: not locked_shards(writer))
    assert held(claim(connect())) == {ONE}


def test_settings_of_the_claim_end_with_its_transaction(lane: Connection, writer: Connection) -> None:
    insert(writer, "1")
    names = "jit", "plan_cache_mode", "synchronous_commit", "lock_timeout", "idle_in_transaction_session_timeout"
    show = "SELECT " + ", ".join(f"current_setting('{name}')" for name in names)
    before = lane.execute(show).fetchone()
    claim(lane)
    assert lane.execute(show).fetchone() == ("off", "force_generic_plan", "off", "2s", "30s")
    lane.rollback()
    assert lane.execute(show).fetchone() == before


def test_a_claim_says_when_it_began_on_the_servers_clock(lane: Connection, writer: Connection) -> None:
    insert(writer, "1")
    clock = "SELECT extract(epoch FROM clock_timestamp())::float8"
    [(before,)] = writer.execute(clock).fetchall()
    claimed = claim(lane)
    [(after,)] = writer.execute(clock).fetchall()
    assert before <= claimed.began_at <= after
