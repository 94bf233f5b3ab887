"""Settle: decide from the outcomes what becomes of each message, and write how far the shards are settled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from psycopg import ClientCursor

from outbox_relay.database import translated_errors
from outbox_relay.relay.failures import BEHIND_PARKED, BEHIND_WAITING, Failure, Scope
from outbox_relay.sql import numbers, statement

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from psycopg import Connection

    from outbox_relay.relay.failures import Outcome
    from outbox_relay.relay.marks import Marks
    from outbox_relay.relay.message import Key, Message, OnPoison

PendingState = Literal["parked", "waiting"]


class Aside(NamedTuple):
    """A message that a mark passes although it is not in Kafka, and why: what becomes a row of outbox_pending."""

    message: Message
    state: PendingState
    failure: Failure


@dataclass(frozen=True, slots=True)
class Settlement:
    """
    What a batch comes to, each list in sequence order.

    Attributes:
        published: Acknowledged messages, of each key the ones before its first failure.
        parked: Messages that Kafka will never accept, and under "park" the later ones of their keys.
        waiting: The other messages that Kafka has not acknowledged, and the later ones of their keys.
    """

    published: list[Message] = field(default_factory=list)
    parked: list[Aside] = field(default_factory=list)
    waiting: list[Aside] = field(default_factory=list)


def decide(messages: Sequence[Message], outcomes: Sequence[Outcome], *, on_poison: OnPoison) -> Settlement:
    """
    Tell what becomes of *messages*, which are in sequence order, from the outcome of each.

    An idempotent producer keeps the order but leaves gaps: a message can fail while later ones of its key are accepted.
    To call those published would hide that they overtook it; of each key only the ones before its first failure are.
    Under "skip" a parked message does not hold up the later ones of its key. Messages that are unordered anyway neither
    hold up others nor are held up.
    """
    if outcomes.count(None) == len(outcomes):
        return Settlement(published=list(messages))
    settlement = Settlement()
    stopped: dict[Key, Failure] = {}
    for message, outcome in zip(messages, outcomes, strict=True):
        before = None if message.is_unordered else stopped.get(message.key)
        failure = outcome if before is None else before
        if failure is None:
            settlement.published.append(message)
            continue
        if failure.scope is Scope.MESSAGE:
            settlement.parked.append(Aside(message, "parked", failure))
            follower = BEHIND_PARKED if on_poison == "park" else None
        else:
            settlement.waiting.append(Aside(message, "waiting", failure))
            follower = BEHIND_WAITING
        if follower is not None and not message.is_unordered:
            stopped.setdefault(message.key, follower)
    return settlement


def set_aside(connection: Connection, asides: Collection[Aside], *, schema: str) -> None:
    """
    Write messages to outbox_pending, in the transaction that holds their shards.

    Raises:
        DatabaseUnavailable: The connection broke; nothing of the stint is recorded.
        DatabaseConflict: A time-out ended the transaction; likewise.
    """
    if not asides:
        return
    parameters = {
        "shards": numbers(aside.message.shard for aside in asides),
        "numbers": numbers(aside.message.sequence_no for aside in asides),
        "states": [aside.state for aside in asides],
        "reason_codes": [aside.failure.code for aside in asides],
        "reasons": [aside.failure.reason for aside in asides],
        "are_unordered": [aside.message.is_unordered for aside in asides],
    }
    with translated_errors():
        connection.execute(statement("settle_aside", schema=schema), parameters, prepare=False)  # see read.py


def forget_waiting(connection: Connection, messages: Collection[Message], *, schema: str) -> None:
    """Remove from outbox_pending what was published, as `set_aside` writes to it."""
    if not messages:
        return
    parameters = {
        "shards": numbers(message.shard for message in messages),
        "numbers": numbers(message.sequence_no for message in messages),
    }
    with translated_errors():
        connection.execute(statement("settle_waiting", schema=schema), parameters, prepare=False)  # see read.py


def record_marks(connection: Connection, marks: Marks, *, schema: str) -> int:
    """
    Record the marks that have moved, commit, and return their number.

    Raises:
        DatabaseUnavailable: The connection broke. Whether the commit took place is not known: what was acknowledged
            may be read and sent once more.
    """
    moved = marks.moved()
    with translated_errors():
        if moved:
            shards, throughs, messages, checksums = map(numbers, zip(*moved, strict=True))
            parameters = {"shards": shards, "throughs": throughs, "messages": messages, "checksums": checksums}
            ClientCursor(connection).execute(statement("settle_marks", schema=schema), parameters)
        else:
            connection.commit()
    return len(moved)
