"""What consumers count, and that nobody needs prometheus-client who does not count."""

from __future__ import annotations

import subprocess
import sys

from prometheus_client import CollectorRegistry

from outbox_relay.consumer import Batch
from outbox_relay.consumer.kafka import BatchReport
from outbox_relay.consumer.metrics import ConsumerMetrics
from tests.fixtures.messages import a_message


def counted(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    return {
        (sample.name.removeprefix("outbox_consumer_"), *sample.labels.values()): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name.endswith("_total") and sample.value
    }


def test_each_message_of_a_batch_is_counted_by_what_became_of_it() -> None:
    registry = CollectorRegistry()
    metrics = ConsumerMetrics(registry=registry)
    batch = Batch([a_message(1), a_message(2)], [a_message(3)], [a_message(4)])
    metrics.count_batch("billing", batch)
    metrics.count_batch("shipping", batch)
    metrics.count_batch("shipping", Batch())
    assert counted(registry) == {
        ("messages_total", "billing", "processed"): 2,
        ("messages_total", "billing", "duplicate"): 1,
        ("messages_total", "billing", "stale"): 1,
        ("messages_total", "shipping", "processed"): 2,
        ("messages_total", "shipping", "duplicate"): 1,
        ("messages_total", "shipping", "stale"): 1,
    }


def test_the_loop_counts_poison_too() -> None:
    registry = CollectorRegistry()
    count = ConsumerMetrics(registry=registry).counting("billing")
    for _ in range(2):
        count(BatchReport(processed=3, duplicates=2, stale=1, poisoned=4))
    assert counted(registry) == {
        ("messages_total", "billing", "processed"): 6,
        ("messages_total", "billing", "duplicate"): 4,
        ("messages_total", "billing", "stale"): 2,
        ("messages_total", "billing", "poisoned"): 8,
    }


def test_what_is_pruned_is_counted_apart() -> None:
    registry = CollectorRegistry()
    ConsumerMetrics(registry=registry).count_pruned("billing", 7)
    assert counted(registry) == {("pruned_messages_total", "billing"): 7}


def test_consuming_needs_no_prometheus_client() -> None:
    program = "import sys, outbox_relay.consumer.kafka; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_counting_without_prometheus_client_says_what_to_install() -> None:
    program = "import sys; sys.modules['prometheus_client'] = None; import outbox_relay.consumer.metrics"
    failed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert failed.stderr.endswith(
        "the metrics of a consumer need the package 'prometheus_client': pip install \"outbox-relay[metrics]\"\n"
    )
