"""
The classic failures of database transactions: first the damage without the library, then its absence with it.

Every pair runs the same story on the same kind of server and is judged by the same balances.
"""

from __future__ import annotations

import threading
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

import psycopg
import pytest
from psycopg import Connection, IsolationLevel, errors
from psycopg.conninfo import make_conninfo
from psycopg.rows import TupleRow

from outbox_relay.errors import ConnectionReplaced
from outbox_relay.idempotency import IdempotencyKeys, fingerprint_of
from outbox_relay.transactions import Repetition, transact
from tests.fixtures.proxy import TcpProxy
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg.pq.abc import PGconn

    from tests.fixtures.postgres import Database

    Work = Callable[[Connection[TupleRow]], object]

WAIT_SECONDS = 30.0


@pytest.fixture
def bank(inbox_database: Database) -> Database:
    with inbox_database.connect(autocommit=True) as connection:
        connection.execute("CREATE TABLE account (name text PRIMARY KEY, balance integer NOT NULL)")
        connection.execute("INSERT INTO account VALUES ('alice', 100), ('bob', 100)")
    return inbox_database


@pytest.fixture
def proxy(bank: Database) -> Iterator[TcpProxy]:
    with TcpProxy("127.0.0.1", bank.server.port) as running:
        yield running


def balances(bank: Database) -> dict[str, int]:
    with bank.connect() as connection:
        return dict(connection.execute("SELECT name, balance FROM account ORDER BY name").fetchall())


def add(connection: Connection[TupleRow], name: str, amount: int) -> None:
    connection.execute("UPDATE account SET balance = balance + %s WHERE name = %s", [amount, name])


def charge(connection: Connection[TupleRow]) -> str:
    add(connection, "alice", -10)
    return "charged"


def retried_blindly(connect: Callable[[], Connection[TupleRow]], work: Work) -> None:
    """What is often written: on a lost connection, once more."""
    while True:
        try:
            with connect() as connection:
                work(connection)
                connection.commit()
        except psycopg.OperationalError:
            continue
        return


def given_up(connect: Callable[[], Connection[TupleRow]], work: Work) -> None:
    """The other thing that is often written: on a lost connection, report a failure."""
    try:
        with connect() as connection:
            work(connection)
            connection.commit()
    except psycopg.OperationalError:
        return


@pytest.mark.parametrize(
    ("run", "fault", "expected"),
    [
        (retried_blindly, "swallow_reply_to", 80),  # charged twice
        (given_up, "cut_before", 100),  # not charged at all
        (transact, "swallow_reply_to", 90),
        (transact, "cut_before", 90),
    ],
)
def test_charge_whose_commit_was_cut_is_made_once_only_by_transact(
    bank: Database,
    proxy: TcpProxy,
    run: Callable[[Callable[[], Connection[TupleRow]], Work], object],
    fault: str,
    expected: int,
) -> None:
    through_proxy = make_conninfo(bank.dsn, port=proxy.port)
    getattr(proxy, fault)(b"COMMIT")
    run(partial(psycopg.connect, through_proxy), charge)
    assert (balances(bank)["alice"], proxy.fired.total()) == (expected, 1)


class ReconnectingConnection(Connection[TupleRow]):
    """What some wrappers do: a lost server connection is replaced underneath, and the statement sent again."""

    conninfo = ""
    replaced = 0
    pgconn: PGconn

    def reconnecting(self, statement: str) -> None:
        try:
            self.execute(statement.encode())
        except psycopg.OperationalError:
            fresh = psycopg.connect(self.conninfo)
            self.pgconn, fresh.pgconn = fresh.pgconn, self.pgconn
            self.replaced += 1
            self.execute(statement.encode())


def transfer(bank: Database, connection: ReconnectingConnection) -> None:
    """Move 30 from alice to bob, with the server process ended in the middle."""
    connection.reconnecting("UPDATE account SET balance = balance - 30 WHERE name = 'alice'")
    with bank.connect(autocommit=True) as admin:
        admin.execute("SELECT pg_terminate_backend(%s, 10000)", [connection.info.backend_pid])
    connection.reconnecting("UPDATE account SET balance = balance + 30 WHERE name = 'bob'")


@pytest.fixture
def reconnecting(bank: Database) -> Iterator[ReconnectingConnection]:
    with ReconnectingConnection.connect(bank.dsn) as connection:
        connection.conninfo = bank.dsn
        yield connection


def test_half_a_transfer_is_committed_on_a_connection_that_was_replaced(
    bank: Database, reconnecting: ReconnectingConnection
) -> None:
    transfer(bank, reconnecting)
    reconnecting.commit()
    assert (balances(bank), reconnecting.replaced) == ({"alice": 100, "bob": 130}, 1)  # 30 out of nowhere


def test_transact_refuses_to_commit_on_a_connection_that_was_replaced(
    bank: Database, reconnecting: ReconnectingConnection
) -> None:
    with pytest.raises(ConnectionReplaced, match="began on server process"):
        transact(reconnecting, lambda connection: transfer(bank, connection))
    assert (balances(bank), reconnecting.replaced) == ({"alice": 100, "bob": 100}, 1)


def both_at_once(*works: Callable[[Callable[[], object]], object]) -> None:
    """Run *works* in threads of their own; each calls what it is given once, and all meet there the first time."""
    barrier = threading.Barrier(len(works), timeout=WAIT_SECONDS)
    failures: list[BaseException] = []

    def run(work: Callable[[Callable[[], object]], object]) -> None:
        runs = count()
        try:
            work(lambda: next(runs) or barrier.wait())
        except BaseException as error:  # noqa: BLE001 -- raised again in the test's thread
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_SECONDS)
    if failures:
        raise failures[0]


