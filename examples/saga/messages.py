"""What the services tell each other: commands with the order that they are about, and replies that name an event."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Self
from uuid import UUID

from outbox_relay.writer import Message

if TYPE_CHECKING:
    from examples.saga.machine import Command, Event
    from outbox_relay import consumer

REPLIES = "order-reply"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a customer wants; its id is the saga's, too, and the key of all its messages."""

    order_id: UUID
    customer: str
    item: str
    quantity: int
    cents: int
    address: str

    @classmethod
    def of(cls, message: consumer.Message) -> Self:
        """Read the order in a command."""
        fields = json.loads(message.payload or b"{}")
        return cls(**fields | {"order_id": UUID(message.key)})


def commands_for(service: str) -> str:
    """Name the aggregate type, and with it the topic, of a service's commands."""
    return f"{service}-command"


def command_message(command: Command, order: Order) -> Message:
    """Make the message that tells a service what to do for *order*."""
    return Message(
        aggregate_type=commands_for(command.service),
        aggregate_id=str(order.order_id),
        event_type=command.name,
        payload=asdict(order) | {"order_id": str(order.order_id)},
    )


def reply_message(event: Event, order: Order) -> Message:
    """Make the message that tells the orders service what became of its command."""
    return Message(aggregate_type=REPLIES, aggregate_id=str(order.order_id), event_type=event, payload={})
