"""Ask PostgreSQL and Kafka what the checks need, and give the checks one by one, as the answers come."""

from __future__ import annotations

import time
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from psycopg.conninfo import make_conninfo
from psycopg.rows import class_row

from outbox_relay import kafka_admin
from outbox_relay.database import connect, roll_back, translated_errors
from outbox_relay.errors import ConfigurationError, DatabaseUnavailable, KafkaUnavailable, OutboxRelayError
from outbox_relay.operate import migrate
from outbox_relay.operate.doctor import kafka, messages, postgres
from outbox_relay.operate.doctor.check import Check
from outbox_relay.operate.status import read_status
from outbox_relay.relay.claim import ClaimOptions, begin_statement
from outbox_relay.relay.failures import Unpublishable
from outbox_relay.relay.horizon import OpenTransaction
from outbox_relay.relay.read import Limits
from outbox_relay.relay.shards import SHARDS
from outbox_relay.sql import numbers, statement

if TYPE_CHECKING:
    from collections.abc import Collection, Generator, Iterable, Iterator, Mapping

    from psycopg import Connection
    from psycopg.rows import TupleRow

    from outbox_relay.relay.message import Addressing

T = TypeVar("T")

_ROUND_TRIPS = 5
_MESSAGES_SEEN = 10_000


@dataclass(frozen=True, slots=True)
class Subject:
    """
    What is examined.

    Attributes:
        conninfo: As of the relay.
        ordering_timeout: Seconds that a writer may hold the horizon.
        long_seconds: Seconds after which an open transaction is long, and a prepared one forgotten.
        addressing: How topics are named.
        producer_config: librdkafka's properties.
    """

    conninfo: str
    schema: str
    ordering_timeout: float
    long_seconds: float
    addressing: Addressing
    producer_config: Mapping[str, kafka.ProducerSetting]


def examine(subject: Subject) -> Iterator[Check]:
    """Yield every check; the database or Kafka being away is a finding, and the other is examined all the same."""
    aggregate_types = yield from _examine_database(subject)
    topics = yield from _topics(subject.addressing, aggregate_types)
    yield from _examine_kafka(subject.producer_config, topics=topics)


def _examine_database(subject: Subject) -> Generator[Check, None, list[str]]:
    """Yield the checks of PostgreSQL and return the aggregate types that were seen."""
    try:
        connection = _connect(subject.conninfo)
    except DatabaseUnavailable as error:
        remedy = "# start PostgreSQL there, or correct OUTBOX_RELAY_DATABASE_URL"
        yield Check("postgresql", "FAIL", str(error), remedy)
        return []
    with closing(connection):
        info = connection.info
        yield Check("postgresql", "OK", f"database {info.dbname!r} on {info.host}:{info.port} as {info.user!r}")
        try:
            questions = _Questions(connection, subject)
            yield from questions.server_checks()
            if questions.is_usable:
                yield from questions.outbox_checks()
        except OutboxRelayError as error:
            yield Check("connection", "FAIL", f"no further question was answered: {error}")
            return []
        return questions.aggregate_types


def _connect(conninfo: str) -> Connection:
    """Connect to the primary; if there is none, to whoever answers, to say so."""
    try:
        return connect(conninfo, application_name="outbox-relay doctor")
    except DatabaseUnavailable:
        return connect(make_conninfo(conninfo, target_session_attrs="any"), application_name="outbox-relay doctor")


