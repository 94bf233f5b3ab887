"""What the services run on: databases, topics, and for each service two processes, itself and its relay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from examples.parts import create_database, relay, service
from examples.saga import orders
from examples.saga.messages import REPLIES, commands_for
from examples.saga.participant import STEP_SCHEMA
from examples.saga.service import PARTICIPANTS, TOPIC_TEMPLATE, topic

if TYPE_CHECKING:
    from collections.abc import Mapping

    from examples.parts import Process
    from outbox_relay.sandbox.kafka import Kafka
    from outbox_relay.sandbox.mock_cluster import MockCluster

SCHEMAS: Final[Mapping[str, str]] = {
    "orders": orders.SCHEMA,
    **{name: STEP_SCHEMA + participant.schema for name, participant in PARTICIPANTS.items()},
}
"""The tables of each service's own, besides an outbox and an inbox."""

PARTITIONS = 3


def create_databases(server: str, *, prefix: str = "saga_") -> dict[str, str]:
    """Create a database for each service at the *server* of this connection string, and give theirs."""
    return {name: create_database(server, prefix + name, schema=schema) for name, schema in SCHEMAS.items()}


def create_topics(kafka: Kafka | MockCluster) -> None:
    """Create a topic for the commands of each service, and one for all replies."""
    for aggregate_type in (REPLIES, *map(commands_for, PARTICIPANTS)):
        kafka.create_topic(topic(aggregate_type), partitions=PARTITIONS)


def processes(databases: Mapping[str, str], *, bootstrap_servers: str) -> dict[str, Process]:
    """Give every process by its name: each service, its relay, and the timer of the orders service."""
    services = {
        name: service("examples.saga", name, database=database, bootstrap_servers=bootstrap_servers)
        for name, database in {**databases, "timer": databases["orders"]}.items()
    }
    relays = {
        f"{name} relay": relay(database, bootstrap_servers=bootstrap_servers, topic_template=TOPIC_TEMPLATE)
        for name, database in databases.items()
    }
    return services | relays
