"""A relay and PostgreSQL show each other certificates, and the relay says what is wrong when one is not believed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay.sandbox.history import State
from tests.fixtures import postgres_secure
from tests.fixtures.certificates import Authority
from tests.fixtures.daemon import Daemon
from tests.fixtures.doctor import failed_doctor
from tests.fixtures.load import commit_messages
from tests.fixtures.pipeline import Pipeline, flaws
from tests.fixtures.postgres import create_database
from tests.fixtures.secret_files import SecretFiles

if TYPE_CHECKING:
    from pathlib import Path

    from outbox_relay.sandbox.kafka import Kafka
    from outbox_relay.sandbox.postgres import PostgresServer

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.outside("it reads files of the test")]

SESSIONS = """
SELECT DISTINCT client_dn
FROM pg_stat_ssl
JOIN pg_stat_activity USING (pid)
WHERE application_name LIKE 'outbox-relay%'
"""

# What is wrong, and in which words it shows.
FAULTS = {
    "authority": "certificate verify failed",
    "host name": 'does not match host name "localhost"',
    "client's certificate": "unknown ca",
    "client's name": 'certificate authentication failed for user "relay"',
    "TLS": 'pg_hba.conf rejects connection for host "127.0.0.1", user "relay"',
}


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def pipeline(
    tls_postgres: PostgresServer, authority: Authority, kafka: Kafka, topic_prefix: str, seed: int
) -> Pipeline:
    """The server shows a certificate for 127.0.0.1, and lets the login `relay` in by its certificate alone."""
    database = create_database(tls_postgres)
    postgres_secure.serve_tls(tls_postgres, authority.issue("server", address="127.0.0.1"), trusts=authority)
    postgres_secure.create_relay(database, rule="hostssl cert")
    pipeline = Pipeline(database, kafka, prefix=topic_prefix, seed=seed)
    pipeline.create_topics()
    return pipeline


@pytest.fixture
def right(pipeline: Pipeline, authority: Authority) -> dict[str, str]:
    """The parameters with which a relay is let in."""
    own = authority.issue(postgres_secure.USER)
    return {
        "host": "127.0.0.1",
        "port": str(pipeline.database.server.port),
        "dbname": pipeline.database.name,
        "user": postgres_secure.USER,
        "sslmode": "verify-full",
        "sslrootcert": str(authority.path),
        "sslcert": str(own.path),
        "sslkey": str(own.key_path),
    }


def url(parameters: dict[str, str]) -> dict[str, str]:
    return {"database_url": make_conninfo("", **parameters)}


def test_the_relay_publishes_with_certificates_on_both_sides(pipeline: Pipeline, right: dict[str, str]) -> None:
    with pipeline.relays(1, **url(right)):
        with pipeline.load() as load, pipeline.database.connect() as admin:
            load.await_more(300)
            assert admin.execute(SESSIONS).fetchall() == [("/CN=relay",)]
        pipeline.await_settled()

    assert flaws(pipeline.judge(load.writes)) == {}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_relay_that_is_refused_says_why_and_goes_on_when_it_is_mended_with_a_wrong(
    fault: str, pipeline: Pipeline, right: dict[str, str], authority: Authority, tmp_path: Path
) -> None:
    secrets = SecretFiles(tmp_path)
    secrets.put(url(right | spoiled(fault, authority=authority, directory=tmp_path)))
    environment = secrets.instead_of(pipeline.environment())

    with Daemon(environment) as relay, pipeline.database.connect() as writer:
        writes = commit_messages(writer, "order-1", "payment-1", "order-1")
        assert FAULTS[fault] in str(relay.wait_for_event("database_lost")["reason"])
        assert FAULTS[fault] in failed_doctor(environment)
        assert pipeline.states() == [State.UNPUBLISHED] * 3
        secrets.put(url(right))
        pipeline.await_settled()

    assert flaws(pipeline.judge(writes)) == {}


def spoiled(fault: str, *, authority: Authority, directory: Path) -> dict[str, str]:
    """The parameters with which something is wrong."""
    stranger = Authority(directory, name="stranger")
    unknown, other = stranger.issue("unknown"), authority.issue("other")
    wrong = {
        "authority": {"sslrootcert": str(stranger.path)},
        "host name": {"host": "localhost", "hostaddr": "127.0.0.1"},
        "client's certificate": {"sslcert": str(unknown.path), "sslkey": str(unknown.key_path)},
        "client's name": {"sslcert": str(other.path), "sslkey": str(other.key_path)},
        "TLS": {"sslmode": "disable"},
    }
    return wrong[fault]
