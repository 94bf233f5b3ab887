"""What the loop has to say: one method for each thing that happens, which logs it, counts it and keeps the health."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import asdict
from operator import attrgetter
from typing import TYPE_CHECKING

from outbox_relay.errors import OutboxRelayError
from outbox_relay.observe import events
from outbox_relay.observe.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from structlog.typing import FilteringBoundLogger

    from outbox_relay.observe.metrics import Metrics, RepublishCause
    from outbox_relay.relay.failures import Scope
    from outbox_relay.relay.horizon import OpenTransaction
    from outbox_relay.relay.message import Message
    from outbox_relay.relay.reconcile import Repair
    from outbox_relay.relay.settle import Aside
    from outbox_relay.relay.survey import Backlog, Head, Upkeep

_HELD_SECONDS = 1.0  # from when on a held horizon is worth telling

_AGGREGATE_TYPE = attrgetter("aggregate_type")
_CREATED_AT_MS = attrgetter("created_at_ms")
_STORED_BYTES = attrgetter("stored_bytes")
_IS_UNORDERED = attrgetter("is_unordered")


class Telemetry:
    """
    Used by all threads of a relay; state changes are logged once, however many lanes see them.

    Args:
        topic_of: Gives the topic of an aggregate type, for the labels of the metrics.
        live_max_age: Seconds without a sign of life after which a thread counts as stuck.
        ready_max_age: Seconds after which a relay that moves nothing is not ready; 0 for never.
    """

    def __init__(
        self,
        *,
        logger: FilteringBoundLogger,
        metrics: Metrics,
        topic_of: Callable[[str], str],
        live_max_age: float = 60.0,
        ready_max_age: float = 0.0,
    ) -> None:
        self._logger = logger
        self._metrics = metrics
        self._topic_of = topic_of
        self._live_max_age = live_max_age
        self._ready_max_age = ready_max_age
        self._lock = threading.Lock()
        self._lost: dict[str, dict[str, float]] = {"kafka": {}, "database": {}, "topic": {}}
        self._seen: set[str] = set()
        self._partitions: dict[str, int] = {}
        self._beats: dict[str, float] = {}
        self._is_draining = False
        self._settled_at = time.monotonic()
        self._progress = Progress(known_until=time.monotonic())
        self._held_seconds = 0.0

    def relay_started(self, **facts: object) -> None:
        """Log with what settings the relay works."""
        self._logger.info(events.RELAY_STARTED, **facts)

    def schema_is_newer(self, warning: str) -> None:
        """Log that the database has migrations this version does not know."""
        self._logger.warning(events.SCHEMA_IS_NEWER, warning=warning)

    def certificate_not_renewed(self, error: Exception) -> None:
        """Log that the files of the certificate for metrics changed into what cannot be used."""
        self._logger.warning(events.CERTIFICATE_NOT_RENEWED, error=str(error))

    def relay_draining(self, *, reason: str) -> None:
        """Log that nothing more is claimed, and turn unready."""
        self._is_draining = True
        self._logger.info(events.RELAY_DRAINING, reason=reason)

    def relay_stopped(self, *, is_drained: bool) -> None:
        """Log the end."""
        self._logger.info(events.RELAY_STOPPED, is_drained=is_drained)

    def batch_published(
        self,
        lane: str,
        published: Sequence[Message],
        *,
        acknowledged_at: float,
        read_seconds: float,
        publish_seconds: float,
    ) -> None:
        """Count a batch that Kafka took; *acknowledged_at* is in seconds since 1970, by the database's clock."""
        metrics = self._metrics
        if published:
            metrics.commit_to_ack.observe(map(_CREATED_AT_MS, published), ended_ms=1000 * acknowledged_at)
        messages = Counter(map(_AGGREGATE_TYPE, published))
        for name, count in messages.items():
            of_type = published if count == len(published) else [m for m in published if m.aggregate_type == name]
            topic = self._topic_of(name)
            metrics.published_messages.labels(topic).inc(count)
            metrics.published_bytes.labels(topic).inc(sum(map(_STORED_BYTES, of_type)))
        unordered = sum(map(_IS_UNORDERED, published))
        if unordered:
            metrics.unordered_messages.inc(unordered)
        metrics.batch_messages.observe(len(published))
        metrics.read_seconds.observe(read_seconds)
        metrics.publish_seconds.observe(publish_seconds)
        self._logger.debug(
            events.BATCH_PUBLISHED,
            lane=lane,
            messages=len(published),
            read_seconds=round(read_seconds, 6),
            publish_seconds=round(publish_seconds, 6),
        )

    def marks_recorded(self, marks: int, *, messages: int, seconds: float) -> None:
        """Count the marks of a stint that is committed, and what they settle."""
        if messages:
            self._settled_at = time.monotonic()
        self._metrics.recorded_marks.inc(marks)
        self._metrics.record_seconds.observe(seconds)

    def messages_parked(self, lane: str, parked: Sequence[Aside]) -> None:
        """Count messages that were set aside for an operator, and say which is the first."""
        if not parked:
            return
        self._metrics.newly_parked_messages.inc(len(parked))
        first = parked[0]
        self._logger.error(
            events.MESSAGES_PARKED,
            lane=lane,
            messages=len(parked),
            first_sequence_no=first.message.sequence_no,
            first_message_id=first.message.message_id,
            first_reason=first.failure.text,
        )

    def deliveries_failed(self, failures: Mapping[tuple[str, Scope], int]) -> None:
        """Count messages that were not acknowledged, by code."""
        for (code, scope), count in failures.items():
            self._metrics.failed_deliveries.labels(code, scope.value).inc(count)
        if failures:
            codes = {code: count for (code, _), count in failures.items()}
            self._logger.warning(events.DELIVERIES_FAILED, codes=codes)

    def messages_republished(self, count: int, *, cause: RepublishCause) -> None:
        """Count messages that are in Kafka and below no mark: they will be sent again."""
        self._metrics.republished_messages.labels(cause).inc(count)

    def producers_rebuilt(self, count: int) -> None:
        """Count producers that took the place of one that had failed for good."""
        self._metrics.rebuilt_producers.inc(count)

    def late_messages_found(self, count: int) -> None:
        """Count messages of writers that were given up on, which came after all."""
        self._metrics.late_messages.inc(count)
        self._logger.info(events.LATE_MESSAGES_FOUND, messages=count)

    def claim_conflicted(self, lane: str, error: Exception) -> None:
        """Count a claim that was rolled back."""
        self._metrics.claim_conflicts.inc()
        self._logger.warning(events.CLAIM_CONFLICTED, lane=lane, error=str(error))

    def batch_reconciled(self, messages: int, *, seconds: float) -> None:
        """Count messages that were compared with the marks."""
        if messages:
            self._metrics.reconciled_messages.inc(messages)
            self._metrics.reconcile_seconds.observe(seconds)

    def skipped_messages_found(self, repair: Repair) -> None:
        """Count messages that no mark had counted, and say which interval they are from; they are sent now."""
        self._metrics.skipped_messages.inc(repair.messages)
        self._logger.error(events.SKIPPED_MESSAGES_FOUND, **asdict(repair))

    def reconciling_failed(self, error: Exception) -> None:
        """Count a round of reconciling that an error ended; the relay works on."""
        self._metrics.failed_reconcilings.inc()
        self._logger.warning(events.RECONCILING_FAILED, error=str(error))

    def batch_pruned(self, messages: int, *, seconds: float) -> None:
        """Count messages that were removed because of their age."""
        self._metrics.prune_seconds.observe(seconds)
        if messages:
            self._metrics.pruned_messages.inc(messages)
            self._logger.debug(events.BATCH_PRUNED, messages=messages, seconds=round(seconds, 6))

    def pruning_failed(self, error: Exception) -> None:
        """Count a round of pruning that an error ended; the relay works on."""
        self._metrics.failed_prunings.inc()
        self._logger.warning(events.PRUNING_FAILED, error=str(error))

    def backlog_surveyed(self, backlog: Backlog, *, until: float) -> None:
        """Show what waits until the `time.monotonic()` *until*, and keep whether it moves."""
        self._metrics.survey.show(backlog, until=until)
        heads = [head for head in backlog.heads if self._is_publishable(head)]
        self._progress.saw(heads, now=time.monotonic(), until=until)

    def upkeep_surveyed(self, upkeep: Upkeep, *, until: float) -> None:
        """Show the state of tables and transactions until the `time.monotonic()` *until*."""
        self._metrics.survey.show(upkeep, until=until)

    def survey_failed(self, error: Exception) -> None:
        """Count a survey that an error ended; the relay works on."""
        self._metrics.failed_surveys.inc()
        self._logger.warning(events.SURVEY_FAILED, error=str(error))

    def canary_written(self, *, at: float) -> None:
        """Keep since when, by `time.monotonic()`, a canary has been on its way."""
        self._metrics.canary_open.set_function(lambda: time.monotonic() - at)

    def canary_arrived(self, seconds: float) -> None:
        """Count the time that a canary took."""
        self._metrics.canary_open.set_function(lambda: 0.0)
        self._metrics.canary_seconds.observe(seconds)

    def canary_failed(self, error: Exception) -> None:
        """Count a canary that an error interrupted; the relay works on."""
        self._metrics.failed_canaries.inc()
        self._logger.warning(events.CANARY_FAILED, error=str(error))

    def horizon_polled(self, *, held_seconds: float, blockers: int) -> None:
        """Keep the age of a held horizon and how many hold it, and the watch's heartbeat."""
        self._held_seconds = held_seconds
        self._metrics.horizon_held_seconds.set(held_seconds)
        self._metrics.horizon_blockers.set(blockers)
        self.beat("horizon")

    def horizon_held(self, blockers: Sequence[OpenTransaction], *, held_seconds: float) -> None:
        """Name who holds up new messages."""
        self._logger.warning(
            events.HORIZON_HELD,
            held_seconds=round(held_seconds, 3),
            blockers=[asdict(blocker) for blocker in blockers],
        )

    def horizon_released(self) -> None:
        """Log that messages flow in order again."""
        self._logger.info(events.HORIZON_RELEASED)

    def writers_given_up(self, writers: Sequence[OpenTransaction]) -> None:
        """Name the writers whose messages will come late and unordered."""
        self._metrics.given_up_writers.inc(len(writers))
        for writer in writers:
            self._logger.error(events.WRITER_GIVEN_UP, **asdict(writer))

    def topic_held(self, topic: str, *, reason: str) -> None:
        """Log that messages of *topic* wait."""
        with self._lock:
            self._lost["topic"].setdefault(topic, time.monotonic())
        self._metrics.held_topics.set(len(self._lost["topic"]))
        self._logger.error(events.TOPIC_HELD, topic=topic, reason=reason)

    def topic_released(self, topic: str) -> None:
        """Log that messages of *topic* flow again."""
        with self._lock:
            self._lost["topic"].pop(topic, None)
        self._metrics.held_topics.set(len(self._lost["topic"]))
        self._logger.info(events.TOPIC_RELEASED, topic=topic)

    def partitions_changed(self, topic: str, *, partitions: int) -> None:
        """Log that keys of *topic* may go to other partitions than before, when the first lane notices it."""
        with self._lock:
            is_news = self._partitions.get(topic) != partitions
            self._partitions[topic] = partitions
        if is_news:
            self._logger.warning(events.PARTITIONS_CHANGED, topic=topic, partitions=partitions)

    def kafka_lost(self, thread: str, reason: str) -> None:
        """Log the loss when the first lane notices it."""
        self._part_lost("kafka", thread, events.KAFKA_LOST, reason=reason)

    def kafka_recovered(self, thread: str) -> None:
        """Log the recovery when the last lane has noticed it."""
        self._part_recovered("kafka", thread, events.KAFKA_RECOVERED)

    def database_lost(self, thread: str, error: Exception) -> None:
        """Log the loss when the first thread notices it."""
        self._part_lost("database", thread, events.DATABASE_LOST, reason=str(error))

    def database_recovered(self, thread: str) -> None:
        """Log the recovery when the last thread has noticed it."""
        self._part_recovered("database", thread, events.DATABASE_RECOVERED)

    def thread_failed(self, thread: str, error: Exception) -> None:
        """Log an error that nobody expected, with its traceback."""
        self._logger.error(events.THREAD_FAILED, thread=thread, error=repr(error), exc_info=error)

    def failpoints_armed(self, failpoints: str) -> None:
        """Log that this relay was told to fail."""
        self._logger.warning(events.FAILPOINTS_ARMED, failpoints=failpoints)

    def failpoint_reached(self, point: str, action: str) -> None:
        """Log what happens now, for after a kill nothing tells any more."""
        self._logger.warning(events.FAILPOINT_REACHED, point=point, action=action)

    def _part_lost(self, part: str, thread: str, event: str, **facts: object) -> None:
        with self._lock:
            is_first = not self._lost[part]
            is_news = thread not in self._lost[part]
            self._lost[part].setdefault(thread, time.monotonic())
        if is_news:
            self._metrics.lost_connections.labels(part).inc()
        if is_first:
            self._metrics.is_up.labels(part).set(0)
            self._logger.error(event, thread=thread, **facts)

    def _part_recovered(self, part: str, thread: str, event: str) -> None:
        with self._lock:
            was_lost_at = self._lost[part].pop(thread, None)
            is_last = not self._lost[part]
            self._seen.add(part)
        if is_last:
            self._metrics.is_up.labels(part).set(1)
        if is_last and was_lost_at is not None:
            self._logger.info(event, after_seconds=round(time.monotonic() - was_lost_at, 3))

    def beat(self, thread: str) -> None:
        """Note that *thread* is alive."""
        if thread not in self._beats:
            self._metrics.beat_age.labels(thread).set_function(lambda: time.monotonic() - self._beats[thread])
        self._beats[thread] = time.monotonic()

    def is_lost(self, part: str) -> bool:
        """Tell whether any thread has lost *part*."""
        return bool(self._lost[part])

    def lost_for(self, part: str) -> float:
        """Give the seconds since *part* was lost, 0 while it is in working order."""
        with self._lock:
            return max((time.monotonic() - since for since in self._lost[part].values()), default=0.0)

    def why_not_alive(self) -> list[str]:
        """Tell which threads have shown no life; a part that is away is no reason."""
        now = time.monotonic()
        return [
            f"thread {thread} has not moved for {now - at:.0f} s"
            for thread, at in list(self._beats.items())
            if now - at > self._live_max_age
        ]

    def why_not_ready(self) -> list[str]:
        """Tell why the relay publishes nothing now; empty when it is ready."""
        reasons = self.why_not_alive()
        if self._is_draining:
            reasons.append("draining")
        for part in ("database", "kafka"):
            if part not in self._seen:
                reasons.append(f"{part} has not been reached yet")
            elif self._lost[part]:
                reasons.append(f"{part} is away")
        return reasons + self._why_not_moving()

    def _why_not_moving(self) -> list[str]:
        """
        Tell where messages wait that nobody publishes, and for how long.

        When the backlog cannot be read, it is enough that this relay publishes.
        """
        max_age, now = self._ready_max_age, time.monotonic()
        if not max_age:
            return []
        reasons = self._progress.why_stuck(now=now, max_age=max_age)
        silent_for = now - max(self._progress.known_until, self._settled_at)
        if silent_for > max_age:
            reasons.append(f"nothing was published for {silent_for:.0f} s, and what waits cannot be read")
        if reasons and self._held_seconds > _HELD_SECONDS:
            reasons.append(f"open writers have held up new messages for {self._held_seconds:.0f} s")
        return reasons

    def _is_publishable(self, head: Head) -> bool:
        """
        Tell whether the message waits for nothing that has a reason, a metric and an event of its own.

        A message whose topic is held waits behind the mark. Above it, it would be the shard that stands still.
        """
        if self.is_lost("kafka") or self.is_lost("database"):
            return False
        try:
            return head.state == "unpublished" or self._topic_of(head.aggregate_type) not in self._lost["topic"]
        except OutboxRelayError:
            return True  # no topic at all: it is about to be parked
