"""Survey: what only the database can tell, read by a thread beside the lanes, so that a scrape reads memory alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, TypeVar

from outbox_relay.database import roll_back, translated_errors
from outbox_relay.errors import DatabaseConflict
from outbox_relay.relay.session import repeat_until_stopped
from outbox_relay.sql import statement

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from psycopg import Connection

    from outbox_relay.observe.telemetry import Telemetry

Found = TypeVar("Found")
HeadState = Literal["unpublished", "waiting"]

_LEAST_REST = 20  # times as long as a survey took: it takes a twentieth of the time at most
_LIFETIME = 3  # pauses for which a figure is shown


@dataclass(frozen=True, slots=True)
class SurveyOptions:
    """
    How often to look, and the server's time-outs, in seconds.

    Attributes:
        schema: Where the outbox is.
        messages: Up to which number messages and keys are counted.
        interval: Pause between two surveys; it grows when they take long.
        lock_timeout: Wait for somebody who changes the table's definition.
        statement_timeout: For one of the statements.
    """

    schema: str = "public"
    messages: int = 10_000
    interval: float = 15.0
    lock_timeout: float = 0.5
    statement_timeout: float = 5.0


@dataclass(frozen=True, slots=True)
class Head:
    """
    A message that comes first in its shard.

    Attributes:
        state: "unpublished": the next one above the mark. "waiting": the first one of its aggregate type that the mark
            has passed and that is not in Kafka all the same.
        age_seconds: By `created_at`.
        waiting_seconds: Since it was set aside; 0 for an unpublished one.
    """

    shard: int
    sequence_no: int
    state: HeadState
    aggregate_type: str
    age_seconds: float
    waiting_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Backlog:
    """
    What is not in Kafka yet, what is parked, and what relays have still to do; counts end at `SurveyOptions.messages`.

    Attributes:
        unpublished_messages: Those that no mark has passed, and those that wait.
        waiting_messages: Those that a mark has passed and that the relay sends as soon as it can.
        uncollected_writers: Given-up writers that have ended and whose messages do not wait yet.
        unreconciled_seconds: Age of the oldest mark that nobody has compared with the rows; 0 when there is none.
    """

    heads: list[Head]
    unpublished_messages: int
    waiting_messages: int
    parked_messages: int
    parked_keys: int
    uncollected_writers: int
    unreconciled_seconds: float

    @property
    def oldest_unpublished_seconds(self) -> float:
        """Age of the oldest message that is not in Kafka, by `created_at`; 0 when there is none."""
        return max((head.age_seconds for head in self.heads), default=0.0)

    @property
    def oldest_waiting_seconds(self) -> float:
        """For how long the message that was set aside first has been waiting; 0 when none is."""
        return max((head.waiting_seconds for head in self.heads), default=0.0)


@dataclass(frozen=True, slots=True)
class Table:
    """What one table holds, as PostgreSQL estimates it, and takes, with long values but without indexes."""

    name: str
    live_tuples: float
    dead_tuples: float
    table_bytes: float
    index_bytes: float


@dataclass(frozen=True, slots=True)
class Upkeep:
    """
    What vacuum has to do, and what keeps it from it; ages of transactions are numbers of transactions since.

    Attributes:
        partitions_ahead_seconds: None in the plain layout.
        longest_transaction_seconds: None if this role may not see those of others.
    """

    tables: list[Table]
    partitions_ahead_seconds: float | None
    xid_age: float
    oldest_xmin_age: float
    longest_transaction_seconds: float | None
    oldest_prepared_transaction_seconds: float


def read_backlog(connection: Connection, *, options: SurveyOptions) -> Backlog:
    """
    Look at what waits and what is parked; *connection* is in autocommit mode.

    What is published, the marks that say so, and what waits beyond the counts cost nothing, dead or alive.

    Raises:
        DatabaseUnavailable: The connection broke.
        DatabaseConflict: A time-out ended it; the transaction is still to be rolled back.
        SchemaMismatch: There is no outbox, or this role may not read it.
    """
    with translated_errors():
        connection.execute(begin_statement(options))
        count = statement("backlog", schema=options.schema)
        [counts] = connection.execute(count, {"most": options.messages}).fetchall()
        heads = connection.execute(statement("backlog_heads", schema=options.schema)).fetchall()
        connection.commit()
    return Backlog([Head(*row) for row in heads], *counts)


def read_upkeep(connection: Connection, *, options: SurveyOptions) -> Upkeep:
    """Look at tables and transactions, as `read_backlog` does; no table is read."""
    with translated_errors():
        connection.execute(begin_statement(options))
        [ages] = connection.execute(statement("survey_transactions", schema=options.schema)).fetchall()
        tables = connection.execute(statement("survey_tables", schema=options.schema)).fetchall()
        ahead = _partitions_ahead(connection, schema=options.schema)
        connection.commit()
    return Upkeep([Table(*row) for row in tables], ahead, *ages)


def _partitions_ahead(connection: Connection, *, schema: str) -> float | None:
    [(is_partitioned,)] = connection.execute(statement("partition_exists", schema=schema)).fetchall()
    if not is_partitioned:
        return None
    [(seconds,)] = connection.execute(statement("survey_partitions", schema=schema)).fetchall()
    return float(seconds)


class Surveyor:
    """
    One per process, in a thread and on a connection of its own.

    Whatever fails is told and tried again; no lane notices, and no survey makes the relay lose its database.
    """

    def __init__(
        self,
        *,
        options: SurveyOptions,
        connect: Callable[[], Connection],
        telemetry: Telemetry,
        stop: threading.Event,
    ) -> None:
        self._options = options
        self._connect = connect
        self._telemetry = telemetry
        self._stop = stop

    def run(self) -> None:
        """Look again and again until stopped."""
        repeat_until_stopped(
            "survey",
            connect=self._connect,
            work=self._survey_until_stopped,
            fail=self._telemetry.survey_failed,
            pause=self._options.interval,
            telemetry=self._telemetry,
            stop=self._stop,
        )

    def _survey_until_stopped(self, connection: Connection) -> None:
        while not self._stop.is_set():
            self._stop.wait(self._survey(connection))

    def _survey(self, connection: Connection) -> float:
        """Look once, tell, and return the seconds until the next look."""
        started = time.monotonic()
        upkeep = self._try(read_upkeep, connection)
        backlog = self._try(read_backlog, connection)
        now = time.monotonic()
        pause = max(self._options.interval, _LEAST_REST * (now - started))
        if upkeep is not None:
            self._telemetry.upkeep_surveyed(upkeep, until=now + _LIFETIME * pause)
        if backlog is not None:
            self._telemetry.backlog_surveyed(backlog, until=now + _LIFETIME * pause)
        return pause

    def _try(self, read: Callable[..., Found], connection: Connection) -> Found | None:
        """Return what *read* finds, or None: one that takes too long is no reason to miss the other."""
        try:
            return read(connection, options=self._options)
        except DatabaseConflict as error:
            roll_back(connection)
            self._telemetry.survey_failed(error)
            return None


@lru_cache
def begin_statement(options: SurveyOptions) -> bytes:
    """Return the statements that begin a transaction of looking and set what it needs."""
    return statement("survey_begin", schema=options.schema) % {
        b"lock_timeout_ms": round(options.lock_timeout * 1000),
        b"statement_timeout_ms": round(options.statement_timeout * 1000),
    }
