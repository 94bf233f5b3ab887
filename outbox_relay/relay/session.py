"""A thread's connection: made, lost and made anew after a pause, until the thread is stopped."""

from __future__ import annotations

import random
import time
from contextlib import closing
from typing import TYPE_CHECKING

from outbox_relay.errors import OutboxRelayError
from outbox_relay.relay.failures import Backoff
from outbox_relay.relay.horizon import read_last_number

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from psycopg import Connection

    from outbox_relay.observe.telemetry import Telemetry


def work_until_stopped(
    thread: str,
    *,
    schema: str,
    connect: Callable[[], Connection],
    work: Callable[[Connection], None],
    lose: Callable[[Exception], None],
    telemetry: Telemetry,
    stop: threading.Event,
) -> None:
    """
    Call *work* with a connection on which the outbox can be read, again and again until *stop*.

    After an error the connection is closed, *lose* is called, and the next one comes after a pause: longer each time,
    and short again once a connection has lasted. The except is broad: a thread that ends silently is worse
    than one that reports what nobody expected and tries again.
    """
    backoff = Backoff()
    chance = random.Random()  # noqa: S311 -- jitter, no secret
    while not stop.is_set():
        telemetry.beat(thread)
        connected_at = time.monotonic()
        try:
            with closing(connect()) as connection:
                read_last_number(connection, schema=schema)
                telemetry.database_recovered(thread)
                work(connection)
        except Exception as error:  # noqa: BLE001 -- see above
            if not isinstance(error, OutboxRelayError):
                telemetry.thread_failed(thread, error)
            telemetry.database_lost(thread, error)
            lose(error)
            if time.monotonic() - connected_at > backoff.most_seconds:
                backoff.reset()
            stop.wait(backoff.next_pause(chance))


def repeat_until_stopped(
    thread: str,
    *,
    connect: Callable[[], Connection],
    work: Callable[[Connection], None],
    fail: Callable[[OutboxRelayError], None],
    pause: float,
    telemetry: Telemetry,
    stop: threading.Event,
) -> None:
    """
    Call *work*, on which no message depends, with a new connection, again and again until *stop*.

    What it cannot do is told to *fail* and tried again after *pause* seconds: the relay stays ready, and works on.
    """
    while not stop.is_set():
        try:
            with closing(connect()) as connection:
                work(connection)
        except OutboxRelayError as error:
            fail(error)
        except Exception as error:  # noqa: BLE001 -- as above: no thread ends silently
            telemetry.thread_failed(thread, error)
        stop.wait(pause)
