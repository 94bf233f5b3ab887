"""The saga as real processes: kills and restarts of everything conserve money, and leave no order half done."""

from __future__ import annotations

import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from random import Random
from threading import Event
from typing import TYPE_CHECKING

import psycopg
import pytest

from examples.saga.demo import open_books, overview, place, random_order
from examples.saga.deployment import create_databases, create_topics, processes
from examples.saga.messages import Order
from examples.saga.verdict import read_books, violations
from outbox_relay.errors import CommitOutcomeUnknown
from tests.fixtures.daemon import Daemon
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from examples.parts import Process
    from outbox_relay.sandbox.kafka import KafkaCluster
    from outbox_relay.sandbox.postgres import PostgresServer

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

ORDERS = 300
ROUNDS_OF_KILLS = 3
PLACE_INTERVAL_SECONDS = 0.15
AGAIN_SECONDS = 0.2
END_SECONDS = 60.0

COUNT_EVENTS = "SELECT event, count(*) FROM saga_history GROUP BY event"


class Shop:
    """The databases, and the processes on them, which can be killed and are then started again."""

    def __init__(self, databases: Mapping[str, str], plan: Mapping[str, Process]) -> None:
        self.databases = databases
        self.kills: Counter[str] = Counter()
        self._plan = plan
        self._daemons: dict[str, Daemon] = {}

    @property
    def names(self) -> list[str]:
        return list(self._plan)

    def start(self, name: str) -> None:
        self._daemons[name] = Daemon(self._plan[name].environment, command=self._plan[name].command)

    def kill(self, name: str) -> None:
        """SIGKILL, which must find it alive, and start it again."""
        self._daemons[name].kill()
        assert self._daemons[name].wait() == -signal.SIGKILL, self._daemons[name].other_lines
        self.kills[name] += 1
        self.start(name)

    def stop(self) -> dict[str, int]:
        """SIGTERM to all; give their exit codes."""
        for daemon in self._daemons.values():
            daemon.terminate()
        return {name: daemon.wait() for name, daemon in self._daemons.items()}

    def kill_all(self) -> None:
        for daemon in self._daemons.values():
            daemon.kill()

    def overview(self) -> dict[str, int]:
        return overview(self.databases["orders"])

    def await_ends(self) -> None:
        """Wait until every saga has ended."""
        eventually(lambda: self.overview()["running"] == 0, timeout=END_SECONDS, message=f"{self.overview()}")

    def events(self) -> Counter[str]:
        """How often each event came to all sagas together."""
        with psycopg.connect(self.databases["orders"]) as connection:
            return Counter(dict(connection.execute(COUNT_EVENTS).fetchall()))


@pytest.fixture
def shop(own_postgres: PostgresServer, own_kafka: KafkaCluster) -> Iterator[Shop]:
    databases = create_databases(own_postgres.dsn())
    create_topics(own_kafka)
    open_books(databases)
    shop = Shop(databases, processes(databases, bootstrap_servers=own_kafka.bootstrap_servers))
    with ExitStack() as stack:
        stack.callback(shop.kill_all)
        for name in shop.names:
            shop.start(name)
        yield shop


class Customers:
    """Place orders one after the other, each until it is taken; `placed` tells how many are."""

    def __init__(self, database: str, orders: Sequence[Order]) -> None:
        self.placed = 0
        self._database = database
        self._orders = orders
        self._stop = Event()

    @contextmanager
    def placing(self) -> Iterator[None]:
        """All orders are placed when the context is left without an error."""
        with ThreadPoolExecutor(1) as threads, ExitStack() as on_error:
            on_error.callback(self._stop.set)
            running = threads.submit(self._run)
            yield
            running.result()

    def await_placed(self, count: int) -> None:
        eventually(lambda: self.placed >= count, timeout=END_SECONDS, message="customers are stuck")

    def _run(self) -> None:
        for order in self._orders:
            while not self._stop.wait(PLACE_INTERVAL_SECONDS) and not self._is_taken(order):
                self._stop.wait(AGAIN_SECONDS)
            self.placed += 1

    def _is_taken(self, order: Order) -> bool:
        try:
            place(self._database, order)
        except (psycopg.OperationalError, CommitOutcomeUnknown):
            return False
        return True


def an_order(random: Random) -> Order:
    """One that nobody refuses."""
    drawn = random_order(random)
    return Order(order_id=drawn.order_id, customer="ada", item="book", quantity=1, cents=drawn.cents, address="Quito")


def await_opening(shop: Shop, random: Random) -> None:
    """Place orders until one is shipped: while processes still start, a step takes longer than its time."""
    while not shop.overview()["completed"]:
        place(shop.databases["orders"], an_order(random))
        shop.await_ends()


def test_orders_that_nobody_refuses_are_charged_reserved_and_shipped_once(shop: Shop, seed: int) -> None:
    random = Random(seed)  # noqa: S311 -- repeatable
    before = read_books(shop.databases)
    await_opening(shop, random)
    counts, events = Counter(shop.overview()), shop.events()
    for _ in range(20):
        place(shop.databases["orders"], an_order(random))
    shop.await_ends()
    assert Counter(shop.overview()) - counts == {"started": 20, "completed": 20}
    assert shop.events() - events == {"charged": 20, "reserved": 20, "shipped": 20}
    assert violations(before, read_books(shop.databases)) == []
    assert shop.stop() == dict.fromkeys(shop.names, 0)


def test_kills_of_every_process_and_restarts_of_the_servers_leave_no_order_half_done(
    shop: Shop, own_postgres: PostgresServer, own_kafka: KafkaCluster, seed: int
) -> None:
    random = Random(seed)  # noqa: S311 -- repeatable
    before = read_books(shop.databases)
    customers = Customers(shop.databases["orders"], [random_order(random) for _ in range(ORDERS)])
    victims = [name for _ in range(ROUNDS_OF_KILLS) for name in random.sample(shop.names, len(shop.names))]
    with customers.placing():
        for number, victim in enumerate(victims):
            customers.await_placed(number * ORDERS // len(victims))
            shop.kill(victim)
            if number == len(victims) // 3:
                restart_kafka(own_kafka, shop)
            if number == 2 * len(victims) // 3:
                own_postgres.restart("immediate")
    shop.await_ends()

    assert violations(before, read_books(shop.databases)) == []
    counts, events = shop.overview(), shop.events()
    print(f"{counts}, {events}, {shop.kills}")  # noqa: T201 -- shown when the test fails
    assert counts["started"] == ORDERS
    assert counts["completed"] + counts["compensated"] == ORDERS
    assert counts["stuck"] == 0
    assert shop.kills == dict.fromkeys(shop.names, ROUNDS_OF_KILLS)
    assert min(counts["completed"], counts["compensated"]) > ORDERS // 10
    happened = {"charge_refused", "reserve_refused", "ship_refused", "timed_out", "shipped", "refunded"}
    assert happened <= events.keys()
    assert shop.stop() == dict.fromkeys(shop.names, 0)


def restart_kafka(kafka: KafkaCluster, shop: Shop) -> None:
    """Keep Kafka away until sagas time out for it."""
    timed_out = shop.events()["timed_out"]
    kafka.kill()
    eventually(lambda: shop.events()["timed_out"] > timed_out, message="no saga timed out")
    kafka.restart()
