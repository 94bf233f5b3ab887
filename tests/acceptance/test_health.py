"""What probes and Prometheus are told, from the outside."""

from __future__ import annotations

import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from outbox_relay import __version__
from outbox_relay.sandbox.ports import ReservedPort
from tests.fixtures.load import commit_messages, insert_messages
from tests.fixtures.probes import ask
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fixtures.daemon import Daemon
    from tests.fixtures.pipeline import Pipeline

pytestmark = pytest.mark.kafka

Samples = dict[tuple[str, tuple[str, ...]], float]

INSERT_POISON = """
INSERT INTO outbox (aggregate_type, aggregate_id, event_type, headers)
VALUES ('order', 'order-1', 'happened', '{"attempt": 3}')
"""


def scrape(port: int) -> Samples:
    """Every sample by its name and the values of its labels."""
    status, text = ask(port, "/metrics")
    assert status == 200
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


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
    published = {labels: value for (name, labels), value in after.items() if name.endswith("published_messages_total")}
    assert published == {(pipeline.topic("order"),): 2, (pipeline.topic("payment"),): 1}
    assert after["outbox_relay_batch_messages_sum", ()] == 3
    assert after["outbox_relay_parked_messages_total", ()] == 0


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
        is_overtaken = "SELECT published_at IS NOT NULL FROM outbox WHERE aggregate_id = 'order-3'"
        eventually(lambda: writer.execute(is_overtaken).fetchone() == (True,))
        late.commit()
        pipeline.await_settled()
        names = ("parked_messages", "given_up_writers", "unordered_messages", "late_messages")
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
