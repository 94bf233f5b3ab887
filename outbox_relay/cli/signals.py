"""The signals that stop a command, taken one after the other where it waits."""

from __future__ import annotations

import select
import signal
import socket


class StopSignals:
    """
    SIGTERM and SIGINT from now on, instead of what they did before; one object for a process, in its main thread.

    Which thread a signal reaches does not matter: Python writes its number into a socket, and the main thread reads it
    there. Blocking signals and waiting for them with `sigtimedwait` would need all threads to block them, also those
    that were there before: a tracing exporter's would take the signal, and with it the default, which ends the process.
    """

    def __init__(self) -> None:
        self._received, self._sent = socket.socketpair()
        self._sent.settimeout(0)
        signal.set_wakeup_fd(self._sent.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: None)  # without a handler nothing is written

    def within(self, seconds: float) -> signal.Signals | None:
        """Wait for the next signal, and give it, or None after *seconds*."""
        is_there, _, _ = select.select([self._received], [], [], seconds)
        return signal.Signals(self._received.recv(1)[0]) if is_there else None
