"""Faults of the consumers."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.faults.nemesis.sessions import ended
from tests.faults.soak.stage import SESSION_TIMEOUT_MS, pause

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

    from tests.faults.soak.stage import Stage

MARGIN_SECONDS = 2.0
TERMINATE = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name LIKE 'consumer %'"


@contextmanager
def consumer_killed(stage: Stage, chance: Random) -> Iterator[None]:
    guard = chance.choice(sorted(stage.consumers))
    member = stage.consumers[guard].pop(0)
    member.kill()
    assert member.wait() == -signal.SIGKILL
    yield
    stage.consumers[guard].append(stage.start_consumer(guard))


@contextmanager
def consumer_joins_and_leaves(stage: Stage, chance: Random) -> Iterator[None]:
    """Partitions are given to others twice."""
    guard = chance.choice(sorted(stage.consumers))
    with stage.start_consumer(guard) as guest:
        guest.wait_for_event("consumer_started")
        yield
        guest.terminate()
        assert guest.wait() == 0


@contextmanager
def consumer_frozen(stage: Stage, chance: Random) -> Iterator[None]:
    """Longer than its session: others take its partitions over, and then it goes on."""
    member = stage.consumers[chance.choice(sorted(stage.consumers))][0]
    member.pause()
    pause(SESSION_TIMEOUT_MS / 1000 + MARGIN_SECONDS)
    yield
    member.resume()


@contextmanager
def consumers_sessions_terminated(stage: Stage, _chance: Random) -> Iterator[None]:
    with ended(stage.inbox, TERMINATE):
        yield


CONSUMER = (consumer_killed, consumer_joins_and_leaves, consumer_frozen, consumers_sessions_terminated)
