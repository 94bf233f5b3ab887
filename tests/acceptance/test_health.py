"""What probes and Prometheus are told, from the outside."""

from __future__ import annotations

import re
import socket
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay import __version__
from outbox_relay.sandbox.ports import ReservedPort
from tests.fixtures.load import commit_messages, insert_messages
from tests.fixtures.probes import ask, scrape
from tests.fixtures.proxy import TcpProxy
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from outbox_relay.sandbox.kafka import KafkaCluster
    from tests.fixtures.daemon import Daemon
    from tests.fixtures.pipeline import Pipeline

pytestmark = pytest.mark.kafka

INSERT_POISON = """
INSERT INTO outbox (aggregate_type, aggregate_id, event_type, headers)
VALUES ('order', 'order-1', 'happened', '{"attempt": 3}')
"""


LOCK_SHARD_OF_KEY = """
SELECT
FROM outbox_shard
WHERE shard = hashtextextended(%s || ':' || %s, 0) & 15
FOR UPDATE
"""


@contextmanager
def ready_relay(pipeline: Pipeline, port: ReservedPort) -> Iterator[Daemon]:
    with pipeline.relay(metrics_port=port.number) as relay:
        relay.wait_until_ready()
        yield relay


def test_probes_are_green_while_it_works_and_readiness_turns_red_when_it_drains(pipeline: Pipeline) -> None:
    port = ReservedPort()
    with (
        pipeline.database.connect() as writer,
        pipeline.database.connect() as blocker,
        pipeline.relay(metrics_port=port.number, lock_timeout=25) as relay,
    ):
        relay.wait_until_ready()
        assert ask(port.number, "/livez") == (200, "ok\n")
        assert ask(port.number, "/readyz") == (200, "ok\n")
        blocker.execute("LOCK TABLE outbox_shard IN EXCLUSIVE MODE")  # the claim cannot end before this does
        commit_messages(writer, "order-1")
        eventually(pipeline.waits_for_lock)
        relay.terminate()
        relay.wait_for_event("relay_draining")
        assert ask(port.number, "/livez") == (200, "ok\n")
        assert ask(port.number, "/readyz") == (503, "draining\n")
        blocker.rollback()
        assert relay.wait() == 0


WATCHFUL = {"survey_interval": 0.1, "ready_max_age": 1}


def test_readiness_turns_red_while_nothing_moves_although_the_process_lives(pipeline: Pipeline) -> None:
    port = ReservedPort()
    with (
        pipeline.relay(metrics_port=port.number, **WATCHFUL) as relay,
        pipeline.database.connect() as writer,
        pipeline.database.connect() as somebody,
    ):
        relay.wait_until_ready()
        somebody.execute("SELECT FROM outbox_shard FOR UPDATE")
        commit_messages(writer, "order-1")
        eventually(lambda: ask(port.number, "/readyz")[0] == 503)
        reason = ask(port.number, "/readyz")[1]
        assert re.fullmatch(r"message 1 has been the next of shard \d+ for \d s; 1 stand still\n", reason), reason
        assert ask(port.number, "/livez") == (200, "ok\n")
        somebody.rollback()
        pipeline.await_settled()
        eventually(lambda: ask(port.number, "/readyz") == (200, "ok\n"))


def test_readiness_names_the_one_shard_that_somebody_holds_while_the_others_move(pipeline: Pipeline) -> None:
    port = ReservedPort()
    with (
        pipeline.relay(metrics_port=port.number, **WATCHFUL) as relay,
        pipeline.database.connect(autocommit=True) as writer,
        pipeline.database.connect() as somebody,
    ):
        relay.wait_until_ready()
        somebody.execute(LOCK_SHARD_OF_KEY, ["order", "order-1"])
        commit_messages(writer, "order-1")
        [(shard,)] = writer.execute("SELECT shard FROM outbox").fetchall()

        def turns_red() -> str | None:
            commit_messages(writer, *(f"order-{number}" for number in range(2, 40)))
            status, answer = ask(port.number, "/readyz")
            return answer if status == 503 else None

        reason = eventually(turns_red)
        assert reason is not None
        assert re.fullmatch(rf"message 1 has been the next of shard {shard} for \d s; 1 stand still\n", reason), reason
        somebody.rollback()
        pipeline.await_settled()
        eventually(lambda: ask(port.number, "/readyz") == (200, "ok\n"))


def test_readiness_turns_red_while_nobody_can_tell_whether_anything_moves(pipeline: Pipeline) -> None:
    port = ReservedPort()
    with (
        pipeline.relay(metrics_port=port.number, **WATCHFUL) as relay,
        pipeline.database.connect() as somebody,
    ):
        relay.wait_until_ready()
        somebody.execute("LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE")
        relay.wait_for_event("survey_failed")
        eventually(lambda: ask(port.number, "/readyz")[0] == 503)
        reason = ask(port.number, "/readyz")[1]
        assert re.fullmatch(r"nothing was published for \d s, and what waits cannot be read\n", reason), reason
        somebody.rollback()
        eventually(lambda: ask(port.number, "/readyz") == (200, "ok\n"))


