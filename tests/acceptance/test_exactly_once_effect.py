"""
Each message has one effect, judged from the balances of the consumer's database.

The same faults without a guard, or with one that cannot see them, double the balances: so the judge is not blind.
"""

from __future__ import annotations

import signal
from functools import partial
from typing import TYPE_CHECKING, Literal

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay.sandbox.history import Outcome
from tests.fixtures.consumer_process import Options, consumer_process, guards
from tests.fixtures.ledger import Desk, balances_after, deposit, numbered, once, publish, running
from tests.fixtures.load import Plan
from tests.fixtures.proxy import TcpProxy
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from psycopg import Connection

    from outbox_relay.consumer import Message
    from outbox_relay.sandbox.kafka import Kafka
    from tests.fixtures.consumer_process import Guard
    from tests.fixtures.kafka import CreateTopic
    from tests.fixtures.ledger import Balances, Ledger
    from tests.fixtures.pipeline import Pipeline

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

COMMIT = b"COMMIT"
SHORTEST_SESSION = {"session_timeout_ms": 6000, "max_poll_interval_ms": 6000, "heartbeat_interval_ms": 500}

Verdict = Literal["once", "doubled", "lost"]


def verdict(ledger: Ledger, expected: Balances) -> Verdict:
    excess = ledger.excess(expected)
    if any(amount < 0 for amount in excess.values()):
        return "lost"
    return "doubled" if excess else "once"


def guarded(*guards: Guard) -> pytest.MarkDecorator:
    """Run with each guard, which keeps effects single, and without any, which doubles them."""
    cases = [*((guard, "once") for guard in guards), ("nothing", "doubled")]
    return pytest.mark.parametrize(("guard", "expected"), cases, ids=[guard for guard, _ in cases])


@pytest.fixture
def desk(kafka: Kafka, ledger: Ledger, topic: CreateTopic) -> Desk:
    return Desk(kafka, ledger, topic("deposits", partitions=3))


@guarded("inbox", "sequence")
def test_everything_delivered_two_times_more(desk: Desk, guard: Guard, expected: Verdict) -> None:
    messages = numbered(1_000, keys=50)
    publish(desk.kafka, desk.topic, messages)
    for group in ("first", "second", "third"):
        group_id = f"{desk.topic}.{group}"
        with running(desk.consumer(config=desk.config(group_id=group_id), **guards(guard))):
            desk.await_consumed(1_000, group=group_id)
    assert sum(desk.reports.total.values()) == 3_000
    assert verdict(desk.ledger, once(messages)) == expected


@guarded("inbox", "sequence")
def test_stale_duplicates_of_a_relay_that_was_frozen(desk: Desk, guard: Guard, expected: Verdict) -> None:
    messages = numbered(500, keys=20)
    publish(desk.kafka, desk.topic, [*messages[:300], *messages[100:200], *messages[300:], *messages[400:450]])
    with running(desk.consumer(batch_messages=100, **guards(guard))):
        desk.await_consumed(650)
    assert sum(desk.reports.total.values()) == 650
    assert verdict(desk.ledger, once(messages)) == expected


@guarded("inbox", "offsets")
def test_a_second_consumer_takes_over_in_mid_batch(desk: Desk, guard: Guard, expected: Verdict) -> None:
    messages = numbered(100)
    publish(desk.kafka, desk.topic, messages)

    def dawdle(connection: Connection[Any], messages: Sequence[Message]) -> None:
        deposit(connection, messages)
        connection.execute("SELECT pg_advisory_xact_lock(1)")

    config = desk.config(**SHORTEST_SESSION)
    slow = desk.consumer(config=config, handle=dawdle, **guards(guard))
    quick = desk.consumer(config=config, **guards(guard))
    with desk.ledger.database.connect() as barrier:
        barrier.execute("SELECT pg_advisory_lock(1)")
        with running(slow):
            eventually(lambda: desk.ledger.waiting() == 1, message="the first consumer is not in its batch")
            with running(quick):
                eventually(lambda: desk.ledger.waiting() == 2, message="no other consumer took over")
                barrier.execute("SELECT pg_advisory_unlock(1)")
                desk.await_consumed(100)
    assert verdict(desk.ledger, once(messages)) == expected


