"""Metrics that count a batch at once, or leave out what is out of date."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from outbox_relay.observe.collectors import BatchHistogram
from outbox_relay.observe.metrics import Metrics
from outbox_relay.relay.survey import Backlog, Head, Table, Upkeep

BOUNDS = (0.001, 0.01, 0.1, 1.0)
BACKLOG = Backlog(
    [
        Head(3, 7, "unpublished", "order", age_seconds=12.5),
        Head(3, 5, "waiting", "order", age_seconds=9.0, waiting_seconds=8.5),
    ],
    unpublished_messages=4,
    waiting_messages=3,
    parked_messages=2,
    parked_keys=1,
    uncollected_writers=6,
    unreconciled_seconds=0.5,
)
UPKEEP = Upkeep(
    tables=[Table("outbox", live_tuples=10, dead_tuples=3, table_bytes=8192, index_bytes=16384)],
    partitions_ahead_seconds=None,
    xid_age=1000,
    oldest_xmin_age=20,
    longest_transaction_seconds=1.5,
    oldest_prepared_transaction_seconds=0,
)


def samples(registry: CollectorRegistry) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (sample.name.removeprefix("outbox_relay_"), tuple(sample.labels.values())): sample.value
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


@given(st.lists(st.lists(st.integers(0, 10_000), min_size=1, max_size=30), max_size=4))
def test_a_batch_counts_as_its_messages_one_by_one(batches: list[list[int]]) -> None:
    single = CollectorRegistry()
    histogram = Histogram("age", "Age.", buckets=BOUNDS, registry=single)
    batched = CollectorRegistry()
    collector = BatchHistogram("age", "Age.", bounds=BOUNDS)
    batched.register(collector)
    for ages_ms in batches:
        collector.observe([1_700_000_000_000 - age for age in ages_ms], ended_ms=1_700_000_000_000)
        for age in ages_ms:
            histogram.observe(age / 1000)
    assert samples(batched) == pytest.approx(samples(single))


def test_a_message_from_the_future_has_taken_no_time() -> None:
    collector = BatchHistogram("age", "Age.", bounds=BOUNDS)
    collector.observe([1_000, 99_000], ended_ms=2_000.5)
    [family] = collector.collect()
    assert [(sample.labels.get("le"), sample.value) for sample in family.samples if "bucket" in sample.name] == [
        ("0.001", 1),
        ("0.01", 1),
        ("0.1", 1),
        ("1.0", 1),
        ("+Inf", 2),
    ]
    assert [sample.value for sample in family.samples if sample.name == "age_sum"] == [1.0005]


def test_what_a_survey_found_is_shown_by_table_and_single() -> None:
    metrics = Metrics()
    metrics.survey.show(BACKLOG, until=time.monotonic() + 60)
    metrics.survey.show(UPKEEP, until=time.monotonic() + 60)
    expected = {
        ("unpublished_messages", ()): 4,
        ("oldest_unpublished_seconds", ()): 12.5,
        ("waiting_messages", ()): 3,
        ("oldest_waiting_seconds", ()): 8.5,
        ("parked_messages", ()): 2,
        ("parked_keys", ()): 1,
        ("uncollected_writers", ()): 6,
        ("unreconciled_seconds", ()): 0.5,
        ("xid_age", ()): 1000,
        ("oldest_xmin_age", ()): 20,
        ("longest_transaction_seconds", ()): 1.5,
        ("oldest_prepared_transaction_seconds", ()): 0,
        ("live_tuples", ("outbox",)): 10,
        ("dead_tuples", ("outbox",)): 3,
        ("table_bytes", ("outbox",)): 8192,
        ("index_bytes", ("outbox",)): 16384,
    }
    found = samples(metrics.registry)
    assert {name: found.get(name) for name in expected} == expected
    assert ("partitions_ahead_seconds", ()) not in found


def test_what_is_out_of_date_is_not_shown_at_all() -> None:
    metrics = Metrics()
    metrics.survey.show(BACKLOG, until=time.monotonic() + 60)
    metrics.survey.show(UPKEEP, until=time.monotonic() - 1)
    found = {name for name, _ in samples(metrics.registry)}
    assert "unpublished_messages" in found
    assert found.isdisjoint({"xid_age", "dead_tuples"})


def test_a_newer_survey_takes_the_place_of_the_one_before() -> None:
    metrics = Metrics()
    for count in (5, 9):
        metrics.survey.show(replace(BACKLOG, unpublished_messages=count), until=time.monotonic() + 60)
    assert samples(metrics.registry)["unpublished_messages", ()] == 9


def test_every_cause_of_republishing_is_there_from_the_start() -> None:
    causes = {labels for name, labels in samples(Metrics().registry) if name == "republished_messages_total"}
    assert causes == {("conflict",), ("connection",), ("error",), ("order",)}
