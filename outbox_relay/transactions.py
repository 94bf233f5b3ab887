"""Runs a function as one whole transaction, again where that is safe, and never guesses what a lost COMMIT did."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from inspect import isawaitable
from itertools import count
from typing import TYPE_CHECKING, Generic, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable
from uuid import uuid4

import psycopg
from psycopg import AsyncConnection, AsyncTransaction, Connection, IsolationLevel, Pipeline, Transaction, errors
from psycopg.pq import TransactionStatus

from outbox_relay.errors import CommitOutcomeUnknown, ConnectionReplaced, TransactionError
from outbox_relay.queries import own_cursor, sync, sync_async
from outbox_relay.sql import statement

if TYPE_CHECKING:
    from decimal import Decimal
    from typing import Any

    AnyConnection: TypeAlias = Connection[Any] | AsyncConnection[Any]
    Manager: TypeAlias = AbstractContextManager[object] | AbstractAsyncContextManager[object]

__all__ = ["Pool", "Repetition", "Retry", "Source", "transact", "transact_async"]

ROLLED_BACK_BY_OTHERS = {"40001", "40P01"}  # serialization failure, deadlock: the whole may be run again

T = TypeVar("T")
C = TypeVar("C", bound="AnyConnection")
SyncC = TypeVar("SyncC", bound="Connection[Any]")
AsyncC = TypeVar("AsyncC", bound="AsyncConnection[Any]")
G_co = TypeVar("G_co", covariant=True)
P_contra = TypeVar("P_contra", contravariant=True)

Step: TypeAlias = Callable[[], object]
"""One thing to do that may block: `run_steps` calls it, `run_steps_async` awaits what the call gives."""

Steps: TypeAlias = Generator[Step, "Any", T]
"""Work written once for both kinds of connection: it yields steps, is sent what each gives, and returns its result."""


@runtime_checkable
class Pool(Protocol[G_co, P_contra]):
    """What is needed of a `psycopg_pool.ConnectionPool`, or of its asynchronous and unpooled relatives."""

    def getconn(self) -> G_co: ...  # noqa: D102 -- psycopg_pool's
    def putconn(self, conn: P_contra, /) -> object: ...  # noqa: D102 -- psycopg_pool's


Source: TypeAlias = SyncC | Pool[SyncC, SyncC] | Callable[[], SyncC]
AsyncSource: TypeAlias = AsyncC | Pool[Awaitable[AsyncC], AsyncC] | Callable[[], Awaitable[AsyncC]]
AnySource: TypeAlias = C | Pool[C | Awaitable[C], C] | Callable[[], C | Awaitable[C]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """
    How often, how soon and for how long to try.

    Attributes:
        attempts: Runs of the whole transaction, the first included. 1: never again.
        base_seconds: The longest pause after the first failure. It doubles with each further one; every pause is
            a random part of it, so that transactions that collided do not collide again.
        cap_seconds: The longest pause of all.
        outcome_seconds: How long to go on asking what became of a lost COMMIT, before it is reported as unknown.
            Making one connection may take longer, if the source does not limit it.
    """

    attempts: int = 5
    base_seconds: float = 0.02
    cap_seconds: float = 1.0
    outcome_seconds: float = 10.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts is {self.attempts}: the first run is one of them, so give at least 1")

    def pause_seconds(self, failures: int, *, fraction: float) -> float:
        """Seconds to wait after so many *failures* in a row, *fraction* (0 to 1) of the longest allowed."""
        longest = self.base_seconds * 2.0 ** min(failures - 1, 64)
        return fraction * min(self.cap_seconds, longest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Repetition:
    """A transaction that was rolled back is about to be run again, for telemetry."""

    failures: int
    error: psycopg.Error
    pause_seconds: float


DEFAULT_RETRY = Retry()

OnRetry: TypeAlias = Callable[[Repetition], object]


def transact(
    source: Source[SyncC],
    work: Callable[[SyncC], T],
    *,
    isolation_level: IsolationLevel | None = None,
    retry: Retry = DEFAULT_RETRY,
    on_retry: OnRetry | None = None,
    sleep: Callable[[float], object] = time.sleep,
    fraction: Callable[[], float] = random.random,
) -> T:
    """
    Give the result of *work*, which ran as one whole transaction on one connection and is committed.

    *work* gets the connection, and is called once more from the start, on a new transaction, when the server rolled
    it back for the sake of another (SQLSTATE 40001, 40P01), or when the connection was lost and it is certain that
    nothing was committed. So it must have no effects but those in the transaction, and must let psycopg's errors pass.

    A connection lost at COMMIT is looked into: on another connection from *source* the server says whether the
    transaction is committed, and then the result is returned.

    On a connection that has a transaction open, *work* runs in a savepoint of it. Nothing is then committed or
    repeated here: that is for the owner of the transaction, so let its errors pass.

    Args:
        source: A pool (`psycopg_pool`), or a function that opens a connection (it is closed here): both can replace
            a lost one. Or a connection, which cannot be replaced. How long to wait for a connection is the source's
            affair, and its errors pass through.
        isolation_level: None leaves it to the connection and the server. In a savepoint it must be that of the
            transaction.
        on_retry: Called before each repetition.
        sleep: Waits so many seconds.
        fraction: Gives random numbers from 0 to 1.

    Raises:
        CommitOutcomeUnknown: The connection broke at COMMIT, and the server could not say what became of it. Do not
            repeat the work before you know; the message says how to ask.
        ConnectionReplaced: Not everything ran in the one transaction. What was open is rolled back, and the connection
            closed; what ran outside the transaction may be committed.
        TransactionError: *work* caught the error of a statement and went on; it is rolled back.
        psycopg.Error: The last attempt failed, or a failure that repetition does not mend; it is rolled back.
    """
    steps = whole(
        source,
        lambda connection: perform(lambda: work(connection)),
        isolation_level=isolation_level,
        retry=retry,
        on_retry=on_retry,
        sleep=sleep,
        fraction=fraction,
    )
    return run_steps(steps)


async def transact_async(
    source: AsyncSource[AsyncC],
    work: Callable[[AsyncC], Awaitable[T]],
    *,
    isolation_level: IsolationLevel | None = None,
    retry: Retry = DEFAULT_RETRY,
    on_retry: OnRetry | None = None,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    fraction: Callable[[], float] = random.random,
) -> T:
    """
    Do what `transact` does, with asynchronous connections.

    A task that is cancelled while its COMMIT is on the way does not learn what became of it.
    """
    steps: Steps[T] = whole(
        source,
        lambda connection: perform(lambda: work(connection)),
        isolation_level=isolation_level,
        retry=retry,
        on_retry=on_retry,
        sleep=sleep,
        fraction=fraction,
    )
    return await run_steps_async(steps)


def run_steps(steps: Steps[T]) -> T:
    """Give the result of *steps*; each is called, and its errors go where it was yielded."""
    try:
        step = next(steps)
        while True:
            try:
                given = step()
            except BaseException as error:  # noqa: BLE001 -- passed on, for the steps to roll back
                step = steps.throw(error)
            else:
                step = steps.send(given)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]  # a generator's value is untyped here


async def run_steps_async(steps: Steps[T]) -> T:
    """Do what `run_steps` does, and await what a step gives if it can be awaited."""
    try:
        step = next(steps)
        while True:
            try:
                given = step()
                if isawaitable(given):
                    given = await given
            except BaseException as error:  # noqa: BLE001 -- passed on, for the steps to roll back
                step = steps.throw(error)
            else:
                step = steps.send(given)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]  # a generator's value is untyped here


def perform(step: Callable[[], T | Awaitable[T]]) -> Steps[T]:
    """Make one step into steps."""
    given: T = yield step
    return given


def whole(
    source: AnySource[C],
    work: Callable[[C], Steps[T]],
    *,
    isolation_level: IsolationLevel | None = None,
    retry: Retry = DEFAULT_RETRY,
    on_retry: OnRetry | None = None,
    sleep: Callable[[float], object],
    fraction: Callable[[], float] = random.random,
) -> Steps[T]:
    """Do what `transact` does, as steps, with a *work* that gives steps."""
    if isinstance(source, Connection | AsyncConnection) and is_in_transaction(source):
        return (yield from _nested(source, work, isolation_level=isolation_level))
    failures = 0
    while True:
        try:
            return (yield from _attempt(source, work, isolation_level=isolation_level, retry=retry, sleep=sleep))
        except _NothingCommitted as rolled_back:
            error = rolled_back.error
        failures += 1
        if failures == retry.attempts:
            raise error
        pause_seconds = retry.pause_seconds(failures, fraction=fraction())
        if on_retry:
            on_retry(Repetition(failures=failures, error=error, pause_seconds=pause_seconds))
        yield partial(sleep, pause_seconds)


def is_in_transaction(connection: AnyConnection) -> bool:
    """Whether a transaction is open on *connection*, one that an error has ended included."""
    return connection.info.transaction_status in (TransactionStatus.INTRANS, TransactionStatus.INERROR)


def is_idle(connection: AnyConnection) -> bool:
    """Whether nothing at all is open or on its way on *connection*, or it is closed."""
    return connection.info.transaction_status in (TransactionStatus.IDLE, TransactionStatus.UNKNOWN)


class _NothingCommitted(Exception):
    """An attempt ended without effect, and may be repeated."""

    def __init__(self, error: psycopg.Error) -> None:
        super().__init__(error)
        self.error = error


@dataclass(frozen=True, slots=True)
class Server:
    """What tells one history of transactions from another; the timeline is None on a standby."""

    system_identifier: int
    timeline: str | None
    statistics_began: Decimal


@dataclass(frozen=True, slots=True)
class _LostCommit(Generic[T]):
    """COMMIT got no reply; without an xid there was nothing to commit."""

    xid: str | None
    server: Server
    result: T
    error: psycopg.Error


Outcome: TypeAlias = Literal["committed", "aborted", "undecided", "unknown"]


def outcome_of(status: str | None, *, asked: Server, committed_on: Server) -> Outcome:
    """
    What became of a transaction of server *committed_on* of which server *asked* says *status*.

    A server that crashed may have lost the transaction before it reached the disk, and have given its xid to another
    one since. So "committed" counts only where no crash came between; "aborted" is true of whichever it is.
    """
    if (asked.system_identifier, asked.timeline) != (committed_on.system_identifier, committed_on.timeline):
        return "unknown"
    match status:
        case "committed" if asked.statistics_began == committed_on.statistics_began:
            return "committed"
        case "aborted":
            return "aborted"
        case "in progress":
            return "undecided"
        case _:
            return "unknown"


def _nested(connection: C, work: Callable[[C], Steps[T]], *, isolation_level: IsolationLevel | None) -> Steps[T]:
    def inner() -> Steps[T]:
        yield from _set_isolation_level(connection, isolation_level)
        return (yield from work(connection))

    return (yield from within(connection.transaction(), inner()))


def _attempt(
    source: AnySource[C],
    work: Callable[[C], Steps[T]],
    *,
    isolation_level: IsolationLevel | None,
    retry: Retry,
    sleep: Callable[[float], object],
) -> Steps[T]:
    connection: C = yield _opening(source)
    if not isinstance(connection, Connection | AsyncConnection):
        raise TypeError(_misfit(connection))
    try:
        ended = yield from _once(connection, work, isolation_level=isolation_level)
    except psycopg.Error as error:
        if error.sqlstate in ROLLED_BACK_BY_OTHERS or (connection.closed and _can_reopen(source)):
            raise _NothingCommitted(error) from error
        raise
    finally:
        _close_unless_whole(connection)
        yield lambda: _close(source, connection)
    if not isinstance(ended, _LostCommit):
        return ended
    yield from _settle(source, ended, retry=retry, sleep=sleep)
    return ended.result


def _once(
    connection: C, work: Callable[[C], Steps[T]], *, isolation_level: IsolationLevel | None
) -> Steps[T | _LostCommit[T]]:
    """
    Run *work* between BEGIN and COMMIT, on psycopg's own transaction, which refuses a `commit()` inside *work*.

    Whatever is raised here was rolled back, or the connection was lost before COMMIT was sent.
    """
    transaction = _transaction(connection)
    mark = yield from _begin(connection, transaction, isolation_level=isolation_level)
    try:
        result = yield from work(connection)
        xid, server = yield from _verify(connection, mark)
    except BaseException as error:
        yield _leave(transaction, error)
        yield from _drained(connection)
        raise
    # On a connection that is closed by now psycopg skips COMMIT without a word.
    lost: psycopg.Error = psycopg.OperationalError("the connection was closed before COMMIT")
    try:
        yield _leave(transaction)
        yield from _synced(connection)
    except psycopg.Error as error:
        if not connection.closed:
            yield from _drained(connection)
            raise  # the server's answer to COMMIT was no
        lost = error
    return _LostCommit(xid, server, result, lost) if connection.closed else result


def _synced(connection: AnyConnection) -> Steps[None]:
    """In a caller's pipeline, wait for the answer to COMMIT or ROLLBACK, which psycopg only puts into the queue."""
    if not connection.closed:
        yield lambda: sync(connection) if isinstance(connection, Connection) else sync_async(connection)


