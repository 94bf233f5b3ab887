"""A request is answered once, however often and from how many sides it comes."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import pytest
from psycopg import AsyncConnection, Connection, IsolationLevel

from outbox_relay.errors import NoTransaction, RequestInFlight, RequestMismatch, SchemaMismatch, TransactionError
from outbox_relay.idempotency import AsyncRequest, IdempotencyKeys, Request, fingerprint_of
from outbox_relay.transactions import transact
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg.rows import TupleRow

    from tests.fixtures.postgres import Database

    Connect = Callable[[], Connection[TupleRow]]

KEYS = IdempotencyKeys("charges", wait_seconds=0.1)
FIRST = fingerprint_of("POST", "/charges", {"amount": 10})
OTHER = fingerprint_of("POST", "/charges", {"amount": 11})


@pytest.fixture
def admin(inbox_database: Database, consumer_login: str) -> Iterator[Connection[TupleRow]]:
    """A superuser's session, on a database whose consumers may charge."""
    with inbox_database.connect(autocommit=True) as connection:
        connection.execute("CREATE TABLE charge (id bigint GENERATED ALWAYS AS IDENTITY, step text)")
        connection.execute(f'GRANT SELECT, INSERT ON charge TO "{consumer_login}"'.encode())
        yield connection


@pytest.fixture
def connect(
    inbox_database: Database,
    consumer_login: str,
    admin: Connection[TupleRow],  # noqa: ARG001 -- made the table
) -> Connect:
    """Opens a session of a consumer."""
    return lambda: inbox_database.connect(user=consumer_login)


def charge(connection: Connection[TupleRow], step: str = "only") -> dict[str, object]:
    [(number,)] = connection.execute("INSERT INTO charge (step) VALUES (%s) RETURNING id", [step])
    return {"id": number, "lines": ["ä", 1.0]}


def charges(admin: Connection[TupleRow]) -> list[str]:
    return [step for (step,) in admin.execute("SELECT step FROM charge ORDER BY id")]


def pass_time(admin: Connection[TupleRow], seconds: int) -> None:
    """Make every key as much older."""
    admin.execute(
        "UPDATE idempotency_key SET locked_until = locked_until - %(by)s * interval '1s',"
        " expires_at = expires_at - %(by)s * interval '1s'",
        {"by": seconds},
    )


@pytest.mark.every_postgres
def test_second_request_gets_the_first_ones_response(connect: Connect, admin: Connection[TupleRow]) -> None:
    responses = [
        transact(connect, lambda connection: KEYS.answer(connection, "k", charge, fingerprint=FIRST)) for _ in range(3)
    ]
    assert responses == [{"id": 1, "lines": ["ä", 1.0]}] * 3
    assert charges(admin) == ["only"]


def test_first_response_is_as_the_later_ones_will_be(connect: Connect) -> None:
    responses = [
        transact(connect, lambda inner: KEYS.answer(inner, "k", lambda _: {"b": (1, 2), "a": None}, fingerprint=FIRST))
        for _ in range(2)
    ]
    assert [list(response.items()) for response in responses] == [[("b", [1, 2]), ("a", None)]] * 2


def test_key_of_another_request_is_refused(connect: Connect, admin: Connection[TupleRow]) -> None:
    transact(connect, lambda connection: KEYS.answer(connection, "k", charge, fingerprint=FIRST))
    with pytest.raises(RequestMismatch, match="key 'k' was used before"):
        transact(connect, lambda connection: KEYS.answer(connection, "k", charge, fingerprint=OTHER))
    assert charges(admin) == ["only"]


def test_keys_of_different_scopes_are_different(connect: Connect, admin: Connection[TupleRow]) -> None:
    for scope in ("charges", "refunds"):
        keys = IdempotencyKeys(scope)
        transact(connect, partial(keys.answer, key="k", work=charge, fingerprint=FIRST))
    assert charges(admin) == ["only", "only"]


def test_request_that_failed_is_answered_by_the_next(connect: Connect, admin: Connection[TupleRow]) -> None:
    def fail(connection: Connection[TupleRow]) -> None:
        charge(connection, "lost")
        raise KeyError("no such card")

    with pytest.raises(KeyError):
        transact(connect, lambda connection: KEYS.answer(connection, "k", fail, fingerprint=FIRST))
    transact(connect, lambda connection: KEYS.answer(connection, "k", charge, fingerprint=FIRST))
    assert charges(admin) == ["only"]


