"""
The loop: one lane is one thread, one connection and one producer.

    horizon -> BEGIN -> claim shards -> (read -> publish -> settle) ... -> record marks, COMMIT -> again

One transaction, with all its batches, is a stint. Lanes and processes share nothing but the database. This file alone
decides what a failure means: the stages take values and return values.
"""

from __future__ import annotations

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
from outbox_relay.relay.claim import Claim, ClaimOptions, claim_shards
from outbox_relay.relay.failpoints import DISARMED, Failpoints
from outbox_relay.relay.failures import HELD_BACK, Backoff, Failure, Outcome, Scope
from outbox_relay.relay.holds import HeldTopics
from outbox_relay.relay.message import Addressing, OnPoison, prepare
from outbox_relay.relay.read import Limits, fewer, next_limits, read_messages, read_waiting
from outbox_relay.relay.session import work_until_stopped
from outbox_relay.relay.settle import Settlement, decide, forget_waiting, record_marks, set_aside
from outbox_relay.relay.shards import SHARDS
from outbox_relay.relay.stint import Stint

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

    from psycopg import Connection

    from outbox_relay.observe.metrics import RepublishCause
    from outbox_relay.observe.telemetry import Telemetry
    from outbox_relay.relay.message import Message
    from outbox_relay.relay.publish import Publisher
    from outbox_relay.relay.read import Batch
    from outbox_relay.relay.shards import Shards
    from outbox_relay.relay.watch import HorizonWatch, Reached

