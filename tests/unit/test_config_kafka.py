"""What may be said to librdkafka, and what may not."""

from __future__ import annotations

import re
from importlib import resources

import pytest
from confluent_kafka import KafkaException, Producer
from pydantic import ValidationError

from outbox_relay.config import ProducerSetting, Settings, check_producer_config
from outbox_relay.config.explain import explain
from outbox_relay.config.kafka import DEFAULTS, SECRETS
from outbox_relay.errors import ConfigurationError

BROKER: dict[str, ProducerSetting] = {"bootstrap.servers": "127.0.0.1:1"}


def with_kafka(properties: dict[str, ProducerSetting]) -> Settings:
    return Settings.model_validate({"kafka": properties})


@pytest.mark.parametrize(
    ("properties", "problem"),
    [
        (
            {"acks": 1},
            "ACKS: only acks=all is allowed, or a message marked published could be lost with its broker: remove it",
        ),
        (
            {"request.required.acks": "0"},
            "ACKS: only acks=all is allowed, or a message marked published could be lost with its broker: remove it",
        ),
        (
            {"enable.idempotence": False},
            "ENABLE_IDEMPOTENCE: without it, retries reorder and duplicate messages: remove it",
        ),
        (
            {"enable.gapless.guarantee": "false"},
            "ENABLE_GAPLESS_GUARANTEE: without it, a message could overtake one of its key that failed: remove it",
        ),
        (
            {"max.in.flight": 2},
            (
                "MAX_IN_FLIGHT_REQUESTS_PER_CONNECTION: a second request in flight may overtake one that the broker "
                "refuses: remove it"
            ),
        ),
        (
            {"delivery.report.only.error": True},
            "DELIVERY_REPORT_ONLY_ERROR: a message is marked published by its delivery report: remove it",
        ),
        (
            {"transactional.id": "t"},
            "TRANSACTIONAL_ID: the relay uses no Kafka transactions, delivery is at least once: remove it",
        ),
        ({"error_cb": "f"}, "ERROR_CB: it takes a function, which the relay sets itself: remove it"),
        ({"logger": "f"}, "LOGGER: it takes a function, which the relay sets itself: remove it"),
    ],
    ids=str,
)
def test_a_property_that_would_break_a_promise_is_refused(properties: dict[str, ProducerSetting], problem: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        with_kafka(properties)

    assert explain(refusal.value) == f"OUTBOX_RELAY_KAFKA__{problem}"


@pytest.mark.parametrize(
    "properties",
    [
        {"acks": -1},
        {"acks": "all"},
        {"enable.idempotence": "True"},
        {"max.in.flight.requests.per.connection": "1"},
        {"enable.gapless.guarantee": 1},
    ],
    ids=str,
)
def test_a_property_that_keeps_the_promises_is_allowed(properties: dict[str, ProducerSetting]) -> None:
    settings = with_kafka(BROKER | properties)

    check_producer_config(settings.producer_config())
    assert settings.producer_config().items() >= properties.items()


def test_given_properties_replace_our_defaults_under_each_of_their_names() -> None:
    settings = Settings.model_validate({"batch_bytes": "2MiB", "kafka": {"queue.buffering.max.ms": 9}})

    assert settings.producer_config() == {**DEFAULTS, "queue.buffering.max.kbytes": 4_096, "linger.ms": 9}


@pytest.mark.parametrize(
    ("properties", "problem"),
    [
        ({"linger.mss": 5}, 'No such configuration property: "linger.mss"; did you mean linger.ms?'),
        ({"linger.ms": "soon"}, 'Invalid value for configuration property "queue.buffering.max.ms"'),
        (
            {"security.protocol": "sasl_plaintext", "sasl.mechanism": "PLAIN", "sasl.password": "hunter2"},
            "Failed to create producer: sasl.username and sasl.password must be set",
        ),
    ],
    ids=str,
)
def test_librdkafka_refuses_without_a_broker(properties: dict[str, ProducerSetting], problem: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        check_producer_config(with_kafka(BROKER | properties).producer_config())

    assert str(refusal.value) == f"Kafka configuration: {problem}"


def test_a_configuration_without_a_broker_is_refused() -> None:
    with pytest.raises(ConfigurationError) as refusal:
        check_producer_config(Settings().producer_config())

    assert (
        str(refusal.value)
        == "OUTBOX_RELAY_KAFKA__BOOTSTRAP_SERVERS: not set: name at least one broker, e.g. kafka:9092"
    )


def test_every_property_suggested_is_known_to_librdkafka() -> None:
    known = resources.files("outbox_relay.config").joinpath("producer_properties.txt").read_text().split()

    unknown = [name for name in {*known, *SECRETS} - {"sasl.jaas.config"} if is_unknown_to_librdkafka(name)]

    assert unknown == []


def is_unknown_to_librdkafka(name: str) -> bool:
    try:
        Producer({"log_level": 0, name: "?"})
    except KafkaException as error:
        return re.search("No such configuration property", error.args[0].str()) is not None
    return False
