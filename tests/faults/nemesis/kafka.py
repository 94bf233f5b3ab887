"""Faults of the broker."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.faults.soak.relay import DEADLINE_SECONDS
from tests.faults.soak.stage import DidNotFire, comes_true, pause

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
    lost = stage.count("kafka_lost")
    stage.broker.pause()
    pause(DEADLINE_SECONDS + MARGIN_SECONDS)
    yield
    is_noticed = comes_true(lambda: stage.count("kafka_lost") > lost)
    stage.broker.resume()
    if not is_noticed:
        raise DidNotFire


KAFKA = (kafka_killed, kafka_stopped, kafka_slow, kafka_silent)
