"""The names of the metrics that the daemon and the consumer library offer, as Prometheus stores them."""

from __future__ import annotations

from itertools import chain

from prometheus_client import CollectorRegistry

from outbox_relay.consumer.metrics import ConsumerMetrics
from outbox_relay.observe.metrics import Metrics

SUFFIXES = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_count", "_sum"),
    "info": ("_info",),
    "gauge": ("",),
}


def exported_names() -> set[str]:
    of_consumers = CollectorRegistry()
    ConsumerMetrics(registry=of_consumers)
    families = chain(Metrics().registry.collect(), of_consumers.collect())
    ours = [family for family in families if family.name.startswith(("outbox_relay_", "outbox_consumer_"))]
    return {f"{family.name}{suffix}" for family in ours for suffix in SUFFIXES[family.type]}
