"""Late: messages of writers that were given up on, collected into outbox_pending once their transaction has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from psycopg import ClientCursor

from outbox_relay.database import translated_errors
from outbox_relay.relay.claim import ClaimOptions, begin_statement
from outbox_relay.relay.session import repeat_until_stopped
from outbox_relay.sql import statement

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from psycopg import Connection

    from outbox_relay.observe.telemetry import Telemetry
    from outbox_relay.relay.watch import HorizonWatch

_NUMBERS = 50_000  # of one transaction
_PAUSE_SECONDS = 5.0  # between looks for writers that another relay has given up on


def collect_late(connection: Connection, *, options: ClaimOptions) -> int | None:
    """
    Collect messages of one writer that was given up on and has ended, among a bounded range of numbers.

    Return how many were collected; None means that there is no such writer, or that another relay collects.

    Raises:
        DatabaseUnavailable: The connection broke. What is not collected now is collected later, and nothing twice.
        DatabaseConflict: A lock or a time-out rolled it back.
    """
    with translated_errors():
        connection.execute(begin_statement(options))
        collect = statement("collect_late", schema=options.schema)
        rows = ClientCursor(connection).execute(collect, {"numbers": _NUMBERS}).fetchall()
    return int(rows[0][0]) if rows else None


class LateCollector:
    """
    One per process, in a thread of its own.

    *found* is called when messages were collected: the lanes send them then.
    """

    def __init__(
        self,
        *,
        options: ClaimOptions,
        connect: Callable[[], Connection],
        watch: HorizonWatch,
        found: Callable[[], None],
        telemetry: Telemetry,
        stop: threading.Event,
    ) -> None:
        self._options = options
        self._connect = connect
        self._watch = watch
        self._found = found
        self._telemetry = telemetry
        self._stop = stop

    def run(self) -> None:
        """Collect until stopped."""
        repeat_until_stopped(
            "late",
            connect=self._connect,
            work=self._collect_until_stopped,
            fail=lambda error: self._telemetry.database_lost("late", error),
            pause=1.0,
            telemetry=self._telemetry,
            stop=self._stop,
        )

    def _collect_until_stopped(self, connection: Connection) -> None:
        self._telemetry.database_recovered("late")
        ended = 0
        while not self._stop.is_set():
            self._collect(connection)
            ended = self._watch.wait_for_late_writers(ended, timeout=_PAUSE_SECONDS)

    def _collect(self, connection: Connection) -> None:
        """Collect all there is now."""
        messages = 0
        while not self._stop.is_set():
            collected = collect_late(connection, options=self._options)
            if collected is None:
                break
            messages += collected
        if messages:
            self._telemetry.late_messages_found(messages)
            self._found()
