"""Loopback ports that stay ours while a server is down, so that it comes back at the same address."""

from __future__ import annotations

import socket


class ReservedPort:
    """
    A free loopback port, kept for the caller's servers as long as this object lives.

    Linux gives a bound port to nobody who asks for any free one, yet a server that sets SO_REUSEADDR, as PostgreSQL
    and Java do, can listen on it: two sockets may share an address as long as only one of them listens.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.number: int = self._socket.getsockname()[1]

    def __del__(self) -> None:
        self._socket.close()
