"""The thread that keeps the horizon current and wakes the lanes when it moves."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outbox_relay.relay import horizon as stage
from outbox_relay.relay.horizon import Horizon
from outbox_relay.relay.session import work_until_stopped

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg import Connection

    from outbox_relay.observe.telemetry import Telemetry

_AWAITING_SECONDS = 0.001  # between looks at awaited transactions: most of them commit within a millisecond
_BUSY_SECONDS = 1.0  # how long after the last new number the poll stays fast
_HELD_SECONDS = 1.0  # from when on a held horizon is worth a line in the log


@dataclass(frozen=True, slots=True)
class WatchOptions:
    """
    How often to look for new messages, in seconds.

    Attributes:
        schema: Where the outbox is.
        is_ordered: False takes the last number as the horizon: later numbers may overtake earlier ones.
        ordering_timeout: After this time a writer that is still open is given up on.
        poll_interval: Pause between polls while messages come in.
        idle_poll_interval: Pause that an idle poll backs off to.
    """

    schema: str = "public"
    is_ordered: bool = True
    ordering_timeout: float = 5.0
    poll_interval: float = 0.002
    idle_poll_interval: float = 0.1


class HorizonWatch:
    """One per process, with a connection of its own; the lanes share what it finds."""

    def __init__(self, *, options: WatchOptions, connect: Callable[[], Connection], telemetry: Telemetry) -> None:
        self._options = options
        self._connect = connect
        self._telemetry = telemetry
        self._horizon = Horizon(options.ordering_timeout)
        self._moved = threading.Condition()
        self._stopped = threading.Event()
        self._has_to_reset = False
        self._last_news_at = 0.0
        self._pause = options.poll_interval
        self._reported: frozenset[int] = frozenset()

    @property
    def through(self) -> int:
        """The horizon: no number up to this one can still appear, but late ones. 0 while it is not known."""
        return 0 if self._has_to_reset else self._horizon.through

    @property
    def late_writers_ended(self) -> int:
        """Grows whenever a writer that was given up on has ended: its messages are below the horizon."""
        return self._horizon.late_writers_ended

    def wait_beyond(self, number: int, *, timeout: float) -> int:
        """Wait until the horizon is higher than *number*, at most *timeout* seconds or until the stop; give it."""
        with self._moved:
            self._moved.wait_for(lambda: self.through > number or self._stopped.is_set(), timeout)
        return self.through

    def reset(self) -> None:
        """Start from nothing: a lane has lost its server, and behind the next connection may be another."""
        self._has_to_reset = True

    def stop(self) -> None:
        """End the thread and wake whoever waits."""
        self._stopped.set()
        with self._moved:
            self._moved.notify_all()

    def wake_one(self) -> None:
        """Wake a lane that waits, if any: there is work for one more."""
        with self._moved:
            self._moved.notify()

    def run(self) -> None:
        """Poll until stopped."""
        work_until_stopped(
            "horizon",
            schema=self._options.schema,
            connect=self._connect,
            work=self._poll_until_stopped,
            lose=lambda _error: self.reset(),
            telemetry=self._telemetry,
            stop=self._stopped,
        )

    def _poll_until_stopped(self, connection: Connection) -> None:
        while not self._stopped.is_set():
            if self._has_to_reset:
                self._horizon.reset()
                self._has_to_reset = False
            before = self._horizon.through
            self._poll(connection)
            now = time.monotonic()
            self._telemetry.horizon_polled(
                held_seconds=self._horizon.held_for(now=now), blockers=self._horizon.blockers(now=now)
            )
            if self._horizon.through > before:
                self._announce()
            self._stopped.wait(self._next_pause())

    def _announce(self) -> None:
        self.wake_one()
        if self._reported:
            self._reported = frozenset()
            self._telemetry.horizon_released()

    def _poll(self, connection: Connection) -> None:
        """Bring the horizon up to date; without news this costs one read of the sequence."""
        horizon, schema = self._horizon, self._options.schema
        if not horizon.candidates and not horizon.given_up:
            last_no = stage.read_last_no(connection, schema=schema)
            if last_no == horizon.through:
                return
            if not self._options.is_ordered:
                horizon.through = last_no
                self._last_news_at = time.monotonic()
                return
        seen = stage.observe(connection, schema=schema)
        now = time.monotonic()
        if seen.last_no > horizon.through:
            self._last_news_at = now
        horizon.observe(seen, now=now)
        if horizon.wants_look(now=now):
            self._look(connection)

    def _look(self, connection: Connection) -> None:
        """Tell writers from bystanders, and give up on writers that are overdue."""
        horizon, schema = self._horizon, self._options.schema
        started = time.monotonic()
        writers = stage.list_writers(connection, schema=schema)
        now = time.monotonic()
        horizon.looked(writers, now=now, cost=now - started)
        held_seconds = horizon.held_for(now=now)
        if held_seconds >= _HELD_SECONDS:
            self._report_blockers(connection, held_seconds=held_seconds)
        overdue = horizon.overdue(now=now)
        if overdue:
            described = stage.describe(connection, schema=schema, xids=overdue)
            stage.record_unordered(connection, schema=schema, xids=overdue)
            horizon.give_up(overdue)
            self._telemetry.writers_given_up(described)

    def _report_blockers(self, connection: Connection, *, held_seconds: float) -> None:
        """Log once who holds the horizon, and again when others do."""
        awaited = frozenset(self._horizon.candidates[0].awaited)
        if awaited - self._reported:
            described = stage.describe(connection, schema=self._options.schema, xids=awaited)
            self._telemetry.horizon_held(described, held_seconds=held_seconds)
        self._reported = awaited

    def _next_pause(self) -> float:
        if self._horizon.candidates:
            return min(_AWAITING_SECONDS * (1 + 10 * self._horizon.held_for(now=time.monotonic())), 0.05)
        if time.monotonic() - self._last_news_at < _BUSY_SECONDS:
            self._pause = self._options.poll_interval
        else:
            self._pause = min(self._pause * 2, self._options.idle_poll_interval)
        return self._pause
