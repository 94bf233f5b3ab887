"""SIGTERM at any moment of the start: the process ends with 0 or 143, and says nothing about itself."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys

import pytest

from tests.fixtures.daemon import AWAY

POINTS = int(os.environ.get("RELAY_START_POINTS", "4"))
TAKEN_OVER = "socket.__new__"  # the socket that the daemon reads signals from

# Runs the command, and counts from its own first step on what Python can be audited for: imports, files, sockets,
# threads. It sends the signal to itself at one of these events, or tells at which one the daemon takes signals itself.
AT_EVENT = f"""
import itertools, os, signal, sys
import outbox_relay.__main__ as entry
count, at, name = itertools.count(1), int(sys.argv[1]), sys.argv[2]
def audit(event, arguments):
    number = next(count)
    if number == at:
        os.kill(os.getpid(), signal.Signals[name])
    if at == 0 and event == "{TAKEN_OVER}":
        print(number, flush=True)
        os._exit(0)
end_at_sigterm = entry._end_at_sigterm
def begin():
    end_at_sigterm()
    sys.addaudithook(audit)
entry._end_at_sigterm = begin
sys.argv[1:] = ["run"]
entry.main()
"""


def started(*, at: int, name: str = "SIGTERM") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", AT_EVENT, str(at), name]
    return subprocess.run(command, env=os.environ | AWAY, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.outside("it starts the command with a hook of its own")
def test_a_relay_that_gets_sigterm_while_it_starts_ends_with_0_or_143_and_without_a_traceback(seed: int) -> None:
    last = int(started(at=0).stdout)
    chance = random.Random(seed)  # noqa: S311 -- reproducible

    drawn = [round(last ** chance.random()) for _ in range(POINTS)]  # as many early ones as late ones
    ends = {at: started(at=at) for at in [1, *drawn, last - 1, last, last + 1]}

    assert [(at, end.returncode) for at, end in ends.items() if end.returncode not in {0, 128 + signal.SIGTERM}] == []
    assert [end.stderr for end in ends.values() if "Traceback" in end.stderr] == []
    assert ends[1].returncode == 128 + signal.SIGTERM


@pytest.mark.outside("it starts the command with a hook of its own")
def test_an_interrupted_import_shows_no_traceback() -> None:
    ended = started(at=1, name="SIGINT")

    assert (ended.returncode, ended.stderr) == (128 + signal.SIGINT, "")