def _drained(connection: AnyConnection) -> Steps[None]:
    """In a caller's pipeline that failed, take what is still on its way: an error may stand before the last answer."""
    for _ in range(2):
        with suppress(psycopg.Error):
            yield from _synced(connection)


def _transaction(connection: AnyConnection) -> Manager:
    """Give what `connection.transaction()` gives, except that one entered in a pipeline would keep it to its end."""
    return Transaction(connection) if isinstance(connection, Connection) else AsyncTransaction(connection)


def _begin(
    connection: AnyConnection, transaction: Manager, *, isolation_level: IsolationLevel | None
) -> Steps[tuple[str, int]]:
    """
    Begin, and leave a mark, in one round trip where libpq can; give the mark and the server process.

    If it fails or is cancelled in mid-pipeline, nobody knows how much of it was begun: the connection is closed then.
    """
    cursor = own_cursor(connection)
    mark = {"mark": uuid4().hex}

    def begin() -> Steps[None]:
        yield _enter(transaction)
        yield from _set_isolation_level(connection, isolation_level)
        yield lambda: cursor.execute(statement("transaction_begin", schema=None), mark)

    try:
        yield from within(connection.pipeline() if Pipeline.is_supported() else nullcontext(), begin())
        written: tuple[str, int] = yield cursor.fetchone
    except BaseException:
        connection.pgconn.finish()
        raise
    return written