def last_beats(port: int) -> dict[str, float]:
    """When each thread last gave a sign of life, by `time.monotonic()`."""
    now = time.monotonic()
    ages = {labels[0]: age for (name, labels), age in scrape(port).items() if name == "outbox_relay_beat_age_seconds"}
    return {thread: now - age for thread, age in ages.items()}


def beat_on(port: int, *threads: str) -> Callable[[], bool]:
    """Tells whether all *threads* have begun another turn since now."""
    before = last_beats(port)
    return lambda: all(last_beats(port)[thread] > before[thread] + 0.05 for thread in threads)


def test_threads_that_wait_for_kafka_are_alive(own_kafka_pipeline: Pipeline, own_kafka: KafkaCluster) -> None:
    port = ReservedPort()
    with ready_relay(own_kafka_pipeline, port) as relay, own_kafka_pipeline.database.connect() as writer:
        own_kafka.kill()
        commit_messages(writer, "order-1")
        relay.wait_for_event("kafka_lost")
        for _ in range(2):
            eventually(beat_on(port.number, "lane-1", "lane-2", "horizon"))
        assert ask(port.number, "/readyz")[0] == 503
        assert ask(port.number, "/livez") == (200, "ok\n")


def test_threads_that_wait_for_the_database_are_alive(pipeline: Pipeline) -> None:
    port = ReservedPort()
    with TcpProxy("127.0.0.1", pipeline.database.server.port) as proxy:
        behind_proxy = make_conninfo(pipeline.database.relay_dsn, port=proxy.port)
        with pipeline.relay(metrics_port=port.number, database_url=behind_proxy) as relay:
            relay.wait_until_ready()
            proxy.cut(refuse=True)
            relay.wait_for_event("database_lost")
            for _ in range(2):
                eventually(beat_on(port.number, "lane-1", "lane-2", "horizon"))
            assert ask(port.number, "/readyz") == (503, "database is away\n")
            assert ask(port.number, "/livez") == (200, "ok\n")


def test_metrics_count_what_was_published_by_topic(pipeline: Pipeline) -> None:
    port = ReservedPort()
    with ready_relay(pipeline, port), pipeline.database.connect() as writer:
        before = scrape(port.number)
        commit_messages(writer, "order-1", "order-2", "payment-1")
        pipeline.await_settled()
        eventually(lambda: scrape(port.number)["outbox_relay_batch_messages_count", ()] > 0)
        after = scrape(port.number)
    assert before["outbox_relay_up", ("database",)] == before["outbox_relay_up", ("kafka",)] == 1
    assert before["outbox_relay_build_info", (__version__,)] == 1
    published = {
        labels: value for (name, labels), value in after.items() if name == "outbox_relay_published_messages_total"
    }
    assert published == {(pipeline.topic("order"),): 2, (pipeline.topic("payment"),): 1}
    assert after["outbox_relay_batch_messages_sum", ()] == 3
    assert after["outbox_relay_newly_parked_messages_total", ()] == 0


def test_metrics_count_parked_and_late_messages(pipeline: Pipeline) -> None:
    port = ReservedPort()
    with (
        pipeline.relay(metrics_port=port.number, lanes=1, ordering_timeout=0.5) as relay,
        pipeline.database.connect() as writer,
        pipeline.database.connect() as late,
    ):
        relay.wait_until_ready()
        writer.execute(INSERT_POISON)
        writer.commit()
        insert_messages(late, "order-2")
        commit_messages(writer, "order-3")
        relay.wait_for_event("writer_given_up")
        state_of_newer = "SELECT state FROM outbox_message WHERE aggregate_id = 'order-3'"
        eventually(lambda: writer.execute(state_of_newer).fetchone() == ("published",))
        late.commit()
        pipeline.await_settled()
        names = ("newly_parked_messages", "given_up_writers", "unordered_messages", "late_messages")
        wanted = {(f"outbox_relay_{name}_total", ()): 1.0 for name in names}
        eventually(lambda: wanted.items() <= scrape(port.number).items(), message=f"{wanted}")


def test_another_path_is_answered_with_the_ones_there_are(pipeline: Pipeline) -> None:
    port = ReservedPort()
    with ready_relay(pipeline, port):
        assert ask(port.number, "/") == (404, "try /metrics, /livez or /readyz\n")


def test_a_client_that_says_nothing_keeps_no_probe_waiting(pipeline: Pipeline) -> None:
    port = ReservedPort()
    with ready_relay(pipeline, port), socket.create_connection(("127.0.0.1", port.number)):
        assert ask(port.number, "/livez") == (200, "ok\n")
