"""A canary: who may write one, how many there are, and what is measured."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Literal, cast

import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay import database as relay_database
from outbox_relay.errors import ConfigurationError, DatabaseUnavailable, SchemaMismatch
from outbox_relay.relay import canary as stage
from outbox_relay.relay.canary import (
    AGGREGATE_TYPE,
    Canary,
    CanaryOptions,
    CanaryState,
    check_canary,
    read_canary,
    write_canary,
)
from outbox_relay.sql import statement
from tests.fixtures.marks import mark, set_aside
from tests.fixtures.outbox import insert
from tests.fixtures.postgres import both_layouts
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg import Connection

    from outbox_relay.observe.telemetry import Telemetry
    from tests.fixtures.postgres import Database

pytestmark = pytest.mark.every_postgres

OPTIONS = CanaryOptions(interval=0.01)
SELECT_CANARIES = f"SELECT sequence_no FROM outbox WHERE aggregate_type = '{AGGREGATE_TYPE}' ORDER BY sequence_no"
DATE_BACK = "UPDATE outbox SET created_at = now() - %s * interval '1 second'"

SELECT_LAST_LOOK = """
SELECT query_start FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'outbox-relay canary'
"""

DROPPING_TRIGGER = """
CREATE FUNCTION drop_it() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE TRIGGER dropping BEFORE INSERT ON outbox FOR EACH ROW EXECUTE FUNCTION drop_it()
"""


@pytest.fixture
def admin(database: Database) -> Iterator[Connection]:
    with database.connect(autocommit=True) as connection:
        yield connection


@pytest.fixture
def canary_login(admin: Connection, relay_login: str) -> str:
    """A login with the grants of a relay and of a writer."""
    admin.execute(f'GRANT outbox_writer TO "{relay_login}"')
    return relay_login


@pytest.fixture
def relay(database: Database, canary_login: str) -> Iterator[Connection]:
    with closing(connect(database, user=canary_login)) as connection:
        yield connection


def connect(database: Database, **parameters: str) -> Connection:
    return relay_database.connect(make_conninfo(database.dsn, **parameters), application_name="outbox-relay canary")


def canaries(connection: Connection) -> list[int]:
    return [number for (number,) in connection.execute(SELECT_CANARIES).fetchall()]


def written(relay: Connection) -> int:
    """The number of a canary that has just been written."""
    number = write_canary(relay, options=OPTIONS)
    assert number is not None
    return number


def test_a_relay_that_may_not_write_messages_is_told_the_grant(database: Database, relay_login: str) -> None:
    with closing(connect(database, user=relay_login)) as relay, pytest.raises(ConfigurationError) as refusal:
        check_canary(relay, schema="public")
    assert f"GRANT outbox_writer TO {relay_login};" in str(refusal.value)


@both_layouts
def test_the_grants_of_a_relay_and_of_a_writer_are_enough(admin: Connection, relay: Connection) -> None:
    check_canary(relay, schema="public")
    number = written(relay)
    assert canaries(admin) == [number]
    assert read_canary(relay, number, schema="public") == CanaryState("unpublished", None)
    admin.execute(DATE_BACK, [90])
    mark(admin, age_seconds=30)
    state = read_canary(relay, number, schema="public")
    assert state.state == "published"
    assert state.seconds == pytest.approx(60, abs=10)


def test_a_canary_takes_as_long_as_the_first_mark_that_passes_it(admin: Connection, relay: Connection) -> None:
    number = written(relay)
    admin.execute(DATE_BACK, [90])
    [(shard,)] = admin.execute("SELECT shard FROM outbox").fetchall()
    for step in range(3):
        mark(admin, shard=shard, through=number + step, age_seconds=60 - 30 * step)
    assert read_canary(relay, number, schema="public").seconds == pytest.approx(30, abs=10)


@both_layouts
@pytest.mark.parametrize("state", ["waiting", "parked"])
def test_a_canary_that_its_mark_has_passed_and_that_is_set_aside_has_not_arrived(
    admin: Connection, relay: Connection, state: Literal["waiting", "parked"]
) -> None:
    number = written(relay)
    set_aside(admin, number, state=state)
    mark(admin)
    assert read_canary(relay, number, schema="public") == CanaryState(state, None)
    assert write_canary(relay, options=OPTIONS) is None
    admin.execute("DELETE FROM outbox_pending")
    assert read_canary(relay, number, schema="public").state == "published"
    assert write_canary(relay, options=OPTIONS) is not None


def test_a_canary_of_a_writer_that_was_given_up_on_has_not_arrived(admin: Connection, relay: Connection) -> None:
    number = written(relay)
    admin.execute("INSERT INTO outbox_unordered (transaction_id, from_no) SELECT transaction_id, 0 FROM outbox")
    mark(admin)
    assert read_canary(relay, number, schema="public").state == "waiting"


def test_a_canary_that_was_deleted_is_told(admin: Connection, relay: Connection) -> None:
    number = written(relay)
    admin.execute("DELETE FROM outbox")
    assert read_canary(relay, number, schema="public") == CanaryState(None, None)


def test_a_canary_that_a_trigger_drops_is_an_error_and_leaves_no_transaction(
    admin: Connection, relay: Connection
) -> None:
    admin.execute(DROPPING_TRIGGER)
    with pytest.raises(SchemaMismatch, match="drops the canary"):
        write_canary(relay, options=OPTIONS)
    admin.execute("DROP TRIGGER dropping ON outbox")
    assert write_canary(relay, options=OPTIONS) is not None


def test_nobody_writes_a_second_canary_while_one_is_under_way(
    database: Database, admin: Connection, relay: Connection, canary_login: str
) -> None:
    with closing(connect(database, user=canary_login)) as another:
        first = write_canary(relay, options=OPTIONS)
        insert(admin, *map(str, range(50)))
        assert write_canary(another, options=OPTIONS) is None
        mark(admin)
        second = write_canary(another, options=OPTIONS)
    assert canaries(admin) == [first, second]


def test_nobody_waits_for_another_who_is_about_to_write_one(database: Database, relay: Connection) -> None:
    with database.connect() as another:
        another.execute(statement("canary_lock", schema="public"))
        assert write_canary(relay, options=OPTIONS) is None
        another.rollback()
        assert write_canary(relay, options=OPTIONS) is not None


def test_a_canary_is_not_searched_for_in_all_of_a_long_backlog(
    admin: Connection, relay: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_MOST_SEARCHED", 5)
    first = write_canary(relay, options=OPTIONS)
    insert(admin, *map(str, range(500)))  # of 16 shards
    second = write_canary(relay, options=OPTIONS)
    assert second is not None
    assert canaries(admin) == [first, second]


class Listener:
    """Stands in for the telemetry."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.open_since: list[float] = []
        self.seconds: list[float] = []
        self.failures: list[str] = []

    def canary_written(self, *, at: float) -> None:
        self.open_since.append(at)

    def canary_arrived(self, seconds: float) -> None:
        self.seconds.append(seconds)

    def canary_failed(self, error: Exception) -> None:
        self.failures.append(str(error))

    def thread_failed(self, thread: str, error: Exception) -> None:
        self.failures.append(f"{thread}: {error}")


