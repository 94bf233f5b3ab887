"""The consuming loop on a real broker and a real database: batches, failures, poison and where reading goes on."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import confluent_kafka
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay.consumer import Inbox, SequenceInbox
from outbox_relay.consumer.kafka import BatchReport, Offsets, Poison
from outbox_relay.errors import ForeignRecord, PoisonMessage, SchemaMismatch
from outbox_relay.transactions import Retry
from tests.fixtures.ledger import AcceptsEverything, Desk, Ledger, deposit, numbered, once, publish, running
from tests.fixtures.proxy import TcpProxy
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from psycopg import Connection

    from outbox_relay.consumer import Message
    from outbox_relay.sandbox.kafka import Kafka, KafkaCluster
    from tests.fixtures.kafka import CreateTopic

pytestmark = pytest.mark.kafka


@pytest.fixture
def desk(kafka: Kafka, ledger: Ledger, topic: CreateTopic) -> Desk:
    return Desk(kafka, ledger, topic("deposits", partitions=1))


@pytest.fixture
def wide_desk(kafka: Kafka, ledger: Ledger, topic: CreateTopic) -> Desk:
    return Desk(kafka, ledger, topic("deposits", partitions=4))


class Failing:
    """A handler that fails on one message, so many times."""

    def __init__(self, message_id: str, *, times: int) -> None:
        self.calls: list[list[str]] = []
        self._guilty = message_id
        self._times = times

    def __call__(self, connection: Connection[Any], messages: Sequence[Message]) -> None:
        ids = [str(message.message_id) for message in messages]
        self.calls.append(ids)
        deposit(connection, messages)
        if self._guilty in ids and self._times:
            self._times -= 1
            raise ArithmeticError("the account is closed")


def test_everything_has_its_effect_and_its_offset_is_committed(desk: Desk) -> None:
    messages = numbered(1200)
    publish(desk.kafka, desk.topic, messages)
    with running(desk.consumer()):
        desk.ledger.await_balances(once(messages))
    assert desk.committed() == 1200
    assert desk.reports.total == {"processed": 1200}


def test_a_batch_holds_no_more_than_it_may(desk: Desk) -> None:
    messages = numbered(100)
    publish(desk.kafka, desk.topic, messages)
    handle = Failing("nobody", times=0)
    with running(desk.consumer(batch_messages=30, handle=handle)):
        desk.ledger.await_balances(once(messages))
    assert max(len(ids) for ids in handle.calls) == 30


def test_one_record_at_a_time_can_be_asked_for(desk: Desk) -> None:
    messages = numbered(20)
    publish(desk.kafka, desk.topic, messages)
    with running(desk.consumer(batch_messages=1)):
        desk.ledger.await_balances(once(messages))
    assert desk.reports.batches == [BatchReport(processed=1)] * 20


def test_later_deliveries_are_counted_and_have_no_effect(desk: Desk) -> None:
    messages = numbered(10, keys=1)
    publish(desk.kafka, desk.topic, [*messages, *messages[:4]])
    with running(desk.consumer(inbox=SequenceInbox("billing"), batch_messages=10)):
        eventually(lambda: len(desk.reports.batches) == 2)
    assert desk.reports.total == {"processed": 10, "stale": 4}
    assert desk.ledger.balances() == once(messages)


def test_only_the_guilty_message_fails_and_is_tried_again(desk: Desk) -> None:
    messages = numbered(50)
    publish(desk.kafka, desk.topic, messages)
    handle = Failing(messages[20].message_id, times=2)  # in the batch, and once alone
    with running(desk.consumer(handle=handle)):
        desk.ledger.await_balances(once(messages))
    assert handle.calls.count([messages[20].message_id]) == 2
    assert desk.reports.total == {"processed": 50}
    assert desk.committed() == 50


def test_poison_ends_the_loop_and_all_before_it_is_committed(desk: Desk) -> None:
    messages = numbered(50)
    publish(desk.kafka, desk.topic, messages)
    guilty = messages[20].message_id
    consumer = desk.consumer(handle=Failing(guilty, times=99))
    with pytest.raises(PoisonMessage) as raised:
        consumer.run(threading.Event())
    assert str(raised.value).startswith(
        f"message {guilty} at offset 20 of {desk.topic}[0] failed in 3 attempts: ArithmeticError"
    )
    assert isinstance(raised.value.__cause__, ArithmeticError)
    assert desk.ledger.balances() == once(messages[:20])
    assert desk.committed() == 20


def test_poison_is_put_aside_in_a_transaction_of_its_own_and_the_rest_goes_on(desk: Desk) -> None:
    messages = numbered(50)
    publish(desk.kafka, desk.topic, [*messages, messages[20]])
    poisons: list[Poison] = []

    def put_aside(connection: Connection[Any], poison: Poison) -> None:
        poisons.append(poison)
        connection.execute("INSERT INTO account VALUES ('put aside', 1)")

    handle = Failing(messages[20].message_id, times=99)
    with running(desk.consumer(handle=handle, on_poison=put_aside, batch_messages=50)):
        eventually(lambda: desk.committed() == 51)
    [poison] = poisons
    assert poison.message is not None
    assert (str(poison.message.message_id), poison.record.offset(), poison.attempts) == (messages[20].message_id, 20, 3)
    assert isinstance(poison.error, ArithmeticError)
    assert desk.ledger.balances() == {**once([*messages[:20], *messages[21:]]), "put aside": 1}
    assert desk.reports.total == {"processed": 49, "poisoned": 1, "duplicates": 1}
    assert desk.ledger.rows("inbox_message") == 50


def test_an_on_poison_that_fails_ends_the_loop_and_leaves_nothing(desk: Desk) -> None:
    messages = numbered(3)
    publish(desk.kafka, desk.topic, messages)

    def fail(connection: Connection[Any], _poison: Poison) -> None:
        connection.execute("INSERT INTO account VALUES ('put aside', 1)")
        raise OSError("no dead letters today")

    consumer = desk.consumer(handle=Failing(messages[1].message_id, times=99), on_poison=fail)
    with pytest.raises(OSError, match="no dead letters today"):
        consumer.run(threading.Event())
    assert desk.ledger.balances() == once(messages[:1])
    assert (desk.committed(), desk.ledger.rows("inbox_message")) == (1, 1)


def publish_foreign(desk: Desk) -> None:
    producer = confluent_kafka.Producer({"bootstrap.servers": desk.kafka.bootstrap_servers})
    producer.produce(desk.topic, b"hello", b"key")
    assert producer.flush(10) == 0


def test_a_foreign_record_ends_the_loop_at_once(desk: Desk) -> None:
    messages = numbered(3)
    publish(desk.kafka, desk.topic, messages)
    publish_foreign(desk)
    with pytest.raises(PoisonMessage, match=r"^offset 3 of .* failed in 1 attempts: ForeignRecord"):
        desk.consumer().run(threading.Event())
    assert desk.ledger.balances() == once(messages)
    assert desk.committed() == 3


def test_a_foreign_record_is_handed_over_as_it_came(desk: Desk) -> None:
    publish_foreign(desk)
    messages = numbered(3)
    publish(desk.kafka, desk.topic, messages)
    poisons: list[Poison] = []
    with running(desk.consumer(on_poison=lambda _connection, poison: poisons.append(poison))):
        desk.ledger.await_balances(once(messages))
    [poison] = poisons
    assert (poison.message, poison.record.value(), poison.attempts) == (None, b"hello", 1)
    assert isinstance(poison.error, ForeignRecord)


def test_other_partitions_flow_while_a_failed_message_waits(wide_desk: Desk) -> None:
    messages = numbered(200, keys=40)
    publish(wide_desk.kafka, wide_desk.topic, messages)
    handle = Failing(messages[0].message_id, times=99)
    retry = Retry(attempts=2, base_seconds=3600, cap_seconds=3600)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(wide_desk.consumer(handle=handle, retry=retry).run, stop)
        eventually(lambda: wide_desk.reports.total.get("processed", 0) > 100)
        more = numbered(200, keys=40, first=201)
        publish(wide_desk.kafka, wide_desk.topic, more)
        eventually(lambda: wide_desk.reports.total["processed"] > 250)
        stop.set()
        run.result(timeout=30)  # the pause would be an hour


def test_missing_tables_end_the_loop(desk: Desk) -> None:
    publish(desk.kafka, desk.topic, numbered(3))
    consumer = desk.consumer(inbox=Inbox("billing", schema="elsewhere"), on_poison=lambda *_: None)
    with pytest.raises(SchemaMismatch, match="inbox"):
        consumer.run(threading.Event())


def test_the_member_stays_in_its_group_while_the_database_is_away(desk: Desk) -> None:
    shortest = {"session_timeout_ms": 6000, "max_poll_interval_ms": 6000, "heartbeat_interval_ms": 500}
    rebalances: list[int] = []
    messages = numbered(100)
    with TcpProxy("127.0.0.1", desk.ledger.database.server.port) as proxy:
        behind_proxy = make_conninfo(desk.ledger.dsn, port=proxy.port, connect_timeout=2)
        config = desk.config(**shortest, statistics_interval_ms=200)
        config["stats_cb"] = lambda text: rebalances.append(rebalances_in(text))
        with running(desk.consumer(config=config, connect=partial(psycopg.connect, behind_proxy))):
            publish(desk.kafka, desk.topic, messages[:50])
            desk.ledger.await_balances(once(messages[:50]))
            eventually(lambda: rebalances and rebalances[-1] > 0)
            before = rebalances[-1]
            proxy.cut(refuse=True)
            away_at = time.monotonic()
            publish(desk.kafka, desk.topic, messages[50:])
            eventually(lambda: time.monotonic() - away_at > 8 and proxy.fired["refused"] > 10)
            proxy.heal()
            desk.ledger.await_balances(once(messages))
            assert rebalances[-1] == before
    assert desk.reports.total == {"processed": 100}
    assert desk.committed() == 100


def rebalances_in(statistics: str) -> int:
    """How often the group has changed, as librdkafka counts."""
    return int(json.loads(statistics).get("cgrp", {}).get("rebalance_cnt", 0))


def test_the_loop_stops_while_the_database_is_away(desk: Desk) -> None:
    publish(desk.kafka, desk.topic, numbered(3))
    has_tried = threading.Event()

    def connect() -> Connection[Any]:
        has_tried.set()
        return psycopg.connect(host="127.0.0.1", port=1)

    retry = Retry(base_seconds=3600, cap_seconds=3600)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(desk.consumer(connect=connect, retry=retry).run, stop)
        assert has_tried.wait(30)
        stop.set()
        run.result(timeout=30)  # the pause would be an hour


@pytest.mark.parametrize(
    "protocol",
    [
        {"partition_assignment_strategy": "range"},
        {"partition_assignment_strategy": "cooperative-sticky"},
        {"group_protocol": "consumer"},
    ],
    ids=lambda settings: next(iter(settings.values())),
)
def test_partitions_move_to_a_member_that_joins_and_back_when_it_leaves(
    wide_desk: Desk, protocol: dict[str, str]
) -> None:
    config = wide_desk.config(**protocol)
    messages = numbered(300, keys=40)
    joining = Desk(wide_desk.kafka, wide_desk.ledger, wide_desk.topic)
    with running(wide_desk.consumer(config=config)):
        publish(wide_desk.kafka, wide_desk.topic, messages[:100])
        wide_desk.ledger.await_balances(once(messages[:100]))
        with running(joining.consumer(config=config)):
            for number in range(100, 200):
                publish(wide_desk.kafka, wide_desk.topic, messages[number : number + 1])
                if joining.reports.batches:
                    break
            publish(wide_desk.kafka, wide_desk.topic, messages[number + 1 : 200])
            wide_desk.ledger.await_balances(once(messages[:200]))
        publish(wide_desk.kafka, wide_desk.topic, messages[200:])
        wide_desk.ledger.await_balances(once(messages))
    assert joining.reports.total["processed"] > 0
    total = Counter(wide_desk.reports.total) + Counter(joining.reports.total)
    assert total == {"processed": 300}
    assert wide_desk.committed() == 300


def test_a_partition_that_is_held_back_flows_again_after_a_rebalance(desk: Desk) -> None:
    config = desk.config(partition_assignment_strategy="range")
    messages = numbered(20)
    publish(desk.kafka, desk.topic, messages)
    handle = Failing(messages[10].message_id, times=2)  # in the batch, and once alone
    patient = Retry(base_seconds=3600, cap_seconds=3600)
    with running(desk.consumer(config=config, handle=handle, retry=patient)):
        desk.await_consumed(10)
        with running(desk.consumer(config=config, handle=handle, retry=patient)):
            desk.ledger.await_balances(once(messages))
    assert desk.reports.total == {"processed": 20}


def test_the_loop_goes_on_when_the_broker_is_back(own_kafka: KafkaCluster, ledger: Ledger, topic_prefix: str) -> None:
    desk = Desk(own_kafka, ledger, f"{topic_prefix}deposits")
    own_kafka.create_topic(desk.topic)
    messages = numbered(100)
    with running(desk.consumer()):
        publish(own_kafka, desk.topic, messages[:50])
        ledger.await_balances(once(messages[:50]))
        own_kafka.kill()
        own_kafka.restart()
        publish(own_kafka, desk.topic, messages[50:])
        ledger.await_balances(once(messages), timeout=40)
    assert ledger.excess(once(messages)) == {}


class TestOffsetsInTheDatabase:
    def test_they_decide_where_reading_goes_on(self, desk: Desk) -> None:
        messages = numbered(30)
        publish(desk.kafka, desk.topic, messages)
        with desk.ledger.database.connect() as connection:
            connection.execute("INSERT INTO inbox_offset VALUES ('billing', %s, 0, 10)", [desk.topic])
        desk.commit(20)
        with running(desk.consumer(inbox=AcceptsEverything(), offsets=Offsets("billing"))):
            desk.ledger.await_balances(once(messages[10:]))
        assert desk.reports.total == {"processed": 20}
        assert self.kept(desk) == [(0, 30)]
        assert desk.committed() == 30

    def test_a_partition_without_new_records_is_read_again_from_there(self, desk: Desk) -> None:
        messages = numbered(30)
        publish(desk.kafka, desk.topic, messages)
        with desk.ledger.database.connect() as connection:
            connection.execute("INSERT INTO inbox_offset VALUES ('billing', %s, 0, 25)", [desk.topic])
        desk.commit(30)
        with running(desk.consumer(inbox=AcceptsEverything(), offsets=Offsets("billing"))):
            desk.ledger.await_balances(once(messages[25:]))

    def test_a_first_reading_begins_where_kafka_says(self, wide_desk: Desk) -> None:
        messages = numbered(100, keys=40)
        publish(wide_desk.kafka, wide_desk.topic, messages)
        with running(wide_desk.consumer(inbox=AcceptsEverything(), offsets=Offsets("billing"))):
            wide_desk.ledger.await_balances(once(messages))
        kept = self.kept(wide_desk)
        assert [partition for partition, _ in kept] == [0, 1, 2, 3]
        assert sum(offset for _, offset in kept) == 100

    def test_a_batch_is_rolled_back_when_somebody_else_has_moved_them(self, desk: Desk) -> None:
        messages = numbered(30)
        publish(desk.kafka, desk.topic, messages[:10])
        with running(desk.consumer(inbox=AcceptsEverything(), offsets=Offsets("billing"))):
            desk.ledger.await_balances(once(messages[:10]))
            with desk.ledger.database.connect() as connection:
                connection.execute("UPDATE inbox_offset SET next_offset = 5")
            publish(desk.kafka, desk.topic, messages[10:])
            desk.ledger.await_balances(once([*messages, *messages[5:10]]))
        assert self.kept(desk) == [(0, 30)]

    def test_poison_moves_them_too(self, desk: Desk) -> None:
        messages = numbered(3)
        publish(desk.kafka, desk.topic, messages)
        publish_foreign(desk)
        consumer = desk.consumer(
            handle=Failing(messages[1].message_id, times=99),
            on_poison=lambda *_: None,
            offsets=Offsets("billing"),
        )
        with running(consumer):
            eventually(lambda: self.kept(desk) == [(0, 4)])
        assert desk.reports.total == {"processed": 2, "poisoned": 2}

    def test_consumers_do_not_see_each_others(self, desk: Desk) -> None:
        messages = numbered(3)
        publish(desk.kafka, desk.topic, messages)
        with desk.ledger.database.connect() as connection:
            connection.execute("INSERT INTO inbox_offset VALUES ('shipping', %s, 0, 3)", [desk.topic])
        with running(desk.consumer(offsets=Offsets("billing"))):
            desk.ledger.await_balances(once(messages))

    @staticmethod
    def kept(desk: Desk) -> list[tuple[int, int]]:
        with desk.ledger.database.connect() as connection:
            query = "SELECT partition, next_offset FROM inbox_offset WHERE consumer = 'billing' ORDER BY partition"
            return [(partition, offset) for partition, offset in connection.execute(query)]
