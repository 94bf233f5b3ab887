"""Each check of the doctor, as it passes and as it does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest

from outbox_relay.kafka_admin import Cluster, Topic
from outbox_relay.operate.doctor import kafka, postgres
from outbox_relay.operate.doctor.check import Check, duration
from outbox_relay.operate.doctor.postgres import INDEXES, VACUUM_OPTIONS, Client, Index, Server, Table
from outbox_relay.operate.migrate import MigrationState
from outbox_relay.relay.horizon import OpenTransaction

SERVER = Server(
    version_number=18_0004,
    version="18.4",
    is_replica=False,
    is_read_only=False,
    role_name='re"lay',
    database_name="shop",
    lacks_group=False,
    sees_all_sessions=True,
    has_autovacuum=True,
    freeze_max_age=200_000_000,
    xid_age=100,
    multixact_age=1,
)
CLIENT = Client(host="10.0.0.7", is_encrypted=True, sslmode="verify-full", key_pid=7, pids=[7, 7], clock_seconds=0.01)
TABLE = Table(
    name="public.outbox",
    holds_messages=True,
    has_autovacuum=True,
    options=VACUUM_OPTIONS,
    live_tuples=1_000,
    dead_tuples=10,
    total_bytes=2**20,
    xid_age=100,
    multixact_age=1,
)
FOUND = [
    Index("outbox_pkey", is_primary=True, is_valid=True, definition="btree (id)"),
    *(Index(name, is_primary=False, is_valid=True, definition=definition) for name, definition in INDEXES.items()),
]
SESSION = OpenTransaction(
    xid=9,
    pid=42,
    application_name="etl",
    role_name="shop",
    state="idle in transaction",
    age_seconds=400.0,
    query="SELECT 1",
    gid="",
)
PREPARED = OpenTransaction(
    xid=8, pid=0, application_name="", role_name="shop", state="prepared", age_seconds=9_000.0, query="", gid="it's"
)
MISSING_COLUMN = ("outbox.shard", "GRANT SELECT ON public.outbox TO relay")
MISSING_GRANT = (None, "GRANT DELETE ON public.outbox TO relay")

CONFIG: dict[str, kafka.ProducerSetting] = {"bootstrap.servers": "k1:9092,k2:9092"}
TOPIC = Topic(
    "order.events",
    partitions=6,
    replicas=3,
    is_writable=True,
    settings={"max.message.bytes": "1048588", "min.insync.replicas": "2", "cleanup.policy": "delete"},
)
CLUSTER = Cluster(brokers=2, topics=[TOPIC])
SERVERS = "--bootstrap-server k1:9092,k2:9092"
ALTER = f"kafka-configs.sh {SERVERS} --alter --entity-type topics --entity-name order.events"
CREATE = f"kafka-topics.sh {SERVERS} --create --topic order.events --partitions 6 --replication-factor 2"
ALLOW = f"kafka-acls.sh {SERVERS} --add --allow-principal User:ANONYMOUS"
ALLOW_SECURELY = f"kafka-acls.sh {SERVERS} --command-config client.properties --add --allow-principal User:relay"

State = Literal["applied", "pending", "unknown"]


@pytest.mark.parametrize(
    ("client", "status"),
    [
        (CLIENT, "OK"),
        (replace(CLIENT, is_encrypted=False, host="127.0.0.1"), "OK"),
        (replace(CLIENT, is_encrypted=False, host=""), "OK"),
        (replace(CLIENT, sslmode="prefer", host="::1"), "OK"),
        (replace(CLIENT, is_encrypted=False), "WARN"),
        (replace(CLIENT, sslmode="require"), "WARN"),
    ],
)
def test_tls_is_wanted_from_another_machine_and_with_a_server_that_is_verified(client: Client, status: str) -> None:
    assert postgres.check_tls(client).status == status


@pytest.mark.parametrize(("number", "status"), [(13_0022, "FAIL"), (14_0000, "OK"), (18_0004, "OK"), (19_0000, "WARN")])
def test_versions_14_to_18_are_known(number: int, status: str) -> None:
    assert postgres.check_version(replace(SERVER, version_number=number)).status == status


def test_a_relay_needs_a_server_and_a_role_that_write() -> None:
    assert postgres.check_primary(SERVER).status == "OK"
    assert postgres.check_primary(replace(SERVER, is_replica=True, is_read_only=True)).status == "FAIL"
    assert postgres.check_primary(replace(SERVER, is_read_only=True)).remedy == (
        'ALTER ROLE "re""lay" IN DATABASE "shop" SET default_transaction_read_only = off;'
    )


@pytest.mark.parametrize(
    ("pids", "status", "words"),
    [([7, 7], "OK", "none"), ([11, 12], "OK", "pools transactions"), ([11, 11], "WARN", "UNKNOWN")],
)
def test_a_pooler_shows_by_sessions_that_are_not_ours(pids: list[int], status: str, words: str) -> None:
    check = postgres.check_pooler(replace(CLIENT, pids=pids))
    assert check.status == status
    assert words in check.finding


@pytest.mark.parametrize(
    ("seconds", "status", "finding"),
    [
        (-4.9, "OK", "4.9 s from the server's"),
        (90.0, "WARN", "this machine is 90.0 s ahead of the server"),
        (-7_200.0, "WARN", "this machine is 2 h behind the server"),
    ],
)
def test_a_clock_may_differ_by_a_few_seconds(seconds: float, status: str, finding: str) -> None:
    check = postgres.check_clock(replace(CLIENT, clock_seconds=seconds))
    assert (check.status, check.finding) == (status, finding)


def test_tables_lack_what_has_a_name_and_grants_what_has_none() -> None:
    assert postgres.check_tables([MISSING_GRANT], schema="shop").status == "OK"
    assert postgres.check_tables([MISSING_COLUMN], schema="shop") == Check(
        "tables", "FAIL", "schema 'shop' has no outbox.shard", "outbox-relay migrate apply --schema shop"
    )
    assert postgres.check_grants([], server=SERVER).status == "OK"
    assert postgres.check_grants([MISSING_GRANT], server=SERVER).remedy == f"{MISSING_GRANT[1]};"


def test_a_role_outside_the_group_is_put_into_it() -> None:
    check = postgres.check_grants([MISSING_GRANT], server=replace(SERVER, lacks_group=True))
    assert (check.status, check.remedy) == ("FAIL", 'GRANT outbox_relay TO "re""lay";')


@pytest.mark.parametrize(
    ("states", "status"),
    [
        (["applied", "applied"], "OK"),
        (["pending", "pending"], "OK"),
        (["applied", "pending"], "FAIL"),
        (["applied", "unknown"], "WARN"),
    ],
    ids=["current", "applied by another tool", "older", "newer"],
)
def test_an_older_schema_fails_and_a_newer_one_warns(states: list[State], status: str) -> None:
    migrations = [MigrationState(at, "make", state, None) for at, state in enumerate(states, 1)]
    check = postgres.check_migrations(migrations, schema="shop")
    assert check.status == status
    assert bool(check.remedy) == (status != "OK")


def test_partitions_have_a_version_once_their_migrations_have_begun() -> None:
    begun, pending = MigrationState(1, "make", "applied", None), MigrationState(2, "make", "pending", None)
    assert list(postgres.check_partition_migrations([pending], schema="shop")) == []
    assert list(postgres.check_partition_migrations([begun, pending], schema="shop")) == [
        Check(
            "schema version of partitions",
            "FAIL",
            "older than this version: waits for 0002_make",
            "outbox-relay migrate apply --schema shop --partitioned",
        )
    ]


def test_each_index_is_judged_by_its_presence_validity_and_definition() -> None:
    _, unpublished, parked = FOUND
    create = f'CREATE INDEX CONCURRENTLY {unpublished.name} ON "shop"."outbox" USING {unpublished.definition};'
    drop = f'DROP INDEX CONCURRENTLY "shop"."{unpublished.name}";'
    reindex = f'REINDEX INDEX CONCURRENTLY "shop"."{unpublished.name}";'
    for found, status, remedy in (
        (FOUND, "OK", ""),
        ([parked], "FAIL", create),
        ([replace(unpublished, is_valid=False), parked], "FAIL", reindex),
        ([replace(unpublished, definition="btree (shard)"), parked], "FAIL", f"{drop}\n{create}"),
    ):
        check, fine = postgres.check_indexes(found, schema="shop")
        assert (check.status, check.remedy, fine.status) == (status, remedy, "OK")


@pytest.mark.parametrize(
    ("index", "found", "status", "remedy"),
    [
        ("outbox_unpublished_idx", FOUND, "OK", ""),
        ("outbox_pkey", FOUND, "FAIL", 'ANALYZE "shop"."outbox";'),
        (None, FOUND, "FAIL", 'ANALYZE "shop"."outbox";'),
        ("outbox_pkey", FOUND[:1], "FAIL", ""),
        (
            "by_number",
            [*FOUND, Index("by_number", is_primary=False, is_valid=True, definition="btree (sequence_no)")],
            "FAIL",
            'DROP INDEX CONCURRENTLY "shop"."by_number";',
        ),
    ],
    ids=["right", "primary key", "whole table", "no index", "foreign index"],
)
def test_a_claim_goes_through_the_partial_index_alone(
    index: str | None, found: list[Index], status: str, remedy: str
) -> None:
    scan = {"Node Type": "Scan", "Relation Name": "outbox"} | ({"Index Name": index} if index else {})
    plan = {"Node Type": "Limit", "Plans": [{"Node Type": "Scan", "Relation Name": "outbox_shard"}, scan]}
    check = postgres.check_plan(plan, found=found, schema="shop")
    assert (check.status, check.remedy) == (status, remedy)


def test_autovacuum_is_wanted_on_the_server_and_the_tables_with_the_settings_of_the_migration() -> None:
    assert postgres.check_autovacuum([TABLE], server=SERVER).status == "OK"
    off = postgres.check_autovacuum([TABLE], server=replace(SERVER, has_autovacuum=False))
    assert (off.status, off.remedy.splitlines()[-1]) == ("FAIL", "SELECT pg_reload_conf();")
    disabled = postgres.check_autovacuum([replace(TABLE, has_autovacuum=False)], server=SERVER)
    assert (disabled.status, disabled.remedy) == ("FAIL", "ALTER TABLE public.outbox RESET (autovacuum_enabled);")


def test_a_setting_of_autovacuum_may_differ_but_not_be_absent() -> None:
    tuned = replace(TABLE, options={**VACUUM_OPTIONS, "autovacuum_vacuum_threshold": "500"})
    assert postgres.check_autovacuum([tuned], server=SERVER).status == "OK"
    without = {name: value for name, value in VACUUM_OPTIONS.items() if name != "autovacuum_vacuum_threshold"}
    check = postgres.check_autovacuum([replace(TABLE, options=without)], server=SERVER)
    assert check.status == "WARN"
    assert check.remedy == "ALTER TABLE public.outbox SET (autovacuum_vacuum_threshold = 10000);"


@pytest.mark.parametrize(
    ("live", "dead", "status"),
    [(10, 100_000, "OK"), (10, 100_001, "WARN"), (5_000_000, 400_000, "OK")],
)
def test_dead_tuples_are_many_when_they_are_more_than_the_live_ones(live: int, dead: int, status: str) -> None:
    check = postgres.check_dead_tuples([replace(TABLE, live_tuples=live, dead_tuples=dead)])
    assert (check.status, check.remedy) == (status, "" if status == "OK" else "VACUUM (ANALYZE) public.outbox;")


def test_a_table_of_more_than_100_gib_is_worth_a_warning() -> None:
    assert postgres.check_size([TABLE]) == Check("table size", "OK", "1.0 MiB with indexes")
    assert postgres.check_size([replace(TABLE, total_bytes=101 * 2**30)]).remedy == "outbox-relay prune --older-than 7d"


@pytest.mark.parametrize(
    ("database_age", "table_age", "status", "remedy"),
    [
        (300_000_000, 300_000_000, "OK", ""),
        (500_000_000, 100, "WARN", "VACUUM (FREEZE);"),
        (500_000_000, 500_000_000, "WARN", "VACUUM (FREEZE) public.outbox;"),
        (1_700_000_000, 1_700_000_000, "FAIL", "VACUUM (FREEZE) public.outbox;"),
    ],
)
def test_old_rows_are_frozen_before_the_transaction_ids_run_out(
    database_age: int, table_age: int, status: str, remedy: str
) -> None:
    server = replace(SERVER, xid_age=database_age)
    check = postgres.check_wraparound([replace(TABLE, xid_age=table_age)], server=server)
    assert (check.status, check.remedy) == (status, remedy)


def test_multixacts_run_out_as_well() -> None:
    assert postgres.check_wraparound([TABLE], server=replace(SERVER, multixact_age=1_700_000_000)).status == "FAIL"


def test_a_prepared_transaction_that_is_old_was_forgotten() -> None:
    assert postgres.check_prepared([SESSION]).status == "OK"
    assert postgres.check_prepared([SESSION, PREPARED]) == Check(
        "prepared transactions", "FAIL", "it's (shop, prepared) for 2 h", "ROLLBACK PREPARED 'it''s';"
    )


def test_a_long_transaction_is_named_and_so_is_not_being_able_to_see_any() -> None:
    assert postgres.check_long_transactions([PREPARED], server=SERVER).status == "OK"
    assert postgres.check_long_transactions([SESSION], server=SERVER) == Check(
        "long transactions",
        "WARN",
        "pid 42 (etl, idle in transaction) for 7 min",
        "SELECT pg_terminate_backend(42);",
    )
    blind = postgres.check_long_transactions([], server=replace(SERVER, sees_all_sessions=False))
    assert (blind.status, blind.remedy) == ("WARN", 'GRANT pg_read_all_stats TO "re""lay";')


def test_a_replication_slot_that_nobody_reads_keeps_what_it_would_read() -> None:
    assert postgres.check_slots([]).status == "OK"
    assert postgres.check_slots([postgres.Slot("debezium", 3 * 2**30, 1234)]) == Check(
        "replication slots",
        "WARN",
        "not read by anybody: debezium keeps 3,072.0 MiB of log, and rows that died in the last 1,234 transactions",
        "SELECT pg_drop_replication_slot('debezium');",
    )


def test_a_writer_holds_the_horizon_from_the_ordering_timeout_on() -> None:
    assert postgres.check_horizon([SESSION], ordering_timeout=400.0).status == "OK"
    check = postgres.check_horizon([SESSION, PREPARED], ordering_timeout=5.0)
    assert (check.status, check.remedy) == (
        "FAIL",
        "SELECT pg_terminate_backend(42);\nROLLBACK PREPARED 'it''s';",
    )


@pytest.mark.parametrize(
    ("topic", "status", "remedy"),
    [
        (TOPIC, "OK", ""),
        (
            Topic("order.events", error="UNKNOWN_TOPIC_OR_PART"),
            "FAIL",
            CREATE,
        ),
        (
            replace(TOPIC, is_writable=False),
            "FAIL",
            f"{ALLOW} --operation Write --operation Describe --topic order.events",
        ),
    ],
    ids=["there", "missing", "forbidden"],
)
def test_a_topic_is_there_and_may_be_written_to(topic: Topic, status: str, remedy: str) -> None:
    check = kafka.check_topic(topic, cluster=CLUSTER, config=CONFIG)
    assert (check.status, check.remedy) == (status, remedy)


def test_a_topic_that_may_not_even_be_described_says_so() -> None:
    forbidden = Topic("order.events", error="TOPIC_AUTHORIZATION_FAILED")
    check = kafka.check_topic(forbidden, cluster=CLUSTER, config=CONFIG)
    assert (check.status, check.finding) == ("FAIL", "may not be looked at: TOPIC_AUTHORIZATION_FAILED")


def test_settings_that_may_not_be_read_are_one_warning() -> None:
    assert [check.status for check in kafka.check_settings(TOPIC, config=CONFIG)] == ["OK", "OK", "OK"]
    [check] = kafka.check_settings(
        replace(TOPIC, settings={}, settings_error="TOPIC_AUTHORIZATION_FAILED"),
        config={**CONFIG, "security.protocol": "SASL_SSL", "sasl.username": "relay"},
    )
    assert (check.status, check.remedy) == (
        "WARN",
        f"{ALLOW_SECURELY} --operation DescribeConfigs --topic order.events",
    )


def test_a_topic_takes_what_the_producer_lets_pass() -> None:
    assert kafka.check_message_size(TOPIC, config=CONFIG).status == "OK"
    check = kafka.check_message_size(TOPIC, config={**CONFIG, "message.max.bytes": "2000000"})
    assert (check.status, check.remedy) == ("FAIL", f"{ALTER} --add-config max.message.bytes=2000000")


@pytest.mark.parametrize(
    ("replicas", "least", "status", "remedy"),
    [
        (3, 2, "OK", ""),
        (2, 3, "WARN", f"{ALTER} --add-config min.insync.replicas=1"),
        (1, 1, "WARN", "# let kafka-reassign-partitions.sh give it 3, on as many brokers"),
        (3, 3, "WARN", f"{ALTER} --add-config min.insync.replicas=2"),
        (3, 1, "WARN", f"{ALTER} --add-config min.insync.replicas=2"),
    ],
)
def test_copies_survive_the_loss_of_a_broker_and_so_does_writing(
    replicas: int, least: int, status: str, remedy: str
) -> None:
    topic = replace(TOPIC, replicas=replicas, settings={"min.insync.replicas": str(least)})
    check = kafka.check_copies(topic, config=CONFIG)
    assert (check.status, check.remedy) == (status, remedy)


def test_a_compacted_topic_is_worth_a_warning() -> None:
    assert kafka.check_cleanup(TOPIC, config=CONFIG).status == "OK"
    check = kafka.check_cleanup(replace(TOPIC, settings={"cleanup.policy": "compact,delete"}), config=CONFIG)
    assert (check.status, check.remedy) == ("WARN", f"{ALTER} --add-config cleanup.policy=delete")


@pytest.mark.parametrize(
    ("config", "finding"),
    [
        (CONFIG, "none, and no TLS"),
        ({"security.protocol": "ssl"}, "by certificate or none"),
        ({"security.protocol": "SASL_SSL", "sasl.mechanism": "PLAIN"}, "PLAIN over sasl_ssl"),
    ],
)
def test_the_way_in_is_named(config: dict[str, kafka.ProducerSetting], finding: str) -> None:
    assert kafka.check_authentication(config) == Check("kafka authentication", "OK", finding)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "0.0 s"), (119.0, "119.0 s"), (7_300.0, "2 h"), (400_000.0, "5 days")]
)
def test_a_duration_is_told_in_the_largest_unit_that_fits_twice(seconds: float, words: str) -> None:
    assert duration(seconds) == words
