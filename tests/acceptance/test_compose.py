"""compose.yaml: what Compose itself reads in it, and its services run here as processes that deliver an order."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from outbox_relay.config import Settings
from outbox_relay.sandbox.kafka import KAFKA
from outbox_relay.sandbox.ports import ReservedPort
from outbox_relay.sandbox.postgres import PostgresServer
from tests.fixtures.daemon import Daemon, outbox_relay
from tests.fixtures.go import go_program
from tests.fixtures.kafka_tools import write_kafka_tools
from tests.fixtures.postgres import binaries_of, chosen_versions
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from outbox_relay.sandbox.kafka import Kafka

COMPOSE = "github.com/compose-spec/compose-go/v2/cmd@v2.16.2"  # what `docker compose` reads its files with
FILE = Path(__file__).parents[2] / "compose.yaml"
PAGE = (FILE.parent / "docs" / "container.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^docker compose exec (\w+) (.*)$", PAGE, re.MULTILINE)
KAFKA_TOOLS = "/opt/kafka/bin/"

Service = dict[str, Any]


@pytest.fixture(scope="module")
def services() -> dict[str, Service]:
    """The services as Compose understands them; it has refused what its specification does not allow."""
    command = [str(go_program(COMPOSE)), "-format", "json", str(FILE)]
    done = subprocess.run(command, cwd=FILE.parent, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    loaded: dict[str, Service] = json.loads(done.stdout)["services"]
    return loaded


def test_every_service_waits_for_those_that_it_talks_to(services: dict[str, Service]) -> None:
    waits = {
        name: {other: wait["condition"] for other, wait in service.get("depends_on", {}).items()}
        for name, service in services.items()
    }
    healthy, done = "service_healthy", "service_completed_successfully"
    assert waits == {
        "postgres": {},
        "kafka": {},
        "topics": {"kafka": healthy},
        "migrate": {"postgres": healthy},
        "relay": {"migrate": done, "topics": done},
        "shop": {"migrate": done},
    }
    assert {name for name, service in services.items() if "test" in service.get("healthcheck", {})} == {
        "postgres",
        "kafka",
    }


def test_nothing_is_open_to_other_machines(services: dict[str, Service]) -> None:
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert [(port["host_ip"], port["published"]) for port in published] == [("127.0.0.1", "9464")]


def test_the_relay_is_given_more_time_than_it_takes_to_drain(services: dict[str, Service]) -> None:
    given = int(services["relay"]["stop_grace_period"].removesuffix("s"))
    assert given > Settings.model_fields["drain_timeout"].default


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the services' hosts, ports and files are on this machine."""

    database: PostgresServer
    kafka: Kafka
    metrics_port: int
    tools: Path  # with Kafka's, and psql

    def command(self, service: Service) -> list[str]:
        """What the container of *service* runs, here."""
        if "entrypoint" not in service:
            return outbox_relay(*service.get("command", ["run"]))
        files = {volume["target"]: volume["source"] for volume in service.get("volumes", [])}
        here = [self._here(word) for word in [*service["entrypoint"], *service.get("command", [])]]
        return [re.sub(r"(?<==)/.*", lambda path: files[path[0]], word) for word in here]

    def environment(self, service: Service) -> dict[str, str]:
        """Its variables, those of its image among them, on top of ours."""
        image = {"PATH": f"{self.tools}:{os.environ['PATH']}", "OUTBOX_RELAY_METRICS_PORT": str(self.metrics_port)}
        given = {name: self._here(str(value)) for name, value in service.get("environment", {}).items()}
        return os.environ | image | given

    def run(self, service: Service, command: list[str] | None = None) -> str:
        """Run a job to its end, or another command in the container, and give what it printed."""
        done = subprocess.run(
            command or self.command(service),
            env=self.environment(service),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def execute(self, service: Service, line: str) -> str:
        """What `docker compose exec` prints for *line*."""
        program, *arguments = line.split()
        ours = outbox_relay(*arguments) if program == "outbox-relay" else [self._here(word) for word in line.split()]
        return self.run(service, ours)

    def _here(self, text: str) -> str:
        port = str(self.database.port)
        text = text.replace("@postgres:5432", f"@127.0.0.1:{port}").replace("kafka:9092", self.kafka.bootstrap_servers)
        return {"postgres": "127.0.0.1", "5432": port}.get(text, text).replace(KAFKA_TOOLS, f"{self.tools}/")


@pytest.fixture
def machine(services: dict[str, Service], server_directory: Path, kafka: Kafka, tmp_path: Path) -> Iterator[Machine]:
    """Both servers as their containers start them: Kafka without the topic, PostgreSQL after its script."""
    write_kafka_tools(tmp_path)
    [major] = chosen_versions("newest")
    binaries = binaries_of(major)
    (tmp_path / "psql").symlink_to(binaries / "psql")
    port = ReservedPort()
    with PostgresServer.create(binaries, server_directory) as server:
        database = services["postgres"]["environment"]["POSTGRES_DB"]
        with psycopg.connect(server.dsn(), autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {database}".encode())
        [script] = services["postgres"]["volumes"]
        with psycopg.connect(server.dsn(database)) as admin:
            admin.execute(Path(script["source"]).read_bytes())
        yield Machine(server, kafka, metrics_port=port.number, tools=tmp_path)


@pytest.mark.kafka
def test_its_jobs_and_daemons_bring_the_orders_of_the_shop_to_kafka(
    services: dict[str, Service], machine: Machine
) -> None:
    assert "applied" in machine.run(services["migrate"])
    assert machine.run(services["migrate"]) == "nothing is pending\n"
    for _ in range(2):  # each `up` runs the jobs again
        machine.run(services["topics"])
    relay = services["relay"]
    with (
        Daemon(machine.environment(relay), command=machine.command(relay)) as running,
        Daemon(machine.environment(services["shop"]), command=machine.command(services["shop"])) as shop,
    ):
        running.wait_until_ready()
        eventually(lambda: published(machine) >= 3, message=f"nothing arrived: {shop.other_lines}")
        printed = {command: machine.execute(services[name], command) for name, command in COMMANDS}
        running.terminate()
        assert running.wait() == 0
    status, ready, records = printed.values()
    assert status.startswith("unpublished   ")
    assert ready == "ok\n"
    assert len(records.splitlines()) == 3


def published(machine: Machine) -> int:
    with psycopg.connect(machine.database.dsn("shop")) as connection:
        query = "SELECT count(*) FROM outbox_message JOIN orders ON aggregate_id = id::text WHERE state = 'published'"
        [(count,)] = connection.execute(query).fetchall()
    return int(count)


@pytest.mark.kafka
def test_kafka_can_be_formatted_with_the_variables_of_its_container(
    services: dict[str, Service], kafka: Kafka, tmp_path: Path
) -> None:
    assert kafka.brokers_seen() > 0  # which means that Kafka has been fetched
    configuration = tmp_path / "server.properties"
    configuration.write_text(
        "".join(f"{name}={value}\n" for name, value in properties(services["kafka"]["environment"]).items())
        + f"log.dirs={tmp_path}/data\n"
    )
    tool = ["kafka.tools.StorageTool", "format", "--config", str(configuration), "--cluster-id", "cluster"]
    done = subprocess.run(
        ["java", "-cp", KAFKA.class_path, *tool],  # noqa: S607 -- the user's own Java
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, (tmp_path / "data" / "meta.properties").exists()) == (0, True), done.stderr


def properties(variables: Mapping[str, object]) -> dict[str, str]:
    """The image's own rule: KAFKA_NODE_ID is node.id."""
    return {
        name.removeprefix("KAFKA_").lower().replace("_", "."): str(value)
        for name, value in variables.items()
        if name.startswith("KAFKA_")
    }
