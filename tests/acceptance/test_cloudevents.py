"""`outbox-relay run` with the envelope "cloudevents": what consumers read, and what it refuses."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, cast

import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_kafka_event

from outbox_relay.consumer import message_from
from tests.fixtures.daemon import outbox_relay
from tests.fixtures.outbox import insert
from tests.integration.test_publish import written

if TYPE_CHECKING:
    from confluent_kafka import Message as KafkaRecord

    from tests.fixtures.pipeline import Pipeline

pytestmark = pytest.mark.kafka

SELECT_PARKED = "SELECT sequence_no, reason FROM outbox_pending WHERE state = 'parked' ORDER BY sequence_no"
NO_EVENT = "header \"ce_tenant\" is '': an attribute of a CloudEvent has no control character, nor is it empty"


def run_once(pipeline: Pipeline, **settings: str) -> subprocess.CompletedProcess[str]:
    command, variables = outbox_relay("run", "--once"), os.environ | pipeline.environment(**settings)
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)


def orders(pipeline: Pipeline) -> list[KafkaRecord]:
    return written(pipeline.kafka.bootstrap_servers, pipeline.topic("order"))


def summary(record: KafkaRecord) -> tuple[object, ...]:
    """What the official SDK makes of *record*."""
    headers = dict(cast("list[tuple[str, bytes]]", record.headers()))
    event = from_kafka_event(KafkaMessage(headers, record.key(), record.value() or b""))
    return event.get_source(), event.get_type(), event.get_subject(), event.get_extension("tenant"), event.get_data()


def test_events_are_published_and_what_can_be_none_is_parked_with_its_successors(pipeline: Pipeline) -> None:
    with pipeline.database.connect() as writer:
        insert(writer, "7", payload={"total": 1}, headers={"ce_tenant": "a"})
        insert(writer, "7")
        [bad] = insert(writer, "8", headers={"ce_tenant": ""})
        [behind] = insert(writer, "8")
        writer.commit()
        assert run_once(pipeline, envelope="cloudevents", source="https://shop.example/").returncode == 0
        parked = writer.execute(SELECT_PARKED).fetchall()
    source = "https://shop.example/"
    assert [summary(record) for record in orders(pipeline)] == [
        (source, "placed", "7", "a", {"total": 1}),
        (source, "placed", "7", None, None),
    ]
    assert [record.value() for record in orders(pipeline)][1:] == [None]
    assert [number for number, _ in parked] == [bad, behind]
    assert parked[0][1] == NO_EVENT


def test_a_consumer_reads_on_when_the_envelope_changes(pipeline: Pipeline) -> None:
    numbers = []
    for envelope in ("native", "cloudevents", "native"):
        with pipeline.database.connect() as writer:
            numbers += insert(writer, "7", payload={"envelope": envelope})
        assert run_once(pipeline, envelope=envelope).returncode == 0
    messages = [message_from(record) for record in orders(pipeline)]
    assert [message.sequence_no for message in messages] == numbers
    assert {message.source for message in messages} == {f"{pipeline.database.name}.public"}


@pytest.mark.parametrize("source", ["the shop", "größe"])
def test_a_source_that_no_event_may_have_exits_with_3(pipeline: Pipeline, source: str) -> None:
    finished = run_once(pipeline, envelope="cloudevents", source=source)
    assert finished.returncode == 3
    assert f'the source "{source}" is no URI-reference' in finished.stderr
    assert "OUTBOX_RELAY_SOURCE" in finished.stderr
