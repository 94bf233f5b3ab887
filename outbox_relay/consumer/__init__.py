"""The consumer's side: consume each message once, in the transaction of its effects, with any Kafka client."""

from outbox_relay.consumer.inbox import Batch, Inbox
from outbox_relay.consumer.message import Message
from outbox_relay.consumer.record import Record, message_from
from outbox_relay.consumer.sequence import SequenceInbox

__all__ = [
    "Batch",
    "Inbox",
    "Message",
    "Record",
    "SequenceInbox",
    "message_from",
]
