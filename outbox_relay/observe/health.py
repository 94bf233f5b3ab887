"""The listener for /metrics, /livez and /readyz, by HTTP or HTTPS."""

from __future__ import annotations

import ssl
import threading
from contextlib import suppress
from dataclasses import dataclass
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

from outbox_relay.errors import ConfigurationError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from outbox_relay.observe.metrics import Metrics
    from outbox_relay.observe.telemetry import Telemetry

_CLIENT_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Certificate:
    """Paths of two PEM files: the certificate with those that lead to its authority, and its key, not encrypted."""

    path: str
    key_path: str


class HealthServer:
    """
    Answers probes and scrapes from threads of its own, and nothing else: no state of the relay can be changed.

    Args:
        certificate: Speak HTTPS with it; a renewed one counts from the next connection on. None: HTTP.

    Raises:
        ConfigurationError: The port is taken, or the certificate cannot be used.
    """

    def __init__(
        self, *, host: str, port: int, metrics: Metrics, telemetry: Telemetry, certificate: Certificate | None = None
    ) -> None:
        self._probes: dict[str, Callable[[], list[str]]] = {
            "/livez": telemetry.why_not_alive,
            "/readyz": telemetry.why_not_ready,
        }
        self._metrics: WSGIApplication = make_wsgi_app(metrics.registry)
        tls = _Tls(certificate, telemetry=telemetry) if certificate else None
        try:
            self._server = make_server(host, port, self._answer, server_class=_Server, handler_class=_QuietHandler)
        except OSError as error:
            raise ConfigurationError(
                f"nothing can listen on {host}:{port}: {error.strerror};"
                " choose another OUTBOX_RELAY_METRICS_PORT, or 0 for none",
            ) from error
        self._server.tls = tls
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)

    @property
    def port(self) -> int:
        """The port that was bound."""
        return self._server.server_port

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Stop answering and free the port."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "/")
        if path == "/metrics":
            return self._metrics(environ, start_response)
        probe = self._probes.get(path)
        if probe is None:
            start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
            return [b"try /metrics, /livez or /readyz\n"]
        reasons = probe()
        start_response(
            "503 Service Unavailable" if reasons else "200 OK", [("Content-Type", "text/plain; charset=utf-8")]
        )
        return ["".join(f"{reason}\n" for reason in reasons or ["ok"]).encode()]


class _Server(ThreadingMixIn, WSGIServer):
    """A client that sends nothing must not keep the next probe waiting, so even handshakes are for its own thread."""

    daemon_threads = True
    tls: _Tls | None = None

    def finish_request(self, request: socket.socket, client_address: tuple[str, int]) -> None:  # type: ignore[override]  # never a datagram
        """Answer, unless the client falls silent, hangs up or does not speak TLS, which is its own business."""
        request.settimeout(_CLIENT_TIMEOUT_SECONDS)
        with suppress(OSError), self.tls.wrap(request) if self.tls else request as connection:
            super().finish_request(connection, client_address)


class _Tls:
    """Reads the certificate for every connection: whatever renews the files need not tell the relay."""

    def __init__(self, certificate: Certificate, *, telemetry: Telemetry) -> None:
        self._certificate = certificate
        self._telemetry = telemetry
        self._is_renewable = True
        try:
            self._context = _server_context(certificate)
        except OSError as error:
            raise ConfigurationError(
                f"metrics cannot be served with the certificate {certificate.path} and the key {certificate.key_path}:"
                f" {error.strerror}; let OUTBOX_RELAY_METRICS_CERTIFICATE and OUTBOX_RELAY_METRICS_CERTIFICATE_KEY name"
                " a certificate and the key that belongs to it, PEM files without a password",
            ) from error

    def wrap(self, connection: socket.socket) -> ssl.SSLSocket:
        """Shake hands with the certificate of this moment, or the last good one while the files are being renewed."""
        try:
            self._context = _server_context(self._certificate)
            self._is_renewable = True
        except OSError as error:
            if self._is_renewable:
                self._telemetry.certificate_not_renewed(error)
            self._is_renewable = False
        return self._context.wrap_socket(connection, server_side=True)


def _server_context(certificate: Certificate) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # With no password at all, OpenSSL would ask for that of an encrypted key on the terminal.
    context.load_cert_chain(certificate.path, certificate.key_path, password="")
    return context


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the base class names it so
        """Keep probes out of the log."""
