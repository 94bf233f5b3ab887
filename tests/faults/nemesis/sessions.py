"""Sessions in PostgreSQL that hold what others need."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import LiteralString

    from psycopg import Connection

    from tests.faults.soak.stage import Stage


@contextmanager
def holding(stage: Stage, statement: LiteralString) -> Iterator[Connection]:
    """Keep open a transaction that has executed *statement*."""
    with stage.pipeline.database.connect(autocommit=True) as connection:
        connection.execute(f"BEGIN; {statement}")
        yield connection
        connection.rollback()
