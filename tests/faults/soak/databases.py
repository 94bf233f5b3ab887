"""The databases of a soak, on its own server or on one that somebody runs, made as a user makes them."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from outbox_relay.operate import migrate
from outbox_relay.sandbox.postgres import PostgresServer
from tests.fixtures.postgres import NARROW_PARTITIONS, Database, drop_database

if TYPE_CHECKING:
    from collections.abc import Iterator

LINES = {"outbox": ("outbox",), "partitioned": ("outbox", "partitioned"), "inbox": ("inbox",)}


class GivenServer(PostgresServer):
    """A server that can be used, and not stopped; the login of its *dsn* does the work of every role."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn

    @property
    def host(self) -> str:
        return str(conninfo_to_dict(self._dsn).get("host") or "127.0.0.1")

    @property
    def port(self) -> int:
        return int(conninfo_to_dict(self._dsn).get("port") or 5432)

    @property
    def log_path(self) -> Path:
        """We have none."""
        return Path(os.devnull)

    def dsn(self, dbname: str = "postgres", *, user: str = "") -> str:  # noqa: ARG002 -- others have no password here
        return make_conninfo(self._dsn, dbname=dbname)


@contextmanager
def databases(server: PostgresServer, *, layout: str) -> Iterator[tuple[Database, Database]]:
    """Databases of an outbox and of an inbox; dropped afterwards, so that nothing but roles is left on the server."""
    with ExitStack() as stack:
        created = []
        for line in (layout, "inbox"):
            database = create_database(server, name=f"soak_{line}", line=line)
            stack.callback(drop_database, database)
            created.append(database)
        yield created[0], created[1]


def create_database(server: PostgresServer, *, name: str, line: str) -> Database:
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    database = Database(server, name)
    with database.connect(autocommit=True) as owner:
        for each in LINES[line]:
            migrate.apply(owner, schema="public", line=each)
        if line == "partitioned":
            owner.execute(NARROW_PARTITIONS.read_bytes())
    return database
