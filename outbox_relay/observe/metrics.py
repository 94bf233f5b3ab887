"""The relay's Prometheus metrics, in a registry of their own."""

from __future__ import annotations

from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from outbox_relay import __version__
from outbox_relay.observe.collectors import BatchHistogram, SurveyedGauges

RepublishCause = Literal["conflict", "connection", "error", "order"]

_PREFIX = "outbox_relay"
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0)
_LONG_SECONDS = (*_SECONDS, 60.0, 300.0, 3600.0)
_MESSAGES = (1, 10, 50, 100, 500, 1000, 2500, 5000, 10000)

_SURVEYED = {
    "unpublished_messages": "Messages that are not in Kafka, counted up to 10,000.",
    "oldest_unpublished_seconds": "Age of the oldest of them.",
    "waiting_messages": "Messages that a mark has passed and that wait for Kafka, counted up to 10,000.",
    "oldest_waiting_seconds": "Time for which the first of them has been waiting.",
    "parked_messages": "Messages that are set aside, counted up to 10,000.",
    "parked_keys": "Keys they belong to, counted up to 10,000.",
    "uncollected_writers": "Given-up writers that have ended and whose messages nobody has collected.",
    "unreconciled_seconds": "Age of the oldest mark that has not been compared with the rows.",
    "xid_age": "Transactions since the oldest row of the database was frozen.",
    "oldest_xmin_age": "Transactions for which vacuum has been held back.",
    "longest_transaction_seconds": "Age of the oldest open transaction of the database.",
    "oldest_prepared_transaction_seconds": "Age of the oldest prepared transaction of the database.",
    "partitions_ahead_seconds": "Time for which the partitions that are there last; below 0 one is overdue.",
}
_SURVEYED_BY_TABLE = {
    "live_tuples": "Rows of the table, as estimated by PostgreSQL.",
    "dead_tuples": "Dead rows of the table, as estimated by PostgreSQL.",
    "table_bytes": "Size of the table with its long values.",
    "index_bytes": "Size of its indexes.",
}


class Metrics:
    """One attribute for each metric; labels have a bounded set of values only."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry(auto_describe=True)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, namespace=_PREFIX, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, namespace=_PREFIX, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, namespace=_PREFIX, buckets=buckets, registry=registry)

        self.published_messages = counter("published_messages", "Messages that Kafka acknowledged, each time.", "topic")
        self.published_bytes = counter("published_bytes", "Bytes of them, as stored.", "topic")
        self.failed_deliveries = counter("failed_deliveries", "Messages not acknowledged.", "code", "scope")
        self.republished_messages = counter("republished_messages", "Messages in Kafka that are not marked.", "cause")
        for cause in get_args(RepublishCause):
            self.republished_messages.labels(cause)
        self.newly_parked_messages = counter("newly_parked_messages", "Messages set aside for an operator.")
        self.recorded_marks = counter("recorded_marks", "Marks that say how far a shard is settled.")
        self.unordered_messages = counter("unordered_messages", "Messages published with the header unordered.")
        self.late_messages = counter("late_messages", "Messages of given-up writers that came after all.")
        self.given_up_writers = counter("given_up_writers", "Writers open beyond the ordering timeout.")
        self.claim_conflicts = counter("claim_conflicts", "Claims rolled back by a lock, deadlock or time-out.")
        self.reconciled_messages = counter("reconciled_messages", "Messages compared with the marks that passed them.")
        self.skipped_messages = counter("skipped_messages", "Messages that no mark had counted, sent after all.")
        self.failed_reconcilings = counter("failed_reconcilings", "Rounds of reconciling that an error ended.")
        self.pruned_messages = counter("pruned_messages", "Published messages removed by age.")
        self.failed_prunings = counter("failed_prunings", "Rounds of pruning that an error ended.")
        self.failed_surveys = counter("failed_surveys", "Surveys that an error ended.")
        self.failed_canaries = counter("failed_canaries", "Canaries that an error interrupted.")
        self.lost_connections = counter("lost_connections", "Times a part was lost.", "part")
        self.rebuilt_producers = counter("rebuilt_producers", "Producers replaced after a failure or silence.")
        self.batch_messages = histogram("batch_messages", "Messages of a batch.", _MESSAGES)
        self.read_seconds = histogram("read_seconds", "Time to read a batch.", _SECONDS)
        self.publish_seconds = histogram("publish_seconds", "Time to publish a batch.", _SECONDS)
        self.record_seconds = histogram("record_seconds", "Time to record the marks of a stint.", _SECONDS)
        self.reconcile_seconds = histogram("reconcile_seconds", "Time to compare a batch with its marks.", _SECONDS)
        self.prune_seconds = histogram("prune_seconds", "Time to prune a batch.", _SECONDS)
        self.canary_seconds = histogram("canary_seconds", "Time from a canary's insert to its mark.", _LONG_SECONDS)
        self.horizon_held_seconds = gauge("horizon_held_seconds", "How long open writers have held the horizon.")
        self.horizon_blockers = gauge("horizon_blockers", "Open writers that the horizon waits for.")
        self.canary_open = gauge("canary_open_seconds", "How long the present canary has been on its way.")
        self.held_topics = gauge("held_topics", "Topics that cannot be written to now.")
        self.is_up = gauge("up", "1 while the part is in working order.", "part")
        self.beat_age = gauge("beat_age_seconds", "Time since the thread last began a turn.", "thread")
        self.commit_to_ack = BatchHistogram(
            f"{_PREFIX}_commit_to_ack_seconds", "Time from created_at to the acknowledgement.", bounds=_LONG_SECONDS
        )
        self.survey = SurveyedGauges(prefix=_PREFIX, single=_SURVEYED, by_table=_SURVEYED_BY_TABLE)
        registry.register(self.commit_to_ack)
        registry.register(self.survey)
        Info("build", "Version of the relay.", namespace=_PREFIX, registry=registry).info({"version": __version__})