def test_work_whose_error_is_caught_leaves_nothing_in_a_transaction_that_goes_on(
    connect: Connect, admin: Connection[TupleRow]
) -> None:
    def fail(connection: Connection[TupleRow]) -> None:
        charge(connection, "half")
        raise KeyError("no such card")

    with connect() as connection:
        with pytest.raises(KeyError):
            KEYS.answer(connection, "k", fail, fingerprint=FIRST)
        charge(connection, "after")
        connection.commit()
    assert charges(admin) == ["after"]
    transact(connect, lambda connection: KEYS.answer(connection, "k", charge, fingerprint=FIRST))
    assert charges(admin) == ["after", "only"]


def test_response_that_is_no_json_leaves_nothing_in_a_transaction_that_goes_on(
    connect: Connect, admin: Connection[TupleRow]
) -> None:
    with connect() as connection:
        with pytest.raises(TypeError):
            KEYS.answer(connection, "k", lambda inner: {charge(inner)["id"]: object()}, fingerprint=FIRST)
        connection.commit()
    assert (charges(admin), admin.execute("SELECT FROM idempotency_key").fetchall()) == ([], [])


def test_request_is_told_of_a_twin_that_is_at_work_for_too_long(connect: Connect) -> None:
    with connect() as twin, connect() as connection:
        KEYS.answer(twin, "k", charge, fingerprint=FIRST)
        with pytest.raises(RequestInFlight, match=r"still at work after 0\.1 s"):
            transact(connection, lambda inner: KEYS.answer(inner, "k", charge, fingerprint=FIRST))


@pytest.mark.parametrize("isolation_level", [None, IsolationLevel.SERIALIZABLE])
def test_concurrent_request_waits_for_its_twins_response(
    connect: Connect, admin: Connection[TupleRow], isolation_level: IsolationLevel | None
) -> None:
    keys = IdempotencyKeys("charges", wait_seconds=30)
    responses: list[object] = []

    def answer() -> None:
        responses.append(
            transact(
                connect,
                lambda connection: keys.answer(connection, "k", charge, fingerprint=FIRST),
                isolation_level=isolation_level,
            )
        )

    with connect() as twin:
        first = keys.answer(twin, "k", charge, fingerprint=FIRST)
        waiting = threading.Thread(target=answer)
        waiting.start()
        eventually(lambda: admin.execute("SELECT FROM pg_locks WHERE NOT granted").fetchone() is not None)
        twin.commit()
    waiting.join()
    assert (responses, charges(admin)) == ([first], ["only"])


def test_callers_lock_timeout_is_left_as_it_was(connect: Connect) -> None:
    with connect() as connection:
        connection.execute("SET lock_timeout = '7s'")
        for _ in range(2):
            KEYS.answer(connection, "k", charge, fingerprint=FIRST)
            assert connection.execute("SHOW lock_timeout").fetchone() == ("7s",)


def test_expired_key_may_be_used_for_another_request(connect: Connect, admin: Connection[TupleRow]) -> None:
    transact(connect, lambda connection: KEYS.answer(connection, "k", charge, fingerprint=FIRST))
    pass_time(admin, 86401)
    second = transact(connect, lambda connection: KEYS.answer(connection, "k", charge, fingerprint=OTHER))
    assert (second["id"], charges(admin)) == (2, ["only", "only"])


def test_prune_removes_expired_keys_of_its_scope_in_bounded_batches(
    connect: Connect, admin: Connection[TupleRow]
) -> None:
    with connect() as connection:
        for number in range(5):
            KEYS.answer(connection, f"old {number}", charge, fingerprint=FIRST)
        IdempotencyKeys("refunds").answer(connection, "old", charge, fingerprint=FIRST)
        connection.commit()
        pass_time(admin, 86401)
        KEYS.answer(connection, "new", charge, fingerprint=FIRST)
        pruned = [KEYS.prune(connection, limit=3) for _ in range(3)]
    left = admin.execute("SELECT scope, key FROM idempotency_key ORDER BY scope, key").fetchall()
    assert (pruned, left) == ([3, 2, 0], [("charges", "new"), ("refunds", "old")])


