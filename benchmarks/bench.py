"""The real parts that the scenarios share: a durable PostgreSQL, a Kafka broker, and databases with a backlog."""

from __future__ import annotations

import secrets
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import psycopg
from psycopg import sql

from outbox_relay.operate import migrate
from outbox_relay.sandbox.kafka import Kafka, KafkaCluster
from outbox_relay.sandbox.postgres import PostgresServer, installed_servers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.plan import Plan

AGGREGATE_TYPE = "order"
KEYS = 10_000
SETTINGS = {"shared_buffers": "512MB", "max_wal_size": "4GB", "max_connections": "400"}

# The payload is 200 bytes as JSON; hexadecimal digits compress about as well as what people send.
INSERT_MESSAGES = """
INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload)
SELECT
    %(aggregate_type)s,
    'customer-' || number %% %(keys)s,
    'order_placed',
    jsonb_build_object(
        'order', lpad(number::text, 10, '0'),
        'note', (SELECT string_agg(md5(number::text || part), '') FROM generate_series(1, 5) AS part)
    )
FROM generate_series(1, %(count)s) AS number
"""


@dataclass(frozen=True, slots=True)
class Bench:
    """What a scenario gets."""

    server: PostgresServer
    kafka: Kafka
    plan: Plan

    @contextmanager
    def database(self, *, backlog: int = 0) -> Iterator[str]:
        """Yield the URL of a fresh outbox with *backlog* unpublished messages, numbered from 1; drop it afterwards."""
        template = self._template(backlog)
        name = sql.Identifier(f"run_{secrets.token_hex(4)}")
        with psycopg.connect(self.server.dsn(), autocommit=True) as admin:
            # Copied as files: each run begins with the same pages, and with a checkpoint just made.
            admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy").format(name, template))
            try:
                yield self.server.dsn(name.as_string().strip('"'))
            finally:
                admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))

    def pgbench(self, dsn: str, *options: str, directory: Path) -> None:
        """Run PostgreSQL's own load generator in *directory*, where its script and its log are."""
        program = installed_servers()[self.server.version] / "pgbench"
        subprocess.run([program, *options, dsn], cwd=directory, check=True, capture_output=True)

    def _template(self, backlog: int) -> sql.Identifier:
        """Make the database that those of this size are copied from, unless it exists."""
        name = f"backlog_{backlog}"
        with psycopg.connect(self.server.dsn(), autocommit=True) as admin:
            if not admin.execute("SELECT FROM pg_database WHERE datname = %s", [name]).fetchone():
                admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
                with psycopg.connect(self.server.dsn(name), autocommit=True) as connection:
                    migrate.apply(connection, schema="public")
                    insert_messages(connection, count=backlog)
        return sql.Identifier(name)


def insert_messages(connection: psycopg.Connection, *, count: int) -> None:
    """Insert *count* unpublished messages and vacuum; *connection* is in autocommit mode."""
    connection.execute(INSERT_MESSAGES, {"aggregate_type": AGGREGATE_TYPE, "keys": KEYS, "count": count})
    connection.execute("VACUUM (ANALYZE) outbox")


def say(line: str) -> None:
    """Tell whoever waits how far the run is."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def running_bench(plan: Plan) -> Iterator[Bench]:
    """Start the newest PostgreSQL that is installed, with every write durable, and a broker."""
    servers = installed_servers()
    with TemporaryDirectory(prefix="outbox-relay-benchmark-") as name:
        directory = Path(name)
        directory.chmod(0o755)  # PostgreSQL may have to run as another user
        with (
            PostgresServer.create(servers[max(servers)], directory / "postgres", settings=SETTINGS) as server,
            KafkaCluster(directory / "kafka") as kafka,
        ):
            yield Bench(server, kafka, plan)
