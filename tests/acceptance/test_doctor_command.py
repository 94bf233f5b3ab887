"""The real command `outbox-relay doctor`: what it finds in broken set-ups, and that its remedies mend them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from outbox_relay.operate import migrate
from tests.fixtures.daemon import outbox_relay
from tests.fixtures.kafka_tools import write_kafka_tools
from tests.fixtures.outbox import insert

if TYPE_CHECKING:
    from outbox_relay.sandbox.kafka import Kafka
    from outbox_relay.sandbox.postgres import PostgresServer
    from tests.fixtures.kafka import CreateTopic
    from tests.fixtures.postgres import Database

pytestmark = pytest.mark.kafka

Finding = dict[str, str]

NOWHERE = "host=127.0.0.1 port=1"
AT_ONCE = ("--long-after", "0.01")
IMPATIENT = {"OUTBOX_RELAY_ORDERING_TIMEOUT": "0.01"}


@dataclass(frozen=True, slots=True)
class SetUp:
    """A database with one message, the topic it belongs to, and a relay's login."""

    database: Database
    login: str
    kafka: Kafka
    prefix: str
    tools: Path

    @property
    def topic(self) -> str:
        return f"{self.prefix}order"

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {
            "OUTBOX_RELAY_DATABASE_URL": self.database.server.dsn(self.database.name, user=self.login),
            "OUTBOX_RELAY_KAFKA__BOOTSTRAP_SERVERS": self.kafka.bootstrap_servers,
            "OUTBOX_RELAY_TOPIC_TEMPLATE": self.prefix + "{aggregate_type}",
        }

    def run(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            outbox_relay("doctor", *arguments),
            env=self.environment | settings,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def examine(self, *arguments: str, **settings: str) -> tuple[int, dict[str, Finding]]:
        """The exit code, and the checks by their names."""
        done = self.run("--json", *arguments, **settings)
        assert done.stderr == ""
        return done.returncode, {check["name"]: check for check in json.loads(done.stdout)}

    def paste(self, remedy: str) -> None:
        """Statements as psql would run them, a command as a shell would, both as an administrator."""
        if remedy.endswith(";"):
            with self.database.connect(autocommit=True) as admin:
                for line in remedy.splitlines():
                    admin.execute(line.encode())
            return
        environment = self.environment | {
            "OUTBOX_RELAY_DATABASE_URL": self.database.dsn,
            "PATH": f"{Path(sys.executable).parent}:{self.tools}:{os.environ['PATH']}",
        }
        subprocess.run(["bash", "-ec", remedy], env=environment, check=True, timeout=120)  # noqa: S607 -- any bash


@pytest.fixture(scope="session")
def postgres(durable_postgres: PostgresServer) -> PostgresServer:
    """One that has nothing to be warned of."""
    return durable_postgres


@pytest.fixture
def set_up(database: Database, relay_login: str, kafka: Kafka, topic_prefix: str, tmp_path: Path) -> SetUp:
    with database.connect(autocommit=True) as admin:
        admin.execute(f'GRANT pg_read_all_stats TO "{relay_login}"'.encode())
        insert(admin, "1")
    return SetUp(database, relay_login, kafka, topic_prefix, tmp_path)


@pytest.fixture
def healthy(set_up: SetUp, topic: CreateTopic) -> SetUp:
    topic("order")
    return set_up


@pytest.fixture
def kafka_tools(set_up: SetUp) -> None:
    """Kafka's own command line tools, as its distribution names them."""
    write_kafka_tools(set_up.tools)


def test_a_healthy_set_up_passes_every_check_but_the_one_broker(healthy: SetUp) -> None:
    code, checks = healthy.examine()
    assert code == 0
    assert {name: check["status"] for name, check in checks.items() if check["status"] != "OK"} == {
        f"copies of {healthy.topic}": "WARN"
    }
    assert list(checks) == [
        *("postgresql", "server version", "primary", "tls", "pooler", "clock", "tables", "grants", "schema version"),
        *("definitions", "triggers", "numbers", "index outbox_pkey", "index outbox_published_pkey"),
        *("index outbox_pending_pkey", "index outbox_pending_key_idx", "index outbox_pending_waiting_idx"),
        "index outbox_unordered_pkey",
        *("plan of the lanes", "autovacuum", "dead tuples", "table size", "xid age", "durability"),
        *("prepared transactions", "long transactions", "replication slots"),
        *("horizon", "shard locks", "backlog", "waiting messages", "parked messages", "late writers", "marks"),
        *("kafka", "kafka authentication", f"topic {healthy.topic}", f"message size of {healthy.topic}"),
        *(f"copies of {healthy.topic}", f"cleanup of {healthy.topic}"),
    ]


def test_each_finding_is_a_line_with_its_remedy_below_and_what_is_ok_is_counted(healthy: SetUp) -> None:
    with healthy.database.connect(autocommit=True) as admin:
        admin.execute("ALTER TABLE outbox SET (autovacuum_enabled = off)")
    done, every = healthy.run(), healthy.run("--all")
    finding, remedy, *_, last = done.stdout.splitlines()
    assert (done.returncode, every.returncode) == (5, 5)
    assert finding == "FAIL  autovacuum: off for public.outbox"
    assert remedy == "      ALTER TABLE public.outbox RESET (autovacuum_enabled);"
    fine = every.stdout.count("\nOK    ") + every.stdout.startswith("OK    ")
    assert "\nOK    dead tuples: " in every.stdout
    assert last == f"{fine} checks are OK; --all shows them"
    assert "OK    " not in done.stdout


@pytest.mark.parametrize(
    ("damage", "name", "status", "finding"),
    [
        ("REVOKE SELECT ON outbox_shard FROM outbox_relay", "grants", "FAIL", "lacks privileges that a relay needs"),
        ('REVOKE outbox_relay FROM "{login}"', "grants", "FAIL", "no member of outbox_relay"),
        ("ALTER TABLE outbox DROP CONSTRAINT outbox_pkey", "index outbox_pkey", "FAIL", "missing"),
        ("DROP INDEX outbox_pending_key_idx", "index outbox_pending_key_idx", "FAIL", "missing"),
        (
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'outbox_published_pkey'::regclass",
            "index outbox_published_pkey",
            "FAIL",
            "invalid",
        ),
        (
            "ALTER TABLE outbox DROP CONSTRAINT outbox_pkey, ADD CONSTRAINT outbox_pkey PRIMARY KEY (sequence_no)",
            "index outbox_pkey",
            "FAIL",
            "btree (sequence_no)",
        ),
        ("ALTER SEQUENCE outbox_sequence_no_seq CACHE 50", "definitions", "FAIL", "then let all applications connect"),
        ("ALTER TABLE outbox DISABLE TRIGGER outbox_forget_trigger", "definitions", "FAIL", "outbox_forget_trigger"),
        ("ALTER TABLE outbox ENABLE ROW LEVEL SECURITY", "definitions", "FAIL", "row level security"),
        ("CREATE RULE keep AS ON DELETE TO outbox DO INSTEAD NOTHING", "definitions", "FAIL", "rule keep"),
        ("DELETE FROM outbox_shard WHERE shard = 7", "numbers", "FAIL", "outbox_shard lacks 7"),
        ("ALTER SEQUENCE outbox_sequence_no_seq RESTART", "numbers", "FAIL", "the sequence went back"),
        (
            (
                "INSERT INTO outbox (aggregate_type, aggregate_id, event_type, sequence_no) OVERRIDING SYSTEM VALUE"
                " VALUES ('order', '1', 'placed', 4711)"
            ),
            "numbers",
            "FAIL",
            "the newest message is 4711",
        ),
        ('ALTER DATABASE "{database}" SET synchronous_commit = off', "durability", "WARN", "off for all roles"),
        (
            'ALTER ROLE a_writer IN DATABASE "{database}" SET synchronous_commit = off',
            "durability",
            "WARN",
            "off for a_writer",
        ),
        ("ALTER TABLE outbox_published SET UNLOGGED", "durability", "FAIL", "empties public.outbox_published"),
        ("ALTER TABLE outbox_published RESET (autovacuum_vacuum_scale_factor)", "autovacuum", "WARN", "vacuumed late"),
        ("ALTER TABLE outbox SET (autovacuum_enabled = off)", "autovacuum", "FAIL", "off for public.outbox"),
        ("ALTER TABLE outbox RESET (autovacuum_vacuum_threshold)", "autovacuum", "WARN", "vacuumed late"),
        ('ALTER ROLE "{login}" SET default_transaction_read_only = on', "primary", "FAIL", "read-only"),
        ('REVOKE pg_read_all_stats FROM "{login}"', "long transactions", "WARN", "cannot be seen"),
    ],
)
def test_damage_in_the_database_is_found_and_mended_by_the_remedy(
    healthy: SetUp, damage: str, name: str, status: str, finding: str
) -> None:
    with healthy.database.connect(autocommit=True) as admin:
        admin.execute(damage.format(login=healthy.login, database=healthy.database.name).encode())
    code, checks = healthy.examine()
    assert (code, checks[name]["status"]) == (5 if status == "FAIL" else 0, status)
    assert finding in checks[name]["finding"]

    healthy.paste(checks[name]["remedy"])
    code, checks = healthy.examine()
    assert (code, checks[name]["status"]) == (0, "OK")


def test_a_forgotten_prepared_transaction_is_named_and_rolled_back_by_the_remedy(healthy: SetUp) -> None:
    with healthy.database.connect() as writer:
        insert(writer, "2")
        writer.execute("PREPARE TRANSACTION 'it''s forgotten'")
        writer.commit()
    code, checks = healthy.examine(*AT_ONCE, **IMPATIENT)
    assert code == 5
    for name in ("prepared transactions", "horizon"):
        assert (checks[name]["status"], checks[name]["remedy"]) == ("FAIL", "ROLLBACK PREPARED 'it''s forgotten';")

    healthy.paste(checks["horizon"]["remedy"])
    code, checks = healthy.examine(*AT_ONCE, **IMPATIENT)
    assert (code, checks["prepared transactions"]["status"], checks["horizon"]["status"]) == (0, "OK", "OK")


def test_a_replication_slot_that_nobody_reads_is_dropped_by_the_remedy(healthy: SetUp) -> None:
    name = f"of_{healthy.database.name}"
    with healthy.database.connect(autocommit=True) as admin:
        admin.execute("SELECT pg_create_physical_replication_slot(%s, true)", [name])
    code, checks = healthy.examine()
    assert (code, checks["replication slots"]["status"]) == (0, "WARN")
    assert name in checks["replication slots"]["finding"]

    healthy.paste(checks["replication slots"]["remedy"])
    code, checks = healthy.examine()
    assert (code, checks["replication slots"]["status"]) == (0, "OK")


def test_a_writer_that_stays_open_holds_the_horizon_until_the_remedy_ends_it(healthy: SetUp) -> None:
    with closing(healthy.database.connect(application_name="checkout")) as writer:
        insert(writer, "2")
        code, checks = healthy.examine(*AT_ONCE, **IMPATIENT)
        assert (code, checks["horizon"]["status"], checks["long transactions"]["status"]) == (5, "FAIL", "WARN")
        assert f"pid {writer.info.backend_pid} (checkout, idle in transaction)" in checks["horizon"]["finding"]

        healthy.paste(checks["horizon"]["remedy"])
        code, checks = healthy.examine(*AT_ONCE, **IMPATIENT)
        assert (code, checks["horizon"]["status"], checks["long transactions"]["status"]) == (0, "OK", "OK")


def test_a_schema_without_tables_is_found_and_migrated_by_the_remedy(healthy: SetUp) -> None:
    code, checks = healthy.examine(OUTBOX_RELAY_SCHEMA="shop")
    assert (code, checks["tables"]["status"]) == (5, "FAIL")
    assert checks["kafka"]["status"] == "OK"

    healthy.paste(checks["tables"]["remedy"])
    code, checks = healthy.examine(OUTBOX_RELAY_SCHEMA="shop")
    assert (code, checks["tables"]["status"], checks["schema version"]["status"]) == (0, "OK", "OK")


def test_an_older_schema_is_found_and_migrated_by_the_remedy(healthy: SetUp, monkeypatch: pytest.MonkeyPatch) -> None:
    known = migrate.migrations()
    monkeypatch.setattr(migrate, "migrations", lambda _line: known[:-1])
    with healthy.database.connect(autocommit=True) as admin:
        migrate.apply(admin, schema="shop")
    code, checks = healthy.examine(OUTBOX_RELAY_SCHEMA="shop")
    assert code == 5
    assert checks["schema version"]["finding"] == f"older than this version: waits for {known[-1]}"

    healthy.paste(checks["schema version"]["remedy"])
    code, checks = healthy.examine(OUTBOX_RELAY_SCHEMA="shop")
    assert (code, checks["schema version"]["status"]) == (0, "OK")


@pytest.mark.usefixtures("kafka_tools")
def test_a_missing_topic_is_found_and_created_by_the_remedy(set_up: SetUp) -> None:
    code, checks = set_up.examine()
    assert (code, checks[f"topic {set_up.topic}"]["finding"]) == (5, "does not exist")

    set_up.paste(checks[f"topic {set_up.topic}"]["remedy"])
    code, checks = set_up.examine()
    assert (code, checks[f"topic {set_up.topic}"]["finding"]) == (0, "partitions: 6, copies: 1")


@pytest.mark.usefixtures("kafka_tools")
def test_every_bad_setting_of_a_topic_is_found_and_corrected_by_the_remedies(set_up: SetUp, topic: CreateTopic) -> None:
    topic("order", config={"max.message.bytes": "2000", "min.insync.replicas": "2", "cleanup.policy": "compact,delete"})
    code, checks = set_up.examine()
    bad = {name: check for name, check in checks.items() if check["status"] != "OK"}
    assert code == 5
    assert {name: check["status"] for name, check in bad.items()} == {
        f"message size of {set_up.topic}": "FAIL",
        f"copies of {set_up.topic}": "WARN",
        f"cleanup of {set_up.topic}": "WARN",
    }

    for check in bad.values():
        set_up.paste(check["remedy"])
    code, checks = set_up.examine()
    assert code == 0
    assert {name for name, check in checks.items() if check["status"] != "OK"} == {f"copies of {set_up.topic}"}


def test_a_database_that_is_away_is_a_finding_and_kafka_is_examined(healthy: SetUp) -> None:
    code, checks = healthy.examine(OUTBOX_RELAY_DATABASE_URL=NOWHERE)
    assert (code, list(checks)) == (5, ["postgresql", "kafka", "kafka authentication", "topics"])
    assert (checks["postgresql"]["status"], checks["kafka"]["status"]) == ("FAIL", "OK")


def test_kafka_that_is_away_is_a_finding_after_those_of_the_database(healthy: SetUp) -> None:
    code, checks = healthy.examine(OUTBOX_RELAY_KAFKA__BOOTSTRAP_SERVERS="127.0.0.1:1")
    assert (code, list(checks)[-2:]) == (5, ["marks", "kafka"])
    assert "Connection refused" in checks["kafka"]["finding"]
    assert [name for name, check in checks.items() if check["status"] != "OK"] == ["kafka"]


def test_credentials_that_the_broker_refuses_are_a_finding(healthy: SetUp) -> None:
    code, checks = healthy.examine(
        OUTBOX_RELAY_KAFKA__SECURITY_PROTOCOL="SASL_PLAINTEXT",
        OUTBOX_RELAY_KAFKA__SASL_MECHANISM="PLAIN",
        OUTBOX_RELAY_KAFKA__SASL_USERNAME="relay",
        OUTBOX_RELAY_KAFKA__SASL_PASSWORD="hunter2",  # noqa: S106 -- known to nobody
    )
    assert (code, [name for name, check in checks.items() if check["status"] == "FAIL"]) == (
        5,
        ["kafka authentication"],
    )
    assert "SASL PLAIN mechanism handshake failed" in checks["kafka authentication"]["finding"]


def test_an_aggregate_type_that_makes_no_topic_is_found(healthy: SetUp) -> None:
    with healthy.database.connect(autocommit=True) as admin:
        insert(admin, "1", aggregate_type="no topic")
    code, checks = healthy.examine()
    assert (code, checks["topics"]["status"]) == (5, "FAIL")
    assert "OUTBOX_RELAY_TOPIC_MAP" in checks["topics"]["finding"]


def test_settings_that_cannot_be_used_end_the_doctor_itself(healthy: SetUp) -> None:
    done = healthy.run(OUTBOX_RELAY_KAFKA__ACKS="1")
    assert (done.returncode, done.stdout) == (3, "")


def test_no_secret_is_shown(healthy: SetUp) -> None:
    done = healthy.run(
        OUTBOX_RELAY_DATABASE_URL="postgresql://relay:hunter2@127.0.0.1:1/shop",
        OUTBOX_RELAY_KAFKA__BOOTSTRAP_SERVERS="127.0.0.1:1",
        OUTBOX_RELAY_KAFKA__SECURITY_PROTOCOL="SASL_PLAINTEXT",
        OUTBOX_RELAY_KAFKA__SASL_MECHANISM="PLAIN",
        OUTBOX_RELAY_KAFKA__SASL_USERNAME="relay",
        OUTBOX_RELAY_KAFKA__SASL_PASSWORD="hunter2",  # noqa: S106 -- what must not be shown
    )
    assert done.returncode == 5
    assert "hunter2" not in done.stdout + done.stderr
