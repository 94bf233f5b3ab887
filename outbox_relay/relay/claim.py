"""Claim: begin a transaction, lock shards that nobody else holds, and read up to where they are settled."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from outbox_relay.database import translated_errors
from outbox_relay.relay.marks import Marks
from outbox_relay.sql import numbers, statement

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from psycopg import Connection, Cursor

    from outbox_relay.relay.watch import Reached


@dataclass(frozen=True, slots=True)
class ClaimOptions:
    """
    Where the outbox is, and the server's time-outs for a lane's transaction, in seconds.

    Attributes:
        schema: Where the outbox is.
        lock_timeout: Wait for a table that somebody else has locked.
        statement_timeout: For one of the statements.
        transaction_timeout: PostgreSQL ends a transaction that is idle for longer: the fence against a frozen relay.
        synchronous_commit: True makes marks survive a crash of the server, at the price of a disk flush for each stint.
    """

    schema: str = "public"
    lock_timeout: float = 2.0
    statement_timeout: float = 30.0
    transaction_timeout: float = 30.0
    synchronous_commit: bool = False


class ShardWork(NamedTuple):
    """A shard that is held, or has work; the columns of `claim_shards.sql`."""

    shard: int
    first_no: int | None
    has_waiting: bool
    is_held: bool


@dataclass(frozen=True, slots=True)
class Claim:
    """
    What a transaction holds. The shards stay locked until it ends.

    Attributes:
        held: The shards that are locked now, with what was found in them. Empty: the transaction is ended already.
        missed: Shards with work that somebody else holds, or that are beyond the most.
        marks: Up to where each held shard is settled.
        have_pending: The held shards of which some message is in outbox_pending.
        began_at: When the transaction began, in seconds since 1970 on the database's clock.
        is_of_epoch: False means that the horizon is not of these numbers: the claim is worth nothing.
    """

    held: list[ShardWork]
    missed: list[ShardWork]
    marks: Marks
    have_pending: frozenset[int]
    began_at: float
    is_of_epoch: bool

    @property
    def has_waiting(self) -> bool:
        """Tell whether messages wait in outbox_pending that can be sent now."""
        return any(work.has_waiting for work in self.held)


@lru_cache
def begin_statement(options: ClaimOptions) -> bytes:
    """Return the statements that begin a lane's transaction and set what it needs."""
    return statement("begin_lane", schema=options.schema) % {
        b"lock_timeout_ms": round(options.lock_timeout * 1000),
        b"statement_timeout_ms": round(options.statement_timeout * 1000),
        b"transaction_timeout_ms": round(options.transaction_timeout * 1000),
        b"synchronous_commit": b"on" if options.synchronous_commit else b"off",
    }


def claim_shards(
    connection: Connection,
    *,
    options: ClaimOptions,
    reached: Reached,
    candidates: Collection[int],
    most: int,
    takes_all: bool,
    looks_for_waiting: bool,
    held_types: Collection[str] = (),
) -> Claim:
    """
    Begin a transaction and lock at most *most* of the *candidates*, shards that have work and that nobody else holds.

    *connection* is in autocommit mode: the claim begins the transaction, and recording the marks ends it.

    Args:
        reached: The horizon. A shard has work if it has messages above its mark up to this number.
        takes_all: Hold the candidates without work too, as soon as one has some.
        looks_for_waiting: Take messages that wait in outbox_pending for work, except those of *held_types*.

    Raises:
        DatabaseUnavailable: The connection broke; nothing is held.
        DatabaseConflict: A table stayed locked for longer than the lock time-out; nothing is held.
    """
    parameters = {
        "through": reached.through,
        "candidates": numbers(candidates),
        "most": most,
        "takes_all": takes_all,
        "looks_for_waiting": looks_for_waiting,
        "held_types": list(held_types),
    }
    with translated_errors():
        # In one message and not in a pipeline, which the driver ends with a Flush: PostgreSQL counts no idle time after
        # that, and the transaction of a frozen relay would never be ended.
        began_at = _last_value(connection.execute(begin_statement(options)))
        found = connection.execute(statement("claim_shards", schema=options.schema), parameters, prepare=True)
        shards = [ShardWork(*row) for row in found.fetchall()]
        claim = _read_marks(connection, shards, began_at=began_at, schema=options.schema, reached=reached)
        if not claim.held or not claim.is_of_epoch:
            connection.commit()  # not a rollback, after which the driver prepares the statements anew
    return claim


def _read_marks(
    connection: Connection, shards: Sequence[ShardWork], *, began_at: float, schema: str, reached: Reached
) -> Claim:
    """Read the marks of the shards that are held, in a snapshot later than their locks."""
    held = [work for work in shards if work.is_held]
    marks: dict[int, int] = {}
    pending = set()
    is_of_epoch = True
    if held:
        wanted = {"shards": numbers(work.shard for work in held)}
        rows = connection.execute(statement("claim_marks", schema=schema), wanted, prepare=True).fetchall()
        for shard, through, has_pending, last_no, *epoch in rows:
            marks[shard] = through
            if has_pending:
                pending.add(shard)
            is_of_epoch = is_of_epoch and last_no >= reached.through and tuple(epoch) == reached.epoch
    missed = [work for work in shards if not work.is_held]
    return Claim(held, missed, Marks(marks), frozenset(pending), began_at, is_of_epoch)


def _last_value(cursor: Cursor) -> float:
    """Return the only value of the last of several statements."""
    while cursor.nextset():
        pass
    [(value,)] = cursor.fetchall()
    return float(value)
