"""Each check of the doctor, as it passes and as it does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import click
import pytest

from outbox_relay.cli.doctor import report
from outbox_relay.kafka_admin import Cluster, Topic
from outbox_relay.operate.doctor import kafka, messages, postgres
from outbox_relay.operate.doctor.check import Check, duration
from outbox_relay.operate.doctor.postgres import INDEXES, VACUUM_OPTIONS, Client, Index, Server, Table, Trigger
from outbox_relay.operate.migrate import MigrationState
from outbox_relay.operate.status import Status
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
    table_name="outbox",
    is_logged=True,
    has_autovacuum=True,
    options=VACUUM_OPTIONS["outbox"],
    live_tuples=1_000,
    dead_tuples=10,
    total_bytes=2**20,
    xid_age=100,
    multixact_age=1,
)
FOUND = [
    Index(table, name, is_primary=name.endswith("_pkey"), is_valid=True, definition=definition)
    for (table, name), definition in INDEXES.items()
]
BY_NUMBER = Index("outbox", "by_number", is_primary=False, is_valid=True, definition="btree (sequence_no)")
STATUS = Status(
    unpublished=0,
    oldest_age_seconds=0.0,
    oldest_no=None,
    waiting=0,
    waiting_reasons={},
    longest_wait_seconds=0.0,
    parked=0,
    parked_keys=0,
    uncollected_writers=0,
    unreconciled_seconds=0.0,
    writers=[],
    lockers=[],
    shards=[],
)
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


def test_what_a_relay_refuses_to_start_with_fails_with_the_statement_that_mends_it() -> None:
    problem = ("outbox_shard lacks 7", "INSERT INTO outbox_shard VALUES (7)")
    for check in (postgres.check_defects, postgres.check_disagreements):
        [found] = check([problem])
        assert (found.status, found.finding, found.remedy) == ("FAIL", problem[0], f"{problem[1]};")
        assert [fine.status for fine in check([])] == ["OK"]
    [advised] = postgres.check_defects([("CACHE 50", "ALTER SEQUENCE numbers CACHE 1, then connect anew, all of you")])
    assert (advised.finding, advised.remedy) == (
        "CACHE 50; then connect anew, all of you",
        "ALTER SEQUENCE numbers CACHE 1;",
    )


def test_a_trigger_that_may_drop_rows_is_named() -> None:
    assert postgres.check_triggers([]).status == "OK"
    check = postgres.check_triggers([Trigger('"Guard"', "public.outbox"), Trigger("keep", "public.outbox_published")])
    assert check.status == "WARN"
    assert check.finding.endswith('"Guard" of public.outbox, keep of public.outbox_published')
    assert check.remedy == 'DROP TRIGGER "Guard" ON public.outbox;\nDROP TRIGGER keep ON public.outbox_published;'


@pytest.mark.parametrize("at", range(len(FOUND)), ids=[index.name for index in FOUND])
def test_each_index_is_judged_by_its_presence_validity_and_definition(at: int) -> None:
    index, others = FOUND[at], [*FOUND[:at], *FOUND[at + 1 :]]
    missing, invalid, other = (
        list(postgres.check_indexes(found, schema="shop"))
        for found in (
            others,
            [*others, replace(index, is_valid=False)],
            [*others, replace(index, definition="btree (shard)")],
        )
    )
    assert [check.status for check in postgres.check_indexes(FOUND, schema="shop")] == ["OK"] * len(FOUND)
    for checks in (missing, invalid, other):
        assert [check.name for check in checks if check.status == "FAIL"] == [f"index {index.name}"]
    assert invalid[at].remedy == f'REINDEX INDEX CONCURRENTLY "shop"."{index.name}";'
    assert other[at].remedy.splitlines()[1] == missing[at].remedy


def test_a_primary_key_comes_back_as_a_constraint_and_another_index_beside_work_that_goes_on() -> None:
    wrong = [replace(index, definition="btree (shard)") for index in FOUND]
    remedies = {check.name: check.remedy for check in postgres.check_indexes(wrong, schema="shop")}
    assert remedies["index outbox_pkey"] == (
        'ALTER TABLE "shop"."outbox" DROP CONSTRAINT "outbox_pkey";\n'
        'ALTER TABLE "shop"."outbox" ADD CONSTRAINT outbox_pkey PRIMARY KEY (shard, sequence_no);'
    )
    assert remedies["index outbox_pending_key_idx"] == (
        'DROP INDEX CONCURRENTLY "shop"."outbox_pending_key_idx";\n'
        'CREATE INDEX CONCURRENTLY outbox_pending_key_idx ON "shop"."outbox_pending"'
        " USING btree (key_hash, is_unordered, state, sequence_no);"
    )


@pytest.mark.parametrize(
    ("index", "found", "status", "remedy"),
    [
        ("outbox_pkey", FOUND, "OK", ""),
        (None, FOUND, "FAIL", 'ANALYZE "shop"."outbox";'),
        (None, FOUND[1:], "FAIL", ""),
        ("by_number", [*FOUND, BY_NUMBER], "FAIL", 'DROP INDEX CONCURRENTLY "shop"."by_number";'),
        (
            "by_number",
            [*FOUND, replace(BY_NUMBER, is_partitioned=True)],
            "FAIL",
            'DROP INDEX "shop"."by_number";',
        ),
        ("outbox_p3_pkey", [replace(FOUND[0], is_partitioned=True, parts=["outbox_p3_pkey"])], "OK", ""),
    ],
    ids=["right", "whole table", "no index", "foreign index", "foreign index of partitions", "of a partition"],
)
def test_a_lane_reads_through_the_primary_key_alone(
    index: str | None, found: list[Index], status: str, remedy: str
) -> None:
    scan = {"Node Type": "Scan", "Relation Name": "outbox"} | ({"Index Name": index} if index else {})
    plan = {"Node Type": "Limit", "Plans": [{"Node Type": "Scan", "Relation Name": "outbox_pending"}, scan]}
    check = postgres.check_plan(plan, found=found, schema="shop")
    assert (check.status, check.remedy) == (status, remedy)


def test_autovacuum_is_wanted_on_the_server_and_the_tables_with_the_settings_of_the_migration() -> None:
    assert postgres.check_autovacuum([TABLE], server=SERVER).status == "OK"
    off = postgres.check_autovacuum([TABLE], server=replace(SERVER, has_autovacuum=False))
    assert (off.status, off.remedy.splitlines()[-1]) == ("FAIL", "SELECT pg_reload_conf();")
    disabled = postgres.check_autovacuum([replace(TABLE, has_autovacuum=False)], server=SERVER)
    assert (disabled.status, disabled.remedy) == ("FAIL", "ALTER TABLE public.outbox RESET (autovacuum_enabled);")


def test_a_setting_of_autovacuum_may_differ_but_not_be_absent() -> None:
    tuned = replace(TABLE, options={**VACUUM_OPTIONS["outbox"], "autovacuum_vacuum_threshold": "500"})
    free = replace(TABLE, table_name="outbox_shard", options={})
    assert postgres.check_autovacuum([tuned, free], server=SERVER).status == "OK"
    without = {name: value for name, value in VACUUM_OPTIONS["outbox"].items() if not name.endswith("vacuum_threshold")}
    marks = replace(TABLE, name="public.outbox_published", table_name="outbox_published", options={})
    check = postgres.check_autovacuum([replace(TABLE, options=without), marks], server=SERVER)
    assert check.status == "WARN"
    set_threshold, set_all = check.remedy.splitlines()
    assert set_threshold == "ALTER TABLE public.outbox SET (autovacuum_vacuum_threshold = 10000);"
    assert set_all.startswith("ALTER TABLE public.outbox_published SET (autovacuum_vacuum_scale_factor = 0.05, ")


@pytest.mark.parametrize(
    ("live", "dead", "status"),
    [(10, 100_000, "OK"), (10, 100_001, "WARN"), (5_000_000, 400_000, "OK")],
)
def test_dead_tuples_are_many_when_they_are_more_than_the_live_ones(live: int, dead: int, status: str) -> None:
    check = postgres.check_dead_tuples([replace(TABLE, live_tuples=live, dead_tuples=dead)])
    assert (check.status, check.remedy) == (status, "" if status == "OK" else "VACUUM (ANALYZE) public.outbox;")


def test_what_a_crash_of_the_server_takes_back_is_named() -> None:
    assert postgres.check_durability([TABLE], []).status == "OK"
    unlogged = postgres.check_durability([replace(TABLE, is_logged=False)], [])
    assert (unlogged.status, unlogged.remedy) == ("FAIL", "ALTER TABLE public.outbox SET LOGGED;")
    setting = ("synchronous_commit = off for shop", "ALTER ROLE shop RESET synchronous_commit;")
    check = postgres.check_durability([TABLE], [setting])
    assert (check.status, check.remedy) == ("WARN", setting[1])
    assert check.finding.endswith(setting[0])


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
    one, both = replace(STATUS, writers=[SESSION]), replace(STATUS, writers=[SESSION, PREPARED])
    assert messages.check_horizon(one, ordering_timeout=400.0).status == "OK"
    check = messages.check_horizon(both, ordering_timeout=5.0)
    assert (check.status, check.remedy) == (
        "FAIL",
        "SELECT pg_terminate_backend(42);\nROLLBACK PREPARED 'it''s';",
    )


def test_somebody_who_holds_shards_for_long_keeps_their_messages_from_everybody() -> None:
    held = replace(STATUS, lockers=[SESSION])
    assert messages.check_shard_locks(held, long_seconds=400.0).status == "OK"
    check = messages.check_shard_locks(held, long_seconds=300.0)
    assert (check.status, check.remedy) == ("FAIL", "SELECT pg_terminate_backend(42);")


def test_a_backlog_is_a_warning_from_the_age_on_at_which_a_transaction_is_long() -> None:
    waits = replace(STATUS, unpublished=1_234, oldest_no=7, oldest_age_seconds=400.0)
    fine = messages.check_backlog(STATUS, long_seconds=300.0)
    assert (fine.status, fine.finding) == ("OK", "not in Kafka yet: 0")
    assert messages.check_backlog(waits, long_seconds=400.0).status == "OK"
    check = messages.check_backlog(waits, long_seconds=300.0)
    assert (check.status, check.finding) == (
        "WARN",
        "not in Kafka yet: 1,234, the oldest is message 7, 7 min old",
    )


def test_messages_that_wait_are_told_with_the_reasons() -> None:
    waits = replace(STATUS, waiting=3, waiting_reasons={"late": 2, "skipped": 1}, longest_wait_seconds=90.0)
    assert messages.check_waiting(STATUS, long_seconds=0.0).status == "OK"
    assert messages.check_waiting(waits, long_seconds=90.0).status == "OK"
    check = messages.check_waiting(waits, long_seconds=60.0)
    assert (check.status, check.finding) == ("WARN", "3 for up to 90.0 s; late: 2, skipped: 1")


def test_parked_messages_and_late_ones_wait_for_somebody() -> None:
    assert (messages.check_parked(STATUS).status, messages.check_late_writers(STATUS).status) == ("OK", "OK")
    waits = replace(STATUS, parked=3, parked_keys=2, uncollected_writers=1)
    parked, late = messages.check_parked(waits), messages.check_late_writers(waits)
    assert (parked.status, parked.finding) == ("WARN", "3 of 2 keys")
    assert (late.status, late.finding[:12]) == ("WARN", "1 have ended")


@pytest.mark.parametrize(
    ("unreconciled_seconds", "unthinned_marks", "status", "words"),
    [
        (3_600.0, 999_999, "OK", "not thinned yet: 999,999"),
        (7_201.0, 0, "WARN", "not compared with the messages for 2 h"),
        (0.0, 1_000_000, "WARN", "1,000,000 or more that nobody has thinned"),
    ],
)
def test_marks_are_compared_and_thinned(
    unreconciled_seconds: float, unthinned_marks: int, status: str, words: str
) -> None:
    found = replace(STATUS, unreconciled_seconds=unreconciled_seconds)
    check = messages.check_marks(found, unthinned_marks=unthinned_marks)
    assert check.status == status
    assert words in check.finding


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


def test_what_fails_is_told_first_and_one_finding_of_many_topics_a_few_times() -> None:
    alone = [Check(f"copies of t{number}", "WARN", "1: lost with its broker", f"# t{number}") for number in range(600)]
    fine = [Check(f"topic t{number}", "OK", "partitions: 6") for number in range(600)]
    missing = Check("topic t600", "FAIL", "does not exist", "kafka-topics.sh")

    assert [click.unstyle(line) for line in report([*alone, *fine, missing], shows_all=False)] == [
        *("FAIL  topic t600: does not exist", "      kafka-topics.sh"),
        *("WARN  copies of t0: 1: lost with its broker", "      # t0"),
        *("WARN  copies of t1: 1: lost with its broker", "      # t1"),
        *("WARN  copies of t2: 1: lost with its broker", "      # t2"),
        "WARN  the same of 597 more; --all shows them",
        "600 checks are OK; --all shows them",
    ]
    assert len(report([*alone, *fine, missing], shows_all=True)) == 2 * 600 + 600 + 2 + 1
