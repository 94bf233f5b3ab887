"""Settle: decide from the outcomes what to mark and what to park, and write it in the claim's transaction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from psycopg import ClientCursor

from outbox_relay.database import translated_errors
from outbox_relay.relay.failures import BEHIND_PARKED, Scope
from outbox_relay.sql import numbers, statement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg import Connection

    from outbox_relay.relay.failures import Outcome
    from outbox_relay.relay.message import Key, Message, OnPoison

SettleMode = Literal["mark", "delete"]


@dataclass(frozen=True, slots=True)
class Parked:
    """A message to set aside, and the reason that an operator will read."""

    message: Message
    reason: str


@dataclass(frozen=True, slots=True)
class Settlement:
    """
    What a batch comes to. A message in neither list stays unpublished and is claimed again.

    Attributes:
        published: Acknowledged messages, of each key the ones before its first failure.
        parked: Messages that Kafka will never accept, and under `park` the later ones of their keys.
        unsettled: The others, in sequence order.
    """

    published: list[Message] = field(default_factory=list)
    parked: list[Parked] = field(default_factory=list)
    unsettled: list[Message] = field(default_factory=list)


def decide(messages: Sequence[Message], outcomes: Sequence[Outcome], *, on_poison: OnPoison) -> Settlement:
    """
    Tell what to mark, to park and to leave, from *messages* in sequence order and the outcome of each.

    An idempotent producer keeps the order but leaves gaps: a message can fail while later ones of its key are accepted.
    Marking those would hide that they overtook it, so of each key only the prefix before the first failure is marked.
    Under "skip" a parked message does not hold up the later ones of its key.
    """
    if outcomes.count(None) == len(outcomes):
        return Settlement(published=list(messages))
    settlement = Settlement()
    parked_keys: set[Key] = set()
    open_keys: set[Key] = set()
    for message, outcome in zip(messages, outcomes, strict=True):
        key = message.key
        if key in parked_keys:
            settlement.parked.append(Parked(message, BEHIND_PARKED.text))
        elif key in open_keys:
            settlement.unsettled.append(message)
        elif outcome is None:
            settlement.published.append(message)
        elif outcome.scope is Scope.MESSAGE:
            settlement.parked.append(Parked(message, outcome.text))
            if on_poison == "park":
                parked_keys.add(key)
        else:
            settlement.unsettled.append(message)
            open_keys.add(key)
    return settlement


def settle(connection: Connection, *, schema: str, settlement: Settlement, mode: SettleMode) -> dict[int, int]:
    """
    Write *settlement* and commit; give the new generation of each shard in which something was parked.

    Raises:
        DatabaseUnavailable: The connection broke. Whether the commit took place is not known: what was acknowledged
            may be claimed and sent once more.
    """
    generations: dict[int, int] = {}
    with translated_errors():
        if settlement.parked:
            parameters = {
                "ids": [parked.message.id for parked in settlement.parked],
                "reasons": [parked.reason for parked in settlement.parked],
            }
            generations = dict(connection.execute(statement("park", schema=schema), parameters).fetchall())
        ids = numbers(message.id for message in settlement.published)
        ClientCursor(connection).execute(statement(f"settle_{mode}", schema=schema), {"ids": ids})
    return generations
