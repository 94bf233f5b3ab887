"""Claim: lock shards that nobody else holds and take their oldest unpublished messages."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING

from outbox_relay.database import translated_errors
from outbox_relay.errors import AnswerTooLarge
from outbox_relay.relay.message import Message
from outbox_relay.sql import numbers, statement

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from psycopg import Connection, Cursor
    from psycopg.rows import TupleRow

SHARDS = 16
_SHRINKING = 16
_MESSAGE_FIELDS = len(Message._fields)


@dataclass(frozen=True, slots=True)
class ClaimOptions:
    """
    The most that one claim takes, and the server's time-outs for its transaction, in seconds.

    Attributes:
        schema: Where the outbox is.
        messages: Rows of a batch; its memory grows with it.
        stored_bytes: Bytes of a batch as stored, known before payloads are read; each shard may exceed its part by one
            message.
        readable_bytes: A message that takes more bytes, in the table or as text, comes without its contents. With 0,
            only one comes that cannot be written out.
        shards: Shards of a batch, so that the other lanes find work too.
        lock_timeout: Wait for a message that somebody else has locked.
        transaction_timeout: PostgreSQL ends a transaction that is idle for longer: the fence against a paused relay.
        synchronous_commit: True makes marks survive a crash of the server, at the price of a disk flush for each batch.
    """

    schema: str = "public"
    messages: int = 5000
    stored_bytes: int = 8 * 1024 * 1024
    readable_bytes: int = 8_000_000
    shards: int = SHARDS
    lock_timeout: float = 2.0
    statement_timeout: float = 30.0
    transaction_timeout: float = 30.0
    synchronous_commit: bool = False


@lru_cache
def begin_statement(options: ClaimOptions) -> bytes:
    """Give the statements that begin a lane's transaction and set what it needs."""
    return statement("begin_lane", schema=options.schema) % {
        b"lock_timeout_ms": round(options.lock_timeout * 1000),
        b"statement_timeout_ms": round(options.statement_timeout * 1000),
        b"transaction_timeout_ms": round(options.transaction_timeout * 1000),
        b"synchronous_commit": b"on" if options.synchronous_commit else b"off",
    }


@dataclass(slots=True)
class Floors:
    """
    What a lane remembers of each shard: everything at or below the floor is settled.

    A floor belongs to one generation of its shard; when an operator or another relay changes the shard's parked
    messages, the claim finds another generation and reads that shard from the start.
    """

    _floors: list[int] = field(default_factory=lambda: [0] * SHARDS)
    _generations: list[int] = field(default_factory=lambda: [0] * SHARDS)

    def parameters(self) -> dict[str, str]:
        """Give the parameters of `claim.sql` that describe the floors."""
        return {"floors": numbers(self._floors), "generations": numbers(self._generations)}

    def remember(self, shard: int, *, generation: int, settled_through: int) -> None:
        """Set the floor of *shard* in *generation*."""
        self._floors[shard] = settled_through
        self._generations[shard] = generation

    def forget(self) -> list[int]:
        """Read every shard from the start at the next claim, for a sweep; give the floors there were."""
        forgotten, self._floors = self._floors, [0] * SHARDS
        return forgotten

    def restore(self, floors: Sequence[int], *, shards: Iterable[int]) -> None:
        """Take back the former floors of *shards*."""
        for shard in shards:
            self._floors[shard] = floors[shard]


@dataclass(frozen=True, slots=True)
class Batch:
    """
    What one claim found.

    Attributes:
        messages: Claimed messages in sequence order. They stay locked until the transaction ends.
        generations: Generation of every shard, by number.
        drained: Shards in which nothing was left to claim.
        waiting: Shards that have messages which this claim did not take: another lane holds them.
        began_at: When the transaction began, in seconds since 1970 on the database's clock.
        is_cut: A message that takes far more bytes as text than in the table has ended the batch in its shard.
    """

    messages: list[Message]
    generations: list[int]
    drained: list[int]
    waiting: list[int]
    began_at: float = 0.0
    is_cut: bool = False

    @property
    def stored_bytes(self) -> int:
        """What the messages take, in the table or as text."""
        return sum(map(attrgetter("stored_bytes"), self.messages))

    def may_have_more(self, options: ClaimOptions) -> bool:
        """Tell whether a limit of *options* may have ended the claim in one of its shards."""
        return (
            self.is_cut
            or len(self.messages) * options.shards >= options.messages
            or self.stored_bytes * options.shards >= options.stored_bytes
        )


def next_limits(options: ClaimOptions, batch: Batch, *, most: ClaimOptions) -> ClaimOptions:
    """
    Ask for fewer messages after a batch that was ended by its bytes, and for up to *most* again afterwards.

    Messages beyond the bytes are locked and given back by every claim: with large payloads most of the work.
    """
    is_full = batch.stored_bytes * 2 >= options.stored_bytes and len(batch.messages) < options.messages
    wanted = max(2 * len(batch.messages), most.shards) if batch.is_cut or is_full else 2 * options.messages
    return replace(most, messages=min(wanted, most.messages))


