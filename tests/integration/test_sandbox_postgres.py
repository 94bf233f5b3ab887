from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

from outbox_relay.errors import DatabaseUnavailable
from outbox_relay.sandbox.postgres import PostgresServer, StopMode, installed_servers

if TYPE_CHECKING:
    from tests.fixtures.postgres import Database


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # it is empty once the process has ended
    except FileNotFoundError:
        return False


def refuses_connections(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.every_postgres
def test_server_is_of_the_version_it_was_asked_for(postgres: PostgresServer, postgres_version: int) -> None:
    with psycopg.connect(postgres.dsn()) as conn:
        assert conn.info.server_version // 10000 == postgres_version == postgres.version


@pytest.mark.every_postgres
def test_server_keeps_the_durable_defaults(durable_postgres: PostgresServer) -> None:
    with psycopg.connect(durable_postgres.dsn()) as conn:
        settings = conn.execute(
            "SELECT name, setting FROM pg_settings"
            " WHERE name IN ('fsync', 'synchronous_commit', 'full_page_writes', 'listen_addresses') ORDER BY name"
        ).fetchall()
    assert settings == [
        ("fsync", "on"),
        ("full_page_writes", "on"),
        ("listen_addresses", "127.0.0.1"),
        ("synchronous_commit", "on"),
    ]


@pytest.mark.every_postgres
def test_killed_server_comes_back_at_its_address_with_every_committed_row(own_postgres: PostgresServer) -> None:
    address = own_postgres.dsn()
    with psycopg.connect(address, autocommit=True) as conn:
        conn.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        backend = conn.info.backend_pid
        assert is_running(backend)
        own_postgres.kill()
        assert not is_running(backend)
        assert refuses_connections(own_postgres.port)
    own_postgres.start()
    with psycopg.connect(own_postgres.dsn()) as conn:
        assert own_postgres.dsn() == address
        assert conn.execute("SELECT answer FROM kept").fetchone() == (42,)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_restart_ends_open_sessions(own_postgres: PostgresServer, mode: StopMode) -> None:
    postmaster = own_postgres.pid
    with psycopg.connect(own_postgres.dsn()) as conn:
        own_postgres.restart(mode)
        with pytest.raises(psycopg.OperationalError):
            conn.execute("SELECT 1")
    assert own_postgres.pid != postmaster


def test_stopped_server_can_be_stopped_again(own_postgres: PostgresServer) -> None:
    own_postgres.stop()
    own_postgres.stop()
    assert refuses_connections(own_postgres.port)


def test_settings_of_the_caller_win(server_directory: Path, postgres_version: int) -> None:
    binaries = installed_servers()[postgres_version]
    with PostgresServer.create(binaries, server_directory, settings={"max_connections": "17"}) as server:  # noqa: SIM117 -- the server outlives the connection
        with psycopg.connect(server.dsn()) as conn:
            assert conn.execute("SHOW max_connections").fetchone() == ("17",)


def test_start_that_fails_shows_the_log(server_directory: Path, postgres_version: int) -> None:
    binaries = installed_servers()[postgres_version]
    server = PostgresServer.create(binaries, server_directory, settings={"max_connections": "many"})
    with pytest.raises(DatabaseUnavailable, match='invalid value for parameter "max_connections": "many"'):
        server.start()


def test_directory_in_use_is_not_initialised_again(own_postgres: PostgresServer, postgres_version: int) -> None:
    binaries = installed_servers()[postgres_version]
    with pytest.raises(DatabaseUnavailable, match="exists but is not empty"):
        PostgresServer.create(binaries, own_postgres.data_directory.parent)


def test_each_database_is_fresh_and_migrated(database: Database) -> None:
    with database.connect() as conn:
        assert conn.execute("SELECT count(*) FROM outbox_shard").fetchone() == (16,)
        assert conn.execute("SELECT count(*) FROM outbox").fetchone() == (0,)
