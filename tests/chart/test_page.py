"""docs/kubernetes.md: what it prints is what works."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
import pytest
import yaml
from psycopg.conninfo import make_conninfo

from outbox_relay.sandbox.postgres import PostgresServer
from tests.fixtures.container import Container
from tests.fixtures.helm import KUBERNETES_VERSIONS, ROOT, given, one, problems
from tests.fixtures.postgres import binaries_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from outbox_relay.sandbox.kafka import Kafka
    from tests.fixtures.helm import Helm
    from tests.fixtures.kafka import CreateTopic

PAGE = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return [block.partition("```")[0] for block in PAGE.split(f"```{language}\n")[1:]]


def values_file(directory: Path, number: int) -> Path:
    path = directory / f"values-{number}.yaml"
    path.write_text(blocks("yaml")[number], encoding="utf-8")
    return path


@pytest.mark.parametrize("number", range(len(blocks("yaml"))))
def test_values_of_the_page_render_what_a_cluster_takes(helm: Helm, tmp_path: Path, number: int) -> None:
    rendered = helm.render("--values", values_file(tmp_path, number))
    assert [fault for manifest in rendered for fault in problems(manifest, version=KUBERNETES_VERSIONS[-1])] == []


def test_commands_of_the_page_name_the_objects_of_its_values(helm: Helm, tmp_path: Path) -> None:
    install = values_file(tmp_path, 0)
    [secrets, commands] = blocks("bash")
    assert f"deployment/{one(helm.render('--values', install), 'Deployment')['metadata']['name']} " in commands
    values = yaml.safe_load(install.read_text(encoding="utf-8"))
    for login in (values["database"], values["migrations"]):
        assert f"create secret generic {login['existingSecret']} --from-file=url=" in secrets


@pytest.fixture
def server(postgres_version: int, server_directory: Path) -> Iterator[PostgresServer]:
    """A server with none of our roles, but the login of an application."""
    with PostgresServer.create(binaries_of(postgres_version), server_directory) as server:
        with psycopg.connect(server.dsn(), autocommit=True) as admin:
            admin.execute("CREATE ROLE shop_app LOGIN")
        yield server


@pytest.mark.kafka
def test_the_logins_of_the_page_are_enough_to_migrate_to_write_and_to_relay(
    helm: Helm, kafka: Kafka, topic: CreateTopic, server: PostgresServer, tmp_path: Path
) -> None:
    settings = {
        r"config.kafka.bootstrap\.servers": kafka.bootstrap_servers,
        "config.topic_template": topic("order").removesuffix("order") + "{aggregate_type}",
        "config.metrics_host": "127.0.0.1",
        "extraArgs": ["--once", "--metrics-port", "0"],
    }
    rendered = helm.render("--values", values_file(tmp_path, 0), *given(settings))
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        [logins] = blocks("sql")
        admin.execute(logins.encode())
    secrets = {
        name: {"url": make_conninfo(server.dsn(), user=login)}
        for name, login in (("outbox-owner", "shop_owner"), ("outbox-relay", "shop_relay"))
    }

    migrated = Container(rendered, one(rendered, "Job"), directory=tmp_path, secrets=secrets).run()
    assert migrated.returncode == 0, migrated.stderr
    with psycopg.connect(server.dsn(), user="shop_app") as app:
        app.execute("INSERT INTO outbox (aggregate_type, aggregate_id, event_type) VALUES ('order', '1', 'placed')")
    relayed = Container(rendered, one(rendered, "Deployment"), directory=tmp_path, secrets=secrets).run()
    assert relayed.returncode == 0, relayed.stderr
    with psycopg.connect(server.dsn()) as admin:
        published = "SELECT count(*) FROM outbox_message WHERE state = 'published'"
        assert admin.execute(published).fetchone() == (1,)
