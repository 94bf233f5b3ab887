"""The real parts that the scenarios share: a durable PostgreSQL, a Kafka broker, and databases with a backlog."""

from __future__ import annotations

import secrets
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import psycopg

from benchmarks.installation import Installation, this_checkout
from outbox_relay.sandbox.kafka import KafkaCluster
from outbox_relay.sandbox.postgres import PostgresServer, installed_servers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.plan import Plan

AGGREGATE_TYPE = "order"
KEYS = 10_000
SETTINGS = {"shared_buffers": "512MB", "max_wal_size": "4GB", "max_connections": "400"}
AS_IN_PRODUCTION = ("-XX:TieredStopAtLevel=4",)  # the broker's virtual machine compiles for a long life

# The payload is 200 bytes as JSON; hexadecimal digits compress about as well as what people send.
INSERT_MESSAGES = """
INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload)
SELECT
    %(aggregate_type)s,
    'customer-' || number %% %(keys)s,
    'order_placed',
    jsonb_build_object(
        'note', md5('a' || number) || md5('b' || number) || md5('c' || number) || md5('d' || number),
        'order', lpad(number::text, 47, '0')
    )
FROM generate_series(1, %(count)s) AS number
"""

# Marks as close together as under steady traffic, and as exact.
INSERT_MARKS = """
INSERT INTO outbox_published (shard, through, messages, checksum)
SELECT shard, max(sequence_no), count(*), bit_xor(sequence_no)
FROM outbox
WHERE sequence_no > (SELECT coalesce(max(through), 0) FROM outbox_published)
GROUP BY shard, sequence_no / 200
"""


@dataclass(frozen=True, slots=True)
class Bench:
    """What a scenario gets."""

    server: PostgresServer
    kafka: KafkaCluster
    plan: Plan
    installation: Installation = field(default_factory=this_checkout)

    @contextmanager
    def database(self, *, backlog: int = 0) -> Iterator[str]:
        """Yield the URL of a fresh outbox with *backlog* unpublished messages, numbered from 1; drop it afterwards."""
        name = f"run_{secrets.token_hex(4)}"
        with psycopg.connect(self.server.dsn(), autocommit=True) as admin:
            template = self._template(admin, backlog=backlog)
            # Copied as files: each run begins with the same pages, and with a checkpoint just made.
            admin.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
            try:
                yield self.server.dsn(name)
            finally:
                admin.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def pgbench(self, dsn: str, *options: str, directory: Path) -> None:
        """Run PostgreSQL's own load generator in *directory*, where its script and its log are."""
        program = installed_servers()[self.server.version] / "pgbench"
        subprocess.run([program, *options, dsn], cwd=directory, check=True, stdout=subprocess.DEVNULL)

    def _template(self, admin: psycopg.Connection, *, backlog: int) -> str:
        """Return the name of the database that those of this size are copied from; the first time, make it."""
        name = f"backlog_{backlog}_of_{self.installation.name}"
        if not admin.execute("SELECT FROM pg_database WHERE datname = %s", [name]).rowcount:
            admin.execute(f"CREATE DATABASE {name}")
            self.installation.migrate(self.server.dsn(name))
            with psycopg.connect(self.server.dsn(name), autocommit=True) as connection:
                insert_messages(connection, count=backlog)
        return name


def insert_messages(connection: psycopg.Connection, *, count: int, are_published: bool = False) -> None:
    """Insert *count* messages and vacuum; *connection* is in autocommit mode."""
    connection.execute(INSERT_MESSAGES, {"aggregate_type": AGGREGATE_TYPE, "keys": KEYS, "count": count})
    connection.execute("VACUUM (ANALYZE) outbox")
    if are_published:
        publish_all(connection)


def publish_all(connection: psycopg.Connection) -> None:
    """Write marks that pass every message there is, and vacuum; *connection* is in autocommit mode."""
    connection.execute(INSERT_MARKS)
    connection.execute("VACUUM (ANALYZE) outbox_published")


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
            KafkaCluster(directory / "kafka", jvm_options=AS_IN_PRODUCTION) as kafka,
        ):
            yield Bench(server, kafka, plan)
