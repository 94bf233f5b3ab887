"""Read: the next messages of the shards that a lane holds, bounded by their number and by their bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING

from outbox_relay.database import translated_errors
from outbox_relay.errors import AnswerTooLarge
from outbox_relay.relay.message import Message
from outbox_relay.relay.shards import SHARDS
from outbox_relay.sql import numbers, statement

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from typing import Any

    from psycopg import Connection

    from outbox_relay.relay.claim import Claim

_SHRINKING = 16
_SEQUENCE_NO = attrgetter("sequence_no")
_STORED_BYTES = attrgetter("stored_bytes")
_HEADERS = attrgetter("headers")


@dataclass(frozen=True, slots=True)
class Limits:
    """
    The most that one read returns.

    Attributes:
        messages: Messages of a batch; its memory grows with it.
        stored_bytes: Bytes of a batch as stored, known before payloads are read; each shard may exceed its part by one
            message.
        readable_bytes: A message that takes more bytes, in the table or as text, comes without its contents. 0
            withholds the contents of every message; that is how one is fetched whose text PostgreSQL cannot produce.
        shards: Shards of a batch.
    """

    messages: int = 5000
    stored_bytes: int = 8 * 1024 * 1024
    readable_bytes: int = 8_000_000
    shards: int = SHARDS


@dataclass(frozen=True, slots=True)
class Batch:
    """
    What one read found.

    Attributes:
        messages: In sequence order.
        gone: Numbers, with their shards, of pending messages that somebody has deleted.
        shards: Shards of which anything was found, even if it is for the next read.
        is_cut: A message that takes far more bytes as text than in the table has ended the batch in its shard.
    """

    messages: list[Message]
    gone: list[Message]
    shards: frozenset[int]
    is_cut: bool = False

    @property
    def stored_bytes(self) -> int:
        """What the messages take, in the table or as text."""
        return sum(map(_STORED_BYTES, self.messages))

    def may_have_more(self, limits: Limits, *, shards: int) -> bool:
        """Tell whether one of *limits* may have ended the batch in one of the *shards* that were read."""
        return (
            self.is_cut
            or len(self.messages) * shards >= limits.messages
            or self.stored_bytes * shards >= limits.stored_bytes
        )


def next_limits(limits: Limits, batch: Batch, *, most: Limits) -> Limits:
    """
    Ask for fewer messages after a batch that was ended by its bytes, and for up to *most* again afterwards.

    Messages beyond the bytes are read and thrown away: with large payloads that is most of the work.
    """
    is_full = batch.stored_bytes * 2 >= limits.stored_bytes and len(batch.messages) < limits.messages
    wanted = max(2 * len(batch.messages), 1) if batch.is_cut or is_full else 2 * limits.messages
    return replace(most, messages=min(wanted, most.messages))


def fewer(limits: Limits, *, is_too_large: bool) -> Limits:
    """
    Ask for fewer messages after a stint that failed, in the end for one; `next_limits` asks for more again.

    If a few are still too large to be answered with, ask for the first of each shard without its contents. PostgreSQL
    makes no text of a gigabyte, and a hundred kilobytes of jsonb may have one: the read that meets such a message
    fails. It has to be found, so that all others pass.
    """
    messages = limits.messages // _SHRINKING
    if messages >= limits.shards:
        return replace(limits, messages=messages)
    if is_too_large:
        return replace(limits, messages=1, readable_bytes=0)
    return replace(limits, messages=1, shards=1)


def read_messages(connection: Connection, claim: Claim, *, schema: str, through: int, limits: Limits) -> Batch:
    """
    Return the next messages above the marks of the held shards, up to the number *through*.

    Of each shard the messages come without a hole, except for those of writers that were given up on.

    Raises:
        DatabaseUnavailable: The connection broke.
        DatabaseConflict: A time-out ended the transaction.
        AnswerTooLarge: A text would be longer than PostgreSQL allows: ask for `fewer`.
    """
    marks = claim.marks.through
    parameters = {
        "shards": numbers(marks),
        "marks": numbers(marks.values()),
        "have_pending": [shard in claim.have_pending for shard in marks],
        "through": through,
        "batch_size": limits.messages,
        "batch_bytes": limits.stored_bytes,
        "readable_bytes": limits.readable_bytes,
    }
    return _read(
        connection, "read_messages", parameters, is_planned_once=not claim.have_pending, schema=schema, limits=limits
    )


def read_waiting(
    connection: Connection, claim: Claim, *, schema: str, held_types: Collection[str], limits: Limits
) -> Batch:
    """Return the oldest waiting messages of the held shards but those of *held_types*, as `read_messages` does."""
    parameters = {
        "shards": numbers(work.shard for work in claim.held if work.has_waiting),
        "held_types": list(held_types),
        "batch_size": limits.messages,
        "batch_bytes": limits.stored_bytes,
        "readable_bytes": limits.readable_bytes,
    }
    return _read(connection, "read_waiting", parameters, is_planned_once=False, schema=schema, limits=limits)


def _read(
    connection: Connection,
    name: str,
    parameters: dict[str, object],
    *,
    is_planned_once: bool,
    schema: str,
    limits: Limits,
) -> Batch:
    """
    Read a batch.

    outbox_pending is empty most of the time, and to a plan of that time all its indexes are equally good. With 200,000
    rows in it such a plan takes a minute, so whatever reads it while it is not empty is planned anew each time.
    """
    with translated_errors(), connection.cursor(row_factory=_message_row) as cursor:
        cursor.execute(statement(name, schema=schema), parameters, prepare=is_planned_once)
        messages = cursor.fetchall()
        messages.sort(key=_SEQUENCE_NO)
        batch = Batch(messages, [], frozenset(message.shard for message in messages))
        if None in map(_HEADERS, messages):
            batch = _without_gone(batch)
            batch = _cut(batch, readable_bytes=limits.readable_bytes)
        if batch.messages and not limits.readable_bytes:
            batch = _too_large(connection, batch, schema=schema)
    return batch


def _message_row(_cursor: object) -> Callable[[Sequence[Any]], Message]:
    return Message._make


def _without_gone(batch: Batch) -> Batch:
    """Set apart the pending rows that have no message any more."""
    gone = [message for message in batch.messages if not message.message_id]
    if not gone:
        return batch
    return replace(batch, messages=[each for each in batch.messages if each.message_id], gone=gone)


def _too_large(connection: Connection, batch: Batch, *, schema: str) -> Batch:
    """
    Keep of each shard in *batch* only the first message, and only if PostgreSQL cannot write it out.

    The message that broke the last read may have been published by another lane or parked since, or stands behind
    harmless ones. These are tested, so that none is parked by mistake.
    """
    firsts = {message.shard: message for message in reversed(batch.messages)}
    kept = [each for each in firsts.values() if _is_too_large(connection, each, schema=schema)]
    return replace(batch, messages=sorted(kept, key=_SEQUENCE_NO), is_cut=True)


def _is_too_large(connection: Connection, message: Message, *, schema: str) -> bool:
    wanted = {"shard": message.shard, "sequence_no": message.sequence_no}
    try:
        with translated_errors(), connection.transaction():
            connection.execute(statement("read_text", schema=schema), wanted)
    except AnswerTooLarge:
        return True
    return False


def _cut(batch: Batch, *, readable_bytes: int) -> Batch:
    """
    Drop from each shard the first message whose contents were withheld although it is small enough, and all after it.

    The next read returns them.
    """
    first_nos: dict[int, int] = {}
    for message in batch.messages:
        if message.headers is None and message.stored_bytes <= readable_bytes:
            first_nos.setdefault(message.shard, message.sequence_no)
    kept = [each for each in batch.messages if each.sequence_no < first_nos.get(each.shard, each.sequence_no + 1)]
    return replace(batch, messages=kept, is_cut=bool(first_nos))
