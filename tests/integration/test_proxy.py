from __future__ import annotations

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


def test_blackhole_keeps_connections_open_and_answers_nothing(database: Database, proxy: TcpProxy) -> None:
    with connect(database, proxy) as conn:
        proxy.blackhole()
        with pytest.raises(psycopg.errors.ConnectionTimeout):
            connect(database, proxy)
        proxy.heal()
        assert conn.execute("SELECT 1").fetchone() == (1,)
