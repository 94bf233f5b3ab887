"""The disk under the outbox is full."""

from __future__ import annotations

import os
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
from psycopg import sql

from outbox_relay.sandbox.history import State
from tests.fixtures.load import commit_messages
from tests.fixtures.pipeline import flaws

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fixtures.pipeline import Pipeline

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk"),
]

DISK_BYTES = 4 * 1024 * 1024
MESSAGES = 2_000


@contextmanager
def small_disk(*, owner: int) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="outbox-relay-") as directory:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", directory], check=True)  # noqa: S607 -- of the system
        try:
            os.chown(directory, owner, -1)
            yield Path(directory)
        finally:
            subprocess.run(["umount", "--lazy", directory], check=True)  # noqa: S607 -- of the system


def test_a_full_disk_is_waited_for(own_postgres_pipeline: Pipeline) -> None:
    pipeline, server = own_postgres_pipeline, own_postgres_pipeline.database.server
    with small_disk(owner=server.data_directory.stat().st_uid) as disk:
        with pipeline.database.connect(autocommit=True) as admin:
            place = sql.SQL("CREATE TABLESPACE small LOCATION {}").format(sql.Literal(str(disk)))
            admin.execute(place)
            for table in ("outbox", "outbox_published"):
                admin.execute(f"ALTER TABLE {table} SET TABLESPACE small")
        with pipeline.database.connect() as writer:
            writes = commit_messages(writer, *[f"order-{number % 7}" for number in range(MESSAGES)])
        ballast = fill(disk)
        with pipeline.database.connect() as writer, pytest.raises(psycopg.errors.DiskFull):
            commit_messages(writer, *["order-1"] * MESSAGES)
        with pipeline.relays(1, lanes=1) as [relay]:
            assert "No space left on device" in str(relay.wait_for_event("database_lost")["reason"])
            assert State.PUBLISHED not in pipeline.states()
            ballast.unlink()
            pipeline.await_settled()
            relay.wait_for_event("database_recovered")
        verdict = pipeline.judge(writes)
        server.stop()
    assert flaws(verdict).keys() == {"duplicated"}
    assert len(verdict.duplicated) < 2 * MESSAGES  # the first stint as a whole, and then only single messages


def fill(disk: Path) -> Path:
    """Leave no room on *disk*; give the file to remove for some."""
    ballast = disk / "ballast"
    statistics = os.statvfs(disk)
    ballast.write_bytes(bytes(statistics.f_bavail * statistics.f_frsize))
    return ballast
