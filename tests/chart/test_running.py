"""What the rendered containers would run, run: their arguments, variables and files, with the real command."""

from __future__ import annotations

import json
from functools import partial
from ssl import create_default_context
from typing import TYPE_CHECKING

import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay.config import Settings
from outbox_relay.sandbox.ports import ReservedPort
from tests.fixtures.certificates import Authority
from tests.fixtures.container import Container
from tests.fixtures.daemon import AWAY, Daemon
from tests.fixtures.helm import MINIMAL, given, one
from tests.fixtures.load import commit_messages
from tests.fixtures.pipeline import Pipeline
from tests.fixtures.probes import ask
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from outbox_relay.sandbox.kafka import Kafka
    from tests.fixtures.helm import Helm
    from tests.fixtures.postgres import Database

OTHER_SETTINGS: dict[str, object] = {
    "schema": "shop",
    "topic_map": {"invoice": "billing.invoices"},
    "allowed_topics": ["order.events", "billing.invoices"],
    "lanes": 4,
    "batch_bytes": 1_000_000,
    "poll_interval": 0.0025,
    "retention": 2_592_000.0,
    "synchronous_commit": True,
    "drain_timeout": 25.5,
    "metrics_port": 9000,
}
PROPERTIES: dict[str, object] = {
    "bootstrap.servers": "kafka-1:9092,kafka-2:9092",
    "message.max.bytes": 20_000_000,
    "linger.ms": 1500.5,
    "socket.nagle.disable": False,
}


@pytest.fixture
def pipeline(database: Database, kafka: Kafka, topic_prefix: str) -> Pipeline:
    pipeline = Pipeline(database, kafka, prefix=topic_prefix, seed=0)
    pipeline.create_topics()
    return pipeline


def is_green(port: int, path: str) -> bool:
    return ask(port, path) == (200, "ok\n")


def values_for(pipeline: Pipeline, port: ReservedPort) -> list[str]:
    settings = {
        r"config.kafka.bootstrap\.servers": pipeline.kafka.bootstrap_servers,
        "config.topic_template": pipeline.topic("{aggregate_type}"),
        "config.metrics_host": "127.0.0.1",
        "config.metrics_port": port.number,
        "config.retention": 0,  # or the login would have to be a pruner's, too
        "database.existingSecret": "login",
    }
    return ["--values", str(MINIMAL), *given(settings)]


@pytest.mark.kafka
def test_the_deployment_s_container_publishes_and_answers_its_probes(
    helm: Helm, pipeline: Pipeline, relay_login: str, tmp_path: Path
) -> None:
    port = ReservedPort()
    rendered = helm.render(*values_for(pipeline, port))
    secrets = {"login": {"url": make_conninfo(pipeline.database.dsn, user=relay_login)}}
    container = Container(rendered, one(rendered, "Deployment"), directory=tmp_path, secrets=secrets)
    assert [declared["containerPort"] for declared in container.spec["ports"]] == [port.number]

    with Daemon(container.environment, command=container.command) as relay:
        relay.wait_for_event("relay_started")
        for probe in ("livenessProbe", "readinessProbe"):
            path = container.spec[probe]["httpGet"]["path"]
            eventually(partial(is_green, port.number, path), message=f"{path} stayed red")
        with pipeline.database.connect() as writer:
            commit_messages(writer, "order-1")
        pipeline.await_settled()
        relay.terminate()
        assert relay.wait() == 0
    assert len(pipeline.records()) == 1


def test_metrics_are_served_with_the_certificate_of_the_secret(helm: Helm, tmp_path: Path) -> None:
    port, authority = ReservedPort(), Authority(tmp_path)
    certificate = authority.issue("relay", address="127.0.0.1")
    values = {
        "config.metrics_host": "127.0.0.1",
        "config.metrics_port": port.number,
        "config.retention": 0,  # or the login would have to be a pruner's, too
        "database.existingSecret": "login",
    }
    rendered = helm.render("--values", MINIMAL, *given(values | {"metrics.tls.certificateSecret": "relay-tls"}))
    pem = {"tls.crt": certificate.path.read_text(), "tls.key": certificate.key_path.read_text()}
    secrets = {"login": {"url": AWAY["OUTBOX_RELAY_DATABASE_URL"]}, "relay-tls": pem}
    container = Container(rendered, one(rendered, "Deployment"), directory=tmp_path, secrets=secrets)
    with Daemon(container.environment, command=container.command) as relay:
        relay.wait_for_event("database_lost")
        assert ask(port.number, "/livez", tls=create_default_context(cafile=authority.path)) == (200, "ok\n")