@pytest.mark.parametrize(("guard", "protocol"), [("inbox", "range"), ("offsets", "cooperative-sticky")])
def test_consumers_that_come_and_go_under_load(pipeline: Pipeline, ledger: Ledger, guard: Guard, protocol: str) -> None:
    first, joining = Desk(pipeline.kafka, ledger, *pipeline.topics), Desk(pipeline.kafka, ledger, *pipeline.topics)
    options = {"config": first.config(partition_assignment_strategy=protocol), "batch_messages": 50, **guards(guard)}
    with pipeline.relays(1), running(first.consumer(**options)):
        with pipeline.load(Plan(writers=2)) as load:
            eventually(lambda: first.reports.total.get("processed", 0) > 100)
            for turn in (1, 2):
                with running(joining.consumer(**options)):
                    eventually(lambda: joining.reports.total.get("processed", 0) > 20 * turn)  # noqa: B023 -- at once
            load.await_more(50)
        pipeline.await_settled()
        committed = [(write.key, write.message_id) for write in load.writes if write.outcome is Outcome.COMMITTED]
        first.await_consumed(len(committed))
    assert verdict(ledger, balances_after(committed)) == "once"


@guarded("inbox", "sequence", "offsets")
def test_killed_between_the_commit_of_the_effects_and_that_of_the_offsets(
    desk: Desk, guard: Guard, expected: Verdict
) -> None:
    messages = numbered(100)
    publish(desk.kafka, desk.topic, messages)
    config = {name: str(value) for name, value in desk.config(group_instance_id="1").items()}  # it comes back at once
    options = partial(Options, config=config, topics=desk.topics, dsn=desk.ledger.dsn, guard=guard)
    with consumer_process(options(waits_before_offsets=True)) as victim:
        victim.wait_for_event("effects_committed")
        victim.kill()
        assert victim.wait() == -signal.SIGKILL
    assert desk.committed() == 0
    with consumer_process(options()) as successor:
        desk.await_consumed(100)
        successor.terminate()
        assert successor.wait() == 0
    assert verdict(desk.ledger, once(messages)) == expected


@guarded("inbox", "offsets")
def test_the_reply_to_commit_is_lost_and_the_server_cannot_be_asked(
    desk: Desk, guard: Guard, expected: Verdict, caplog: pytest.LogCaptureFixture
) -> None:
    messages = numbered(100)
    with TcpProxy("127.0.0.1", desk.ledger.database.server.port) as proxy:
        behind_proxy = make_conninfo(desk.ledger.dsn, port=proxy.port)

        def connect() -> Connection[Any]:
            if proxy.fired["swallowed"] and not proxy.fired["refused"]:
                proxy.cut(refuse=True)
            return psycopg.connect(behind_proxy)

        proxy.swallow_reply_to(COMMIT)
        publish(desk.kafka, desk.topic, messages)
        with running(desk.consumer(connect=connect, **guards(guard))):
            eventually(lambda: "the database is away" in caplog.text)
            proxy.heal()
            desk.await_consumed(100)
        assert proxy.fired["swallowed"] == 1
    assert verdict(desk.ledger, once(messages)) == expected


@pytest.mark.parametrize("guard", ["inbox", "nothing"])
@pytest.mark.parametrize("fault", ["swallowed", "cut_before"])
def test_the_connection_is_cut_at_commit_and_the_server_can_be_asked(
    desk: Desk, guard: Guard, fault: Literal["swallowed", "cut_before"]
) -> None:
    messages = numbered(100)
    with TcpProxy("127.0.0.1", desk.ledger.database.server.port) as proxy:
        (proxy.swallow_reply_to if fault == "swallowed" else proxy.cut_before)(COMMIT)
        publish(desk.kafka, desk.topic, messages)
        connect = partial(psycopg.connect, make_conninfo(desk.ledger.dsn, port=proxy.port))
        with running(desk.consumer(connect=connect, **guards(guard))):
            desk.await_consumed(100)
        assert proxy.fired[fault] == 1
    assert desk.reports.total == {"processed": 100}
    assert verdict(desk.ledger, once(messages)) == "once"
