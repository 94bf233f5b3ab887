"""The thread that keeps the horizon, on real sessions: what it announces, whom it gives up on, when it begins anew."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import pytest
import structlog
from structlog.testing import capture_logs

from outbox_relay import database as relay_database
from outbox_relay.observe.metrics import Metrics
from outbox_relay.observe.telemetry import Telemetry
from outbox_relay.relay.horizon import read_last_number
from outbox_relay.relay.message import Addressing
from outbox_relay.relay.watch import HorizonWatch, WatchOptions
from tests.fixtures.marks import mark
from tests.fixtures.outbox import insert
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from tests.fixtures.postgres import Database

LONG = 3_600.0


@pytest.fixture
def shop(database: Database) -> Iterator[Connection]:
    with database.connect(autocommit=True) as connection:
        yield connection


@contextmanager
def watching(
    database: Database, *, ordering_timeout: float = LONG, renumbered: list[None] | None = None
) -> Iterator[HorizonWatch]:
    """A watch that runs; each renumbering is appended to *renumbered*."""
    seen: list[None] = [] if renumbered is None else renumbered
    watch = HorizonWatch(
        options=WatchOptions(ordering_timeout=ordering_timeout),
        connect=partial(relay_database.connect, database.relay_dsn, application_name="horizon"),
        telemetry=Telemetry(logger=structlog.get_logger(), metrics=Metrics(), topic_of=Addressing().topic),
        renumbered=lambda: seen.append(None),
    )
    thread = threading.Thread(target=watch.run)
    thread.start()
    try:
        yield watch
    finally:
        watch.stop()
        thread.join()


def reaches(watch: HorizonWatch, number: int) -> None:
    eventually(lambda: watch.reached.through == number, message=f"the horizon is not at {number}")


def test_the_horizon_is_the_last_number_in_its_epoch(database: Database, shop: Connection) -> None:
    insert(shop, "1", "2")
    with watching(database) as watch:
        reaches(watch, 2)
        assert watch.reached == tuple(read_last_number(shop, schema="public"))
        insert(shop, "1")
        reaches(watch, 3)


def test_an_open_writer_holds_the_horizon_until_it_ends(database: Database, shop: Connection) -> None:
    insert(shop, "1")
    with watching(database) as watch, database.connect() as writer:
        reaches(watch, 1)
        insert(writer, "1")
        insert(shop, "2")
        assert watch.wait_beyond(1, timeout=0.2).through == 1
        writer.commit()
        reaches(watch, 3)


def test_whoever_waits_is_woken_by_the_horizon(database: Database, shop: Connection) -> None:
    with watching(database) as watch:
        insert(shop, "1")
        assert watch.wait_beyond(0, timeout=30).through == 1


def test_whoever_waits_is_woken_by_the_stop(database: Database) -> None:
    with watching(database) as watch, ThreadPoolExecutor(1) as thread:
        woken = thread.submit(watch.wait_beyond, 0, timeout=LONG)
        watch.stop()
        assert woken.result() == (0, None)


def test_whoever_waits_is_woken_by_other_work_once_there_is_a_horizon(database: Database, shop: Connection) -> None:
    has_other_work = threading.Event()
    with watching(database) as watch, ThreadPoolExecutor(1) as thread:
        early = thread.submit(watch.wait_beyond, 1, timeout=0.2, has_other_work=lambda: True)
        assert early.result().through == 0
        insert(shop, "1")
        reaches(watch, 1)
        woken = thread.submit(watch.wait_beyond, 1, timeout=LONG, has_other_work=has_other_work.is_set)
        assert not woken.done()
        has_other_work.set()
        watch.wake()
        assert woken.result().through == 1


def test_a_writer_is_recorded_before_the_horizon_passes_it(database: Database, shop: Connection) -> None:
    with watching(database, ordering_timeout=0.2) as watch, database.connect() as writer:
        insert(writer, "1")
        insert(shop, "2")
        mark(shop, shard=2, through=0)
        assert watch.wait_beyond(0, timeout=30).through == 2
        assert shop.execute("SELECT from_no, collected_at FROM outbox_unordered").fetchall() == [(0, None)]


def test_the_end_of_a_writer_that_was_given_up_on_wakes_whoever_collects(database: Database) -> None:
    with watching(database, ordering_timeout=0.2) as watch, database.connect() as writer:
        insert(writer, "1")
        reaches(watch, 1)
        assert watch.wait_for_late_writers(0, timeout=0.0) == 0
        writer.rollback()
        assert watch.wait_for_late_writers(0, timeout=30) == 1


def test_a_writer_that_is_given_up_on_twice_keeps_its_first_record(database: Database, shop: Connection) -> None:
    with watching(database, ordering_timeout=0.2) as watch, database.connect() as writer:
        insert(writer, "1")
        reaches(watch, 1)
        insert(shop, "2")
        mark(shop)
        watch.reset()
        assert watch.reached.through == 0
        reaches(watch, 2)
        assert shop.execute("SELECT from_no FROM outbox_unordered").fetchall() == [(0,)]


def test_a_writer_that_was_given_up_on_before_is_not_waited_for(database: Database, shop: Connection) -> None:
    with database.connect() as writer:
        insert(writer, "1")
        with watching(database, ordering_timeout=0.2) as watch:
            reaches(watch, 1)
        insert(shop, "2")
        with watching(database) as watch:
            reaches(watch, 2)
            writer.commit()
            assert watch.wait_for_late_writers(0, timeout=30) == 1


def test_a_reset_announces_nothing_until_the_horizon_is_found_again(database: Database, shop: Connection) -> None:
    insert(shop, "1")
    with watching(database) as watch, database.connect() as writer:
        reaches(watch, 1)
        insert(writer, "1")
        watch.reset()
        assert watch.wait_beyond(0, timeout=0.2).through == 0
        writer.rollback()
        reaches(watch, 2)


@pytest.mark.parametrize(
    "restart", [b"TRUNCATE outbox RESTART IDENTITY", b"TRUNCATE outbox; ALTER SEQUENCE outbox_sequence_no_seq RESTART"]
)
def test_numbers_that_begin_anew_are_another_epoch_and_told_once(
    database: Database, shop: Connection, restart: bytes
) -> None:
    renumbered: list[None] = []
    insert(shop, *["1"] * 9)
    with watching(database, renumbered=renumbered) as watch:
        reaches(watch, 9)
        before = watch.reached.epoch
        shop.execute(restart)
        insert(shop, "1", "1")
        reaches(watch, 2)
        assert watch.reached.epoch != before
        assert renumbered == [None]


def test_a_sequence_below_the_marks_leaves_no_horizon_until_it_is_mended(database: Database, shop: Connection) -> None:
    renumbered: list[None] = []
    insert(shop, *["1"] * 9)
    mark(shop)
    with capture_logs() as logs, watching(database, renumbered=renumbered) as watch:
        reaches(watch, 9)
        shop.execute("SELECT setval('outbox_sequence_no_seq', 5)")
        eventually(lambda: [each for each in logs if each["event"] == "database_lost"])
        assert (watch.reached.through, renumbered) == (0, [])
        shop.execute("SELECT setval('outbox_sequence_no_seq', 9)")
        reaches(watch, 9)
        assert renumbered == [None]


def test_numbers_that_begin_anew_have_no_horizon_while_the_tables_are_locked(
    database: Database, shop: Connection
) -> None:
    insert(shop, "1", "2")
    mark(shop)
    with watching(database) as watch, database.connect() as holder:
        reaches(watch, 2)
        holder.execute("LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE")
        shop.execute("ALTER SEQUENCE outbox_sequence_no_seq RESTART WITH 1")
        shop.execute("SELECT nextval('outbox_sequence_no_seq')")
        reaches(watch, 0)
        assert watch.wait_beyond(0, timeout=2.0).through == 0
        holder.rollback()
        shop.execute("SELECT setval('outbox_sequence_no_seq', 2)")
        reaches(watch, 2)


def test_a_sequence_that_gives_several_numbers_at_once_leaves_no_horizon(database: Database, shop: Connection) -> None:
    shop.execute("ALTER SEQUENCE outbox_sequence_no_seq CACHE 10")
    insert(shop, "1")
    with capture_logs() as logs, watching(database) as watch:
        lost = eventually(lambda: [each for each in logs if each["event"] == "database_lost"])
        assert "CACHE 10" in str(lost[0])
        assert watch.reached.through == 0


def test_a_connection_that_is_ended_begins_anew(database: Database, shop: Connection) -> None:
    insert(shop, "1")
    with watching(database) as watch:
        reaches(watch, 1)
        shop.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name = 'horizon'"
        )
        insert(shop, "1")
        reaches(watch, 2)