def _set_isolation_level(connection: AnyConnection, isolation_level: IsolationLevel | None) -> Steps[None]:
    if isolation_level is not None:
        level = isolation_level.name.replace("_", " ")
        yield lambda: own_cursor(connection).execute(f"SET TRANSACTION ISOLATION LEVEL {level}".encode())


def _verify(connection: AnyConnection, mark: tuple[str, int]) -> Steps[tuple[str | None, Server]]:
    if connection.info.transaction_status is TransactionStatus.INERROR:
        raise TransactionError(
            "a statement failed, its error was caught, and the transaction is rolled back with all that came before: "
            "let the error pass, or put what may fail into `with connection.transaction():`"
        )
    cursor = own_cursor(connection)
    yield lambda: cursor.execute(statement("transaction_verify", schema=None))
    found, process_id, xid, *server = yield cursor.fetchone
    if (found, process_id) != mark:
        yield connection.close  # ends what is open on it: psycopg's transaction knows only the session it began on
        raise ConnectionReplaced(
            f"the transaction began on server process {mark[1]}, and its last statement ran outside it, on process "
            f"{process_id}: nothing may reconnect, commit or change the server connection underneath. The "
            "connection is closed and what was open is rolled back, but what ran outside may be committed"
        )
    return xid, Server(*server)


