"""
Everything at work while everything fails, by a schedule from a seed: nothing is lost, no effect comes twice.

RELAY_SOAK_SECONDS, RELAY_SOAK_SEEDS and RELAY_SOAK_FAULTS say for how long, from which seeds and with which faults;
`make soak` sets them. A soak leaves its report and the relays' logs in build/soak, and one that fails its history too.
RELAY_SOAK_DATABASE_URL and KAFKA_BOOTSTRAP_SERVERS name servers to use instead of its own.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from outbox_relay.sandbox.kafka import Kafka
from tests.faults.nemesis import FAULTS, OF_OWN_SERVERS
from tests.faults.soak.artefacts import kept
from tests.faults.soak.databases import GivenServer, databases
from tests.faults.soak.relay import STATEMENT_SECONDS, TRANSACTION_SECONDS
from tests.faults.soak.report import lines, report_of
from tests.faults.soak.run import Soak, soak
from tests.faults.soak.stage import staged
from tests.fixtures.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator

    from outbox_relay.sandbox.kafka import KafkaCluster
    from outbox_relay.sandbox.postgres import PostgresServer
    from tests.faults.soak.stage import Stage

    Servers = tuple[PostgresServer, Kafka]

_log = logging.getLogger("soak")

SECONDS = float(os.environ.get("RELAY_SOAK_SECONDS", "120"))
SEEDS = [int(seed) for seed in os.environ.get("RELAY_SOAK_SEEDS", "1,2,3").split(",")]
DATABASE = os.environ.get("RELAY_SOAK_DATABASE_URL", "")
POSSIBLE = FAULTS.keys() - (OF_OWN_SERVERS if DATABASE else set())
CHOSEN = set(filter(None, os.environ.get("RELAY_SOAK_FAULTS", "").split(","))) or POSSIBLE
LAYOUTS = "partitioned", "outbox"
DIRECTORY = Path(__file__).parents[2] / "build" / "soak"
SLACK_SECONDS = 300.0


if DATABASE:

    @pytest.fixture
    def servers() -> Servers:
        return GivenServer(DATABASE), Kafka(os.environ["KAFKA_BOOTSTRAP_SERVERS"])

else:

    @pytest.fixture
    def servers(own_postgres: PostgresServer, own_kafka: KafkaCluster) -> Servers:
        return own_postgres, own_kafka


@pytest.fixture
def stage(servers: Servers, seed: int, layout: str) -> Iterator[Stage]:
    server, kafka = servers
    with databases(server, layout=layout) as (database, inbox):
        pipeline = Pipeline(database, kafka, prefix=f"soak-{seed}.", seed=seed)
        pipeline.create_topics()
        with staged(pipeline, inbox=inbox) as stage:
            yield stage


@pytest.mark.kafka
@pytest.mark.slow
@pytest.mark.timeout(SECONDS + SLACK_SECONDS)
@pytest.mark.parametrize(("seed", "layout"), [(seed, LAYOUTS[seed % 2]) for seed in SEEDS])
def test_a_soak_breaks_no_promise(seed: int, stage: Stage) -> None:
    directory, result = DIRECTORY / f"seed-{seed}", Soak()
    with kept(stage, result, directory=directory):
        soak(stage, result, faults=CHOSEN, seed=seed, seconds=SECONDS, tell=_log.info)
        report = report_of(result, seed=seed, seconds=SECONDS)
        (directory / "report.md").write_text("\n".join(lines(report)))
        assert report.verdict.broken_promises() == {}
        assert report.not_recovered == []
        assert report.never_fired == []
        assert report.found_skipped == report.skipped
        assert report.oldest_transaction_seconds < TRANSACTION_SECONDS + STATEMENT_SECONDS