class _Questions:
    """The questions to one database; they stop at what makes the later ones pointless."""

    def __init__(self, connection: Connection, subject: Subject) -> None:
        self.is_usable = True
        self.aggregate_types: list[str] = []
        self._connection = connection
        self._subject = subject
        self._schema = subject.schema
        [self._server] = self._rows(postgres.Server, "doctor_server")

    def server_checks(self) -> Iterator[Check]:
        """Who answers, and whether a relay can work there at all."""
        server = self._server
        primary = postgres.check_primary(server)
        self.is_usable = primary.status != "FAIL"
        client = self._client()
        yield postgres.check_version(server)
        yield primary
        yield postgres.check_tls(client)
        yield postgres.check_pooler(client)
        yield postgres.check_clock(client)

    def outbox_checks(self) -> Iterator[Check]:
        """The tables, if they are there."""
        missing = self._fetch("list_missing", {"schema": self._schema})
        tables = postgres.check_tables(missing, schema=self._schema)
        yield tables
        if tables.status == "FAIL":
            return
        yield postgres.check_grants(missing, server=self._server)
        for name, checks in (
            ("schema version", self._migration_checks),
            ("definitions", self._definition_checks),
            ("numbers", self._number_checks),
            ("index", self._index_checks),
            ("partitions", self._partition_checks),
            ("vacuum", self._vacuum_checks),
            ("transactions", self._transaction_checks),
            ("messages", self._message_checks),
            ("topics", self._look_for_aggregate_types),
        ):
            try:
                yield from checks()
            except DatabaseUnavailable:
                raise
            except OutboxRelayError as error:
                roll_back(self._connection)  # some questions begin a transaction of their own
                yield Check(name, "FAIL", str(error))

    def _migration_checks(self) -> Iterator[Check]:
        outbox, partitioned = (
            migrate.status(self._connection, schema=self._schema, line=line) for line in ("outbox", "partitioned")
        )
        yield postgres.check_migrations(outbox, schema=self._schema)
        yield from postgres.check_partition_migrations(partitioned, schema=self._schema)

    def _definition_checks(self) -> Iterator[Check]:
        yield from postgres.check_defects(self._fetch("list_defects", {"schema": self._schema}))
        yield postgres.check_triggers(self._rows(postgres.Trigger, "doctor_triggers"))

    def _number_checks(self) -> Iterator[Check]:
        yield from postgres.check_disagreements(self._fetch("list_disagreements", {"schema": self._schema}))

    def _index_checks(self) -> Iterator[Check]:
        found = self._rows(postgres.Index, "doctor_indexes")
        yield from postgres.check_indexes(found, schema=self._schema)
        yield postgres.check_plan(self._plan(), found=found, schema=self._schema)

    def _partition_checks(self) -> Iterator[Check]:
        [(is_partitioned,)] = self._fetch("partition_exists")
        if is_partitioned:
            [found] = self._rows(postgres.Partitions, "doctor_partitions")
            yield postgres.check_partitions(found, schema=self._schema)

    def _vacuum_checks(self) -> Iterator[Check]:
        tables = self._rows(postgres.Table, "doctor_tables")
        yield postgres.check_autovacuum(tables, server=self._server)
        yield postgres.check_dead_tuples(tables)
        yield postgres.check_size(tables)
        yield postgres.check_wraparound(tables, server=self._server)
        yield postgres.check_durability(tables, self._fetch("doctor_settings"))

    def _transaction_checks(self) -> Iterator[Check]:
        long = self._rows(OpenTransaction, "doctor_transactions", {"seconds": self._subject.long_seconds})
        yield postgres.check_prepared(long)
        yield postgres.check_long_transactions(long, server=self._server)
        yield postgres.check_slots(self._rows(postgres.Slot, "doctor_slots"))

    def _message_checks(self) -> Iterator[Check]:
        status = read_status(self._connection, schema=self._schema)
        long_seconds = self._subject.long_seconds
        [(unthinned_marks,)] = self._fetch("doctor_marks", {"most": messages.MANY_MARKS})
        yield messages.check_horizon(status, ordering_timeout=self._subject.ordering_timeout)
        yield messages.check_shard_locks(status, long_seconds=long_seconds)
        yield messages.check_backlog(status, long_seconds=long_seconds)
        yield messages.check_waiting(status, long_seconds=long_seconds)
        yield messages.check_parked(status)
        yield messages.check_late_writers(status)
        yield messages.check_marks(status, unthinned_marks=unthinned_marks)

    def _look_for_aggregate_types(self) -> Iterable[Check]:
        """Remember them for the checks of topics; no check of its own."""
        rows = self._fetch("doctor_aggregate_types", {"most": _MESSAGES_SEEN})
        self.aggregate_types = [aggregate_type for (aggregate_type,) in rows]
        return []

    def _client(self) -> postgres.Client:
        """Look at our own end, and ask a few times for the session and the time; the quickest answer is the best."""
        pids = []
        clocks = []
        for _ in range(_ROUND_TRIPS):
            asked_at = time.time()
            with translated_errors():
                [(pid, now)] = self._connection.execute(statement("doctor_pid", schema=None)).fetchall()
            round_trip = time.time() - asked_at
            pids.append(pid)
            clocks.append((round_trip, asked_at + round_trip / 2 - now))
        pgconn = self._connection.pgconn
        given = {option.keyword: option.val for option in pgconn.info}
        return postgres.Client(
            host=self._connection.info.hostaddr,
            is_encrypted=pgconn.ssl_in_use,
            sslmode=(given.get(b"sslmode") or b"").decode(),
            key_pid=pgconn.backend_pid,
            pids=pids,
            clock_seconds=min(clocks)[1],
        )

    def _plan(self) -> Mapping[str, object]:
        """Have a lane's read planned with its settings; it is not run."""
        limits = Limits()
        parameters = {
            "shards": numbers(range(SHARDS)),
            "marks": numbers([0] * SHARDS),
            "have_pending": [True] * SHARDS,
            "through": 2**62,
            "batch_size": limits.messages,
            "batch_bytes": limits.stored_bytes,
            "readable_bytes": limits.readable_bytes,
        }
        explain = b"EXPLAIN (FORMAT JSON) " + statement("read_messages", schema=self._schema)
        with translated_errors():
            self._connection.execute(begin_statement(ClaimOptions(schema=self._schema)))
            [([explained],)] = self._connection.execute(explain, parameters).fetchall()
        roll_back(self._connection)
        plan: Mapping[str, object] = explained["Plan"]
        return plan

    def _rows(self, kind: type[T], name: str, parameters: Mapping[str, object] | None = None) -> list[T]:
        with self._transaction(), self._connection.cursor(row_factory=class_row(kind)) as cursor:
            return cursor.execute(statement(name, schema=self._schema), parameters).fetchall()

    def _fetch(self, name: str, parameters: Mapping[str, object] | None = None) -> list[TupleRow]:
        with self._transaction():
            return self._connection.execute(statement(name, schema=self._schema), parameters).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with translated_errors(), self._connection.transaction():
            self._connection.execute(statement("doctor_limits", schema=None))
            yield


