"""Sessions in PostgreSQL that hold what others need, or that are ended."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.faults.soak.stage import DidNotFire, comes_true

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import LiteralString

    from psycopg import Connection

    from tests.faults.soak.stage import Stage
    from tests.fixtures.postgres import Database


@contextmanager
def holding(stage: Stage, statement: LiteralString) -> Iterator[Connection]:
    """Keep open a transaction that has executed *statement*."""
    with stage.pipeline.database.connect(autocommit=True) as connection:
        connection.execute(f"BEGIN; {statement}")
        yield connection
        connection.rollback()


@contextmanager
def ended(database: Database, statement: LiteralString) -> Iterator[None]:
    """End sessions by *statement*, which counts them, as soon as there are some."""
    with database.connect(autocommit=True) as admin:
        has_ended = comes_true(lambda: admin.execute(statement).fetchall() != [(0,)])
    yield
    if not has_ended:
        raise DidNotFire