@pytest.mark.kafka
def test_helm_test_passes_where_the_relay_works_and_fails_where_it_cannot(
    helm: Helm, pipeline: Pipeline, relay_login: str, tmp_path: Path
) -> None:
    rendered = helm.render(*values_for(pipeline, ReservedPort()))
    for login, code in ((relay_login, 0), ("nobody", 5)):
        secrets = {"login": {"url": make_conninfo(pipeline.database.dsn, user=login)}}
        container = Container(rendered, one(rendered, "Pod", suffix="-test"), directory=tmp_path, secrets=secrets)
        examined = container.run()
        assert examined.returncode == code, examined.stdout


@pytest.mark.parametrize("line", ["outbox", "inbox"])
def test_a_migration_job_leaves_nothing_pending(helm: Helm, database: Database, tmp_path: Path, line: str) -> None:
    values = {
        "config.schema": "shop",
        "migrations.enabled": True,
        "migrations.existingSecret": "owner",
        "migrations.inbox.enabled": True,
        "migrations.inbox.existingSecret": "owner",
        "migrations.inbox.schema": "shop",
    }
    rendered = helm.render("--values", MINIMAL, *given(values))
    secrets = {"owner": {"url": database.dsn}}
    job = Container(rendered, one(rendered, "Job", suffix=line), directory=tmp_path, secrets=secrets)

    applied = job.run()
    assert applied.returncode == 0, applied.stderr
    flags = ["--inbox"] if line == "inbox" else []
    assert job.run("migrate", "status", "--schema", "shop", *flags).returncode == 0


def shown(container: Container) -> Mapping[str, Mapping[str, object]]:
    printed = container.run("config", "show", "--json")
    assert printed.returncode == 0, printed.stderr
    rows: Mapping[str, Mapping[str, object]] = json.loads(printed.stdout)
    return rows


def test_every_setting_reaches_the_relay_as_it_was_given(helm: Helm, tmp_path: Path) -> None:
    defaults = Settings().model_dump(mode="json", by_alias=True, exclude={"database_url", "kafka"})
    settings = defaults | OTHER_SETTINGS
    values = {f"config.{name}": value for name, value in settings.items()}
    values |= {f"config.kafka.{name.replace('.', chr(92) + '.')}": value for name, value in PROPERTIES.items()}
    rendered = helm.render("--values", MINIMAL, *given(values))
    secrets = {"outbox-relay-database": {"url": "host=db"}}
    container = Container(rendered, one(rendered, "Deployment"), directory=tmp_path, secrets=secrets)

    read = {name: row["value"] for name, row in shown(container).items() if row["source"] == "TOML file"}
    read |= {"OUTBOX_RELAY_METRICS_PORT": shown(container)["OUTBOX_RELAY_METRICS_PORT"]["value"]}  # a variable
    wanted = {f"OUTBOX_RELAY_{name.upper()}": value for name, value in settings.items()}
    wanted |= {f"OUTBOX_RELAY_KAFKA__{name.replace('.', '_').upper()}": value for name, value in PROPERTIES.items()}
    wanted["OUTBOX_RELAY_ALLOWED_TOPICS"] = ["billing.invoices", "order.events"]
    assert read == wanted


def test_every_secret_reaches_the_relay_from_a_file(helm: Helm, tmp_path: Path) -> None:
    values = {
        r"config.kafka.security\.protocol": "SASL_SSL",
        r"config.kafka.sasl\.mechanism": "SCRAM-SHA-512",
        "kafka.sasl.existingSecret": "kafka-user",
        "database.existingSecret": "shop-app",
        "database.urlKey": "uri",
    }
    rendered = helm.render("--values", MINIMAL, *given(values))
    secrets = {
        "shop-app": {"uri": "postgresql://relay:hunter2@db/shop"},
        "kafka-user": {"username": "relay", "password": "hunter2"},
    }
    container = Container(rendered, one(rendered, "Deployment"), directory=tmp_path, secrets=secrets)

    rows = shown(container)
    assert {name: row["value"] for name, row in rows.items() if row["source"] == "secret file"} == {
        "OUTBOX_RELAY_DATABASE_URL": "********",
        "OUTBOX_RELAY_KAFKA__SASL_USERNAME": "relay",
        "OUTBOX_RELAY_KAFKA__SASL_PASSWORD": "********",
    }