def test_session_without_a_transaction_is_refused(inbox_database: Database) -> None:
    with inbox_database.connect(autocommit=True) as connection, pytest.raises(NoTransaction):
        KEYS.answer(connection, "k", charge, fingerprint=FIRST)


def test_missing_table_is_named_with_its_remedy(database: Database) -> None:
    with database.connect() as connection, pytest.raises(SchemaMismatch, match="--inbox"):
        KEYS.answer(connection, "k", charge, fingerprint=FIRST)


@pytest.mark.parametrize(
    ("key", "words"),
    [("", "the key has 0 characters"), ("x" * 256, "256 characters: give 1 to 255"), ("a\0b", "has a NUL character")],
)
def test_unusable_key_is_refused_with_the_reason(connect: Connect, key: str, words: str) -> None:
    with connect() as connection, pytest.raises(ValueError, match=words):
        KEYS.answer(connection, key, charge, fingerprint=FIRST)


def test_keys_that_would_expire_before_they_are_taken_over_are_refused() -> None:
    with pytest.raises(ValueError, match="let expires_after_seconds be the larger one"):
        IdempotencyKeys("charges", takeover_after_seconds=60, expires_after_seconds=59)


@pytest.mark.parametrize("response", [object(), float("nan")])
def test_response_that_is_not_json_is_refused_and_nothing_written(
    connect: Connect, admin: Connection[TupleRow], response: object
) -> None:
    def answer(connection: Connection[TupleRow]) -> object:
        charge(connection)
        return response

    with pytest.raises((TypeError, ValueError), match="JSON"):
        transact(connect, lambda connection: KEYS.answer(connection, "k", answer, fingerprint=FIRST))
    assert charges(admin) == []


def test_fingerprint_is_of_what_the_request_says_not_of_how() -> None:
    same = {fingerprint_of("post", "/charges", body) for body in ({"a": 1, "b": [2]}, {"b": [2], "a": 1})}
    others = {
        fingerprint_of(*request)
        for request in (
            ("PUT", "/charges", {"a": 1, "b": [2]}),
            ("POST", "/charge", {"a": 1, "b": [2]}),
            ("POST", "/charges", {"a": 1, "b": [3]}),
            ("POST", "/charges", b'{"a": 1, "b": [2]}'),
            ("POST", "/charges", '{"a": 1, "b": [2]}'),
            ("POST", "/charges"),
        )
    }
    assert (len(same), len(others), same & others) == (1, 6, set())


def test_fingerprint_is_the_same_in_every_version() -> None:
    assert FIRST == "79d0eecf665933778fb126a5be14e0dd521e812d1a70168580916ab537d1afd2"


class Crash(BaseException):
    """What a killed process leaves behind: no handler of an Exception has run."""


def two_steps(crash_after: str | None = None) -> Callable[[Request[Connection[TupleRow]]], dict[str, object]]:
    def work(request: Request[Connection[TupleRow]]) -> dict[str, object]:
        done: dict[str, object] = {}
        for name in ("reserve", "capture"):
            done[name] = request.step(name, partial(charge, step=name))["id"]
            if name == crash_after:
                raise Crash
        return done

    return work


def crash_between_the_steps(connect: Connect) -> None:
    with pytest.raises(Crash):
        KEYS.answer_in_steps(connect, "k", two_steps(crash_after="reserve"), fingerprint=FIRST)


@pytest.mark.every_postgres
def test_second_request_gets_the_response_of_all_steps(connect: Connect, admin: Connection[TupleRow]) -> None:
    responses = [KEYS.answer_in_steps(connect, "k", two_steps(), fingerprint=FIRST) for _ in range(2)]
    assert (responses, charges(admin)) == ([{"reserve": 1, "capture": 2}] * 2, ["reserve", "capture"])


def test_request_in_steps_is_not_taken_over_before_its_time(connect: Connect, admin: Connection[TupleRow]) -> None:
    crash_between_the_steps(connect)
    pass_time(admin, 55)
    with pytest.raises(RequestInFlight, match=r"at the latest in [0-5]\.\d s"):
        KEYS.answer_in_steps(connect, "k", two_steps(), fingerprint=FIRST)
    assert charges(admin) == ["reserve"]


