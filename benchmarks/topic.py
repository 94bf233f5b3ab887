"""A topic of one measurement, in which the broker notes when it wrote each message."""

from __future__ import annotations

import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING

from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from confluent_kafka.admin import ListOffsetsResultInfo

    from outbox_relay.sandbox.kafka import Kafka

PARTITIONS = 8
REQUEST_TIMEOUT_SECONDS = 10.0


class Topic:
    """Created empty; `temporary_topic` removes it again."""

    def __init__(self, kafka: Kafka) -> None:
        self.name = f"benchmark-{secrets.token_hex(4)}"
        self._admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
        kafka.create_topic(self.name, partitions=PARTITIONS, config={"message.timestamp.type": "LogAppendTime"})

    def messages(self) -> int:
        """Give the number of messages in it."""
        return sum(partition.offset for partition in self._offsets(OffsetSpec.latest()))

    def written_between(self) -> tuple[float, float]:
        """Give the times at which the broker wrote the first and the last message, in seconds to the millisecond."""
        firsts = self._offsets(OffsetSpec.for_timestamp(0))
        lasts = self._offsets(OffsetSpec.max_timestamp())
        return _times(firsts)[0] / 1000, _times(lasts)[-1] / 1000

    def delete(self) -> None:
        """Remove it and what is in it."""
        self._admin.delete_topics([self.name])[self.name].result(REQUEST_TIMEOUT_SECONDS)

    def _offsets(self, wanted: OffsetSpec) -> list[ListOffsetsResultInfo]:
        partitions = {TopicPartition(self.name, number): wanted for number in range(PARTITIONS)}
        answers = self._admin.list_offsets(partitions, request_timeout=REQUEST_TIMEOUT_SECONDS)
        return [answer.result() for answer in answers.values()]


def _times(partitions: list[ListOffsetsResultInfo]) -> list[int]:
    """Give the times in rising order; an empty partition has none."""
    return sorted(partition.timestamp for partition in partitions if partition.timestamp >= 0)


@contextmanager
def temporary_topic(kafka: Kafka) -> Iterator[Topic]:
    """Create a topic, and remove it afterwards."""
    topic = Topic(kafka)
    try:
        yield topic
    finally:
        topic.delete()
