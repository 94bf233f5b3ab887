"""Faults of the broker."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.faults.soak.relay import DEADLINE_SECONDS
from tests.faults.soak.stage import noticed, pause

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

    from tests.faults.soak.stage import Stage

MARGIN_SECONDS = 2.0


@contextmanager
def kafka_killed(stage: Stage, _chance: Random) -> Iterator[None]:
    stage.broker.kill()
    yield
    stage.broker.restart()


@contextmanager
def kafka_stopped(stage: Stage, _chance: Random) -> Iterator[None]:
    stage.broker.stop()
    yield
    stage.broker.restart()


@contextmanager
def kafka_slow(stage: Stage, _chance: Random) -> Iterator[None]:
    """The broker answers again before anybody has given up on it."""
    stage.broker.pause()
    pause(DEADLINE_SECONDS / 2)
    stage.broker.resume()
    yield


@contextmanager
def kafka_silent(stage: Stage, _chance: Random) -> Iterator[None]:
    """Connections stay open, and no answer comes before the deadline."""
    stage.broker.pause()
    try:
        with noticed(stage, "kafka_lost"):
            pause(DEADLINE_SECONDS + MARGIN_SECONDS)
            yield
    finally:
        stage.broker.resume()


KAFKA = (kafka_killed, kafka_stopped, kafka_slow, kafka_silent)
