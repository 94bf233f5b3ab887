"""`outbox-relay run` as an operator meets it: its exit codes, its words, and what it may do."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from outbox_relay.sandbox.history import State
from outbox_relay.sandbox.ports import ReservedPort
from tests.fixtures.daemon import outbox_relay
from tests.fixtures.load import commit_messages, insert_messages
from tests.fixtures.pipeline import flaws, short_times

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fixtures.pipeline import Pipeline

pytestmark = pytest.mark.kafka

SHORT_TIMES = short_times(publish_deadline=2)

INSERT_POISON = """
INSERT INTO outbox (aggregate_type, aggregate_id, event_type, headers)
VALUES ('order', 'order-3', 'happened', '{"attempt": 3}')
"""


def run(pipeline: Pipeline, *arguments: str, **settings: str | float) -> subprocess.CompletedProcess[str]:
    command = outbox_relay("run", *arguments)
    environment = os.environ | pipeline.environment(**settings)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def login(pipeline: Pipeline) -> Iterator[str]:
    """A login role that belongs to no group yet."""
    name = f"relay_of_{pipeline.database.name}"
    with pipeline.database.connect(autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'open sesame'").format(sql.Identifier(name)))
        yield name
        admin.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(name)))


def grant(pipeline: Pipeline, group: str, login: str) -> None:
    with pipeline.database.connect() as admin:
        admin.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(group), sql.Identifier(login)))


def test_once_publishes_what_is_there_and_exits_with_0(pipeline: Pipeline) -> None:
    with pipeline.database.connect() as writer:
        writes = commit_messages(writer, *[f"order-{number % 7}" for number in range(1_000)])
    finished = run(pipeline, "--once", batch_size=300)
    assert (finished.returncode, finished.stdout) == (0, "")
    assert flaws(pipeline.judge(writes)) == {}
    assert run(pipeline, "--once").returncode == 0
    assert flaws(pipeline.judge(writes)) == {}


def test_once_exits_with_4_while_kafka_is_away(pipeline: Pipeline) -> None:
    with pipeline.database.connect() as writer:
        commit_messages(writer, "order-1")
    nobody = f"127.0.0.1:{ReservedPort().number}"
    finished = run(pipeline, "--once", kafka__bootstrap_servers=nobody, **SHORT_TIMES)
    assert finished.returncode == 4
    assert finished.stderr.splitlines()[-1] == (
        "outbox-relay: Kafka has been away for 2 s; messages are left unpublished"
    )
    assert pipeline.states() == [State.UNPUBLISHED]


def test_once_exits_with_4_while_the_database_is_away(pipeline: Pipeline) -> None:
    finished = run(pipeline, "--once", database_url=f"host=127.0.0.1 port={ReservedPort().number} user=relay")
    assert finished.returncode == 4
    assert "Connection refused" in finished.stderr


def test_once_exits_with_4_when_a_topic_does_not_exist(pipeline: Pipeline) -> None:
    with pipeline.database.connect() as writer:
        commit_messages(writer, "order-1", "refund-1")
    finished = run(pipeline, "--once", **SHORT_TIMES)
    assert finished.returncode == 4
    assert finished.stderr.splitlines()[-1] == (
        f"outbox-relay: cannot write to {pipeline.topic('refund')}: create the topic, or grant access to it"
    )
    assert pipeline.states() == [State.PUBLISHED, State.WAITING]


def test_a_database_url_that_is_none_exits_with_3_without_showing_it(pipeline: Pipeline) -> None:
    finished = run(pipeline, database_url="postgres//shop:open-sesame@db/shop")
    assert finished.returncode == 3
    assert finished.stderr.startswith("outbox-relay: OUTBOX_RELAY_DATABASE_URL: not a connection string: ")
    assert "sesame" not in finished.stderr


def test_missing_tables_exit_with_3_and_the_command_that_makes_them(pipeline: Pipeline) -> None:
    with pipeline.database.connect() as admin:
        admin.execute("CREATE SCHEMA elsewhere")
    finished = run(pipeline, schema="elsewhere")
    assert finished.returncode == 3
    assert "`outbox-relay migrate apply`" in finished.stderr


def test_a_missing_grant_exits_with_3_and_the_grant(pipeline: Pipeline, login: str) -> None:
    dsn = make_conninfo(pipeline.database.dsn, user=login)
    refused = run(pipeline, database_url=dsn)
    assert refused.returncode == 3
    assert f"`GRANT outbox_relay TO {login}`" in refused.stderr

    grant(pipeline, "outbox_relay", login)
    with pipeline.database.connect(autocommit=True) as admin:
        admin.execute("REVOKE INSERT ON outbox_published FROM outbox_relay")
        refused = run(pipeline, database_url=dsn)
        assert refused.returncode == 3
        assert f"GRANT INSERT ON public.outbox_published TO {login}" in refused.stderr
        admin.execute("GRANT INSERT ON outbox_published TO outbox_relay")

    refused = run(pipeline, database_url=dsn)
    assert refused.returncode == 3
    assert f"GRANT outbox_pruner TO {login}" in refused.stderr
    assert run(pipeline, "--once", database_url=dsn, retention=0).returncode == 0


def test_an_unknown_setting_exits_with_3_and_the_one_that_was_meant(pipeline: Pipeline) -> None:
    finished = run(pipeline, batch_sise=10)
    assert (finished.returncode, finished.stderr) == (
        3,
        "outbox-relay: OUTBOX_RELAY_BATCH_SISE: unknown setting; did you mean OUTBOX_RELAY_BATCH_SIZE?\n",
    )


def test_the_group_role_can_do_all_that_the_relay_does(pipeline: Pipeline, login: str) -> None:
    grant(pipeline, "outbox_relay", login)
    dsn = make_conninfo(pipeline.database.dsn, user=login)
    with (
        pipeline.relays(1, database_url=dsn, retention=0, ordering_timeout=0.5) as [relay],
        pipeline.database.connect() as writer,
        pipeline.database.connect() as forgetful,
    ):
        commit_messages(forgetful, "order-1")
        insert_messages(forgetful, "order-2")
        commit_messages(writer, "order-1")
        relay.wait_for_event("writer_given_up")
        forgetful.commit()
        relay.wait_for_event("late_messages_found")
        writer.execute(INSERT_POISON)
        writer.commit()
        relay.wait_for_event("messages_parked")
        pipeline.await_settled()
        relay.terminate()
        assert relay.wait() == 0
    assert pipeline.states() == [*[State.PUBLISHED] * 3, State.PARKED]
    assert len(pipeline.records()) == 3


def test_no_secret_reaches_the_log(pipeline: Pipeline, login: str) -> None:
    grant(pipeline, "outbox_relay", login)
    secrets = {
        "database_url": make_conninfo(pipeline.database.dsn, user=login, password="open sesame"),  # noqa: S106 -- looked for below
        "kafka__sasl_password": "a very secret word",
    }
    with pipeline.relays(1, log_level="debug", retention=0, **secrets) as [relay]:
        with pipeline.database.connect() as writer:
            commit_messages(writer, "order-1")
        relay.wait_for_event("batch_published")
        relay.terminate()
        assert relay.wait() == 0
    said = str(relay.events) + "".join(relay.other_lines)
    assert "relay_stopped" in said
    assert "sesame" not in said
    assert "very secret" not in said