def fewer(options: ClaimOptions, *, is_too_large: bool) -> ClaimOptions:
    """
    Ask for fewer messages after a turn that failed, in the end for one; `next_limits` asks for more again.

    If one is still too large to be answered with, ask for it without its contents. PostgreSQL makes no text of a
    gigabyte, and a hundred kilobytes of jsonb may have one: the claim that such a message is in fails. It has to be
    found, so that all others pass.
    """
    messages = options.messages // _SHRINKING
    if messages >= options.shards:
        return replace(options, messages=messages)
    is_alone = options.messages == options.shards == 1
    return replace(
        options, messages=1, shards=1, readable_bytes=0 if is_alone and is_too_large else options.readable_bytes
    )


def claim(
    connection: Connection,
    *,
    options: ClaimOptions,
    through: int,
    floors: Floors,
    held_types: Collection[str] = (),
) -> Batch:
    """
    Begin a transaction and take the oldest unpublished messages of shards that nobody else holds.

    *connection* is in autocommit mode: the claim begins the transaction, and settling ends it; until then the messages
    stay locked. An empty batch means "nothing to do now", not "nothing in the table"; its transaction is ended already.

    Args:
        through: The horizon; no message with a higher number is taken.
        held_types: Aggregate types to leave out.

    Raises:
        DatabaseUnavailable: The connection broke; nothing is claimed.
        DatabaseConflict: A row stayed locked for longer than the lock time-out; nothing is claimed.
        AnswerTooLarge: A text would be longer than PostgreSQL allows: ask for `fewer`.
    """
    parameters = claim_parameters(options, through=through, floors=floors, held_types=held_types)
    take = statement("claim", schema=options.schema)
    with translated_errors():
        # In one message and not in a pipeline, which the driver ends with a Flush: PostgreSQL counts no idle time after
        # that, and the transaction of a frozen relay would never be ended.
        began_at = _last_value(connection.execute(begin_statement(options)))
        batch = _batch(connection.execute(take, parameters, prepare=True).fetchall(), began_at=began_at)
        if None in map(attrgetter("headers"), batch.messages):
            batch = _cut(batch, readable_bytes=options.readable_bytes)
        if batch.messages and not options.readable_bytes:
            batch = _too_large(connection, batch, schema=options.schema)
        if not batch.messages:
            connection.commit()  # not a rollback, after which the driver prepares the claim anew
    return batch


def claim_parameters(
    options: ClaimOptions, *, through: int, floors: Floors, held_types: Collection[str] = ()
) -> dict[str, object]:
    """Give the parameters of `claim.sql`."""
    return floors.parameters() | {
        "through": through,
        "held_types": list(held_types),
        "max_shards": options.shards,
        "batch_size": options.messages,
        "batch_bytes": options.stored_bytes,
        "readable_bytes": options.readable_bytes,
    }


def _last_value(cursor: Cursor) -> float:
    """Give the only value of the last of several statements."""
    while cursor.nextset():
        pass
    [(value,)] = cursor.fetchall()
    return float(value)


def _batch(rows: Sequence[TupleRow], *, began_at: float) -> Batch:
    """Split the claim's rows into messages and what it says about the shards."""
    messages: list[Message] = []
    generations = [0] * SHARDS
    drained = []
    waiting = []
    for row in rows:
        shard, generation, is_drained = row[2], row[-2], row[-1]
        generations[shard] = generation
        if row[0] is not None:
            messages.append(Message._make(row[:_MESSAGE_FIELDS]))
        elif is_drained:
            drained.append(shard)
        else:
            waiting.append(shard)
    messages.sort(key=attrgetter("sequence_no"))
    return Batch(messages, generations, drained, waiting, began_at)


def _too_large(connection: Connection, batch: Batch, *, schema: str) -> Batch:
    """
    Give *batch* with the first message if PostgreSQL cannot write that out, and otherwise with none.

    The one that made the last claim fail may be another lane's by now, or parked. Then this one comes in its place, and
    would be parked for it.
    """
    try:
        with translated_errors(), connection.transaction():
            connection.execute(statement("claim_text", schema=schema), {"id": batch.messages[0].id})
    except AnswerTooLarge:
        return replace(batch, messages=batch.messages[:1], is_cut=True)
    return replace(batch, messages=[], is_cut=True)


def _cut(batch: Batch, *, readable_bytes: int) -> Batch:
    """Take from *batch* what comes in its shard from a message on that can be read, and was not."""
    first_nos: dict[int, int] = {}
    for message in batch.messages:
        if message.headers is None and message.stored_bytes <= readable_bytes:
            first_nos.setdefault(message.shard, message.sequence_no)
    kept = [each for each in batch.messages if each.sequence_no < first_nos.get(each.shard, each.sequence_no + 1)]
    return replace(batch, messages=kept, is_cut=bool(first_nos))
