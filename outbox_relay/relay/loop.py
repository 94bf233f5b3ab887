"""
The loop: one lane is one thread, one connection and one producer.

    horizon -> BEGIN -> claim -> publish -> settle -> COMMIT -> again

Lanes and processes share nothing but the database. This file alone decides what a failure means: the stages take
values and return values.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from outbox_relay.database import roll_back
from outbox_relay.errors import (
    AnswerTooLarge,
    DatabaseConflict,
    DatabaseUnavailable,
    KafkaUnavailable,
    OutboxRelayError,
)
from outbox_relay.relay.claim import Batch, ClaimOptions, Floors, claim, fewer, next_limits
from outbox_relay.relay.failpoints import DISARMED, Failpoints
from outbox_relay.relay.failures import Backoff, Failure, Outcome, Scope
from outbox_relay.relay.holds import HeldTopics
from outbox_relay.relay.message import Addressing, OnPoison, prepare
from outbox_relay.relay.session import work_until_stopped
from outbox_relay.relay.settle import Settlement, SettleMode, decide, settle

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Mapping, Sequence

    from psycopg import Connection

    from outbox_relay.observe.metrics import RepublishCause
    from outbox_relay.observe.telemetry import Telemetry
    from outbox_relay.relay.message import Message
    from outbox_relay.relay.publish import Publisher
    from outbox_relay.relay.watch import HorizonWatch

_RETRY_CLAIM_SECONDS = 0.05  # when another lane holds shards that have work: if it dies, they are free at once
_MOST_WAIT_SECONDS = 1.0  # between heartbeats, and between probes of held topics
_LOST_MARKS: dict[type[Exception], RepublishCause] = {
    DatabaseConflict: "conflict",
    DatabaseUnavailable: "connection",
}


@dataclass(frozen=True, slots=True)
class LaneOptions:
    """
    How a lane works.

    Attributes:
        claim: What one claim may take.
        addressing: Where messages go.
        settle: Mark published messages, or delete them.
        on_poison: Park the later messages of a key behind a message that Kafka will never take, or skip that one only.
        publish_deadline: Seconds from the claim to the last acknowledgement that is waited for.
        sweep_interval: Seconds between claims that look at every unpublished message again, for late ones.
        failpoints: What a test of faults wants to happen.
    """

    claim: ClaimOptions = field(default_factory=ClaimOptions)
    addressing: Addressing = field(default_factory=Addressing)
    settle: SettleMode = "mark"
    on_poison: OnPoison = "park"
    publish_deadline: float = 15.0
    sweep_interval: float = 5.0
    failpoints: Failpoints = DISARMED


class Lane:
    """Claims, publishes and settles batch after batch until it is stopped."""

    def __init__(
        self,
        name: str,
        *,
        options: LaneOptions,
        connect: Callable[[], Connection],
        publisher: Publisher,
        watch: HorizonWatch,
        telemetry: Telemetry,
        stop: threading.Event,
    ) -> None:
        self.name = name
        self.drained_through = 0
        self._options = options
        self._connect = connect
        self._publisher = publisher
        self._watch = watch
        self._telemetry = telemetry
        self._stop = stop
        self._chance = random.Random()  # noqa: S311 -- jitter, no secret
        self._holds = HeldTopics(self._chance)
        self._conflict_backoff = Backoff()
        self._kafka_backoff = Backoff()
        self._kafka_is_ready = False
        self._rebuilt_producers = 0
        self._limits = options.claim
        self._reach = options.failpoints.reach
        self._forget()

    @property
    def held_topics(self) -> list[str]:
        """Topics whose messages wait because the topic cannot be written to."""
        return self._holds.topics

    def run(self) -> None:
        """Work until stopped. The batch in hand is finished first; nothing is claimed after the stop."""
        work_until_stopped(
            self.name,
            schema=self._limits.schema,
            connect=self._connect,
            work=self._work,
            lose=self._lose,
            telemetry=self._telemetry,
            stop=self._stop,
        )
        self._publisher.close()

    def _lose(self, error: Exception) -> None:
        """Trust nothing that was known of the server; after an unforeseen error, nor the producer."""
        self._watch.reset()
        if not isinstance(error, OutboxRelayError):
            self._publisher.close()

    def _forget(self) -> None:
        """Start as if new: behind a new connection may be another server."""
        self._floors = Floors()
        self._claimed_through = 0
        self._claim_at = math.inf
        self._sweep_at = 0.0
        self._late_writers_seen = self._watch.late_writers_ended

    def _work(self, connection: Connection) -> None:
        """Take turns on one connection until it breaks or the lane is stopped."""
        self._forget()
        while not self._stop.is_set():
            self._await_kafka()
            self._telemetry.beat(self.name)
            self._count_rebuilt_producers()
            try:
                self._probe_held_topics()
                for topic, partitions in self._publisher.changed_partitions().items():
                    self._telemetry.partitions_changed(topic, partitions=partitions)
                through = self._await_work()
                if through is not None and not self._stop.is_set():
                    self._turn(connection, through=through)
            except DatabaseConflict as error:
                self._limits = fewer(self._limits, is_too_large=isinstance(error, AnswerTooLarge))
                roll_back(connection)
                self._telemetry.claim_conflicted(self.name, error)
                self._stop.wait(self._conflict_backoff.next_pause(self._chance))
            except KafkaUnavailable as error:
                self._kafka_is_ready = False  # noted first: the rollback may fail
                roll_back(connection)
                self._lose_kafka(str(error))

    def _await_work(self) -> int | None:
        """Wait until the horizon moves, or a claim or a sweep is due; give the horizon, or None if nothing is."""
        if self._watch.late_writers_ended != self._late_writers_seen:
            self._sweep_at = 0.0
        due_at = min(self._claim_at, self._sweep_at)
        is_known = self._watch.through > 0
        timeout = min(due_at - time.monotonic(), _MOST_WAIT_SECONDS) if is_known else _MOST_WAIT_SECONDS
        through = self._watch.wait_beyond(self._claimed_through, timeout=max(timeout, 0.0))
        is_due = through > self._claimed_through or time.monotonic() >= due_at
        return through if through and is_due else None

    def _turn(self, connection: Connection, *, through: int) -> None:
        """Claim, publish, settle, commit. Nothing is remembered before the commit: what fails is claimed again."""
        started = time.monotonic()
        swept_floors = self._begin_sweep(now=started)
        self._reach("before_claim")
        batch = claim(
            connection,
            options=self._limits,
            through=through,
            floors=self._floors,
            held_types=self._holds.aggregate_types,
        )
        claimed = time.monotonic()
        if batch.may_have_more(self._limits):
            self._watch.wake_one()
        if swept_floors is not None:
            self._end_sweep(batch, swept_floors, seconds=claimed - started)
        if not batch.messages:
            self._remember(batch, Settlement(), {}, through=through)
            return
        self._reach("after_claim")
        self._telemetry.beat(self.name)
        outcomes = self._publish(batch.messages, deadline=started + self._options.publish_deadline)
        published = time.monotonic()
        self._telemetry.beat(self.name)
        self._reach("before_settle")
        settlement = decide(batch.messages, outcomes, on_poison=self._options.on_poison)
        generations = self._settle(connection, settlement, acknowledged=outcomes.count(None))
        self._reach("after_commit")
        self._remember(batch, settlement, generations, through=through)
        self._telemetry.batch_published(
            self.name,
            settlement,
            acknowledged_at=batch.began_at + published - started,
            claim_seconds=claimed - started,
            publish_seconds=published - claimed,
            settle_seconds=time.monotonic() - published,
        )
        self._react(batch.messages, outcomes)

    def _publish(self, messages: Sequence[Message], *, deadline: float) -> list[Outcome]:
        """Send what can be sent; give the outcome of each message."""
        prepared = prepare(messages, addressing=self._options.addressing, on_poison=self._options.on_poison)
        reported = self._publisher.publish(prepared.records, deadline=deadline)
        for index, outcome in zip(prepared.indexes, reported, strict=True):
            prepared.outcomes[index] = outcome
        return prepared.outcomes

    def _settle(self, connection: Connection, settlement: Settlement, *, acknowledged: int) -> dict[int, int]:
        """Settle, and count what is in Kafka and stays unmarked; of a lost COMMIT nobody knows whether it is."""
        try:
            generations = settle(
                connection, schema=self._limits.schema, settlement=settlement, mode=self._options.settle
            )
        except Exception as error:
            self._telemetry.messages_republished(acknowledged, cause=_LOST_MARKS.get(type(error), "error"))
            self._limits = fewer(self._limits, is_too_large=False)  # for each refusal sends all of them again
            raise
        self._telemetry.messages_republished(acknowledged - len(settlement.published), cause="order")
        return generations

    def _remember(
        self,
        batch: Batch,
        settlement: Settlement,
        new_generations: Mapping[int, int],
        *,
        through: int,
    ) -> None:
        """Raise the floors, and decide when to claim next and how much."""
        ends = {message.shard: message.sequence_no for message in batch.messages}
        ends |= {message.shard: message.sequence_no - 1 for message in reversed(settlement.unsettled)}
        ends |= dict.fromkeys(batch.drained, through)
        for shard, end in ends.items():
            generation = new_generations.get(shard, batch.generations[shard])
            self._floors.remember(shard, generation=generation, settled_through=end)
        self._claimed_through = through
        self._claim_at = math.inf
        if batch.may_have_more(self._limits) or settlement.unsettled:
            self._claim_at = 0.0
        elif batch.waiting:
            self._claim_at = time.monotonic() + _RETRY_CLAIM_SECONDS
        elif not batch.messages:
            self.drained_through = through
        self._limits = next_limits(self._limits, batch, most=self._options.claim)
        self._conflict_backoff.reset()

    def _begin_sweep(self, *, now: float) -> list[int] | None:
        """Forget the floors when a sweep is due, so that the next claim finds late messages too."""
        if now < self._sweep_at:
            return None
        self._late_writers_seen = self._watch.late_writers_ended
        return self._floors.forget()

    def _end_sweep(self, batch: Batch, floors: Sequence[int], *, seconds: float) -> None:
        """
        Count the late messages and schedule the next sweep; it may take a twentieth of the time at most.

        Shards that other lanes held were not looked at: they keep their floors, and those lanes sweep them.
        """
        self._sweep_at = time.monotonic() + max(self._options.sweep_interval, 20 * seconds)
        self._floors.restore(floors, shards=batch.waiting)
        late = sum(message.sequence_no <= floors[message.shard] for message in batch.messages)
        if late and self._options.addressing.is_ordered:
            self._telemetry.late_messages_found(late)

    def _react(self, messages: Sequence[Message], outcomes: Sequence[Outcome]) -> None:
        """Draw the consequences of what was not acknowledged, with no transaction open."""
        failed = [
            (message, outcome) for message, outcome in zip(messages, outcomes, strict=True) if outcome is not None
        ]
        if len(failed) < len(messages):
            self._kafka_backoff.reset()
        self._telemetry.deliveries_failed(Counter((outcome.code, outcome.scope) for _, outcome in failed))
        self._hold_topics(failed)
        if self._holds and len(failed) < len(messages):
            self._forgive_topics(messages, outcomes)
        lost = next((outcome for _, outcome in failed if outcome.scope is Scope.CONNECTION), None)
        if lost is not None:
            self._lose_kafka(lost.text)

    def _hold_topics(self, failed: Sequence[tuple[Message, Failure]]) -> None:
        """Leave messages of unavailable topics out of the next claims."""
        for message, outcome in failed:
            if outcome.scope is Scope.TOPIC:
                topic = self._options.addressing.topic(message.aggregate_type)
                if self._holds.hold(topic, aggregate_type=message.aggregate_type, now=time.monotonic()):
                    self._telemetry.topic_held(topic, reason=outcome.reason)

    def _forgive_topics(self, messages: Sequence[Message], outcomes: Sequence[Outcome]) -> None:
        """Forget the past failures of topics that took a message."""
        acknowledged = {m.aggregate_type for m, outcome in zip(messages, outcomes, strict=True) if outcome is None}
        self._holds.acknowledged({self._options.addressing.topic(name) for name in acknowledged})

    def _probe_held_topics(self) -> None:
        """Ask the brokers about held topics whose time has come, and claim the messages of those that are back."""
        for topic in self._holds.due(now=time.monotonic()):
            if self._publisher.unavailable([topic]):
                self._holds.postpone(topic, now=time.monotonic())
                continue
            self._holds.release(topic)
            self._floors.forget()
            self._claim_at = 0.0
            self._telemetry.topic_released(topic)

    def _await_kafka(self) -> None:
        """Return when the brokers answer, or on the stop. No transaction is open meanwhile."""
        self._kafka_is_ready &= not self._telemetry.is_lost("kafka")  # another lane may have noticed
        while not self._kafka_is_ready and not self._stop.is_set():
            self._telemetry.beat(self.name)
            try:
                self._publisher.probe()
            except KafkaUnavailable as error:
                self._lose_kafka(str(error))
            else:
                self._kafka_is_ready = True
                self._telemetry.kafka_recovered(self.name)

    def _count_rebuilt_producers(self) -> None:
        rebuilt = self._publisher.producers_rebuilt
        self._telemetry.producers_rebuilt(rebuilt - self._rebuilt_producers)
        self._rebuilt_producers = rebuilt

    def _lose_kafka(self, reason: str) -> None:
        self._kafka_is_ready = False
        self._telemetry.kafka_lost(self.name, reason)
        self._stop.wait(self._kafka_backoff.next_pause(self._chance))
