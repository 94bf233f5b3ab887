from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.fixtures.proxy import TcpProxy
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fixtures.postgres import Database


@pytest.fixture
def proxy(database: Database) -> Iterator[TcpProxy]:
    with TcpProxy("127.0.0.1", database.server.port) as running:
        yield running


def connect(database: Database, proxy: TcpProxy) -> psycopg.Connection:
    return psycopg.connect(make_conninfo(database.dsn, port=proxy.port, connect_timeout=3))


def outcome(database: Database, xid: str) -> object:
    with database.connect() as conn:
        found = conn.execute("SELECT pg_xact_status(%s::xid8)", [xid]).fetchone()
    return found and found[0]


def current_xid(conn: psycopg.Connection) -> str:
    (xid,) = conn.execute("SELECT pg_current_xact_id()::text").fetchone() or ("",)
    return str(xid)


def test_cut_connection_is_lost_and_a_new_one_works(database: Database, proxy: TcpProxy) -> None:
    with connect(database, proxy) as conn:
        proxy.cut()
        with pytest.raises(psycopg.OperationalError):
            conn.execute("SELECT 1")
    with connect(database, proxy) as conn:
        assert conn.execute("SELECT 1").fetchone() == (1,)
    assert proxy.fired["cut"] == 1


def test_refused_clients_come_through_after_healing(database: Database, proxy: TcpProxy) -> None:
    proxy.cut(refuse=True)
    with pytest.raises(psycopg.OperationalError):
        connect(database, proxy)
    assert proxy.fired["refused"] >= 1
    proxy.heal()
    connect(database, proxy).close()


def test_commit_whose_reply_is_swallowed_is_committed(database: Database, proxy: TcpProxy) -> None:
    with connect(database, proxy) as conn:
        xid = current_xid(conn)
        proxy.swallow_reply_to(b"COMMIT")
        with pytest.raises(psycopg.OperationalError):
            conn.commit()
    assert outcome(database, xid) == "committed"
    assert proxy.fired == {"swallowed": 1}


def test_commit_that_is_cut_before_the_server_is_aborted(database: Database, proxy: TcpProxy) -> None:
    with connect(database, proxy) as conn:
        xid = current_xid(conn)
        proxy.cut_before(b"COMMIT")
        with pytest.raises(psycopg.OperationalError):
            conn.commit()
    assert eventually(lambda: outcome(database, xid) != "in progress" and outcome(database, xid)) == "aborted"
    assert proxy.fired == {"cut_before": 1}


def test_trap_springs_once(database: Database, proxy: TcpProxy) -> None:
    proxy.cut_before(b"needle")
    with connect(database, proxy) as conn, pytest.raises(psycopg.OperationalError):
        conn.execute("SELECT 'needle'")
    with connect(database, proxy) as conn:
        assert conn.execute("SELECT 'needle'").fetchone() == ("needle",)


def test_a_trap_that_nobody_has_sprung_is_disarmed_by_healing(database: Database, proxy: TcpProxy) -> None:
    proxy.cut_before(b"needle")
    proxy.heal()
    with connect(database, proxy) as conn:
        assert conn.execute("SELECT 'needle'").fetchone() == ("needle",)
    assert proxy.fired == {}


def test_blackhole_keeps_connections_open_and_answers_nothing(database: Database, proxy: TcpProxy) -> None:
    with connect(database, proxy) as conn:
        proxy.blackhole()
        with pytest.raises(psycopg.errors.ConnectionTimeout):
            connect(database, proxy)
        proxy.heal()
        assert conn.execute("SELECT 1").fetchone() == (1,)


def test_client_of_a_blackhole_notices_by_itself_that_nothing_is_acknowledged(
    database: Database, proxy: TcpProxy
) -> None:
    dsn = make_conninfo(database.dsn, port=proxy.port, tcp_user_timeout=500)
    with psycopg.connect(dsn) as conn:
        proxy.blackhole()
        with pytest.raises(psycopg.OperationalError, match="timed out"):
            conn.execute("SELECT 1")
    assert proxy.fired == {"blackholed": 1}


def test_answers_that_are_lost_leave_the_server_with_the_request(database: Database, proxy: TcpProxy) -> None:
    with connect(database, proxy) as conn, ThreadPoolExecutor(1) as thread:
        xid = current_xid(conn)
        proxy.blackhole("answers")
        committing = thread.submit(conn.commit)
        eventually(lambda: outcome(database, xid) == "committed")
        assert not committing.done()
        proxy.heal()
        committing.result()


def test_requests_that_are_lost_reach_the_server_after_healing(database: Database, proxy: TcpProxy) -> None:
    with connect(database, proxy) as conn, ThreadPoolExecutor(1) as thread:
        xid = current_xid(conn)
        proxy.blackhole("requests")
        committing = thread.submit(conn.commit)
        assert outcome(database, xid) == "in progress"
        proxy.heal()
        committing.result()
    assert outcome(database, xid) == "committed"


def test_a_slow_network_holds_up_both_ways_until_it_is_healed(database: Database, proxy: TcpProxy) -> None:
    with connect(database, proxy) as conn:
        proxy.slow_down(seconds=0.1)
        began_at = time.monotonic()
        conn.execute("SELECT 1")
        assert time.monotonic() - began_at >= 0.2
        proxy.heal()
        assert proxy.fired["delayed"] >= 2
        delayed = proxy.fired["delayed"]
        conn.execute("SELECT 1")
        assert proxy.fired["delayed"] == delayed


@pytest.mark.parametrize(("trap", "expected"), [("cut_before", "in progress"), ("swallow_reply_to", "committed")])
def test_a_trap_acts_before_the_server_gets_it_or_when_it_has_answered(
    database: Database, proxy: TcpProxy, trap: str, expected: str
) -> None:
    outcomes: list[object] = []
    with connect(database, proxy) as conn:
        xid = current_xid(conn)
        getattr(proxy, trap)(b"COMMIT", action=lambda: outcomes.append(outcome(database, xid)))
        with pytest.raises(psycopg.OperationalError):
            conn.commit()
    assert outcomes == [expected]


def wait_events(conn: psycopg.Connection, pid: int) -> list[str]:
    """What the session *pid* waits for; nothing if it has ended."""
    found = conn.execute("SELECT coalesce(wait_event, '') FROM pg_stat_activity WHERE pid = %s", [pid]).fetchall()
    return [event for (event,) in found]


def test_client_learns_after_healing_that_the_server_gave_up_meanwhile(database: Database, proxy: TcpProxy) -> None:
    with (
        ThreadPoolExecutor(1) as thread,
        connect(database, proxy) as conn,
        database.connect(autocommit=True) as admin,
    ):
        pid = conn.info.backend_pid
        asking = thread.submit(conn.execute, "SELECT pg_sleep(60)")
        eventually(lambda: wait_events(admin, pid) == ["PgSleep"])
        proxy.blackhole()
        admin.execute("SELECT pg_terminate_backend(%s)", [pid])
        eventually(lambda: wait_events(admin, pid) == [])
        proxy.heal()
        with pytest.raises(psycopg.OperationalError):
            asking.result()
