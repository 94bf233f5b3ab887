"""The network between the relay and PostgreSQL breaks in ways that nobody is told of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from psycopg.conninfo import make_conninfo

from tests.fixtures.load import Plan
from tests.fixtures.pipeline import flaws, most_in_hand, short_times
from tests.fixtures.proxy import TcpProxy
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fixtures.pipeline import Pipeline

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

LANES = 2
BATCH_SIZE = 500
STINT = most_in_hand(batch_size=BATCH_SIZE)
SHORT_TIMES = short_times(publish_deadline=2)
NOTICED_AFTER_MS = 3000  # half a minute unless the connection string says otherwise
PLAN = Plan(writers=6, bulk_rows=100)


@pytest.fixture
def network(pipeline: Pipeline) -> Iterator[TcpProxy]:
    with TcpProxy("127.0.0.1", pipeline.database.server.port) as proxy:
        yield proxy


def test_a_host_that_vanished_loses_its_locks_and_comes_back_by_itself(pipeline: Pipeline, network: TcpProxy) -> None:
    far_dsn = make_conninfo(
        pipeline.database.relay_dsn,
        port=network.port,
        application_name="far",
        tcp_user_timeout=NOTICED_AFTER_MS,
        connect_timeout=2,
    )
    sizes = {"lanes": LANES, "batch_size": BATCH_SIZE}
    with (
        pipeline.relays(1, database_url=far_dsn, **sizes, **SHORT_TIMES) as [far],
        pipeline.relays(1, **sizes, **SHORT_TIMES),
    ):
        with pipeline.load(PLAN) as load:
            pipeline.strike_in_transaction(network.blackhole, undo=network.heal, of="far")
            far.wait_for_event("database_lost")
            eventually(lambda: not pipeline.open_transactions(of="far"), message="the far relay keeps its locks")
            load.await_more(500)
        pipeline.await_settled()
        network.heal()
        far.wait_for_event("database_recovered")
        assert network.fired["blackholed"] >= LANES
    verdict = pipeline.judge(load.writes)
    assert flaws(verdict).keys() <= {"duplicated"}
    assert len(verdict.duplicated) <= LANES * STINT


def test_a_slow_network_repeats_and_overtakes_nothing(pipeline: Pipeline, network: TcpProxy) -> None:
    far_dsn = make_conninfo(pipeline.database.relay_dsn, port=network.port)
    with pipeline.relays(1, database_url=far_dsn) as [relay]:
        network.slow_down(seconds=0.1)
        with pipeline.load(PLAN) as load:
            load.await_more(1_000)
        pipeline.await_settled()
        assert network.fired["delayed"] > 0
        assert relay.events_named("database_lost", "claim_conflicted") == []
    assert flaws(pipeline.judge(load.writes)) == {}
