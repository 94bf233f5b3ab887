"""docs/from-debezium.md: both write the same records, and going over loses, doubles and reorders nothing."""

from __future__ import annotations

import json
import re
from itertools import filterfalse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import pytest

from tests.fixtures.accounts import CREATE, Accounts, arrived
from tests.fixtures.connect import STRINGS, connector_config
from tests.fixtures.guides import Guide
from tests.fixtures.pipeline import Pipeline
from tests.fixtures.topics import read_topic
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    import psycopg
    from confluent_kafka import Message

    from outbox_relay.sandbox.kafka import Kafka
    from tests.fixtures.connect import Connect
    from tests.fixtures.postgres import Database

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

GUIDE = Guide(Path(__file__).parents[2] / "docs" / "from-debezium.md")
TABLE = """
CREATE TABLE {table} (
    id uuid PRIMARY KEY,
    aggregatetype varchar(255) NOT NULL,
    aggregateid varchar(255) NOT NULL,
    type varchar(255) NOT NULL,
    payload {payload}
)
"""
JSON = "org.apache.kafka.connect.json.JsonConverter"
EVENT_TYPE = "jsonb_strip_nulls(jsonb_build_object('eventType', type))"
PLACEMENT = {"transforms.outbox.table.fields.additional.placement": "type:header:eventType"}
SHARED_HEADERS = {"id", "eventType"}
HEADERS_OF_RELAY = {"event_type", "aggregate_type", "sequence_no", "source", "content-type"}
HEADERS_OF_DEBEZIUM = "__debezium.context."


class Mapping(NamedTuple):
    """A line of the guide's table: what to select for a kind of payload and a converter."""

    payload_type: str
    converter: str
    key: str
    payload: str
    payload_bytes: str
    promise: str


MAPPINGS = [
    Mapping(*(cell.strip(" `") for cell in line.strip("|").split("|")))
    for line in re.findall(r"^\| (?:jsonb|text|bytea) .*$", GUIDE.text, re.MULTILINE)
]
CONVERTERS = [
    {"value.converter": STRINGS},
    {"value.converter": STRINGS},
    {"value.converter": "io.debezium.converters.BinaryDataConverter"},
    {
        "key.converter": JSON,
        "value.converter": JSON,
        "key.converter.schemas.enable": "false",
        "value.converter.schemas.enable": "false",
    },
    {
        "value.converter": JSON,
        "value.converter.schemas.enable": "false",
        "transforms.outbox.table.expand.json.payload": "true",
    },
]
KEYS = ["4711", "4712", "ü 4713"]
PAYLOADS = [
    '{"b": 1.50, "ü/\\"": "\\n\\u0001", "list": [1, 2], "inner": {"a": null, "c": 1}, "nothing": null}',
    '{"a": {}}',
    None,
]


@pytest.fixture
def pipeline(logical_database: Database, kafka: Kafka, topic_prefix: str, seed: int) -> Pipeline:
    return Pipeline(logical_database, kafka, prefix=f"{topic_prefix}outbox.event.", seed=seed)


def headers(record: Message) -> dict[str, bytes]:
    return dict(cast("list[tuple[str, bytes]]", record.headers()))


def when(record: Message) -> int:
    """Milliseconds of its timestamp."""
    return record.timestamp()[1]


def is_of_relay(record: Message) -> bool:
    return "source" in headers(record)


def routed(pipeline: Pipeline) -> dict[str, str]:
    """What makes Debezium use the topics of *pipeline*."""
    return {"transforms.outbox.route.topic.replacement": pipeline.topic("${routedByValue}")}


def what_consumers_see(records: list[Message], *, promise: str) -> dict[str | bytes | None, tuple[object, ...]]:
    """Partition, value and shared headers by key."""
    seen: dict[str | bytes | None, tuple[object, ...]] = {}
    for record in records:
        value: object = record.value()
        if promise == "same JSON":
            value = json.loads(record.value() or b"")
        shared = {name: text for name, text in headers(record).items() if name in SHARED_HEADERS}
        seen[record.key()] = (record.partition(), value, shared)
    return seen


def start_connector(connect: Connect, database: Database, name: str, config: dict[str, str]) -> None:
    """Return when the slot is in use: what was written before would not be seen."""
    connect.create(name, config)
    query = "SELECT active FROM pg_replication_slots WHERE slot_name = %s"
    with database.connect(autocommit=True) as connection:
        eventually(lambda: connection.execute(query, [config["slot.name"]]).fetchone() == (True,))


def write_to_both(connection: psycopg.Connection, table: str, mapping: Mapping) -> None:
    """Insert a row of each payload into *table*, and forward it as *mapping* says; the table is the aggregate type."""
    is_binary = mapping.payload_type == "bytea"
    payload = "convert_to(payload, 'UTF8')" if is_binary else f"payload::{mapping.payload_type}"
    insert = f"INSERT INTO {table} SELECT gen_random_uuid(), '{table}', key, 'order_placed', {payload}"
    rows = "FROM unnest(%s::text[], %s::text[]) AS row (key, payload)"
    connection.execute(f"{insert} {rows}".encode(), [KEYS, PAYLOADS])
    columns = "message_id, aggregate_type, aggregate_id, event_type, payload, payload_bytes, headers"
    selected = f"id, aggregatetype, {mapping.key}, type, {mapping.payload}, {mapping.payload_bytes}, {EVENT_TYPE}"
    connection.execute(f"INSERT INTO outbox ({columns}) SELECT {selected} FROM {table}".encode())
    connection.commit()


