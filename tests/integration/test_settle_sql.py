"""What settling writes, and that it is all or nothing when the connection breaks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay import database as relay_database
from outbox_relay.errors import DatabaseUnavailable
from outbox_relay.relay.claim import Claim, ClaimOptions, claim_shards
from outbox_relay.relay.failures import BEHIND_PARKED, BEHIND_WAITING, NO_REPORT, Failure, Scope
from outbox_relay.relay.horizon import read_last_number
from outbox_relay.relay.read import Limits, read_messages
from outbox_relay.relay.settle import Aside, forget_waiting, record_marks, set_aside
from outbox_relay.relay.shards import SHARDS
from outbox_relay.relay.watch import Reached
from tests.fixtures.outbox import insert, message
from tests.fixtures.postgres import both_layouts
from tests.fixtures.proxy import TcpProxy
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from outbox_relay.relay.message import Message
    from tests.fixtures.postgres import Database

pytestmark = [pytest.mark.every_postgres, both_layouts]

ONE, TWO, SEVEN = 1, 2, 13  # the shards of these keys of the type "order"
REFUSED = Failure(Scope.MESSAGE, "MSG_SIZE_TOO_LARGE", "shrink it")


@pytest.fixture
def proxy(database: Database) -> Iterator[TcpProxy]:
    with TcpProxy("127.0.0.1", database.server.port) as running:
        yield running


@pytest.fixture
def lane(database: Database, proxy: TcpProxy) -> Iterator[Connection]:
    """A lane of a relay that has the shipped grants and nothing else."""
    dsn = make_conninfo(database.relay_dsn, host="127.0.0.1", port=proxy.port)
    with relay_database.connect(dsn, application_name="lane") as connection:
        yield connection


@pytest.fixture
def shop(database: Database) -> Iterator[Connection]:
    with database.connect(autocommit=True) as connection:
        insert(connection, "1", "1", "2", "7")
        yield connection


def claimed(lane: Connection) -> tuple[Claim, list[Message]]:
    """All shards that have messages, and their messages."""
    claim = claim_shards(
        lane,
        options=ClaimOptions(),
        reached=Reached(*read_last_number(lane, schema="public")),
        candidates=range(SHARDS),
        most=SHARDS,
        takes_all=False,
        looks_for_waiting=True,
    )
    return claim, read_messages(lane, claim, schema="public", through=10**6, limits=Limits()).messages


def record(lane: Connection, claim: Claim) -> int:
    return record_marks(lane, claim.marks, schema="public")


def states(shop: Connection) -> dict[int, str]:
    return dict(shop.execute("SELECT sequence_no, state FROM outbox_message ORDER BY sequence_no").fetchall())


def marks(shop: Connection) -> list[tuple[int, int, int, int]]:
    return shop.execute(
        "SELECT shard, through, messages, checksum FROM outbox_published ORDER BY shard, through"
    ).fetchall()


def pending(shop: Connection) -> list[tuple[int, str, str, str, bool]]:
    return shop.execute(
        "SELECT sequence_no, state, reason_code, reason, is_unordered FROM outbox_pending ORDER BY sequence_no"
    ).fetchall()


def test_marks_that_moved_are_recorded_with_what_they_passed(lane: Connection, shop: Connection) -> None:
    claim, messages = claimed(lane)
    claim.marks.pass_over(messages[:3])
    assert record(lane, claim) == 2
    assert marks(shop) == [(ONE, 2, 2, 1 ^ 2), (TWO, 3, 1, 3)]
    assert states(shop) == {1: "published", 2: "published", 3: "published", 4: "unpublished"}


def test_a_mark_knows_its_time_and_which_transactions_had_ended_before_it(lane: Connection, shop: Connection) -> None:
    claim, messages = claimed(lane)
    claim.marks.pass_over(messages)
    record(lane, claim)
    insert(shop, "1")
    assert shop.execute(
        """
        SELECT
            bool_and(mark.published_at <= clock_timestamp()),
            bool_and(mark.published_at >= earlier.created_at),
            bool_and(mark.before_xid > earlier.transaction_id),
            bool_and(mark.before_xid <= later.transaction_id)
        FROM outbox_published AS mark, outbox AS earlier, outbox AS later
        WHERE earlier.sequence_no = 4 AND later.sequence_no = 5
        """
    ).fetchall() == [(True, True, True, True)]


def test_what_is_set_aside_has_its_key_and_why(lane: Connection, shop: Connection) -> None:
    claim, messages = claimed(lane)
    asides = [
        Aside(messages[0], "parked", REFUSED),
        Aside(messages[1], "parked", BEHIND_PARKED),
        Aside(messages[2]._replace(is_unordered=True), "waiting", NO_REPORT),
    ]
    set_aside(lane, asides, schema="public")
    claim.marks.pass_over(messages)
    record(lane, claim)
    assert states(shop) == {1: "parked", 2: "parked", 3: "waiting", 4: "published"}
    assert pending(shop) == [
        (1, "parked", "MSG_SIZE_TOO_LARGE", "shrink it", False),
        (2, "parked", "behind_parked", BEHIND_PARKED.reason, False),
        (3, "waiting", "no_report", NO_REPORT.reason, True),
    ]
    assert shop.execute(
        """
        SELECT count(*) FROM outbox_pending AS pending JOIN outbox USING (shard, sequence_no)
        WHERE pending.key_hash = hashtextextended(outbox.aggregate_type || ':' || outbox.aggregate_id, 0)
            AND pending.aggregate_type = outbox.aggregate_type
        """
    ).fetchall() == [(3,)]


def test_setting_aside_once_more_keeps_the_time_unless_the_state_changes(lane: Connection, shop: Connection) -> None:
    claim, messages = claimed(lane)
    set_aside(lane, [Aside(messages[0], "waiting", NO_REPORT)], schema="public")
    record(lane, claim)
    shop.execute("UPDATE outbox_pending SET since = '2001-01-01'")
    claim, _ = claimed(lane)
    is_old = "SELECT reason_code, since = '2001-01-01' FROM outbox_pending"
    set_aside(lane, [Aside(messages[0], "waiting", BEHIND_WAITING)], schema="public")
    assert lane.execute(is_old).fetchall() == [("behind_waiting", True)]
    set_aside(lane, [Aside(messages[0], "parked", REFUSED)], schema="public")
    assert lane.execute(is_old).fetchall() == [("MSG_SIZE_TOO_LARGE", False)]


def test_a_message_that_somebody_has_deleted_is_not_set_aside(lane: Connection, shop: Connection) -> None:
    claim, messages = claimed(lane)
    shop.execute("DELETE FROM outbox WHERE sequence_no = 1")
    set_aside(lane, [Aside(each, "parked", REFUSED) for each in messages[:2]], schema="public")
    claim.marks.pass_over(messages)
    record(lane, claim)
    assert [number for number, *_ in pending(shop)] == [2]


def test_a_waiting_message_that_is_in_kafka_is_forgotten_and_no_other(lane: Connection, shop: Connection) -> None:
    claim, messages = claimed(lane)
    set_aside(lane, [Aside(each, "waiting", NO_REPORT) for each in messages], schema="public")
    forget_waiting(lane, [messages[0], messages[3], message(99)], schema="public")
    record(lane, claim)
    assert [number for number, *_ in pending(shop)] == [2, 3]


def test_recording_no_mark_ends_the_transaction_and_frees_the_shards(lane: Connection, shop: Connection) -> None:
    claim, messages = claimed(lane)
    set_aside(lane, [Aside(messages[0], "waiting", NO_REPORT)], schema="public")
    assert record(lane, claim) == 0
    assert not lane.info.transaction_status
    assert (marks(shop), len(pending(shop))) == ([], 1)
    shop.execute("SELECT FROM outbox_shard FOR UPDATE NOWAIT")


def test_nothing_remains_of_a_stint_that_is_rolled_back(lane: Connection, shop: Connection) -> None:
    _, messages = claimed(lane)
    set_aside(lane, [Aside(messages[0], "waiting", NO_REPORT)], schema="public")
    lane.rollback()
    assert (marks(shop), pending(shop)) == ([], [])


def test_a_commit_whose_answer_is_lost_is_unavailable_and_was_made(
    proxy: TcpProxy, lane: Connection, shop: Connection
) -> None:
    claim, messages = claimed(lane)
    claim.marks.pass_over(messages)
    proxy.swallow_reply_to(b"COMMIT")
    with pytest.raises(DatabaseUnavailable):
        record(lane, claim)
    assert states(shop) == dict.fromkeys((1, 2, 3, 4), "published")
    assert proxy.fired == {"swallowed": 1}


def test_a_commit_that_never_arrived_is_unavailable_and_everything_is_as_before(
    proxy: TcpProxy, lane: Connection, shop: Connection
) -> None:
    claim, messages = claimed(lane)
    claim.marks.pass_over(messages)
    set_aside(lane, [Aside(messages[0], "parked", REFUSED)], schema="public")
    proxy.cut_before(b"COMMIT")
    with pytest.raises(DatabaseUnavailable):
        record(lane, claim)
    eventually(lambda: not shop.execute("SELECT FROM pg_stat_activity WHERE application_name = 'lane'").fetchall())
    assert states(shop) == dict.fromkeys((1, 2, 3, 4), "unpublished")
    assert (marks(shop), pending(shop), proxy.fired) == ([], [], {"cut_before": 1})
