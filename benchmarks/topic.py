"""A topic of one measurement, in which the broker notes when it wrote each message."""

from __future__ import annotations

import secrets
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._listoffsets import ListOffsetsResultInfo, OffsetSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from outbox_relay.sandbox.kafka import Kafka

PARTITIONS = 8
REQUEST_TIMEOUT_SECONDS = 10.0
ARRIVAL_TIMEOUT_SECONDS = 300.0
LOOK_SECONDS = 0.2


class Topic:
    """Created empty; `temporary_topic` removes it again."""

    def __init__(self, kafka: Kafka) -> None:
        self.name = f"benchmark-{secrets.token_hex(4)}"
        self._admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
        kafka.create_topic(self.name, partitions=PARTITIONS, config={"message.timestamp.type": "LogAppendTime"})

    def messages(self) -> int:
        """Return the number of messages in it."""
        latest = OffsetSpec.latest()  # type: ignore[no-untyped-call]
        return sum(partition.offset for partition in self._offsets(latest))

    def await_messages(self, count: int) -> None:
        """
        Wait until it has *count* messages, with looks that are rare enough to disturb nobody.

        Raises:
            TimeoutError: It has fewer after five minutes.
        """
        deadline = time.monotonic() + ARRIVAL_TIMEOUT_SECONDS
        while (present := self.messages()) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{present} of {count} messages came in {ARRIVAL_TIMEOUT_SECONDS:g} s")
            time.sleep(LOOK_SECONDS)

    def written_between(self) -> tuple[float, float]:
        """Return the times at which the broker wrote the first and the last message, in seconds to the millisecond."""
        newest = OffsetSpec.max_timestamp()  # type: ignore[no-untyped-call]
        firsts = self._offsets(OffsetSpec.for_timestamp(0))
        return _times(firsts)[0] / 1000, _times(self._offsets(newest))[-1] / 1000

    def delete(self) -> None:
        """Remove it and what is in it."""
        self._admin.delete_topics([self.name])[self.name].result(REQUEST_TIMEOUT_SECONDS)

    def _offsets(self, wanted: OffsetSpec) -> list[ListOffsetsResultInfo]:
        partitions = {TopicPartition(self.name, number): wanted for number in range(PARTITIONS)}
        answers = self._admin.list_offsets(partitions, request_timeout=REQUEST_TIMEOUT_SECONDS)
        return [answer.result() for answer in answers.values()]


def _times(partitions: list[ListOffsetsResultInfo]) -> list[int]:
    """Return the times in rising order; an empty partition has none."""
    return sorted(partition.timestamp for partition in partitions if partition.timestamp >= 0)


@contextmanager
def temporary_topic(kafka: Kafka) -> Iterator[Topic]:
    """Create a topic, and remove it afterwards."""
    topic = Topic(kafka)
    try:
        yield topic
    finally:
        topic.delete()