def test_both_write_the_same_records(pipeline: Pipeline, connect: Connect) -> None:
    database = pipeline.database
    lines = {f"line{number}": mapping for number, mapping in enumerate(MAPPINGS, start=1)}
    with database.connect() as connection, pipeline.relays(1):
        for (table, mapping), converters in zip(lines.items(), CONVERTERS, strict=True):
            pipeline.kafka.create_topic(pipeline.topic(table), partitions=5)
            connection.execute(TABLE.format(table=table, payload=mapping.payload_type).encode())
            connection.commit()
            config = connector_config(database, table=table, slot=table, publication=table)
            start_connector(connect, database, table, config | routed(pipeline) | converters | PLACEMENT)
            write_to_both(connection, table, mapping)
        for table, mapping in lines.items():
            by_relay, by_debezium = by_writer(pipeline, table)
            assert len(by_relay) == len(KEYS)
            seen = [what_consumers_see(records, promise=mapping.promise) for records in (by_relay, by_debezium)]
            assert seen[0] == seen[1]
            assert max(map(when, by_relay)) <= min(map(when, by_debezium))
            assert set().union(*map(headers, by_relay)) == SHARED_HEADERS | HEADERS_OF_RELAY
            others = set().union(*map(headers, by_debezium)) - SHARED_HEADERS
            assert others == {name for name in others if name.startswith(HEADERS_OF_DEBEZIUM)}


def by_writer(pipeline: Pipeline, aggregate_type: str) -> tuple[list[Message], list[Message]]:
    """The relay's records and Debezium's, once all of them are there."""

    def complete() -> list[Message] | None:
        records = read_topic(pipeline.kafka.bootstrap_servers, pipeline.topic(aggregate_type))
        return records if len(records) == 2 * len(KEYS) else None

    records = eventually(complete) or []
    return list(filter(is_of_relay, records)), list(filterfalse(is_of_relay, records))


def write_event(connection: psycopg.Connection, key: str, versions: range) -> None:
    """As applications of Debezium do: insert, check how many, and often delete at once."""
    inserted = connection.execute(
        "INSERT INTO outboxevent (id, aggregatetype, aggregateid, type, payload)"
        " SELECT gen_random_uuid(), 'account', %s, 'raised', jsonb_build_object('version', version)"
        " FROM unnest(%s::bigint[]) AS version RETURNING id",
        [key, list(versions)],
    ).fetchall()
    assert len(inserted) == len(versions)
    if versions[0] % 2:
        deleted = connection.execute("DELETE FROM outboxevent WHERE id = ANY(%s)", [[id_ for (id_,) in inserted]])
        assert deleted.rowcount == len(versions)


@pytest.fixture(params=["filtered", "all_tables"])
def prepared(pipeline: Pipeline, connect: Connect, request: pytest.FixtureRequest) -> Pipeline:
    """Debezium at work on a table, with each publication that it can make, and the guide's preparations made."""
    database = pipeline.database
    pipeline.kafka.create_topic(pipeline.topic("account"), partitions=3)
    pipeline.kafka.create_topic(pipeline.topic("outbox_cut_over"))
    with database.connect(autocommit=True) as owner:
        owner.execute(TABLE.format(table="outboxevent", payload="jsonb").encode())
        owner.execute(CREATE)
        owner.execute("CREATE ROLE shop LOGIN")
        owner.execute("GRANT SELECT, INSERT, DELETE ON outboxevent TO shop")
        owner.execute("GRANT SELECT, UPDATE ON account TO shop")
    config = connector_config(database, table="outboxevent") | routed(pipeline)
    for mode in (request.param, "disabled"):
        start_connector(connect, database, "outbox", config | {"publication.autocreate.mode": mode})
    GUIDE.run("Prepare", database=database)
    return pipeline


def cut_over(connect: Connect, database: Database, load: Accounts, *, is_behind: bool) -> None:
    """As the guide has it, until Debezium has finished, which is behind the writers or keeps up with them."""
    if is_behind:
        connect.stop("outbox")
    load.await_more(100)
    [(reached,)] = GUIDE.run("Cut over", database=database)
    load.await_more(100)
    if is_behind:
        assert connect.position("outbox") < reached
        connect.resume("outbox")
    eventually(lambda: connect.position("outbox") >= reached)
    connect.stop("outbox")


def test_going_over_and_back_under_load_loses_doubles_and_reorders_nothing(
    prepared: Pipeline, connect: Connect, seed: int
) -> None:
    database = prepared.database
    with Accounts(database.server.dsn(database.name, user="shop"), write=write_event, seed=seed) as load:
        eventually(lambda: connect.position("outbox") > 0)
        cut_over(connect, database, load, is_behind=True)
        with prepared.relays(1):
            load.await_more(100)
            GUIDE.run("Back to Debezium", database=database)
            load.await_more(100)
            prepared.await_settled()
        connect.resume("outbox")
        load.await_more(100)
        cut_over(connect, database, load, is_behind=False)
        with prepared.relays(1) as [relay]:
            GUIDE.run("Finish", database=database)
            load.await_more(100)
            relay.terminate()
            assert relay.wait() == 0
    with prepared.relays(1):
        prepared.await_settled()
    topic = prepared.topic("account")
    assert arrived(prepared.kafka, topic) == load.versions()
    by_relay = sum(map(is_of_relay, read_topic(prepared.kafka.bootstrap_servers, topic)))
    assert 300 < by_relay < sum(map(len, load.versions().values())) - 300
