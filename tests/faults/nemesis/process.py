"""Faults of the relays' processes."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, get_args

from outbox_relay.relay.failpoints import Point
from tests.faults.nemesis.sessions import holding
from tests.faults.soak.relay import TRANSACTION_SECONDS
from tests.faults.soak.stage import DidNotFire, comes_true, noticed, pause

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

    from tests.faults.soak.relay import Relay
    from tests.faults.soak.stage import Stage

FROZEN_SECONDS = 1.0
STOPPED_AT_ONCE = 128 + signal.SIGTERM
FAILPOINTS = get_args(Point)
LATEST_VISIT = 5


@contextmanager
def relay_killed(stage: Stage, chance: Random) -> Iterator[None]:
    relay = chance.choice(stage.relays)
    relay.signal(signal.SIGKILL)
    assert relay.await_end() == -signal.SIGKILL
    yield
    relay.start()


@contextmanager
def all_relays_killed(stage: Stage, _chance: Random) -> Iterator[None]:
    for relay in stage.relays:
        relay.signal(signal.SIGKILL)
    assert [relay.await_end() for relay in stage.relays] == [-signal.SIGKILL] * len(stage.relays)
    yield
    for relay in stage.relays:
        relay.start()


@contextmanager
def relay_killed_at_a_point(stage: Stage, chance: Random) -> Iterator[None]:
    relay = chance.choice(stage.relays)
    restart(relay, failpoints=f"{chance.choice(FAILPOINTS)}=kill@{chance.randint(1, LATEST_VISIT)}")
    assert relay.await_end() == -signal.SIGKILL
    yield
    relay.start()


@contextmanager
def relay_meets_an_unforeseen_error(stage: Stage, chance: Random) -> Iterator[None]:
    relay = chance.choice(stage.relays)
    try:
        with noticed(relay, "thread_failed"):
            restart(relay, failpoints=f"{chance.choice(FAILPOINTS)}=raise@{chance.randint(1, LATEST_VISIT)}")
            yield
    finally:
        restart(relay)


@contextmanager
def relay_stopped(stage: Stage, chance: Random) -> Iterator[None]:
    relay = chance.choice(stage.relays)
    stop(relay)
    yield
    relay.start()


@contextmanager
def relay_stopped_at_once(stage: Stage, chance: Random) -> Iterator[None]:
    """By a second signal, while it waits for somebody's lock."""
    relay = chance.choice(stage.relays)
    drained = relay.count("relay_draining")
    relay.await_start()
    with holding(stage, "LOCK TABLE outbox_shard IN EXCLUSIVE MODE"):
        comes_true(stage.pipeline.waits_for_lock)
        relay.signal(signal.SIGTERM)
        comes_true(lambda: relay.count("relay_draining") > drained)
        relay.signal(signal.SIGTERM)
        code = relay.await_end()
    yield
    relay.start()
    if code != STOPPED_AT_ONCE:
        raise DidNotFire


@contextmanager
def messages_kept_for_seconds(stage: Stage, chance: Random) -> Iterator[None]:
    """One relay removes what is published as soon as that is possible."""
    relay = chance.choice(stage.relays)
    restart(relay, retention="1")
    before = stage.first_number
    yield
    has_pruned = comes_true(lambda: stage.first_number > before)
    restart(relay)
    if not has_pruned:
        raise DidNotFire


@contextmanager
def relay_frozen(stage: Stage, chance: Random) -> Iterator[None]:
    relay = chance.choice(stage.relays)
    relay.signal(signal.SIGSTOP)
    pause(FROZEN_SECONDS)
    yield
    relay.signal(signal.SIGCONT)


@contextmanager
def relay_frozen_beyond_its_transaction(stage: Stage, chance: Random) -> Iterator[None]:
    relay = chance.choice(stage.relays)
    relay.signal(signal.SIGSTOP)
    pause(TRANSACTION_SECONDS + FROZEN_SECONDS)
    yield
    relay.signal(signal.SIGCONT)


def stop(relay: Relay) -> None:
    relay.await_start()  # before, a signal ends it as it ends any process
    relay.signal(signal.SIGTERM)
    assert relay.await_end() == 0


def restart(relay: Relay, **settings: str) -> None:
    stop(relay)
    relay.start(allow_failpoints="yes", **settings)


PROCESS = (
    relay_killed,
    all_relays_killed,
    relay_killed_at_a_point,
    relay_meets_an_unforeseen_error,
    relay_stopped,
    relay_stopped_at_once,
    messages_kept_for_seconds,
    relay_frozen,
    relay_frozen_beyond_its_transaction,
)
