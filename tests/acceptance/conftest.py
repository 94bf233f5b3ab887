"""What every acceptance test starts from."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.pipeline import Pipeline

if TYPE_CHECKING:
    from outbox_relay.sandbox.kafka import Kafka, KafkaCluster
    from tests.fixtures.postgres import Database


@pytest.fixture
def seed() -> int:
    """Of everything random in a test; pytest -p no:randomly or --randomly-seed repeat it."""
    seed = random.randrange(2**32)  # noqa: S311 -- no secret
    print(f"seed {seed}")  # noqa: T201 -- shown when the test fails
    return seed


@pytest.fixture
def pipeline(database: Database, kafka: Kafka, topic_prefix: str, seed: int) -> Pipeline:
    """A fresh database and fresh topics on the shared servers."""
    pipeline = Pipeline(database, kafka, prefix=topic_prefix, seed=seed)
    pipeline.create_topics()
    return pipeline


@pytest.fixture
def own_kafka_pipeline(database: Database, own_kafka: KafkaCluster, topic_prefix: str, seed: int) -> Pipeline:
    """A fresh database and a broker that this test may stop, kill and restart."""
    pipeline = Pipeline(database, own_kafka, prefix=topic_prefix, seed=seed)
    pipeline.create_topics()
    return pipeline


@pytest.fixture
def own_postgres_pipeline(own_database: Database, kafka: Kafka, topic_prefix: str, seed: int) -> Pipeline:
    """A broker and a database server that this test may stop, kill and restart."""
    pipeline = Pipeline(own_database, kafka, prefix=topic_prefix, seed=seed)
    pipeline.create_topics()
    return pipeline
