"""The thread that keeps the horizon current and wakes the lanes when it moves."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from outbox_relay.errors import DatabaseConflict, SchemaMismatch
from outbox_relay.relay import horizon as stage
from outbox_relay.relay.horizon import Epoch, Horizon
from outbox_relay.relay.session import work_until_stopped

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg import Connection

    from outbox_relay.observe.telemetry import Telemetry

_AWAITING_SECONDS = 0.001  # between looks at awaited transactions: most of them commit within a millisecond
_BUSY_SECONDS = 1.0  # how long after the last new number the poll stays fast
_HELD_SECONDS = 1.0  # from when on a held horizon is worth a line in the log
_CHECK_SECONDS = 5.0  # between looks at whether the sequence and the marks belong together


class Reached(NamedTuple):
    """The horizon and the epoch of its number; 0 and None while it is not known."""

    through: int
    epoch: Epoch | None


_UNKNOWN = Reached(0, None)


@dataclass(frozen=True, slots=True)
class WatchOptions:
    """
    How often to look for new messages, in seconds.

    Attributes:
        schema: Where the outbox is.
        ordering_timeout: After this time a writer that is still open is given up on.
        poll_interval: Pause between polls while messages come in.
        idle_poll_interval: Pause that an idle poll backs off to.
    """

    schema: str = "public"
    ordering_timeout: float = 5.0
    poll_interval: float = 0.002
    idle_poll_interval: float = 0.1


class HorizonWatch:
    """
    One per process, with a connection of its own; the lanes share what it finds.

    *renumbered* is called when the numbers are those of another epoch, or were set back: marks may have been passed by
    messages that nobody has seen.
    """

    def __init__(
        self,
        *,
        options: WatchOptions,
        connect: Callable[[], Connection],
        telemetry: Telemetry,
        renumbered: Callable[[], None] = lambda: None,
    ) -> None:
        self._options = options
        self._connect = connect
        self._telemetry = telemetry
        self._renumbered = renumbered
        self._is_renumbered = False
        self._horizon = Horizon(options.ordering_timeout)
        self._moved = threading.Condition()
        self._stopped = threading.Event()
        self._has_to_reset = False
        self._reached = _UNKNOWN
        self._epoch: Epoch | None = None
        self._check_at = 0.0
        self._last_news_at = 0.0
        self._pause = options.poll_interval
        self._reported: frozenset[int] = frozenset()

    @property
    def reached(self) -> Reached:
        """The horizon: no message up to its number can still appear, except those of writers that were given up on."""
        return _UNKNOWN if self._has_to_reset else self._reached

    def wait_beyond(
        self, number: int, *, timeout: float, has_other_work: Callable[[], bool] = lambda: False
    ) -> Reached:
        """
        Wait until the horizon is higher than *number*, or until the stop, at most *timeout* seconds; return it.

        Once there is a horizon, the wait also ends when *has_other_work*, which is asked again at each `wake`.
        """

        def is_over() -> bool:
            through = self.reached.through
            return through > number or self._stopped.is_set() or (through > 0 and has_other_work())

        with self._moved:
            self._moved.wait_for(is_over, timeout)
        return self.reached

    def wait_for_late_writers(self, seen: int, *, timeout: float) -> int:
        """Wait until another number of given-up writers has ended than *seen*, or until the stop; return the number."""
        with self._moved:
            self._moved.wait_for(lambda: self._horizon.late_writers_ended != seen or self._stopped.is_set(), timeout)
        return self._horizon.late_writers_ended

    def reset(self) -> None:
        """Start from nothing: a lane has lost its server, and behind the next connection may be another."""
        self._has_to_reset = True

    def stop(self) -> None:
        """End the thread and wake whoever waits."""
        self._stopped.set()
        self.wake()

    def wake(self) -> None:
        """Let all that wait see whether they have other work."""
        with self._moved:
            self._moved.notify_all()

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
        self._check_at = 0.0
        while not self._stopped.is_set():
            if self._has_to_reset:
                self._horizon.reset()
                self._reached = _UNKNOWN
                self._has_to_reset = False
            self._check(connection)
            self._poll(connection)
            now = time.monotonic()
            self._telemetry.horizon_polled(
                held_seconds=self._horizon.held_for(now=now), blockers=self._horizon.blockers(now=now)
            )
            self._announce()
            self._stopped.wait(self._next_pause())

    def _check(self, connection: Connection) -> None:
        """
        See every few seconds whether the tables can be trusted still.

        A locked one is left for the next time, but not after the numbers began anew: there is no horizon until then.
        """
        now = time.monotonic()
        if now < self._check_at:
            return
        self._check_at = now + _CHECK_SECONDS
        try:
            stage.check_tables(connection, schema=self._options.schema)
        except DatabaseConflict:
            if self._is_renumbered:
                raise
            return
        except SchemaMismatch:
            self._is_renumbered = True
            self._check_at = 0.0
            raise
        if self._is_renumbered:
            self._is_renumbered = False
            self._renumbered()

    def _announce(self) -> None:
        """Let the lanes know how far the horizon is."""
        before, self._reached = self._reached, Reached(self._horizon.through, self._epoch)
        if self._reached.through <= before.through:
            return
        with self._moved:
            self._moved.notify_all()
        if self._reported:
            self._reported = frozenset()
            self._telemetry.horizon_released()

    def _poll(self, connection: Connection) -> None:
        """Bring the horizon up to date; without news this costs one read of the sequence."""
        horizon, schema = self._horizon, self._options.schema
        if not horizon.candidates and not horizon.given_up:
            last = stage.read_last_number(connection, schema=schema)
            if (last.number, last.epoch) == (horizon.through, self._epoch):
                return
        seen = stage.observe(connection, schema=schema)
        if seen.epoch != self._epoch or seen.last_no < horizon.newest_no:
            self._is_renumbered = self._epoch is not None
            self._check_at = 0.0
            self._check(connection)
            horizon.reset()
            self._epoch = seen.epoch
        now = time.monotonic()
        if seen.last_no > horizon.through:
            self._last_news_at = now
        if horizon.is_new:
            horizon.give_up(stage.list_given_up(connection, schema=schema))  # nobody waits for them a second time
        late = horizon.late_writers_ended
        horizon.observe(seen, now=now)
        if horizon.wants_look(now=now):
            self._look(connection)
        if horizon.late_writers_ended != late:
            with self._moved:
                self._moved.notify_all()

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