def test_crashed_request_is_continued_at_its_recovery_point(connect: Connect, admin: Connection[TupleRow]) -> None:
    crash_between_the_steps(connect)
    point = admin.execute("SELECT recovery_point FROM idempotency_key").fetchone()
    pass_time(admin, 61)
    response = KEYS.answer_in_steps(connect, "k", two_steps(), fingerprint=FIRST)
    assert (point, response) == (("reserve",), {"reserve": 1, "capture": 2})
    assert charges(admin) == ["reserve", "capture"]


def test_crashed_request_is_not_taken_over_by_another_request(connect: Connect, admin: Connection[TupleRow]) -> None:
    crash_between_the_steps(connect)
    pass_time(admin, 61)
    with pytest.raises(RequestMismatch):
        KEYS.answer_in_steps(connect, "k", two_steps(), fingerprint=OTHER)


def test_step_of_a_request_that_was_taken_over_is_rolled_back(connect: Connect, admin: Connection[TupleRow]) -> None:
    def overtaken(request: Request[Connection[TupleRow]]) -> None:
        request.step("reserve", lambda connection: charge(connection, "reserve"))
        pass_time(admin, 61)
        KEYS.answer_in_steps(connect, "k", two_steps(), fingerprint=FIRST)
        request.step("capture", lambda connection: charge(connection, "capture of the zombie"))

    with pytest.raises(RequestInFlight, match="taken over"):
        KEYS.answer_in_steps(connect, "k", overtaken, fingerprint=FIRST)
    assert charges(admin) == ["reserve", "capture"]


def test_zombie_of_a_pruned_key_cannot_go_on_under_its_successor(connect: Connect, admin: Connection[TupleRow]) -> None:
    def forgotten(request: Request[Connection[TupleRow]]) -> None:
        pass_time(admin, 86401)
        with connect() as connection:
            KEYS.prune(connection)
        with pytest.raises(Crash):
            KEYS.answer_in_steps(connect, "k", two_steps(crash_after="reserve"), fingerprint=OTHER)
        request.step("capture", lambda connection: charge(connection, "capture of the zombie"))

    with pytest.raises(RequestInFlight, match="taken over"):
        KEYS.answer_in_steps(connect, "k", forgotten, fingerprint=FIRST)
    assert charges(admin) == ["reserve"]


def test_request_that_raised_may_be_taken_over_at_once(connect: Connect, admin: Connection[TupleRow]) -> None:
    def fail(request: Request[Connection[TupleRow]]) -> None:
        request.step("reserve", lambda connection: charge(connection, "reserve"))
        raise KeyError("the provider said no")

    with pytest.raises(KeyError, match="provider"):
        KEYS.answer_in_steps(connect, "k", fail, fingerprint=FIRST)
    assert KEYS.answer_in_steps(connect, "k", two_steps(), fingerprint=FIRST) == {"reserve": 1, "capture": 2}
    assert charges(admin) == ["reserve", "capture"]


@pytest.mark.every_postgres
@pytest.mark.parametrize("isolation_level", [None, IsolationLevel.SERIALIZABLE])
def test_steps_side_by_side_are_all_remembered(
    connect: Connect, admin: Connection[TupleRow], isolation_level: IsolationLevel | None
) -> None:
    names = ["reserve", "capture", "post"]
    together = threading.Barrier(len(names), timeout=60)

    def connect_at_level() -> Connection[TupleRow]:
        connection = connect()
        connection.isolation_level = isolation_level
        return connection

    def side_by_side(request: Request[Connection[TupleRow]], *, crash: bool = False) -> dict[str, object]:
        def step(name: str) -> object:
            def work(connection: Connection[TupleRow]) -> object:
                result = charge(connection, name)
                with suppress(threading.BrokenBarrierError):
                    together.wait()
                return result["lines"]

            return request.step(name, work)

        with ThreadPoolExecutor(len(names)) as threads:
            results = list(threads.map(step, names))
        together.abort()
        if crash:
            raise Crash
        return dict(zip(names, results, strict=True))

    with pytest.raises(Crash):
        KEYS.answer_in_steps(connect_at_level, "k", partial(side_by_side, crash=True), fingerprint=FIRST)
    pass_time(admin, 61)
    response = KEYS.answer_in_steps(connect_at_level, "k", side_by_side, fingerprint=FIRST)
    assert response == {name: ["ä", 1.0] for name in names}
    assert sorted(charges(admin)) == sorted(names)


