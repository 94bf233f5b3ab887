"""A canary: who may write one, how many there are, and what is measured."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, cast

import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay import database as relay_database
from outbox_relay.errors import ConfigurationError, DatabaseUnavailable
from outbox_relay.relay import canary as stage
from outbox_relay.relay.canary import AGGREGATE_TYPE, Canary, CanaryOptions, check_canary, read_canary, write_canary
from outbox_relay.sql import statement
from tests.fixtures.outbox import insert
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg import Connection

    from outbox_relay.observe.telemetry import Telemetry
    from tests.fixtures.postgres import Database

pytestmark = pytest.mark.every_postgres

OPTIONS = CanaryOptions(interval=0.01)
SELECT_CANARIES = f"SELECT id FROM outbox WHERE aggregate_type = '{AGGREGATE_TYPE}' ORDER BY id"


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
    return [canary_id for (canary_id,) in connection.execute(SELECT_CANARIES).fetchall()]


def test_a_relay_that_may_not_write_messages_is_told_the_grant(database: Database, relay_login: str) -> None:
    with closing(connect(database, user=relay_login)) as relay, pytest.raises(ConfigurationError) as refusal:
        check_canary(relay, schema="public")
    assert f"GRANT outbox_writer TO {relay_login};" in str(refusal.value)


def test_the_grants_of_a_relay_and_of_a_writer_are_enough(admin: Connection, relay: Connection) -> None:
    check_canary(relay, schema="public")
    canary_id = write_canary(relay, options=OPTIONS)
    assert canary_id is not None
    assert canaries(admin) == [canary_id]
    assert read_canary(relay, canary_id, schema="public") == (False, None)
    admin.execute("UPDATE outbox SET published_at = created_at + interval '250 ms'")
    assert read_canary(relay, canary_id, schema="public") == (True, 0.25)


def test_a_canary_that_was_deleted_has_arrived(admin: Connection, relay: Connection) -> None:
    canary_id = write_canary(relay, options=OPTIONS)
    assert canary_id is not None
    admin.execute("DELETE FROM outbox")
    assert read_canary(relay, canary_id, schema="public") == (True, None)


def test_nobody_writes_a_second_canary_while_one_is_under_way(
    database: Database, admin: Connection, relay: Connection, canary_login: str
) -> None:
    with closing(connect(database, user=canary_login)) as another:
        first = write_canary(relay, options=OPTIONS)
        insert(admin, *map(str, range(50)))
        assert write_canary(another, options=OPTIONS) is None
        admin.execute("UPDATE outbox SET published_at = now()")
        second = write_canary(another, options=OPTIONS)
    assert canaries(admin) == [first, second]


def test_nobody_writes_behind_a_canary_that_is_parked(admin: Connection, relay: Connection) -> None:
    first = write_canary(relay, options=OPTIONS)
    admin.execute("UPDATE outbox SET parked_at = now()")
    assert write_canary(relay, options=OPTIONS) is None
    assert canaries(admin) == [first]


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
            admin.execute(
                "UPDATE outbox SET published_at = created_at + interval '1 second' WHERE published_at IS NULL"
            )
        eventually(lambda: len(listener.seconds) == 3)
    assert listener.seconds == [1.0, 1.0, 1.0]


def test_a_canary_is_followed_over_a_lost_connection(database: Database, admin: Connection) -> None:
    listener = Listener()
    with sending(listener, partial(connect, database)):
        eventually(lambda: listener.open_since)
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE '%canary'")
        eventually(lambda: len(listener.open_since) > 1)
        assert listener.open_since[0] == listener.open_since[1]
        [canary_id] = canaries(admin)
        admin.execute("UPDATE outbox SET published_at = created_at + interval '3 seconds' WHERE id = %s", [canary_id])
        eventually(lambda: listener.seconds)
    assert listener.seconds[0] == 3.0
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
