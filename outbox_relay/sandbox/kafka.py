"""Real Kafka brokers from Maven Central, started on this machine: one for most uses, three for fail-over."""

from __future__ import annotations

import signal
import subprocess
import uuid
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from outbox_relay.errors import ConfigurationError, KafkaUnavailable
from outbox_relay.sandbox.maven import Jars
from outbox_relay.sandbox.ports import ReservedPort
from outbox_relay.sandbox.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

KAFKA_VERSION = "4.3.1"
KAFKA = Jars("Kafka", Path(__file__).with_name("kafka-pom.xml"), {"kafka.version": KAFKA_VERSION})

START_TIMEOUT_SECONDS = 90.0
STOP_TIMEOUT_SECONDS = 30.0
REQUEST_TIMEOUT_SECONDS = 10.0
LOG_TAIL_CHARACTERS = 2000

_JVM_OPTIONS = (
    "-Xmx512m",
    "-XX:TieredStopAtLevel=1",  # one that lives for a minute spends half of its time on compiling otherwise
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
)


class Kafka:
    """A Kafka that somebody runs, as far as demos and tests need to speak to it."""

    def __init__(self, bootstrap_servers: str) -> None:
        self.bootstrap_servers = bootstrap_servers

    def create_topic(self, name: str, *, partitions: int = 1, config: Mapping[str, str] | None = None) -> None:
        """
        Create a topic, on as many brokers as there are up to three, and wait until every partition has a leader.

        Raises:
            KafkaException: The broker refused, for example because the topic exists.
        """
        replicas = min(3, self.brokers_seen())
        topic = NewTopic(name, num_partitions=partitions, replication_factor=replicas, config=dict(config or {}))
        admin = self.admin()  # a name for it, since dropping the client would cancel its request
        admin.create_topics([topic])[name].result(REQUEST_TIMEOUT_SECONDS)
        eventually(partial(self._is_led, name, partitions=partitions), message=f"topic {name} got no leaders")

    def brokers_seen(self) -> int:
        """How many brokers are in service, 0 when nobody answers."""
        try:
            return len(self.admin().list_topics(timeout=1).brokers)
        except KafkaException:
            return 0

    def admin(self) -> AdminClient:
        """Give a client for what is not offered here; keep it until its requests are answered."""
        return AdminClient({"bootstrap.servers": self.bootstrap_servers, "log_level": 0})

    def _is_led(self, topic: str, *, partitions: int) -> bool:
        found = self.admin().list_topics(topic, timeout=REQUEST_TIMEOUT_SECONDS).topics[topic].partitions
        return len(found) == partitions and all(partition.leader >= 0 for partition in found.values())


