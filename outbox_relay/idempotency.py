"""Answers a request that arrives more than once as it was answered the first time, and has its effects once."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Generic, TypeVar

import psycopg
from psycopg import AsyncConnection, AsyncCursor, Connection, errors

from outbox_relay.errors import OutboxRelayError, RequestInFlight, RequestMismatch, TransactionError
from outbox_relay.queries import Queries, Query, execute, execute_async, savepoint, savepoint_async
from outbox_relay.sql import statement
from outbox_relay.transactions import is_idle, perform, run_steps, run_steps_async, whole, within

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Any

    from outbox_relay.queries import AsyncSession, Session
    from outbox_relay.transactions import AnyConnection, AnySource, AsyncSource, Source, Step, Steps

__all__ = ["AsyncRequest", "IdempotencyKeys", "Request", "fingerprint_of"]

LONGEST_NAME_CHARACTERS = 255

T = TypeVar("T")
C = TypeVar("C", bound="AnyConnection")
SyncC = TypeVar("SyncC", bound="Connection[Any]")
AsyncC = TypeVar("AsyncC", bound="AsyncConnection[Any]")
SyncS = TypeVar("SyncS", bound="Session")
AsyncS = TypeVar("AsyncS", bound="AsyncSession")


def fingerprint_of(method: str, path: str, body: object = None) -> str:
    """
    Give a hash of a request, the same in every process and version: 64 hexadecimal digits of SHA-256.

    *body* is what its JSON was parsed to, and then neither the order of its keys nor white space matters, but 1 and
    1.0 differ; or the bytes as they came, and then every byte matters. *method* may be in either case; *path* is taken
    as it is, so give it with the query string if that is part of the request.
    """
    content: object
    if isinstance(body, bytes):
        kind, content = "bytes", hashlib.sha256(body).hexdigest()
    else:
        kind, content = "json", body
    canonical = json.dumps(
        [method.upper(), path, kind, content], sort_keys=True, separators=(",", ":"), allow_nan=False
    )
    return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class IdempotencyKeys:
    """
    The idempotency keys of one scope: a kind of request, and the client that chooses the keys, if clients do.

    `answer` is for a request whose effects are all in one transaction; `answer_in_steps` for one that also calls
    others, a payment provider say, between several transactions.

    A key is text of 1 to 255 characters. Responses and results of steps are whatever JSON can hold, and every caller
    gets them as JSON gives them back: tuples as lists, the keys of dictionaries as text. They are kept in the table as
    plain text. All times are the database's.

    Attributes:
        scope: 1 to 255 characters. The same key in another scope is another key.
        schema: Where the table is; None leaves it to the search_path.
        wait_seconds: How long a request waits for a twin that is being answered in one transaction.
        takeover_after_seconds: How long a request of several steps may take from one step to the next. When it takes
            longer, it counts as crashed: the next request with its key goes on in its place.
        expires_after_seconds: How long a key is remembered, from when it was taken. Then it may be used again, for any
            request, so let it be longer than clients repeat requests.

    Raises:
        ValueError: A name is empty, too long or has a NUL character, or keys expire before they are taken over.
    """

    scope: str
    schema: str | None = None
    wait_seconds: float = 5.0
    takeover_after_seconds: float = 60.0
    expires_after_seconds: float = 86400.0

    def __post_init__(self) -> None:
        _check_name("scope", self.scope)
        if self.expires_after_seconds < self.takeover_after_seconds:
            raise ValueError(
                f"keys would expire after {self.expires_after_seconds:g} s, before their requests are taken over after "
                f"{self.takeover_after_seconds:g} s: let expires_after_seconds be the larger one"
            )

    def answer(self, session: SyncS, key: str, work: Callable[[SyncS], T], *, fingerprint: str) -> T:
        """
        Give the response that *work* gives for the first request with *key*, to that one and to all that follow.

        Everything happens in the transaction that is open on *session*: once it is committed the effects and the
        response are there, and after a crash or an error neither is, even if the error is caught and the transaction
        goes on: all of it is in a savepoint. A request that comes while the first one is at
        work waits for it. Raise the isolation level only together with `transact`, for it then may have to be
        repeated as a whole.

        Args:
            session: A connection, or a cursor, inside a transaction; *work* gets it.
            fingerprint: What tells this request from others; see `fingerprint_of`.

        Raises:
            RequestMismatch: The key was used for a request with another fingerprint.
            RequestInFlight: The first request was still at work after `wait_seconds`.
            NoTransaction: The session is in autocommit mode and no transaction is open.
            TypeError, ValueError: The key is not usable, or the response is not JSON.
        """
        steps = self._answer(session, key, lambda: work(session), fingerprint=fingerprint)
        return run_steps(within(savepoint(session), steps))

    async def answer_async(
        self, session: AsyncS, key: str, work: Callable[[AsyncS], Awaitable[T]], *, fingerprint: str
    ) -> T:
        """Do what `answer` does, with an asynchronous session."""
        steps: Steps[T] = self._answer(session, key, lambda: work(session), fingerprint=fingerprint)
        return await run_steps_async(within(savepoint_async(session), steps))

    def answer_in_steps(
        self, source: Source[SyncC], key: str, work: Callable[[Request[SyncC]], T], *, fingerprint: str
    ) -> T:
        """
        Give the response that *work* gives for the first request with *key*, to that one and to all that follow.

        *work* does what belongs into the database in `Request.step`, each a transaction of its own (see `transact`),
        and calls others between the steps. When it crashes, the next request with the key goes on after the last step
        that was committed: *work* is called from the start, and the steps that are done give their results again.

        So whatever stands between two steps may happen again, and has to bear it: give it an idempotency key as well.
        When *work* raises, the request may be taken over at once.

        Args:
            source: Where connections come from, as in `transact`.
            fingerprint: What tells this request from others; see `fingerprint_of`.

        Raises:
            RequestMismatch: The key was used for a request with another fingerprint.
            RequestInFlight: Another one is at work on the request, or has taken it over from this one.
            TransactionError: *source* is a connection that has a transaction open.
            TypeError, ValueError: The key is not usable, or the response is not JSON.
        """
        steps = self._answer_in_steps(
            source, key, lambda claim: work(Request(source, claim)), fingerprint=fingerprint, sleep=time.sleep
        )
        return run_steps(steps)

    async def answer_in_steps_async(
        self,
        source: AsyncSource[AsyncC],
        key: str,
        work: Callable[[AsyncRequest[AsyncC]], Awaitable[T]],
        *,
        fingerprint: str,
    ) -> T:
        """
        Do what `answer_in_steps` does, with asynchronous connections.

        A task that is cancelled leaves its request as a crash does.
        """
        steps: Steps[T] = self._answer_in_steps(
            source,
            key,
            lambda claim: work(AsyncRequest(source, claim)),
            fingerprint=fingerprint,
            sleep=asyncio.sleep,
        )
        return await run_steps_async(steps)

    def prune(self, session: Session, *, limit: int = 1000) -> int:
        """Remove at most *limit* expired keys of this scope, and say how many; repeat it while that is *limit*."""
        return execute(session, self._prune(limit))

    async def prune_async(self, session: AsyncSession, *, limit: int = 1000) -> int:
        """Do what `prune` does, with an asynchronous session."""
        return await execute_async(session, self._prune(limit))

    def _answer(
        self,
        session: Session | AsyncSession,
        key: str,
        work: Callable[[], T | Awaitable[T]],
        *,
        fingerprint: str,
    ) -> Steps[T]:
        taken = yield from self._take(session, key, fingerprint=fingerprint)
        if isinstance(taken, _Claim):
            response = _to_json((yield work))
            yield from _executed(session, taken.write("finish", response=response))
        else:
            response = taken
        answer: T = json.loads(response)
        return answer

    def _answer_in_steps(
        self,
        source: AnySource[C],
        key: str,
        work: Callable[[_Claim], T | Awaitable[T]],
        *,
        fingerprint: str,
        sleep: Callable[[float], object],
    ) -> Steps[T]:
        _require_own_transaction(source)
        taken = yield from whole(
            source, lambda connection: self._take(connection, key, fingerprint=fingerprint), sleep=sleep
        )
        if isinstance(taken, _Claim):
            response = yield from _finished(source, taken, work, sleep=sleep)
        else:
            response = taken
        answer: T = json.loads(response)
        return answer

    def _take(self, session: Session | AsyncSession, key: str, *, fingerprint: str) -> Steps[_Claim | str]:
        """Give the claim on *key*, or the response that is stored under it."""
        _check_name("key", key)
        try:
            return (yield from _executed(session, self._take_or_read(key, fingerprint=fingerprint)))
        except errors.LockNotAvailable as error:
            raise RequestInFlight(
                f"the first request with key {key!r} was still at work after {self.wait_seconds:g} s: "
                "send the same request again later"
            ) from error

    def _take_or_read(self, key: str, *, fingerprint: str) -> Queries[_Claim | str]:
        names = {"scope": self.scope, "key": key}
        take = Query(
            statement("idempotency_take", schema=self.schema),
            names
            | {
                "fingerprint": fingerprint,
                "wait": f"{max(1, round(self.wait_seconds * 1000))}ms",  # 0 would be without end
                "takeover_after": timedelta(seconds=self.takeover_after_seconds),
                "expires_after": timedelta(seconds=self.expires_after_seconds),
            },
        )
        read = Query(statement("idempotency_read", schema=self.schema), names)
        while True:
            [(fencing_token, step_results, _)] = yield take
            if fencing_token is not None:
                return _Claim(self, key, fencing_token, json.loads(step_results))
            for known, response, locked_seconds in (yield read):  # none: pruned since
                return _stored_response(
                    key, fingerprint, fingerprint=known, response=response, locked_seconds=locked_seconds
                )

    def _prune(self, limit: int) -> Queries[int]:
        parameters = {"scope": self.scope, "limit": limit}
        [(pruned,)] = yield Query(statement("idempotency_prune", schema=self.schema), parameters)
        return int(pruned)


@dataclass(frozen=True, slots=True)
class _Claim:
    """The right to answer the request with this key, until another one takes it over."""

    keys: IdempotencyKeys
    key: str
    fencing_token: int
    step_results: dict[str, object]  # grows with each step
    open_steps: set[str] = field(default_factory=set)

    def write(self, name: str, **values: object) -> Queries[None]:
        """
        Execute the statement idempotency_<name>.

        Raises:
            RequestInFlight: The request was taken over, or its key has expired.
        """
        parameters = {"scope": self.keys.scope, "key": self.key, "fencing_token": self.fencing_token, **values}
        if not (yield Query(statement(f"idempotency_{name}", schema=self.keys.schema), parameters)):
            raise RequestInFlight(
                f"the request with key {self.key!r} made no step for {self.keys.takeover_after_seconds:g} s and was "
                "taken over: nothing more is written for it here; send the same request again for its response"
            )


class _AnyRequest(Generic[C]):
    """What the two kinds of request have in common."""

    def __init__(self, source: AnySource[C], claim: _Claim) -> None:
        self._source = source
        self._claim = claim
        self._names: set[str] = set()

    def _step(self, name: str, work: Callable[[C], T | Awaitable[T]], *, sleep: Callable[[float], object]) -> Steps[T]:
        _check_name("step", name)
        if name in self._names:
            raise ValueError(f"there are two steps {name!r} in this request: the second would not be carried out")
        self._names.add(name)
        results = self._claim.step_results
        if name not in results:
            _require_own_transaction(self._source, self._claim)
            self._claim.open_steps.add(name)
            try:
                results[name] = yield from whole(
                    self._source,
                    lambda connection: self._advanced(connection, name, lambda: work(connection)),
                    sleep=sleep,
                )
            finally:
                self._claim.open_steps.discard(name)
        result: T = results[name]  # type: ignore[assignment]  # of an earlier call with the same name
        return result

    def _advanced(self, connection: C, name: str, work: Step) -> Steps[object]:
        result: object = json.loads(_to_json((yield work)))
        written = self._claim.write(
            "advance",
            recovery_point=name,
            result=_to_json(result),
            takeover_after=timedelta(seconds=self._claim.keys.takeover_after_seconds),
        )
        yield from _executed(connection, written)
        return result


class Request(_AnyRequest[SyncC]):
    """A request that is answered in several steps; see `IdempotencyKeys.answer_in_steps`."""

    def step(self, name: str, work: Callable[[SyncC], T]) -> T:
        """
        Give the result of *work*, which is carried out once: in a transaction of its own, together with its result.

        When it was carried out before, by a request that crashed later on, its result of then is given again.

        Args:
            name: Names the step within the request, in every version of the program that may take the request over.
            work: Gets a connection inside a transaction; it may be repeated as a whole, see `transact`.

        Raises:
            RequestInFlight: Another one has taken the request over; this step is rolled back.
            TransactionError: The source is a connection, and another step is at work on it.
            TypeError, ValueError: The result is not JSON, or the name is taken.
        """
        return run_steps(self._step(name, work, sleep=time.sleep))


class AsyncRequest(_AnyRequest[AsyncC]):
    """A request that is answered in several steps, with asynchronous connections."""

    async def step(self, name: str, work: Callable[[AsyncC], Awaitable[T]]) -> T:
        """Do what `Request.step` does."""
        steps: Steps[T] = self._step(name, work, sleep=asyncio.sleep)
        return await run_steps_async(steps)


def _finished(
    source: AnySource[C],
    claim: _Claim,
    work: Callable[[_Claim], object],
    *,
    sleep: Callable[[float], object],
) -> Steps[str]:
    """Answer the request, or leave it for the next one to take over at once."""

    def write(name: str, **values: object) -> Steps[None]:
        _require_own_transaction(source, claim)
        return whole(source, lambda connection: _executed(connection, claim.write(name, **values)), sleep=sleep)

    try:
        response = _to_json((yield lambda: work(claim)))
        yield from write("finish", response=response)
    except Exception:
        with suppress(psycopg.Error, OutboxRelayError):  # it is taken over in time all the same
            yield from write("release")
        raise
    return response


def _require_own_transaction(source: AnySource[C], claim: _Claim | None = None) -> None:
    """
    Return when the next transaction on *source* is committed by itself.

    Raises:
        TransactionError: It would be part of another one, perhaps that of a step that runs at the same time.
    """
    if isinstance(source, Connection | AsyncConnection) and (not is_idle(source) or (claim and claim.open_steps)):
        raise TransactionError(
            "the connection has a transaction open, so a step would not be committed when it ends: end that first, "
            "and for steps that run at the same time give a pool, or a function that opens connections"
        )


def _stored_response(key: str, wanted: str, *, fingerprint: str, response: str | None, locked_seconds: float) -> str:
    if fingerprint != wanted:
        raise RequestMismatch(f"key {key!r} was used before, for another request: choose a new key for a new request")
    if response is None:
        raise RequestInFlight(
            f"the first request with key {key!r} is still at work, or crashed: send the same request again, "
            f"at the latest in {max(locked_seconds, 0.0):.1f} s"
        )
    return response


def _executed(session: Session | AsyncSession, queries: Queries[T]) -> Steps[T]:
    if isinstance(session, AsyncConnection | AsyncCursor):
        return perform(lambda: execute_async(session, queries))
    return perform(lambda: execute(session, queries))


def _to_json(value: object) -> str:
    return json.dumps(value, allow_nan=False)


def _check_name(what: str, name: str) -> None:
    if not name or len(name) > LONGEST_NAME_CHARACTERS:
        raise ValueError(f"the {what} has {len(name)} characters: give 1 to {LONGEST_NAME_CHARACTERS}")
    if "\0" in name:
        raise ValueError(f"the {what} {name!r} has a NUL character, which PostgreSQL cannot store")