def withdraw_if_covered(connection: Connection[TupleRow], name: str, *, meet: Callable[[], object]) -> None:
    """Withdraw 150 from one account if both together cover it: the rule is that the sum stays above zero."""
    [(total,)] = connection.execute("SELECT sum(balance) FROM account")
    meet()
    if total >= 150:
        add(connection, name, -150)


def deposit(connection: Connection[TupleRow], amount: int, *, meet: Callable[[], object]) -> None:
    """Read, calculate, write: what an object mapper does."""
    [(balance,)] = connection.execute("SELECT balance FROM account WHERE name = 'alice'")
    meet()
    connection.execute("UPDATE account SET balance = %s WHERE name = 'alice'", [balance + amount])


def transfer_in_order(connection: Connection[TupleRow], first: str, second: str, *, meet: Callable[[], object]) -> None:
    """Move 10 from *first* to *second*, locking them in that order."""
    add(connection, first, -10)
    meet()
    add(connection, second, 10)


def run_once(bank: Database, work: Work, *, isolation_level: IsolationLevel | None = None) -> None:
    """One transaction as the driver makes it."""
    with bank.connect() as connection:
        connection.isolation_level = isolation_level
        work(connection)


@pytest.mark.parametrize("level", [IsolationLevel.READ_COMMITTED, IsolationLevel.REPEATABLE_READ])
def test_write_skew_breaks_the_rule_below_serializable(bank: Database, level: IsolationLevel) -> None:
    both_at_once(
        *(
            lambda meet, name=name: run_once(
                bank, partial(withdraw_if_covered, name=name, meet=meet), isolation_level=level
            )
            for name in ("alice", "bob")
        )
    )
    assert sum(balances(bank).values()) == -100


def test_write_skew_is_absent_when_transact_repeats_at_serializable(bank: Database) -> None:
    repeated: list[Repetition] = []
    both_at_once(
        *(
            lambda meet, name=name: transact(
                bank.connect,
                partial(withdraw_if_covered, name=name, meet=meet),
                isolation_level=IsolationLevel.SERIALIZABLE,
                on_retry=repeated.append,
            )
            for name in ("alice", "bob")
        )
    )
    assert sum(balances(bank).values()) == 50
    assert {event.error.sqlstate for event in repeated} == {"40001"}


def test_update_is_lost_at_read_committed(bank: Database) -> None:
    both_at_once(
        *(lambda meet, amount=amount: run_once(bank, partial(deposit, amount=amount, meet=meet)) for amount in (1, 10))
    )
    assert balances(bank)["alice"] in {101, 110}


@pytest.mark.parametrize("level", [IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE])
def test_no_update_is_lost_when_transact_repeats_the_whole(bank: Database, level: IsolationLevel) -> None:
    repeated: list[Repetition] = []
    both_at_once(
        *(
            lambda meet, amount=amount: transact(
                bank.connect,
                partial(deposit, amount=amount, meet=meet),
                isolation_level=level,
                on_retry=repeated.append,
            )
            for amount in (1, 10)
        )
    )
    assert balances(bank)["alice"] == 111
    assert {event.error.sqlstate for event in repeated} == {"40001"}


def test_one_of_two_transfers_fails_in_a_deadlock(bank: Database) -> None:
    with pytest.raises(errors.DeadlockDetected):
        both_at_once(
            lambda meet: run_once(bank, partial(transfer_in_order, first="alice", second="bob", meet=meet)),
            lambda meet: run_once(bank, partial(transfer_in_order, first="bob", second="alice", meet=meet)),
        )
    assert sorted(balances(bank).values()) == [90, 110]


def test_both_transfers_are_made_when_transact_repeats_the_one_in_the_deadlock(bank: Database) -> None:
    repeated: list[Repetition] = []
    both_at_once(
        *(
            lambda meet, first=first, second=second: transact(
                bank.connect,
                partial(transfer_in_order, first=first, second=second, meet=meet),
                on_retry=repeated.append,
            )
            for first, second in (("alice", "bob"), ("bob", "alice"))
        )
    )
    assert balances(bank) == {"alice": 100, "bob": 100}
    assert [event.error.sqlstate for event in repeated] == ["40P01"]


def keyed(connection: Connection[TupleRow]) -> str:
    """Answer the client's request under the key that it sends along."""
    fingerprint = fingerprint_of("POST", "/charges", {"amount": 10})
    return IdempotencyKeys("charges").answer(connection, "order 4711", charge, fingerprint=fingerprint)


@pytest.mark.parametrize(("answer", "expected"), [(charge, 80), (keyed, 90)])
def test_request_that_the_client_repeats_after_a_time_out_is_charged_once_only_with_a_key(
    bank: Database, answer: Callable[[Connection[TupleRow]], str], expected: int
) -> None:
    """The first request hangs on a lock; its client gives up, asks again, and both are answered in the end."""
    answers: list[str] = []

    def request() -> None:
        answers.append(transact(bank.connect, answer))

    requests = [threading.Thread(target=request) for _ in range(2)]
    with bank.connect() as blocker:
        blocker.execute("SELECT FROM account WHERE name = 'alice' FOR UPDATE")
        for number, sent in enumerate(requests, start=1):
            sent.start()
            eventually(partial(has_waiting, bank, number))
        blocker.rollback()
    for sent in requests:
        sent.join(WAIT_SECONDS)
    assert (answers, balances(bank)["alice"]) == (["charged", "charged"], expected)


def has_waiting(bank: Database, sessions: int) -> bool:
    with bank.connect() as connection:
        waiting = connection.execute(
            "SELECT count(DISTINCT pid) = %s FROM pg_stat_activity"
            " WHERE wait_event_type = 'Lock' AND datname = current_database()",
            [sessions],
        ).fetchone()
    return waiting == (True,)