class KafkaCluster(Kafka):
    """
    Combined brokers and controllers (KRaft) on loopback ports that they keep over restarts.

    Everything they write is below *directory*, which the caller removes. Nodes are numbered from 1. The first start on
    a machine fetches Kafka. Topics never come into being by themselves. Leaving the context stops the nodes; those
    whose parent is killed with SIGKILL run on.

    Args:
        listeners: Further ones beside the plain one that this class itself uses: protocols by name, in capitals.
        settings: Further ones of the brokers, such as those of the listeners.
        jvm_options: Further ones of the brokers' virtual machines.
    """

    def __init__(
        self,
        directory: Path,
        *,
        brokers: int = 1,
        listeners: Mapping[str, str] | None = None,
        settings: Mapping[str, str] | None = None,
        jvm_options: Sequence[str] = (),
    ) -> None:
        self._nodes = {
            number: _Node(number, directory / f"node-{number}", listeners=listeners or {})
            for number in range(1, brokers + 1)
        }
        self._settings = settings or {}
        self._jvm_options = jvm_options
        self._cluster_id = uuid.uuid4().hex[:22]
        super().__init__(",".join(node.address for node in self._nodes.values()))

    def servers_of(self, listener: str, *, host: str = "127.0.0.1") -> str:
        """Give the bootstrap servers of a further listener; another name of the *host* may be asked for."""
        return ",".join(f"{host}:{node.port_of(listener)}" for node in self._nodes.values())

    def advertise(self, listener: str, *, port: int, node: int = 1) -> None:
        """From its next start on, let a node send the clients of a further listener to *port*, say a proxy's."""
        self._nodes[node].advertised_ports[listener] = port

    def start(self) -> None:
        """
        Start every node and wait until all are in service.

        Raises:
            ConfigurationError: Java or Maven is missing.
            DependencyUnavailable: Kafka could not be fetched.
            KafkaUnavailable: A node did not come up.
        """
        if missing := KAFKA.what_is_missing():
            raise ConfigurationError(missing)
        KAFKA.fetch()
        for node in self._nodes.values():
            self._start(node)
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """
        Return once every node is in service.

        Raises:
            KafkaUnavailable: One ended, or they took too long.
        """
        for node in self._nodes.values():
            node.wait_until_ready(brokers=len(self._nodes))

    @property
    def pids(self) -> list[int]:
        """Process ids of the nodes that run."""
        return [node.pid for node in self._nodes.values() if node.pid is not None]

    def stop(self) -> None:
        """End every node in order, as far as they can: the last ones have no quorum left and are killed."""
        for node in self._nodes.values():
            node.signal(signal.SIGCONT)
            node.signal(signal.SIGTERM)
        for node in self._nodes.values():
            node.wait_or_kill(timeout=STOP_TIMEOUT_SECONDS)

    def kill(self, node: int = 1) -> None:
        """Kill a node with SIGKILL."""
        self._nodes[node].wait_or_kill(timeout=0)

    def pause(self, node: int = 1) -> None:
        """Stop a node's clock: its connections stay open, and nothing answers."""
        self._nodes[node].signal(signal.SIGSTOP)

    def resume(self, node: int = 1) -> None:
        """Let a paused node go on."""
        self._nodes[node].signal(signal.SIGCONT)

    def restart(self, node: int = 1) -> None:
        """End a node in order if it runs, start it at the same address and wait until it is in service."""
        self._nodes[node].signal(signal.SIGTERM)
        self._nodes[node].wait_or_kill(timeout=STOP_TIMEOUT_SECONDS)
        self._start(self._nodes[node])
        self._nodes[node].wait_until_ready(brokers=1)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:  # Ctrl-C too must not leave nodes behind
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        for node in self._nodes:
            self.kill(node)

    def _start(self, node: _Node) -> None:
        voters = ",".join(f"{other.number}@127.0.0.1:{other.controller_port}" for other in self._nodes.values())
        copies = len(self._nodes)
        node.start(
            cluster_id=self._cluster_id,
            settings={
                "controller.quorum.voters": voters,
                "auto.create.topics.enable": "false",
                "min.insync.replicas": str(copies // 2 + 1),
                "group.initial.rebalance.delay.ms": "0",
                "log.retention.ms": "-1",  # whatever the time stamps of records say
                "offsets.topic.replication.factor": str(copies),
                "offsets.topic.num.partitions": "4",
                "transaction.state.log.replication.factor": str(copies),
                "transaction.state.log.min.isr": str(copies // 2 + 1),
                "transaction.state.log.num.partitions": "4",
                **self._settings,
            },
            jvm_options=self._jvm_options,
        )


class _Node:
    """One process of a cluster."""

    def __init__(self, number: int, directory: Path, *, listeners: Mapping[str, str]) -> None:
        self.number = number
        self._directory = directory
        self._protocols = {"PLAINTEXT": "PLAINTEXT", "CONTROLLER": "PLAINTEXT", **listeners}
        self._ports = {listener: ReservedPort() for listener in listeners}
        self.advertised_ports = {listener: port.number for listener, port in self._ports.items()}
        self._port = ReservedPort()
        self._controller_port = ReservedPort()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port.number}"

    @property
    def controller_port(self) -> int:
        return self._controller_port.number

    def port_of(self, listener: str) -> int:
        return self._ports[listener].number

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self, *, cluster_id: str, settings: Mapping[str, str], jvm_options: Sequence[str]) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        further = "".join(f",{listener}://127.0.0.1:{port.number}" for listener, port in self._ports.items())
        advertised = "".join(f",{listener}://127.0.0.1:{port}" for listener, port in self.advertised_ports.items())
        properties = self._directory / "server.properties"
        own_settings = {
            "process.roles": "broker,controller",
            "node.id": str(self.number),
            "listeners": f"PLAINTEXT://{self.address},CONTROLLER://127.0.0.1:{self.controller_port}{further}",
            "advertised.listeners": f"PLAINTEXT://{self.address}{advertised}",
            "listener.security.protocol.map": ",".join(f"{name}:{kind}" for name, kind in self._protocols.items()),
            "controller.listener.names": "CONTROLLER",
            "log.dirs": str(self._directory / "data"),
        }
        properties.write_text("".join(f"{name}={value}\n" for name, value in (own_settings | dict(settings)).items()))
        if not (self._directory / "data").exists():
            format_ = ("kafka.tools.StorageTool", "format", "--config", str(properties), "--cluster-id", cluster_id)
            if self._java(*jvm_options, *format_).wait():
                raise KafkaUnavailable(f"Kafka's storage could not be formatted\n{self._log_tail()}")
        self._process = self._java(*jvm_options, "kafka.Kafka", str(properties))

    def wait_until_ready(self, *, brokers: int) -> None:
        # A node answers clients only when the controller has let it into service. Asking it alone, not the cluster,
        # keeps a node that was killed a moment ago from looking alive through the others' memory of it.
        kafka = Kafka(self.address)
        try:
            eventually(
                lambda: self._has_ended() or kafka.brokers_seen() >= brokers,
                timeout=START_TIMEOUT_SECONDS,
                message=f"Kafka node {self.number} did not come into service",
            )
        except TimeoutError as error:
            raise KafkaUnavailable(f"{error}\n{self._log_tail()}") from error
        if self._has_ended():
            raise KafkaUnavailable(f"Kafka node {self.number} ended while it started\n{self._log_tail()}")

    def signal(self, number: signal.Signals) -> None:
        if self._process:
            self._process.send_signal(number)

    def wait_or_kill(self, *, timeout: float) -> None:
        if self._process is None:
            return
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _java(self, *arguments: str) -> subprocess.Popen[bytes]:
        # In a session of its own: Ctrl-C in the terminal is for us, and we end the node in order.
        with self._log_path.open("ab") as log:
            return subprocess.Popen(  # noqa: S603 -- Kafka as fetched
                ("java", "-cp", KAFKA.class_path, *_JVM_OPTIONS, *arguments),  # noqa: S607 -- the user's own Java
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def _log_path(self) -> Path:
        return self._directory / "node.log"

    def _has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def _log_tail(self) -> str:
        return self._log_path.read_text(errors="replace")[-LOG_TAIL_CHARACTERS:]