def _settle(
    source: AnySource[C], lost: _LostCommit[T], *, retry: Retry, sleep: Callable[[float], object]
) -> Steps[None]:
    """Return if *lost* is committed, else raise what it is."""
    outcome: Outcome = "aborted"
    if lost.xid is not None:
        outcome = yield from _ask_until_known(source, lost.xid, lost.server, retry=retry, sleep=sleep)
    if outcome == "aborted":
        raise _NothingCommitted(lost.error) if _can_reopen(source) else lost.error
    if outcome != "committed":  # still undecided, or never to be known
        raise CommitOutcomeUnknown(
            f"the connection broke at COMMIT of transaction {lost.xid}, and the server it was on could not be asked "
            "whether it is committed: do not repeat it before you know. If no failover and no crash came between, that "
            f"server still says so: SELECT pg_xact_status('{lost.xid}')"
        ) from lost.error


def _ask_until_known(
    source: AnySource[C], xid: str, server: Server, *, retry: Retry, sleep: Callable[[float], object]
) -> Steps[Outcome]:
    if not _can_reopen(source):
        return "unknown"
    deadline = time.monotonic() + retry.outcome_seconds
    for asked in count(1):
        outcome: Outcome = yield from _ask(source, xid, server)
        if outcome != "undecided" or time.monotonic() > deadline:
            break
        yield partial(sleep, retry.pause_seconds(asked, fraction=1.0))
    return outcome