@contextmanager
def sending(listener: Listener, connect: Callable[[], Connection]) -> Iterator[None]:
    canary = Canary(options=OPTIONS, connect=connect, telemetry=cast("Telemetry", listener), stop=listener.stop)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(canary.run)
        try:
            yield
        finally:
            listener.stop.set()
        running.result()


def test_one_canary_follows_the_other(database: Database, admin: Connection) -> None:
    listener = Listener()
    with sending(listener, partial(connect, database)):
        for count in (1, 2, 3):
            eventually(lambda count=count: len(canaries(admin)) == count)  # type: ignore[misc]  # bound for the wait
            admin.execute(DATE_BACK, [90])
            mark(admin)
        eventually(lambda: len(listener.seconds) == 3)
    assert listener.seconds == pytest.approx([90, 90, 90], abs=10)


def test_the_mark_that_passed_a_canary_before_it_was_in_kafka_does_not_tell_how_long_it_took(
    database: Database, admin: Connection
) -> None:
    listener = Listener()
    with sending(listener, partial(connect, database)):
        [number] = eventually(lambda: canaries(admin))
        looks = admin.execute(SELECT_LAST_LOOK).fetchall()
        with admin.transaction():
            admin.execute(DATE_BACK, [3_600])
            set_aside(admin, number, state="waiting")
            mark(admin)
        eventually(lambda: admin.execute(SELECT_LAST_LOOK).fetchall() != looks)
        looks = admin.execute(SELECT_LAST_LOOK).fetchall()
        eventually(lambda: admin.execute(SELECT_LAST_LOOK).fetchall() != looks)
        admin.execute("DELETE FROM outbox_pending")
        eventually(lambda: listener.seconds)
    assert listener.seconds[0] < 3_000


def test_a_canary_is_followed_over_a_lost_connection(database: Database, admin: Connection) -> None:
    listener = Listener()
    with sending(listener, partial(connect, database)):
        eventually(lambda: listener.open_since)
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE '%canary'")
        eventually(lambda: len(listener.open_since) > 1)
        assert listener.open_since[0] == listener.open_since[1]
        assert len(canaries(admin)) == 1
        admin.execute(DATE_BACK, [90])
        mark(admin)
        eventually(lambda: listener.seconds)
    assert listener.seconds[0] == pytest.approx(90, abs=10)
    assert len(listener.failures) == 1


def test_the_thread_tells_what_failed_and_tries_again(database: Database) -> None:
    failures: list[Exception] = [DatabaseUnavailable("away"), RuntimeError("unforeseen")]

    def connect_at_last() -> Connection:
        if failures:
            raise failures.pop(0)
        return connect(database)

    listener = Listener()
    with sending(listener, connect_at_last):
        eventually(lambda: listener.open_since)
    assert listener.failures == ["away", "canary: unforeseen"]
