"""Prometheus metrics of consumers: what became of their messages. Needs the extra `metrics`."""

from __future__ import annotations

from typing import TYPE_CHECKING

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'the metrics of a consumer need the package {error.name!r}: pip install "outbox-relay[metrics]"',
        name=error.name,
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable

    from outbox_relay.consumer.inbox import Batch
    from outbox_relay.consumer.kafka import BatchReport

__all__ = ["ConsumerMetrics"]


class ConsumerMetrics:
    """
    Counts what all consumers of a process did with their messages, each under its name.

    Args:
        registry: Where the metrics are registered, once; by default that which prometheus_client exposes.
    """

    def __init__(self, *, registry: CollectorRegistry = REGISTRY) -> None:
        self._messages = Counter(
            "outbox_consumer_messages", "Messages by what became of them.", ["consumer", "outcome"], registry=registry
        )
        self._pruned = Counter(
            "outbox_consumer_pruned_messages", "Records removed from the inbox.", ["consumer"], registry=registry
        )

    def count_batch(self, consumer: str, batch: Batch) -> None:
        """Count what an inbox gave, once its transaction is committed."""
        self._count(consumer, processed=len(batch.fresh), duplicate=len(batch.duplicates), stale=len(batch.stale))

    def counting(self, consumer: str) -> Callable[[BatchReport], None]:
        """Give what the consuming loop calls as its `on_batch`."""

        def count(report: BatchReport) -> None:
            self._count(
                consumer,
                processed=report.processed,
                duplicate=report.duplicates,
                stale=report.stale,
                poisoned=report.poisoned,
            )

        return count

    def count_pruned(self, consumer: str, messages: int) -> None:
        """Count what `prune` or `prune_all` gave."""
        self._pruned.labels(consumer).inc(messages)

    def _count(self, consumer: str, **messages: int) -> None:
        for outcome, count in messages.items():
            self._messages.labels(consumer, outcome).inc(count)
