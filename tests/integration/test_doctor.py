"""What the doctor learns from PostgreSQL, on every version, as a login that has the relay's grants and no more."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from outbox_relay.operate.doctor import examine as examination
from outbox_relay.operate.doctor.examine import Subject, examine
from outbox_relay.relay.horizon import record_unordered
from outbox_relay.relay.message import Addressing
from tests.fixtures.marks import mark, set_aside
from tests.fixtures.outbox import insert
from tests.fixtures.postgres import both_layouts
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from psycopg import Connection

    from outbox_relay.operate.doctor.check import Check
    from outbox_relay.sandbox.kafka import Kafka
    from outbox_relay.sandbox.postgres import PostgresServer
    from tests.fixtures.postgres import Database

pytestmark = pytest.mark.kafka

TERMINATE = """
SELECT pg_terminate_backend(pid)
FROM pg_stat_activity
WHERE application_name = 'outbox-relay doctor' AND datname = current_database()
"""


@pytest.fixture(scope="session")
def postgres(durable_postgres: PostgresServer) -> PostgresServer:
    """One that has nothing to be warned of."""
    return durable_postgres


@pytest.fixture
def admin(database: Database) -> Iterator[Connection]:
    with database.connect(autocommit=True) as connection:
        yield connection


@pytest.fixture
def subject(database: Database, relay_login: str, kafka: Kafka, topic_prefix: str) -> Subject:
    return Subject(
        conninfo=database.server.dsn(database.name, user=relay_login),
        schema="public",
        ordering_timeout=5.0,
        long_seconds=300.0,
        addressing=Addressing(template=topic_prefix + "{aggregate_type}"),
        producer_config={"bootstrap.servers": kafka.bootstrap_servers},
    )


def by_name(checks: Iterable[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def not_ok(subject: Subject) -> dict[str, str]:
    return {check.name: check.finding for check in examine(subject) if check.status != "OK"}


@both_layouts
@pytest.mark.every_postgres
def test_a_migrated_database_passes_every_check_it_can_be_seen_to_pass(
    admin: Connection, subject: Subject, relay_login: str
) -> None:
    assert not_ok(subject) == {"long transactions": "the sessions of other roles cannot be seen"}
    admin.execute(f'GRANT pg_read_all_stats TO "{relay_login}"'.encode())
    assert not_ok(subject) == {}


@both_layouts
@pytest.mark.every_postgres
def test_a_lane_without_its_index_reads_published_messages(admin: Connection, subject: Subject) -> None:
    admin.execute("ALTER TABLE outbox DROP CONSTRAINT outbox_pkey")
    checks = by_name(examine(subject))
    assert checks["index outbox_pkey"].finding == "is missing"
    assert checks["plan of the lanes"].status == "FAIL"
    admin.execute(checks["index outbox_pkey"].remedy.encode())
    mended = by_name(examine(subject))
    assert (mended["index outbox_pkey"].status, mended["plan of the lanes"].status) == ("OK", "OK")


@pytest.mark.every_postgres
def test_an_index_of_somebody_that_leads_a_lane_astray_is_dropped_by_the_remedy(
    admin: Connection, subject: Subject
) -> None:
    admin.execute("CREATE INDEX by_number ON outbox (sequence_no)")
    admin.execute("CREATE INDEX by_time ON outbox (created_at)")
    admin.execute("ANALYZE outbox")
    check = by_name(examine(subject))["plan of the lanes"]
    assert (check.status, check.remedy) == ("FAIL", 'DROP INDEX CONCURRENTLY "public"."by_number";')
    admin.execute(check.remedy.encode())
    assert by_name(examine(subject))["plan of the lanes"].status == "OK"


@pytest.mark.every_postgres
def test_definitions_are_compared_as_they_are_whatever_the_role_sets(
    admin: Connection, subject: Subject, relay_login: str
) -> None:
    for setting in ("quote_all_identifiers = on", "datestyle = 'German, DMY'", "enable_indexscan = off"):
        admin.execute(f'ALTER ROLE "{relay_login}" SET {setting}'.encode())
    admin.execute(f'GRANT pg_read_all_stats TO "{relay_login}"'.encode())
    assert not_ok(subject) == {}


@both_layouts
@pytest.mark.every_postgres
def test_a_trigger_before_a_row_is_written_is_named_and_dropped_by_the_remedy(
    admin: Connection, subject: Subject
) -> None:
    admin.execute(
        """
        CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
        CREATE TRIGGER "Keep" BEFORE DELETE ON outbox FOR EACH ROW EXECUTE FUNCTION keep();
        CREATE TRIGGER keep BEFORE INSERT ON outbox_published FOR EACH ROW EXECUTE FUNCTION keep();
        CREATE TRIGGER after AFTER INSERT ON outbox FOR EACH ROW EXECUTE FUNCTION keep()
        """
    )
    check = by_name(examine(subject))["triggers"]
    assert check.status == "WARN"
    for statement in check.remedy.splitlines():
        admin.execute(statement.encode())
    assert len(check.remedy.splitlines()) == 2
    assert by_name(examine(subject))["triggers"].status == "OK"


@pytest.mark.every_postgres
def test_what_waits_is_parked_or_late_is_told(
    database: Database, admin: Connection, subject: Subject, relay_login: str
) -> None:
    admin.execute(f'GRANT pg_read_all_stats TO "{relay_login}"'.encode())
    with database.connect() as writer:
        insert(writer, "9")
        [(xid,)] = writer.execute("SELECT pg_current_xact_id()::text").fetchall()
        record_unordered(admin, schema="public", xids=[int(xid)])
        writer.commit()
    insert(admin, "1", "2", "3", created_at="2001-01-01")
    set_aside(admin, 2, state="waiting", reason_code="skipped", age_seconds=7_300)
    set_aside(admin, 3, state="parked")
    mark(admin, through=3, age_seconds=7_300)
    insert(admin, "1", "2", "3")
    mark(admin)
    insert(admin, "1")
    checks = by_name(examine(subject))
    warned = ("backlog", "waiting messages", "parked messages", "late writers", "marks")
    assert {name: checks[name].status for name in warned} == dict.fromkeys(warned, "WARN")
    assert checks["waiting messages"].finding == "1 for up to 2 h; skipped: 1"
    assert checks["marks"].finding == "not compared with the messages for 2 h"


@both_layouts
@pytest.mark.every_postgres
def test_somebody_who_holds_shards_is_named_and_ended_by_the_remedy(
    database: Database, admin: Connection, subject: Subject, relay_login: str
) -> None:
    admin.execute(f'GRANT pg_read_all_stats TO "{relay_login}"'.encode())
    with closing(database.connect(application_name="by hand")) as person:
        person.execute("SELECT FROM outbox_shard FOR UPDATE")
        check = by_name(examine(replace(subject, long_seconds=0.0)))["shard locks"]
        assert "(by hand, idle in transaction)" in check.finding
        admin.execute(check.remedy.encode())
        eventually(lambda: by_name(examine(replace(subject, long_seconds=0.0)))["shard locks"].status == "OK")


@pytest.mark.every_postgres
@pytest.mark.parametrize("layout", ["partitioned"])
def test_each_partition_is_examined_and_what_mends_it_works(admin: Connection, subject: Subject) -> None:
    admin.execute("ALTER TABLE outbox_p3 SET (autovacuum_enabled = off)")
    admin.execute("UPDATE outbox_partition SET opened_at = now() - interval '2 days' WHERE closed_at IS NULL")
    checks = by_name(examine(subject))
    assert checks["autovacuum"].finding == "off for public.outbox_p3"
    assert checks["partitions"].finding.startswith("the next one should have been opened 24 h ago: ")
    for check in (checks["autovacuum"], checks["partitions"], checks["partitions"]):
        admin.execute(check.remedy.encode())
    mended = by_name(examine(subject))
    assert mended["autovacuum"].status == "OK"
    assert mended["partitions"].finding == "11, of them ahead: 2"


@pytest.mark.every_postgres
def test_transactions_are_long_from_the_given_age_on(
    database: Database, admin: Connection, subject: Subject, relay_login: str
) -> None:
    admin.execute(f'GRANT pg_read_all_stats TO "{relay_login}"'.encode())
    with database.connect(application_name="report") as reader:
        reader.execute("SELECT FROM outbox")
        patient, impatient = by_name(examine(subject)), by_name(examine(replace(subject, long_seconds=0.0)))
        assert patient["long transactions"].status == "OK"
        assert f"pid {reader.info.backend_pid} (report, idle in transaction)" in impatient["long transactions"].finding
        assert impatient["horizon"].status == "OK"


@both_layouts
@pytest.mark.every_postgres
def test_aggregate_types_are_looked_for_among_the_newest_messages_and_those_that_wait(
    admin: Connection, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examination, "_MESSAGES_SEEN", 16)
    for name in ("published", "waiting"):
        insert(admin, *map(str, range(100)), aggregate_type=name)
    set_aside(admin, *range(101, 201), state="waiting")
    mark(admin)
    for name in ("next", "between", "new"):
        insert(admin, *map(str, range(100)), aggregate_type=name)
    topics = [name for name in by_name(examine(subject)) if name.startswith("topic ")]
    assert topics == [f"topic {subject.addressing.topic(name)}" for name in ("new", "next", "waiting")]


def test_a_database_that_goes_away_meanwhile_is_a_finding_and_kafka_is_examined(
    admin: Connection, subject: Subject
) -> None:
    checks = examine(subject)
    assert next(check for check in checks if check.name == "tables").status == "OK"
    admin.execute(TERMINATE)
    rest = by_name(checks)
    assert rest["connection"].finding.startswith("no further question was answered: ")
    assert list(rest)[-3:] == ["kafka", "kafka authentication", "topics"]


def test_a_table_that_somebody_locks_is_a_finding_and_nobody_queues_behind_the_doctor(
    database: Database, subject: Subject
) -> None:
    with database.connect() as owner:
        owner.execute("LOCK TABLE outbox")
        checks = by_name(examine(subject))
    assert "lock timeout" in checks["numbers"].finding
    assert "lock timeout" in checks["messages"].finding
    assert checks["kafka"].status == "OK"


def test_a_replica_is_told_from_a_primary(own_database: Database, subject: Subject) -> None:
    server = own_database.server
    server.stop()
    (server.data_directory / "standby.signal").touch()
    server.start()
    checks = by_name(examine(replace(subject, conninfo=own_database.dsn)))
    assert checks["primary"].finding.startswith("only a replica answers")
    assert [name for name, check in checks.items() if check.status == "FAIL"] == ["primary"]
    assert "tables" not in checks
