"""Members of a group come, go and freeze under load: what they have done is told in time, and no effect is doubled."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import confluent_kafka
import pytest
from confluent_kafka import KafkaError, KafkaException
from psycopg.conninfo import make_conninfo

from tests.fixtures.consumer_process import Options, consumer_process, guards
from tests.fixtures.ledger import Desk, numbered, once, publish, running
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from outbox_relay.relay.message import Message as Published
    from outbox_relay.sandbox.kafka import Kafka
    from tests.fixtures.consumer_process import Guard
    from tests.fixtures.kafka import CreateTopic
    from tests.fixtures.ledger import Ledger

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

REBALANCES = 8
WAIT_SECONDS = 60.0
SHORTEST_SESSION = {"session_timeout_ms": 6000, "max_poll_interval_ms": 6000, "heartbeat_interval_ms": 200}


@pytest.fixture
def desk(kafka: Kafka, ledger: Ledger, topic: CreateTopic) -> Desk:
    return Desk(kafka, ledger, topic("deposits", partitions=8))


@pytest.mark.parametrize("protocol", ["range", "cooperative-sticky"])
def test_members_that_come_and_go_under_load_repeat_nothing(desk: Desk, protocol: str) -> None:
    config = desk.config(partition_assignment_strategy=protocol, **SHORTEST_SESSION)
    joining = Desk(desk.kafka, desk.ledger, desk.topic)
    messages: list[Published] = []
    is_over = threading.Event()

    def keep_publishing() -> None:
        while not is_over.is_set():
            more = numbered(20, keys=200, first=len(messages) + 1)
            publish(desk.kafka, desk.topic, more)
            messages.extend(more)

    with ThreadPoolExecutor(1) as thread, running(desk.consumer(config=config, batch_messages=2)):
        publishing = thread.submit(keep_publishing)
        try:
            for turn in range(1, REBALANCES + 1):
                with running(joining.consumer(config=config, batch_messages=2)):
                    eventually(lambda: joining.reports.total.get("processed", 0) > 10 * turn)  # noqa: B023 -- at once
        finally:
            is_over.set()
        publishing.result()
        desk.await_consumed(len(messages), timeout=WAIT_SECONDS)
    assert desk.ledger.excess(once(messages)) == {}
    assert Counter(desk.reports.total) + Counter(joining.reports.total) == {"processed": len(messages)}


class RefusedUntilRevoked(confluent_kafka.Consumer):
    """Tells Kafka no offset before its partitions are taken away, as if a rebalance were going on all the time."""

    refused = 0
    is_revoked = False

    def subscribe(  # type: ignore[override]
        self, topics: list[str], *, on_revoke: Callable[..., None], on_lost: Callable[..., None]
    ) -> None:
        def revoke(*arguments: object) -> None:
            self.is_revoked = True
            on_revoke(*arguments)

        super().subscribe(topics, on_revoke=revoke, on_lost=on_lost)

    def commit(self, **offsets: object) -> object:  # type: ignore[override]
        if not self.is_revoked:
            RefusedUntilRevoked.refused += 1
            raise KafkaException(KafkaError(KafkaError.REBALANCE_IN_PROGRESS))
        return super().commit(**offsets)  # type: ignore[call-overload]


@pytest.mark.parametrize("protocol", ["range", "cooperative-sticky"])
def test_offsets_that_a_rebalance_refused_are_committed_before_the_partitions_go(
    desk: Desk, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = desk.config(partition_assignment_strategy=protocol, **SHORTEST_SESSION)
    joining = Desk(desk.kafka, desk.ledger, desk.topic)
    messages = numbered(200, keys=40)
    publish(desk.kafka, desk.topic, messages)

    def joins() -> bool:
        more = numbered(10, keys=40, first=len(messages) + 1)
        publish(desk.kafka, desk.topic, more)
        messages.extend(more)
        return joining.reports.total.get("processed", 0) > 0

    monkeypatch.setattr(RefusedUntilRevoked, "refused", 0)
    with monkeypatch.context() as patch:
        patch.setattr(confluent_kafka, "Consumer", RefusedUntilRevoked)
        first = desk.consumer(config=config)
        stop = threading.Event()
        with ThreadPoolExecutor(1) as thread:
            run = thread.submit(first.run, stop)
            try:
                desk.ledger.await_balances(once(messages), timeout=WAIT_SECONDS)
                patch.undo()
                with running(joining.consumer(config=config)):
                    eventually(joins, timeout=WAIT_SECONDS)
                    desk.await_consumed(len(messages), timeout=WAIT_SECONDS)
            finally:
                stop.set()
            run.result()
    assert RefusedUntilRevoked.refused > 0
    assert Counter(desk.reports.total) + Counter(joining.reports.total) == {"processed": len(messages)}
    assert desk.ledger.excess(once(messages)) == {}


@pytest.mark.parametrize(("guard", "is_doubled"), [("inbox", False), ("offsets", False), ("nothing", True)])
def test_a_member_frozen_in_mid_batch_that_goes_on_has_no_second_effect_and_moves_no_offset_back(
    desk: Desk, guard: Guard, *, is_doubled: bool
) -> None:
    messages = numbered(100)
    config = desk.config(**SHORTEST_SESSION)
    dsn = make_conninfo(desk.ledger.dsn, application_name="zombie")
    options = Options(config=config, topics=desk.topics, dsn=dsn, guard=guard)
    with consumer_process(options) as zombie:
        with desk.ledger.database.connect() as barrier:
            barrier.execute("LOCK TABLE account IN EXCLUSIVE MODE")
            publish(desk.kafka, desk.topic, messages)
            eventually(lambda: desk.ledger.waiting() == 1, message="the member is not in its batch")
            zombie.pause()
            barrier.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'zombie'")
        with running(desk.consumer(config=config, **guards(guard))):
            desk.await_consumed(100, timeout=WAIT_SECONDS)
            zombie.resume()
            zombie.terminate()
            assert zombie.wait() == 0
            assert desk.committed() == 100
    assert bool(desk.ledger.excess(once(messages))) is is_doubled