def _topics(addressing: Addressing, aggregate_types: Iterable[str]) -> Generator[Check, None, set[str]]:
    """Return the topics of these types and of the settings; give a check for each type that makes none."""
    topics = set(addressing.topics.values())
    for aggregate_type in aggregate_types:
        try:
            topics.add(addressing.topic(aggregate_type))
        except Unpublishable as error:
            yield Check("topics", "FAIL", f"{error}; its messages get parked", "# see the finding")
    return topics


def _examine_kafka(config: Mapping[str, kafka.ProducerSetting], *, topics: Collection[str]) -> Iterator[Check]:
    servers = str(config.get("bootstrap.servers", ""))
    try:
        cluster = kafka_admin.describe_cluster(config, topics=topics)
    except KafkaUnavailable as error:
        remedy = (
            "# start Kafka there, or correct OUTBOX_RELAY_KAFKA__BOOTSTRAP_SERVERS, or, if the brokers ask for a"
            " certificate, OUTBOX_RELAY_KAFKA__SSL_CERTIFICATE_LOCATION"
        )
        yield Check("kafka", "FAIL", str(error), remedy)
        return
    except ConfigurationError as error:
        remedy = (
            "# correct OUTBOX_RELAY_KAFKA__SASL_... or OUTBOX_RELAY_KAFKA__SSL_...; what the brokers' certificates name"
            " must be in OUTBOX_RELAY_KAFKA__BOOTSTRAP_SERVERS"
        )
        yield Check("kafka authentication", "FAIL", str(error), remedy)
        return
    yield Check("kafka", "OK", f"{servers}; brokers in service: {cluster.brokers}")
    yield kafka.check_authentication(config)
    if not cluster.topics:
        yield Check("topics", "OK", "none is known before the first message")
    for topic in cluster.topics:
        check = kafka.check_topic(topic, cluster=cluster, config=config)
        yield check
        if check.status != "FAIL":
            yield from kafka.check_settings(topic, config=config)
