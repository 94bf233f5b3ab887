from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from outbox_relay.sandbox.ports import ReservedPort
from tests.fixtures.daemon import Daemon

LOGS_AND_WAITS = """
import json, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print("no JSON", file=sys.stderr)
print(json.dumps({"event": "relay_started", "lanes": 2}), file=sys.stderr, flush=True)
while True: signal.pause()
"""
SERVES_READYZ = """
import http.server, os
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/readyz" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(os.environ["OUTBOX_RELAY_METRICS_PORT"])), Ready).serve_forever()
"""


def python(script: str) -> tuple[str, ...]:
    return (sys.executable, "-c", script)


def test_events_and_other_lines_are_told_apart() -> None:
    with Daemon({}, command=python(LOGS_AND_WAITS)) as daemon:
        daemon.wait_until_ready()
        assert daemon.wait_for_event("relay_started") == {"event": "relay_started", "lanes": 2}
        assert daemon.other_lines == ["no JSON\n"]


def test_events_that_did_not_come_are_missed() -> None:
    with Daemon({}, command=python(LOGS_AND_WAITS)) as daemon:
        daemon.wait_until_ready()
        assert daemon.events_named("relay_started", "relay_stopped") == [{"event": "relay_started", "lanes": 2}]
        with pytest.raises(TimeoutError, match="not 2 x the event relay_started within"):
            daemon.wait_for_events("relay_started", count=2, timeout=0.1)


def test_exit_code_is_the_process_own() -> None:
    with Daemon({}, command=python(LOGS_AND_WAITS)) as daemon:
        daemon.wait_until_ready()
        daemon.terminate()
        assert daemon.wait() == 7


def test_paused_process_ends_only_after_it_is_resumed() -> None:
    with Daemon({}, command=python(LOGS_AND_WAITS)) as daemon:
        daemon.wait_until_ready()
        daemon.pause()
        daemon.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            daemon.wait(timeout=0.2)
        daemon.resume()
        assert daemon.wait() == 7


def test_killed_process_says_so() -> None:
    with Daemon({}, command=python(LOGS_AND_WAITS)) as daemon:
        daemon.wait_until_ready()
        daemon.kill()
        assert daemon.wait() == -signal.SIGKILL


def test_readiness_comes_from_the_probe_where_there_is_one() -> None:
    port = ReservedPort()
    with Daemon({"OUTBOX_RELAY_METRICS_PORT": str(port.number)}, command=python(SERVES_READYZ)) as daemon:
        daemon.wait_until_ready()


def test_process_that_ends_early_is_reported_with_its_last_words() -> None:
    ends = python("import sys; sys.exit('no such table')")
    with Daemon({}, command=ends) as daemon, pytest.raises(AssertionError, match="exit code 1\nno such table"):
        daemon.wait_until_ready()
