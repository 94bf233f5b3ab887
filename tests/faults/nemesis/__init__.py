"""
The nemesis: the faults that strike in a soak, by where they strike.

A fault is a context: it strikes on entering, lasts as long as its body, is healed on leaving, and raises `DidNotFire`
then if there is no sign that it did anything. Whatever else it raises fails the soak.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from random import Random

from tests.faults.nemesis import consumer, kafka, network, operator, postgres, process, tables
from tests.faults.soak.stage import Stage

Fault = Callable[[Stage, Random], AbstractContextManager[None]]

FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        *process.PROCESS,
        *postgres.POSTGRES,
        *tables.TABLES,
        *network.NETWORK,
        *kafka.KAFKA,
        *operator.OPERATOR,
        *consumer.CONSUMER,
    )
}

# Those that can strike in the middle of another one, with where they strike: they wait for nothing that it has stopped.
PAIRABLE: dict[str, str] = {
    fault.__name__: fault.__module__
    for fault in (
        process.relay_killed,
        process.all_relays_killed,
        process.relay_frozen,
        process.relay_frozen_beyond_its_transaction,
        postgres.postgres_crashed,
        postgres.postgres_killed,
        network.relay_cut_off,
        network.relay_in_a_black_hole,
        kafka.kafka_killed,
        kafka.kafka_slow,
        consumer.consumer_killed,
    )
}

# Those that take servers which a soak has started itself.
OF_OWN_SERVERS = frozenset(
    fault.__name__
    for fault in (
        postgres.postgres_restarted,
        postgres.postgres_crashed,
        postgres.postgres_killed,
        *kafka.KAFKA,
    )
)