def _ask(source: AnySource[C], xid: str, server: Server) -> Steps[Outcome]:
    """Ask once, on a connection of its own; whatever fails on the way leaves it undecided."""
    try:
        connection: C = yield _opening(source)
    except Exception:  # noqa: BLE001 -- the source is the caller's, and the doubt must not be hidden by its errors
        return "undecided"
    parameters = {"xid": xid}
    try:
        cursor = own_cursor(connection)
        yield lambda: cursor.execute(statement("transaction_outcome", schema=None), parameters)
        status, *asked = yield cursor.fetchone
        outcome = outcome_of(status, asked=Server(*asked), committed_on=server)
        if outcome == "undecided":
            yield lambda: cursor.execute(statement("transaction_abandon", schema=None), parameters)
        yield connection.rollback
    except errors.InvalidParameterValue:  # the xid is in the future: after a restore, a failover or a crash
        return "unknown"
    except psycopg.Error:
        return "undecided"
    finally:
        yield lambda: _close(source, connection)
    return outcome


def _can_reopen(source: AnySource[C]) -> bool:
    return not isinstance(source, Connection | AsyncConnection)


def _opening(source: AnySource[C]) -> Step:
    if isinstance(source, Connection | AsyncConnection):
        return lambda: source
    if isinstance(source, Pool):
        return source.getconn
    if callable(source):
        return source
    raise TypeError(_misfit(source))


def _misfit(given: object) -> str:
    """Say what to give instead of *given*, and let go of what nobody will await."""
    if isinstance(given, Coroutine):
        given.close()
    if isawaitable(given):
        return "got an asynchronous source of connections: call the function whose name ends in _async, and await it"
    return (
        f"got a {type(given).__module__}.{type(given).__qualname__}, not psycopg's connection: give a psycopg "
        "connection, a psycopg_pool pool, or a function that opens a psycopg connection"
    )


def _close(source: AnySource[C], connection: C) -> object:
    if isinstance(source, Connection | AsyncConnection):
        return None
    if isinstance(source, Pool):
        given = source.putconn(connection)
        return _carried_out(given) if isawaitable(given) else given
    return connection.close()


def _close_unless_whole(connection: AnyConnection) -> None:
    """Close a connection that was interrupted in a way that leaves a transaction open; this never waits."""
    if not is_idle(connection):
        connection.pgconn.finish()


async def _carried_out(work: Awaitable[object]) -> None:
    """Wait until *work* is done, which is soon, even if cancelled: a pool would miss the connection for ever."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled:
        raise cancelled
    task.result()


def within(manager: Manager, steps: Steps[T]) -> Steps[T]:
    """Do *steps* within *manager*, as a `with` statement would."""
    yield _enter(manager)
    try:
        result = yield from steps
    except BaseException as error:
        yield _leave(manager, error)
        raise
    yield _leave(manager)
    return result


def _enter(manager: Manager) -> Step:
    return manager.__enter__ if isinstance(manager, AbstractContextManager) else manager.__aenter__


def _leave(manager: Manager, error: BaseException | None = None) -> Step:
    leave = manager.__exit__ if isinstance(manager, AbstractContextManager) else manager.__aexit__
    if error is None:
        return partial(leave, None, None, None)
    return partial(leave, type(error), error, error.__traceback__)
