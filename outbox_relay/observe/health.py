"""The HTTP listener for /metrics, /livez and /readyz."""

from __future__ import annotations

import threading
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

from outbox_relay.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from outbox_relay.observe.metrics import Metrics
    from outbox_relay.observe.telemetry import Telemetry


class HealthServer:
    """Answers probes and scrapes from a thread of its own, and nothing else: no state of the relay can be changed."""

    def __init__(self, *, host: str, port: int, metrics: Metrics, telemetry: Telemetry) -> None:
        self._probes: dict[str, Callable[[], list[str]]] = {
            "/livez": telemetry.why_not_alive,
            "/readyz": telemetry.why_not_ready,
        }
        self._metrics: WSGIApplication = make_wsgi_app(metrics.registry)
        try:
            self._server = make_server(host, port, self._answer, server_class=_Server, handler_class=_QuietHandler)
        except OSError as error:
            raise ConfigurationError(
                f"nothing can listen on {host}:{port}: {error.strerror};"
                " choose another OUTBOX_RELAY_METRICS_PORT, or 0 for none",
            ) from error
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
    """A client that sends nothing must not keep the next probe waiting."""

    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    timeout = 5

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the base class names it so
        """Keep probes out of the log."""