_REST_SECONDS = 0.025  # while another process holds the shards that have work: if it dies, they are free at once
_LOOK_SECONDS = 1.0  # between looks for waiting messages that somebody has released, or that another relay has left
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
        claim: How the database is used.
        limits: What one read may return.
        addressing: Where messages go.
        on_poison: Park the later messages of a key behind a message that Kafka will never take, or skip that one only.
        publish_deadline: Seconds from a read to the last acknowledgement that is waited for.
        stint_seconds: How long the batches of a stint may take together. A crash repeats one stint at most; shorter
            stints write more marks.
        stint_messages: Messages after which a stint ends, however short it was.
        linger_seconds: How long a stint waits for new messages before it ends.
        busy_shards: Shards that a lane holds at most while it has more work than a stint can do: other lanes find some.
        failpoints: What a test of faults wants to happen.
    """

    claim: ClaimOptions = field(default_factory=ClaimOptions)
    limits: Limits = field(default_factory=Limits)
    addressing: Addressing = field(default_factory=Addressing)
    on_poison: OnPoison = "park"
    publish_deadline: float = 15.0
    stint_seconds: float = 0.1
    stint_messages: int = 5000
    linger_seconds: float = 0.02
    busy_shards: int = 4
    failpoints: Failpoints = DISARMED


class Lane:
    """Works off stint after stint until it is stopped."""

    def __init__(
        self,
        name: str,
        *,
        options: LaneOptions,
        connect: Callable[[], Connection],
        publisher: Publisher,
        watch: HorizonWatch,
        shards: Shards,
        telemetry: Telemetry,
        stop: threading.Event,
    ) -> None:
        self.name = name
        self._options = options
        self._connect = connect
        self._publisher = publisher
        self._watch = watch
        self._shards = shards
        self._telemetry = telemetry
        self._stop = stop
        self._chance = random.Random()  # noqa: S311 -- jitter, no secret
        self._holds = HeldTopics(self._chance)
        self._conflict_backoff = Backoff()
        self._kafka_backoff = Backoff()
        self._kafka_is_ready = False
        self._rebuilt_producers = 0
        self._limits = options.limits
        self._is_busy = False
        self._is_careful = False
        self._look_at = 0.0
        self._reach = options.failpoints.reach

    @property
    def held_topics(self) -> list[str]:
        """Topics whose messages wait because the topic cannot be written to."""
        return self._holds.topics

    def run(self) -> None:
        """Work until stopped. The stint in hand is recorded first; nothing is claimed after the stop."""
        work_until_stopped(
            self.name,
            schema=self._options.claim.schema,
            connect=self._connect,
            work=self._work,
            lose=self._lose,
            telemetry=self._telemetry,
            stop=self._stop,
        )
        self._publisher.close()

    def look_soon(self) -> None:
        """Look for waiting messages in the next stint."""
        self._look_at = 0.0

    def _lose(self, error: Exception) -> None:
        """Trust nothing that was known of the server; after an unforeseen error, nor the producer."""
        self._watch.reset()
        self._shards.forget()
        self._be_careful(is_too_large=False)
        if not isinstance(error, OutboxRelayError):
            self._publisher.close()

    def _work(self, connection: Connection) -> None:
        """Take turns on one connection until it breaks or the lane is stopped."""
        self._look_at = 0.0
        while not self._stop.is_set():
            self._await_kafka()
            self._telemetry.beat(self.name)
            self._count_rebuilt_producers()
            try:
                self._probe_held_topics()
                for topic, partitions in self._publisher.changed_partitions().items():
                    self._telemetry.partitions_changed(topic, partitions=partitions)
                if self._shards.await_free(timeout=_MOST_WAIT_SECONDS):
                    reached = self._await_work()
                    if reached is None:
                        continue
                    self._await_kafka()  # another lane may have found it gone meanwhile
                    if not self._stop.is_set():
                        self._turn(connection, reached)
            except DatabaseConflict as error:
                self._be_careful(is_too_large=isinstance(error, AnswerTooLarge))
                self._shards.forget()
                roll_back(connection)
                self._telemetry.claim_conflicted(self.name, error)
                self._stop.wait(self._conflict_backoff.next_pause(self._chance))
            except KafkaUnavailable as error:
                self._kafka_is_ready = False  # noted first: the rollback may fail
                roll_back(connection)
                self._lose_kafka(str(error))

    def _await_work(self) -> Reached | None:
        """Wait until the horizon is beyond what is drained, or a look is due; return it, or None if neither is so."""
        drained = self._shards.drained_for(self.name)
        until_look = self._look_at - time.monotonic()
        timeout = until_look if 0 < until_look < _MOST_WAIT_SECONDS else _MOST_WAIT_SECONDS
        reached = self._watch.wait_beyond(drained, timeout=timeout, has_other_work=self._is_look_due)
        has_work = reached.through > drained or self._is_look_due()
        return reached if reached.through and has_work else None

    def _is_look_due(self) -> bool:
        return time.monotonic() >= self._look_at

    def _turn(self, connection: Connection, reached: Reached) -> None:
        """Claim shards that no other lane of the process holds, and work on them for one stint."""
        candidates = self._shards.take(self.name)
        try:
            if candidates:
                self._claim(connection, reached, candidates)
        finally:
            self._shards.keep(self.name, ())

    def _claim(self, connection: Connection, reached: Reached, candidates: Sequence[int]) -> None:
        self._reach("before_claim")
        began = time.monotonic()
        looks_for_waiting = self._is_look_due()
        claim = claim_shards(
            connection,
            options=self._options.claim,
            reached=reached,
            candidates=candidates,
            most=min(self._limits.shards, self._options.busy_shards if self._is_busy else SHARDS),
            takes_all=not self._is_busy and self._limits.shards == SHARDS,
            looks_for_waiting=looks_for_waiting,
            held_types=self._holds.aggregate_types,
        )
        if not claim.is_of_epoch:
            self._lose_epoch()
            return
        self._shards.keep(self.name, [work.shard for work in claim.held])
        has_work = {work.shard for work in (*claim.held, *claim.missed)}
        self._shards.drain((shard for shard in candidates if shard not in has_work), through=reached.through)
        if looks_for_waiting and not any(work.has_waiting for work in (*claim.held, *claim.missed)):
            self._look_at = time.monotonic() + _LOOK_SECONDS
        self._reach("after_claim")
        if claim.held:
            self._work_off(connection, claim, reached, clock=claim.began_at - began)
        elif claim.missed:
            self._stop.wait(_REST_SECONDS)

    def _lose_epoch(self) -> None:
        """Begin anew: the numbers that the horizon was found for are not those of this transaction."""
        self._watch.reset()
        self._shards.forget()

    def _work_off(self, connection: Connection, claim: Claim, reached: Reached, *, clock: float) -> None:
        """Publish batch after batch of the held shards, then record the marks. What fails before that is read again."""
        stint = Stint(claim.marks, on_poison=self._options.on_poison, has_pending=bool(claim.have_pending))
        try:
            lost, drained_through = self._publish_batches(connection, claim, stint, reached, clock=clock)
            self._record(connection, stint)
        except Exception as error:
            self._telemetry.messages_republished(stint.acknowledged, cause=_LOST_MARKS.get(type(error), "error"))
            raise
        if drained_through:
            self._shards.drain((work.shard for work in claim.held), through=drained_through)
        self._is_busy = not drained_through and stint.messages >= self._options.stint_messages // 5
        if lost is not None:
            self._lose_kafka(lost.text)

    def _publish_batches(
        self, connection: Connection, claim: Claim, stint: Stint, reached: Reached, *, clock: float
    ) -> tuple[Failure | None, int]:
        """Publish until the stint is over; return what loses Kafka, and through which number nothing is left, or 0."""
        ends_at = time.monotonic() + self._options.stint_seconds
        is_first = True
        lost, most = None, self._options.limits
        try:
            if claim.has_waiting:
                lost, most = self._publish_waiting(connection, claim, stint, clock=clock)
            while lost is None:
                through = reached.through
                batch, lost = self._publish_next(connection, claim, stint, through=through, clock=clock)
                if is_first:
                    _pass_late(claim, batch, through=through)
                    is_first = False
                has_more = batch.may_have_more(self._limits, shards=len(claim.held))
                self._limits = next_limits(self._limits, batch, most=most)
                self._is_careful &= self._limits != self._options.limits
                if self._is_over(stint, ends_at=ends_at):
                    return lost, 0 if has_more else through
                if not has_more:
                    later = self._linger(reached, ends_at=ends_at)
                    if later is None:
                        return lost, through
                    reached = later
        except KafkaUnavailable as error:
            lost = Failure(Scope.CONNECTION, "unavailable", str(error))
        return lost, 0

    def _linger(self, reached: Reached, *, ends_at: float) -> Reached | None:
        """Wait a little for the horizon to move; return it, or None when the stint had better end."""
        rest = min(self._options.linger_seconds, ends_at - time.monotonic())
        if self._is_busy or rest <= 0:
            return None
        later = self._watch.wait_beyond(reached.through, timeout=rest)
        return later if later.epoch == reached.epoch and later.through > reached.through else None

    def _is_over(self, stint: Stint, *, ends_at: float) -> bool:
        """Tell whether the stint has done its part, or has set aside what the next one can send."""
        return (
            self._stop.is_set()
            or self._is_careful
            or self._can_send_aside(stint)
            or time.monotonic() > ends_at
            or stint.messages >= self._options.stint_messages
            or stint.stored_bytes >= self._options.limits.stored_bytes
        )

    def _can_send_aside(self, stint: Stint) -> bool:
        held = self._holds.aggregate_types
        return any(aside.state == "waiting" and aside.message.aggregate_type not in held for aside in stint.asides)

    def _publish_waiting(
        self, connection: Connection, claim: Claim, stint: Stint, *, clock: float
    ) -> tuple[Failure | None, Limits]:
        """
        Send one batch of the messages that wait in outbox_pending.

        Return the failure that loses Kafka, if any, and what the next reads may return at most: were it not for that, a
        message that cannot be read would be met again and again while there are no new ones.
        """
        schema = self._options.claim.schema
        started = time.monotonic()
        batch = read_waiting(
            connection, claim, schema=schema, held_types=self._holds.aggregate_types, limits=self._limits
        )
        forget_waiting(connection, batch.gone, schema=schema)
        settlement, outcomes = self._publish(batch.messages, stint, started=started, clock=clock)
        forget_waiting(connection, settlement.published, schema=schema)
        set_aside(connection, settlement.parked, schema=schema)
        stint.take_in_waiting(settlement)
        self._telemetry.messages_parked(self.name, settlement.parked)
        most = next_limits(self._limits, batch, most=self._options.limits)
        return self._react(batch.messages, outcomes), most

    def _publish_next(
        self, connection: Connection, claim: Claim, stint: Stint, *, through: int, clock: float
    ) -> tuple[Batch, Failure | None]:
        """Send the next batch above the marks; return it, and the failure that loses Kafka."""
        started = time.monotonic()
        batch = read_messages(
            connection, claim, schema=self._options.claim.schema, through=through, limits=self._limits
        )
        self._reach("after_read")
        settlement, outcomes = self._publish(batch.messages, stint, started=started, clock=clock)
        stint.take_in(batch.messages, settlement)
        return batch, self._react(batch.messages, outcomes)

    def _publish(
        self, messages: Sequence[Message], stint: Stint, *, started: float, clock: float
    ) -> tuple[Settlement, list[Outcome]]:
        """Send what may be sent, and decide what becomes of each message."""
        if not messages:
            return Settlement(), []
        read_at = time.monotonic()
        self._telemetry.beat(self.name)
        prepared = prepare(
            messages,
            addressing=self._options.addressing,
            on_poison=self._options.on_poison,
            held_types=self._holds.aggregate_types,
            why_held_back=stint.why_held_back if stint.may_hold_back else None,
        )
        reported = self._publisher.publish(prepared.records, deadline=started + self._options.publish_deadline)
        for index, outcome in zip(prepared.indexes, reported, strict=True):
            prepared.outcomes[index] = outcome
        published_at = time.monotonic()
        self._telemetry.beat(self.name)
        self._reach("before_settle")
        settlement = decide(messages, prepared.outcomes, on_poison=self._options.on_poison)
        overtaking = prepared.outcomes.count(None) - len(settlement.published)
        self._telemetry.messages_republished(overtaking, cause="order")
        self._telemetry.batch_published(
            self.name,
            settlement.published,
            acknowledged_at=clock + published_at,
            read_seconds=read_at - started,
            publish_seconds=published_at - read_at,
        )
        return settlement, prepared.outcomes

    def _record(self, connection: Connection, stint: Stint) -> None:
        """Record the stint; of a lost COMMIT nobody knows whether it took place."""
        schema = self._options.claim.schema
        self._reach("before_record")
        started = time.monotonic()
        set_aside(connection, stint.asides, schema=schema)
        marks = record_marks(connection, stint.marks, schema=schema)
        self._reach("after_commit")
        self._conflict_backoff.reset()
        self._telemetry.marks_recorded(marks, messages=stint.messages, seconds=time.monotonic() - started)
        self._telemetry.messages_parked(self.name, [aside for aside in stint.asides if aside.state == "parked"])
        if self._can_send_aside(stint):
            self._look_at = 0.0

    def _be_careful(self, *, is_too_large: bool) -> None:
        """Read fewer messages, and let a stint be one batch, or each refusal repeats the batches before it."""
        self._limits = fewer(self._limits, is_too_large=is_too_large)
        self._is_careful = True

    def _react(self, messages: Sequence[Message], outcomes: Sequence[Outcome]) -> Failure | None:
        """Draw the consequences of what was not acknowledged; return the failure that loses Kafka, if there is one."""
        if outcomes.count(None) == len(outcomes) and not self._holds:
            if outcomes:
                self._kafka_backoff.reset()
            return None
        failed = [
            (message, outcome)
            for message, outcome in zip(messages, outcomes, strict=True)
            if outcome is not None and outcome not in HELD_BACK
        ]
        if None in outcomes:
            self._kafka_backoff.reset()
        self._telemetry.deliveries_failed(Counter((outcome.code, outcome.scope) for _, outcome in failed))
        self._hold_topics(failed)
        if self._holds and None in outcomes:
            self._forgive_topics(messages, outcomes)
        return next((outcome for _, outcome in failed if outcome.scope is Scope.CONNECTION), None)

    def _hold_topics(self, failed: Sequence[tuple[Message, Failure]]) -> None:
        """Send nothing more to topics that are away."""
        for message, outcome in failed:
            if outcome.scope is Scope.TOPIC:
                topic = self._options.addressing.topic(message.aggregate_type)
                if self._holds.hold(topic, aggregate_type=message.aggregate_type, now=time.monotonic()):
                    self._telemetry.topic_held(topic, reason=outcome.reason)

    def _forgive_topics(self, messages: Sequence[Message], outcomes: Sequence[Outcome]) -> None:
        """Forget that topics were held which have taken a message since."""
        taken = {message.aggregate_type for message, outcome in zip(messages, outcomes, strict=True) if outcome is None}
        self._holds.acknowledged(map(self._options.addressing.topic, taken))

    def _probe_held_topics(self) -> None:
        """Release the held topics that are back."""
        for topic in self._holds.due(now=time.monotonic()):
            if self._publisher.unavailable([topic]):
                self._holds.postpone(topic, now=time.monotonic())
                continue
            self._holds.release(topic)
            self._look_at = 0.0
            self._telemetry.topic_released(topic)

    def _await_kafka(self) -> None:
        """Probe until Kafka answers. No transaction is open meanwhile: an outage holds no lock and no snapshot."""
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

    def _lose_kafka(self, reason: str) -> None:
        self._kafka_is_ready = False
        self._count_rebuilt_producers()
        self._telemetry.kafka_lost(self.name, reason)
        self._stop.wait(self._kafka_backoff.next_pause(self._chance))

    def _count_rebuilt_producers(self) -> None:
        rebuilt = self._publisher.producers_rebuilt
        self._telemetry.producers_rebuilt(rebuilt - self._rebuilt_producers)
        self._rebuilt_producers = rebuilt


def _pass_late(claim: Claim, batch: Batch, *, through: int) -> None:
    """Move the marks of shards in which only messages of given-up writers are left, for no mark counts those."""
    for work in claim.held:
        is_ahead = work.first_no is not None and work.first_no > claim.marks.through[work.shard]
        if is_ahead and work.shard not in batch.shards:
            claim.marks.pass_nothing(work.shard, through=through)