def test_steps_at_the_same_time_on_one_connection_are_refused(connect: Connect, admin: Connection[TupleRow]) -> None:
    def nested(request: Request[Connection[TupleRow]]) -> None:
        request.step("outer", lambda _: request.step("inner", charge))

    with connect() as connection, pytest.raises(TransactionError, match="give a pool"):
        KEYS.answer_in_steps(connection, "k", nested, fingerprint=FIRST)
    assert charges(admin) == []


def test_tasks_that_make_steps_on_one_connection_are_refused(
    inbox_database: Database, admin: Connection[TupleRow]
) -> None:
    async def charge_async(connection: AsyncConnection[TupleRow]) -> None:
        await connection.execute("INSERT INTO charge (step) VALUES ('only')")

    async def side_by_side(request: AsyncRequest[AsyncConnection[TupleRow]]) -> None:
        await asyncio.gather(request.step("reserve", charge_async), request.step("capture", charge_async))

    async def main() -> None:
        async with await AsyncConnection.connect(inbox_database.dsn) as connection:
            await KEYS.answer_in_steps_async(connection, "k", side_by_side, fingerprint=FIRST)

    with pytest.raises(TransactionError, match="give a pool"):
        asyncio.run(main())
    assert charges(admin) in (["only"], [])


def test_request_in_steps_is_refused_in_an_open_transaction(connect: Connect) -> None:
    with connect() as connection:
        connection.execute("SELECT")
        with pytest.raises(TransactionError, match="has a transaction open"):
            KEYS.answer_in_steps(connection, "k", two_steps(), fingerprint=FIRST)


def test_two_steps_of_one_name_are_refused(connect: Connect) -> None:
    def twice(request: Request[Connection[TupleRow]]) -> None:
        for _ in range(2):
            request.step("reserve", charge)

    with pytest.raises(ValueError, match="two steps 'reserve'"):
        KEYS.answer_in_steps(connect, "k", twice, fingerprint=FIRST)


def test_asynchronous_requests_are_answered_likewise(
    inbox_database: Database, consumer_login: str, admin: Connection[TupleRow]
) -> None:
    async def open_connection() -> AsyncConnection[TupleRow]:
        return await AsyncConnection.connect(inbox_database.dsn, user=consumer_login)

    async def charge_async(connection: AsyncConnection[TupleRow]) -> int:
        cursor = await connection.execute("INSERT INTO charge (step) VALUES ('only') RETURNING id")
        [(number,)] = await cursor.fetchall()
        return int(number)

    async def in_steps(request: AsyncRequest[AsyncConnection[TupleRow]]) -> list[int]:
        return [await request.step(name, charge_async) for name in ("reserve", "capture")]

    async def main() -> list[object]:
        async with await open_connection() as connection:
            plain = [await KEYS.answer_async(connection, "k", charge_async, fingerprint=FIRST) for _ in range(2)]
            await connection.commit()
            steps = [
                await KEYS.answer_in_steps_async(open_connection, "s", in_steps, fingerprint=FIRST) for _ in range(2)
            ]
            return [plain, steps, await KEYS.prune_async(connection)]

    assert asyncio.run(main()) == [[1, 1], [[2, 3], [2, 3]], 0]
    assert len(charges(admin)) == 3


def test_unfinished_transaction_leaves_no_key(connect: Connect, admin: Connection[TupleRow]) -> None:
    connection = connect()
    KEYS.answer(connection, "k", charge, fingerprint=FIRST)
    connection.close()
    eventually(
        lambda: admin.execute("SELECT count(*) FROM pg_stat_activity WHERE backend_xid IS NOT NULL").fetchone() == (0,)
    )
    assert (admin.execute("SELECT FROM idempotency_key").fetchall(), charges(admin)) == ([], [])
