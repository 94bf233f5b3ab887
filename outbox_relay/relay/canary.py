"""
Canary: a message of the relay's own from time to time, to measure the way from the database to Kafka and back.

It takes the way of every message: the insert, the horizon, a lane's read, Kafka's acknowledgement, the mark.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from psycopg import ClientCursor

from outbox_relay.database import translated_errors
from outbox_relay.errors import ConfigurationError, SchemaMismatch
from outbox_relay.relay.session import repeat_until_stopped
from outbox_relay.sql import statement

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from psycopg import Connection

    from outbox_relay.observe.telemetry import Telemetry

AGGREGATE_TYPE = "outbox-relay-canary"
_PARAMETERS = {"aggregate_type": AGGREGATE_TYPE, "aggregate_id": "canary"}

_MOST_SEARCHED = 1_000
_LEAST_PAUSE_SECONDS = 0.01
_MOST_PAUSE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class CanaryOptions:
    """
    How often to send a canary, in seconds.

    Attributes:
        schema: Where the outbox is.
        interval: From the mark of one to the next one.
        timeout: For a statement, for a lock, and for an idle transaction.
    """

    schema: str = "public"
    interval: float = 60.0
    timeout: float = 2.0


def check_canary(connection: Connection, *, schema: str) -> None:
    """
    Return normally when this role may write a canary.

    Raises:
        ConfigurationError: It may not; the message has the GRANT.
    """
    with translated_errors():
        [(may_write,)] = connection.execute(statement("canary_privilege", schema=schema)).fetchall()
    if not may_write:
        user = connection.info.user
        raise ConfigurationError(
            f"role {user!r} may not write the canary that OUTBOX_RELAY_CANARY_INTERVAL asks for:"
            f" GRANT outbox_writer TO {user}; or set it to 0"
        )


def write_canary(connection: Connection, *, options: CanaryOptions) -> int | None:
    """
    Write a canary and return its number; None while there is another one, of whatever relay, or one is being written.

    *connection* is in autocommit mode; the canary is a transaction of its own.

    Raises:
        DatabaseUnavailable: The connection broke; the canary may have been written.
        DatabaseConflict: A lock or a time-out rolled it back.
        SchemaMismatch: This role may not write messages any more, or a trigger has dropped this one.
    """
    begin = statement("canary_begin", schema=options.schema) % {b"timeout_ms": round(options.timeout * 1000)}
    with translated_errors():
        connection.execute(begin)
        [(is_alone,)] = connection.execute(statement("canary_lock", schema=options.schema)).fetchall()
        if not is_alone or _is_under_way(connection, schema=options.schema):
            connection.rollback()
            return None
        write = statement("canary_write", schema=options.schema)
        row = ClientCursor(connection).execute(write, _PARAMETERS).fetchone()
    if row is None:
        raise SchemaMismatch("a trigger of the table outbox drops the canary: outbox-relay doctor names it")
    return int(row[0])


@dataclass(frozen=True, slots=True)
class CanaryState:
    """
    What has become of a canary.

    Attributes:
        state: As `outbox_message` has it; None when the message was deleted.
        seconds: From its insert to the mark that passed it; None unless it is published.
    """

    state: str | None
    seconds: float | None


def read_canary(connection: Connection, number: int, *, schema: str) -> CanaryState:
    """Look what has become of the canary with this *number*."""
    with translated_errors():
        parameters = {**_PARAMETERS, "sequence_no": number}
        row = connection.execute(statement("canary_read", schema=schema), parameters).fetchone()
    return CanaryState(*row or (None, None))


class Canary:
    """
    One thread per process, with a connection of its own; one canary at a time is on its way from here.

    It is followed until it arrives, over lost connections too. Whatever fails is told and tried again.
    """

    def __init__(
        self,
        *,
        options: CanaryOptions,
        connect: Callable[[], Connection],
        telemetry: Telemetry,
        stop: threading.Event,
    ) -> None:
        self._options = options
        self._connect = connect
        self._telemetry = telemetry
        self._stop = stop
        self._number: int | None = None
        self._written_at = 0.0
        self._was_set_aside = False

    def run(self) -> None:
        """Send one canary after the other until stopped."""
        repeat_until_stopped(
            "canary",
            connect=self._connect,
            work=self._send_until_stopped,
            fail=self._telemetry.canary_failed,
            pause=min(self._options.interval, _MOST_PAUSE_SECONDS),
            telemetry=self._telemetry,
            stop=self._stop,
        )

    def _send_until_stopped(self, connection: Connection) -> None:
        while not self._stop.is_set():
            self._write(connection)
            self._await_mark(connection)
            self._stop.wait(self._options.interval)

    def _write(self, connection: Connection) -> None:
        if self._number is None:
            self._number = write_canary(connection, options=self._options)
            self._written_at = time.monotonic()
            self._was_set_aside = False
        if self._number is not None:
            self._telemetry.canary_written(at=self._written_at)

    def _await_mark(self, connection: Connection) -> None:
        """Look again and again, after pauses of a tenth of the time that has passed."""
        while self._number is not None and not self._stop.is_set():
            found = read_canary(connection, self._number, schema=self._options.schema)
            passed = time.monotonic() - self._written_at
            if found.state in {"published", None}:
                self._number = None
                self._telemetry.canary_arrived(self._seconds(found, passed=passed))
            else:
                self._was_set_aside |= found.state in {"waiting", "parked"}
                self._stop.wait(min(max(passed / 10, _LEAST_PAUSE_SECONDS), _MOST_PAUSE_SECONDS))

    def _seconds(self, found: CanaryState, *, passed: float) -> float:
        """Return how long a canary took: a mark tells it, unless it passed the canary before it was in Kafka."""
        return passed if found.seconds is None or self._was_set_aside else found.seconds


def _is_under_way(connection: Connection, *, schema: str) -> bool:
    parameters = {**_PARAMETERS, "most": _MOST_SEARCHED}
    [(is_under_way,)] = connection.execute(statement("canary_look", schema=schema), parameters).fetchall()
    return bool(is_under_way)
