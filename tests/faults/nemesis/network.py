"""Faults of the network between PostgreSQL and those who use it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.faults.soak.stage import DidNotFire, comes_true
from tests.fixtures.pipeline import COMMIT_OF_MARKS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from random import Random

    from tests.faults.soak.stage import Stage
    from tests.fixtures.proxy import Fault, TcpProxy

WRITERS_COMMIT = b"COMMIT\x00"


@contextmanager
def relay_cut_off(stage: Stage, chance: Random) -> Iterator[None]:
    network = chance.choice(stage.relays).network
    with counted(network, "cut"):
        network.cut(refuse=True)
        yield
        network.heal()


@contextmanager
def relay_in_a_black_hole(stage: Stage, chance: Random) -> Iterator[None]:
    """Connections stay open and nothing comes through: the hosts learn of it by their time-outs only."""
    network = chance.choice(stage.relays).network
    with counted(network, "blackholed"):
        network.blackhole()
        yield
        network.heal()


@contextmanager
def commit_of_marks_lost(stage: Stage, chance: Random) -> Iterator[None]:
    network = chance.choice(stage.relays).network
    with sprung(network, network.cut_before, COMMIT_OF_MARKS, "cut_before"):
        yield


@contextmanager
def answer_to_commit_of_marks_lost(stage: Stage, chance: Random) -> Iterator[None]:
    network = chance.choice(stage.relays).network
    with sprung(network, network.swallow_reply_to, COMMIT_OF_MARKS, "swallowed"):
        yield


@contextmanager
def commit_of_a_writer_lost(stage: Stage, _chance: Random) -> Iterator[None]:
    network = stage.writers_network
    with sprung(network, network.cut_before, WRITERS_COMMIT, "cut_before"):
        yield


@contextmanager
def answer_to_commit_of_a_writer_lost(stage: Stage, _chance: Random) -> Iterator[None]:
    network = stage.writers_network
    with sprung(network, network.swallow_reply_to, WRITERS_COMMIT, "swallowed"):
        yield


@contextmanager
def writers_cut_off(stage: Stage, _chance: Random) -> Iterator[None]:
    with counted(stage.writers_network, "cut"):
        stage.writers_network.cut(refuse=True)
        yield
        stage.writers_network.heal()


@contextmanager
def counted(network: TcpProxy, fault: Fault) -> Iterator[None]:
    before = network.fired[fault]
    yield
    if network.fired[fault] == before:
        raise DidNotFire


@contextmanager
def sprung(network: TcpProxy, lay_trap: Callable[[bytes], None], pattern: bytes, fault: Fault) -> Iterator[None]:
    """Lay a trap, and wait until somebody has sprung it."""
    before = network.fired[fault]
    lay_trap(pattern)
    yield
    has_sprung = comes_true(lambda: network.fired[fault] > before)
    network.heal()
    if not has_sprung:
        raise DidNotFire


NETWORK = (
    relay_cut_off,
    relay_in_a_black_hole,
    commit_of_marks_lost,
    answer_to_commit_of_marks_lost,
    commit_of_a_writer_lost,
    answer_to_commit_of_a_writer_lost,
    writers_cut_off,
)
