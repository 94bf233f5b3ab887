"""The consuming loop for confluent-kafka: records in, effects once, offsets last. Needs the extra `kafka`."""

from outbox_relay.consumer.kafka.loop import BatchReport, Consumer, Handle, OnPoison, Poison
from outbox_relay.consumer.kafka.offsets import Offsets

__all__ = [
    "BatchReport",
    "Consumer",
    "Handle",
    "Offsets",
    "OnPoison",
    "Poison",
]
