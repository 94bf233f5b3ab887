"""A relay proves who it is to real brokers over TLS, and says what is wrong when they do not believe it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay.sandbox.history import State
from tests.fixtures import postgres_secure
from tests.fixtures.certificates import Authority
from tests.fixtures.daemon import Daemon
from tests.fixtures.doctor import failed_doctor
from tests.fixtures.kafka_secure import FIRST_PASSWORD, SecureKafka, running_secure_kafka
from tests.fixtures.load import commit_messages
from tests.fixtures.pipeline import Pipeline, flaws
from tests.fixtures.secret_files import SecretFiles

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.fixtures.postgres import Database

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.outside("it reads files of the test")]

NEW_PASSWORD = "horse correct"  # noqa: S105 -- of servers that live as long as the test
LONG_SECONDS = 600
SHORT_TIMES = {"publish_deadline": 5, "kafka__message_timeout_ms": 8_000, "transaction_timeout": 10}

# What is wrong: where it shows, and in which words.
FAULTS = {
    "password": ("PASSWORD", "Authentication failed during authentication due to invalid credentials"),
    "authority": ("PASSWORD", "certificate verify failed"),
    "host name": ("PASSWORD", "certificate verify failed"),
    "client secret": ("TOKEN", "Failed to acquire SASL OAUTHBEARER token"),
    "certificate": ("CERTIFICATE", "no broker answered"),  # which may close the connection before it says why
}


@pytest.fixture(scope="module")
def secure_kafka() -> Iterator[SecureKafka]:
    with running_secure_kafka() as kafka:
        yield kafka


@pytest.fixture
def pipeline(database: Database, secure_kafka: SecureKafka, topic_prefix: str, seed: int) -> Pipeline:
    pipeline = Pipeline(database, secure_kafka.cluster, prefix=topic_prefix, seed=seed)
    pipeline.create_topics()
    return pipeline


@pytest.fixture
def secrets(tmp_path: Path) -> SecretFiles:
    return SecretFiles(tmp_path)


def environment(pipeline: Pipeline, secrets: SecretFiles) -> dict[str, str]:
    return secrets.instead_of(pipeline.environment(**SHORT_TIMES))


@pytest.mark.parametrize("listener", ["PASSWORD", "TOKEN", "CERTIFICATE"])
def test_the_relay_publishes_over_tls_with_a(
    listener: str, secure_kafka: SecureKafka, pipeline: Pipeline, secrets: SecretFiles
) -> None:
    secrets.put(secure_kafka.client(listener))

    with Daemon(environment(pipeline, secrets)):
        with pipeline.load() as load:
            load.await_more(300)
        pipeline.await_settled()

    assert flaws(pipeline.judge(load.writes)) == {}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_relay_that_is_refused_says_why_and_goes_on_when_it_is_mended_with_a_wrong(
    fault: str, secure_kafka: SecureKafka, pipeline: Pipeline, secrets: SecretFiles, tmp_path: Path
) -> None:
    listener, words = FAULTS[fault]
    right = secure_kafka.client(listener)
    secrets.put(right | spoiled(fault, kafka=secure_kafka, directory=tmp_path))

    with Daemon(environment(pipeline, secrets)) as relay, pipeline.database.connect() as writer:
        writes = commit_messages(writer, "order-1", "payment-1", "order-1")
        assert words in str(relay.wait_for_event("kafka_lost")["reason"])
        assert words in failed_doctor(environment(pipeline, secrets))
        assert pipeline.states() == [State.UNPUBLISHED] * 3
        secrets.put(right)
        pipeline.await_settled()
        relay.wait_for_event("kafka_recovered")

    assert flaws(pipeline.judge(writes)) == {}


def test_an_expired_token_is_refused_and_a_later_one_is_taken(
    secure_kafka: SecureKafka, pipeline: Pipeline, secrets: SecretFiles
) -> None:
    secrets.put(secure_kafka.client("TOKEN"))
    secure_kafka.tokens.lifetime_seconds = -60

    try:
        with Daemon(environment(pipeline, secrets)) as relay, pipeline.database.connect() as writer:
            writes = commit_messages(writer, "order-1", "payment-1", "order-1")
            assert "Must supply an unexpired token" in str(relay.wait_for_event("kafka_lost")["reason"])
            assert pipeline.states() == [State.UNPUBLISHED] * 3
            secure_kafka.tokens.lifetime_seconds = LONG_SECONDS
            pipeline.await_settled()
    finally:
        secure_kafka.tokens.lifetime_seconds = LONG_SECONDS

    assert flaws(pipeline.judge(writes)) == {}


def spoiled(fault: str, *, kafka: SecureKafka, directory: Path) -> dict[str, str]:
    """The settings with which something is wrong."""
    stranger = Authority(directory, name="stranger")
    unknown = stranger.issue("unknown")
    wrong = {
        "password": {"kafka.sasl.password": "wrong"},
        "authority": {"kafka.ssl.ca.location": str(stranger.path)},
        "host name": {"kafka.bootstrap.servers": kafka.cluster.servers_of("PASSWORD", host="localhost")},
        "client secret": {"kafka.sasl.oauthbearer.client.secret": "wrong"},
        "certificate": {
            "kafka.ssl.certificate.location": str(unknown.path),
            "kafka.ssl.key.location": str(unknown.key_path),
        },
    }
    return wrong[fault]


def test_passwords_that_change_while_messages_flow_need_no_restart_and_lose_nothing(
    secure_kafka: SecureKafka, own_database: Database, topic_prefix: str, seed: int, secrets: SecretFiles
) -> None:
    pipeline = Pipeline(own_database, secure_kafka.cluster, prefix=topic_prefix, seed=seed)
    pipeline.create_topics()
    postgres_secure.create_relay(own_database, rule="host scram-sha-256")
    postgres_secure.set_password(own_database, FIRST_PASSWORD)
    secrets.put(secure_kafka.client("PASSWORD") | database_url(own_database, FIRST_PASSWORD))

    try:
        with Daemon(environment(pipeline, secrets)) as relay:
            with pipeline.load() as load:
                relay.wait_for_event("relay_started")
                load.await_more(100)
                secure_kafka.set_password(NEW_PASSWORD)
                assert "authentication" in str(relay.wait_for_event("kafka_lost")["reason"]).lower()
                secrets.put({"kafka.sasl.password": NEW_PASSWORD})
                relay.wait_for_event("kafka_recovered")
                load.await_more(100)
                postgres_secure.set_password(own_database, NEW_PASSWORD)
                relay.wait_for_event("database_lost")
                load.await_more(100)
                secrets.put(database_url(own_database, NEW_PASSWORD))
                relay.wait_for_event("database_recovered")
            pipeline.await_settled()
    finally:
        secure_kafka.set_password(FIRST_PASSWORD)

    said = f"{relay.events}{relay.other_lines}"
    assert [word for word in (FIRST_PASSWORD, NEW_PASSWORD, FIRST_PASSWORD.split()[0]) if word in said] == []
    assert flaws(pipeline.judge(load.writes)).keys() <= {"duplicated"}


def database_url(database: Database, password: str) -> dict[str, str]:
    return {"database_url": make_conninfo(database.dsn, user=postgres_secure.USER, password=password)}
