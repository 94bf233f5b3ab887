"""Publish: hand records to Kafka in order and report what became of each. Nothing else here imports confluent_kafka."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from contextlib import suppress
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.cimpl import Producer  # tracing tools replace the other name by one that adds headers

from outbox_relay.errors import ConfigurationError, KafkaUnavailable
from outbox_relay.kafka_admin import find_refusal
from outbox_relay.relay.failpoints import DISARMED
from outbox_relay.relay.failures import NO_REPORT, WITHDRAWN, Failure, Outcome, Scope, scope_of

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from confluent_kafka import Message as DeliveredMessage
    from confluent_kafka.admin import ClusterMetadata

    from outbox_relay.relay.failpoints import Failpoints
    from outbox_relay.relay.message import Record

    ReadConfig = Callable[[], Mapping[str, "ProducerSetting"]]

ProducerSetting = str | int | float | bool

_ANY_PARTITION = -1  # the partitioner chooses
_ALONE_SECONDS = 60.0
_METADATA_SECONDS = 5.0
_PURGE_SECONDS = 2.0
_GAP_REFUSED = KafkaError._GAPLESS_GUARANTEE  # noqa: SLF001 -- librdkafka's names begin with an underscore
_WITHDRAWING_CODES = frozenset({"_PURGE_QUEUE", "_PURGE_INFLIGHT", "_FATAL"})
_TOO_LARGE = "MSG_SIZE_TOO_LARGE"
_WRONG_TIME = "INVALID_TIMESTAMP"
_DEFAULT_MESSAGE_BYTES = 1_000_000
_DEFAULT_REFRESH_MS = 300_000
_ERRORS_KEPT = 100
_TOPIC = attrgetter("topic")
_SINGLY: dict[str, ProducerSetting] = {"enable.gapless.guarantee": False, "linger.ms": 0, "batch.num.messages": 1}


class Publisher:
    """
    Sends batches of records; one per lane, used by one thread.

    A broker that refuses one message refuses the whole batch it came in, and every message of the batch is reported
    with the same error. So the topic of such a batch is sent for a minute by a second producer, one message of each key
    at a time: what is refused alone is guilty. A topic that could not be written to is sent like that until it takes a
    message: that it can be seen is no proof that it can be written to, and the others of its batch would be repeated.

    *read_config* is asked anew for each producer. One that gets no answer gives way to another, which sees the
    credentials and certificates that were rotated meanwhile.
    """

    def __init__(
        self, read_config: ReadConfig, *, logger: logging.Logger | None = None, failpoints: Failpoints = DISARMED
    ) -> None:
        self._together = _Sender(read_config, is_single=False, logger=logger, failpoints=failpoints)
        self._singly = _Sender(read_config, is_single=True, logger=logger, failpoints=failpoints)
        self._alone_until: dict[str, float] = {}
        self._unproven: set[str] = set()
        self._known_topics: set[str] = set()
        self._partitions: dict[str, int] = {}
        self._told_partitions: dict[str, int] = {}
        self._look_at = 0.0

    @property
    def producers_rebuilt(self) -> int:
        """How many producers have taken the place of one that had failed for good, or had to be purged."""
        return sum(max(0, sender.producers_built - 1) for sender in (self._together, self._singly))

    def probe(self) -> None:
        """
        Ask the brokers for metadata, which also connects and warms up the producer.

        Raises:
            KafkaUnavailable: No broker answered within five seconds.
        """
        self._together.read_metadata(next(iter(self._known_topics), None), timeout=_METADATA_SECONDS)

    def unavailable(self, topics: Iterable[str], *, timeout: float = _METADATA_SECONDS) -> dict[str, Failure]:
        """
        Tell which of *topics* cannot be written to; each is asked about once, until it fails.

        A record for a missing topic would otherwise wait in the producer, with the batch's locks, until the deadline.

        Raises:
            KafkaUnavailable: No broker answered within *timeout* seconds.
        """
        failures = {}
        for topic in set(topics) - self._known_topics:
            metadata = self._together.read_metadata(topic, timeout=timeout).topics[topic]
            error = metadata.error
            if error is None:
                self._known_topics.add(topic)
                self._partitions[topic] = len(metadata.partitions)
                self._told_partitions.setdefault(topic, len(metadata.partitions))
            else:
                failures[topic] = Failure(
                    Scope.TOPIC, error.name(), f'topic "{topic}": {error.str()}; create it or grant access'
                )
        return failures

    def changed_partitions(self) -> dict[str, int]:
        """
        Give the number of partitions of those topics that have another one since the last call.

        Topics are asked about as often as librdkafka does for itself, by topic.metadata.refresh.interval.ms; until it
        is time, the answer is empty.

        Raises:
            KafkaUnavailable: No broker answered within five seconds.
        """
        now = time.monotonic()
        if now < self._look_at:
            return {}
        self._look_at = now + self._together.refresh_seconds
        self._known_topics.clear()
        self.unavailable(self._partitions)
        changed = dict(self._partitions.items() - self._told_partitions.items())
        self._told_partitions = dict(self._partitions)
        return changed

    def publish(self, records: Sequence[Record], *, deadline: float) -> list[Outcome]:
        """
        Send *records* in order and wait for Kafka's reports until *deadline*, a `time.monotonic()`.

        The outcomes come in the order of the records. Per key, nothing behind a record that failed for good is
        written by this call; a record without a report may have been written all the same.

        Raises:
            KafkaUnavailable: No broker tells whether a topic that is new to us exists; nothing was sent.
        """
        timeout = min(_METADATA_SECONDS, max(0.0, deadline - time.monotonic()))
        topics = set(map(_TOPIC, records))
        missing = self.unavailable(topics, timeout=timeout)
        now = time.monotonic()
        alone = {topic for topic, until in self._alone_until.items() if until > now} | self._unproven
        if missing or not alone.isdisjoint(topics):
            outcomes, was_refused = self._send_apart(records, missing=missing, alone=alone, deadline=deadline)
        else:
            outcomes, was_refused = self._together.send(records, deadline=deadline)
        if was_refused:
            self._send_alone_from_now_on(records, outcomes)
        if outcomes.count(None) < len(outcomes):
            failed = {record.topic for record, outcome in zip(records, outcomes, strict=True) if _is_of_topic(outcome)}
            self._known_topics -= failed
            self._unproven |= failed
            if failed & alone:
                self._singly.drop()  # it refuses by itself what a broker refused once, for minutes
        return outcomes

    def _send_apart(
        self, records: Sequence[Record], *, missing: Mapping[str, Failure], alone: Collection[str], deadline: float
    ) -> tuple[list[Outcome], bool]:
        """Send nothing to the topics in *missing* and one message at a time to those in *alone*, the rest as usual."""
        outcomes: list[Outcome] = [missing.get(record.topic, WITHDRAWN) for record in records]
        sendable = [index for index, record in enumerate(records) if record.topic not in missing]
        singly = [index for index in sendable if records[index].topic in alone]
        self._send_singly(records, singly, outcomes, deadline=deadline)
        self._unproven -= {records[index].topic for index in singly if outcomes[index] is None}
        together = [index for index in sendable if records[index].topic not in alone]
        sent, was_refused = self._together.send([records[index] for index in together], deadline=deadline)
        for index, outcome in zip(together, sent, strict=True):
            outcomes[index] = outcome
        return outcomes, was_refused

    def _send_singly(
        self, records: Sequence[Record], indexes: Sequence[int], outcomes: list[Outcome], *, deadline: float
    ) -> None:
        """Send one message of each key at a time, and nothing behind one that failed."""
        queues: dict[tuple[str, str], deque[int]] = defaultdict(deque)
        for index in indexes:
            queues[records[index].topic, records[index].key].append(index)
        while queues and time.monotonic() < deadline:
            heads = [queue[0] for queue in queues.values()]
            sent, _ = self._singly.send([records[index] for index in heads], deadline=deadline)
            for index, outcome in zip(heads, sent, strict=True):
                outcomes[index] = outcome
            queues = {key: queue for key, queue in queues.items() if outcomes[queue.popleft()] is None and queue}

    def _send_alone_from_now_on(self, records: Sequence[Record], outcomes: Sequence[Outcome]) -> None:
        """Remember the topics that refused a batch; should no report say which, all those that it may have been."""
        failed = [
            (record.topic, outcome) for record, outcome in zip(records, outcomes, strict=True) if outcome is not None
        ]
        refusing = {topic for topic, outcome in failed if scope_of(outcome.code) is Scope.MESSAGE}
        if all(outcome is WITHDRAWN for _, outcome in failed):
            refusing = {topic for topic, _ in failed}
        self._alone_until |= dict.fromkeys(refusing, time.monotonic() + _ALONE_SECONDS)

    def close(self) -> None:
        """Drop the producers at once; whatever they still hold is thrown away and stays unpublished."""
        self._together.drop()
        self._singly.drop()


class _Sender:
    """
    One producer at a time, replaced after it failed for good.

    With `enable.gapless.guarantee` a refused batch makes the producer fail as a whole, before anything behind that
    batch is written. Without it, librdkafka goes on with a new epoch and later messages of the same key are accepted:
    a topic that took 2,000 bytes got the last 10 of 100 messages of a key and refused the 90 before.
    """

    def __init__(
        self, read_config: ReadConfig, *, is_single: bool, logger: logging.Logger | None, failpoints: Failpoints
    ) -> None:
        self._read_config = read_config
        self._is_single = is_single
        self._logger = logger
        self._failpoints = failpoints
        self._config: Mapping[str, ProducerSetting] = {}
        self._errors: deque[KafkaError] = deque(maxlen=_ERRORS_KEPT)
        self._producer: Producer | None = None
        self._reports = _Reports(failpoints)
        self.producers_built = 0

    @property
    def refresh_seconds(self) -> float:
        """How often librdkafka asks for the partitions of topics; infinite when it is told not to."""
        milliseconds = float(self._config.get("topic.metadata.refresh.interval.ms", _DEFAULT_REFRESH_MS))
        return milliseconds / 1000 if milliseconds > 0 else math.inf

    def read_metadata(self, topic: str | None, *, timeout: float) -> ClusterMetadata:
        """Give the brokers' word on *topic*, or on nothing in particular; raise KafkaUnavailable if none answers."""
        wanted = {"topic": topic} if topic else {}
        producer = self._open()
        self._errors.clear()
        try:
            metadata: ClusterMetadata = producer.list_topics(**wanted, timeout=timeout)
        except KafkaException as error:
            raise self._why_silent(producer, error.args[0], timeout=timeout) from error
        return metadata

    def _why_silent(self, producer: Producer, error: KafkaError, *, timeout: float) -> KafkaUnavailable:
        """
        Give the most telling error, and give up the producer: the next one reads credentials and certificates again.

        Not only after a refusal, for a broker that dislikes a client's certificate just closes the connection. Nothing
        is lost with the producer: between two batches it holds no message.
        """
        with suppress(KafkaException, SystemError):
            producer.poll(0)  # hands over the errors
        errors = [*self._errors, error]
        self.drop()
        telling = [each for each in errors if each.name() != "_ALL_BROKERS_DOWN"]
        cause = find_refusal(errors) or (telling or errors)[0]
        return KafkaUnavailable(f"no broker answered within {timeout:g} s: {cause.str()}")

    def send(self, records: Sequence[Record], *, deadline: float) -> tuple[list[Outcome], bool]:
        """Send *records*; return what became of each, and whether a batch was refused."""
        if not records:
            return [], False
        producer = self._open()
        reports = self._reports
        self._errors.clear()
        reports.expect(len(records))
        self._hand_over(producer, records, reports, deadline=deadline)
        self._failpoints.reach("after_produce")
        interruption = self._await_reports(producer, deadline=deadline)
        outcomes = reports.outcomes.copy()
        if interruption is None and outcomes.count(None) == len(outcomes):
            return outcomes, False  # as nearly always: no need to look at each
        if interruption is not None:
            self.drop()  # it has failed, or what was purged in flight has left a gap, which makes it fail
        for index, error in reports.errors.items():
            outcomes[index] = self._failure_reported(error)
        for index, outcome in enumerate(outcomes):
            if outcome is None:
                continue
            if interruption is not None and (outcome is NO_REPORT or outcome.code in _WITHDRAWING_CODES):
                outcomes[index] = interruption
            elif outcome.code == _TOO_LARGE:
                outcomes[index] = replace(outcome, reason=self._why_too_large(records[index]))
            elif outcome.code == _WRONG_TIME:
                outcomes[index] = replace(outcome, reason=_why_wrong_time(records[index]))
        return outcomes, interruption is WITHDRAWN

    def _hand_over(self, producer: Producer, records: Sequence[Record], reports: _Reports, *, deadline: float) -> None:
        """Give the records to librdkafka's queue, in order; stop at the deadline or a full queue."""
        produce, outcomes, now = producer.produce, reports.outcomes, time.monotonic
        stopped_keys: set[tuple[str, str]] = set()
        for index, ((topic, key, value, headers, timestamp_ms), take) in enumerate(
            zip(records, reports.takers, strict=False)
        ):
            if now() >= deadline:  # asked each time: a process that was frozen meanwhile must send nothing more
                break
            if stopped_keys and (topic, key) in stopped_keys:
                continue
            try:
                # By position, which takes a third less time: topic, value, key, partition, the callback by its old name
                # and by its new one, timestamp, headers.
                produce(topic, value, key, _ANY_PARTITION, take, take, timestamp_ms, headers)
            except BufferError:
                break
            except KafkaException as error:
                outcomes[index] = _failure(error.args[0])
                if error.args[0].fatal():
                    break
                stopped_keys.add((topic, key))
            else:
                outcomes[index] = NO_REPORT

    def _await_reports(self, producer: Producer, *, deadline: float) -> Failure | None:
        """
        Wait until every message is reported; give what cut the waiting short, if anything.

        A fatal error comes as an exception, mostly wrapped in a SystemError, and reports are still to be fetched after
        it.
        """
        interruption: Failure | None = None
        while len(producer) and time.monotonic() < deadline:
            remaining = max(0.0, deadline - time.monotonic())
            try:
                if self._is_single:
                    producer.poll(remaining)
                else:
                    producer.flush(remaining)
            except (KafkaException, SystemError) as error:
                interruption = _interruption(error)
                deadline = min(deadline, time.monotonic() + _PURGE_SECONDS)
        if len(producer):
            producer.purge()
            with suppress(KafkaException, SystemError):
                producer.flush(_PURGE_SECONDS)
            refusal = find_refusal(self._errors)
            interruption = interruption or (_failure(refusal) if refusal else NO_REPORT)
        return interruption

    def _failure_reported(self, error: KafkaError) -> Failure:
        failure = _failure(error)
        is_shared = failure.scope is Scope.MESSAGE and not self._is_single
        return replace(failure, scope=Scope.BATCH) if is_shared else failure

    def _why_too_large(self, record: Record) -> str:
        own = sum(len(_bytes(part)) for header in record.headers for part in header)
        size = len(_bytes(record.value)) + len(_bytes(record.key)) + own
        limit = self._config.get("message.max.bytes", _DEFAULT_MESSAGE_BYTES)
        return (
            f"the message is {size:,} bytes, more than the producer (message.max.bytes = {limit:,}) or the topic "
            f'"{record.topic}" (max.message.bytes) accepts: raise the limit or shrink the message'
        )

    def drop(self) -> None:
        """Give up the producer; what it still holds is lost to it, and unpublished."""
        if self._producer is not None:
            self._producer.purge()
            self._producer = None

    def _open(self) -> Producer:
        if self._producer is None:
            self._producer = self._build()
            self.producers_built += 1
        return self._producer

    def _build(self) -> Producer:
        """Make a producer of the configuration as it is now, certificates included."""
        self._reports = _Reports(self._failpoints)  # what the last producer may still report is not for this one
        try:
            self._config = {**self._read_config(), **(_SINGLY if self._is_single else {})}
            own: dict[str, object] = {"error_cb": self._errors.append}
            return Producer({**self._config, **own, **({"logger": self._logger} if self._logger else {})})
        except (ConfigurationError, KafkaException) as error:
            raise KafkaUnavailable(f"no producer can be made: {error}") from error


class _Reports:
    """
    What a producer reports of the records of a batch, by their positions.

    A callback is made once for each position, not for each message.

    Attributes:
        outcomes: Until its report comes, a record that was handed over has `NO_REPORT`, and any other `WITHDRAWN`.
        errors: What was reported of those that failed.
        takers: The callbacks, at least one for each record.
    """

    def __init__(self, failpoints: Failpoints) -> None:
        self.outcomes: list[Outcome] = []
        self.errors: dict[int, KafkaError] = {}
        self.takers: list[Callable[[KafkaError | None, DeliveredMessage], None]] = []
        self._take = failpoints.after(_take_report, point="after_report")

    def expect(self, records: int) -> None:
        """Begin a batch of so many *records*. The reports of the one before are all in."""
        self.outcomes[:] = [WITHDRAWN] * records
        self.errors.clear()
        for index in range(len(self.takers), records):
            self.takers.append(partial(self._take, self.outcomes, self.errors, index))


def _take_report(
    outcomes: list[Outcome],
    errors: dict[int, KafkaError],
    index: int,
    error: KafkaError | None,
    _message: DeliveredMessage,
) -> None:
    """
    Note a delivery report, and do nothing else.

    After a fatal error the driver calls this with an exception already set, which surfaces from `flush()` at the first
    call of a C function, or is lost if that one clears it. So nothing is called here, and nothing can raise.
    """
    if error is None:
        outcomes[index] = None
    else:
        errors[index] = error


def _interruption(error: KafkaException | SystemError) -> Failure:
    cause = error if isinstance(error, KafkaException) else error.__cause__
    if not isinstance(cause, KafkaException):
        return Failure(Scope.CONNECTION, "_FATAL", str(error))
    return WITHDRAWN if cause.args[0].code() == _GAP_REFUSED else _failure(cause.args[0])


def _why_wrong_time(record: Record) -> str:
    return (
        f"created_at is {record.timestamp_ms:,} ms after 1970, further from now than the topic"
        f' "{record.topic}" accepts (message.timestamp.after.max.ms, an hour ahead by default, and ...before.max.ms)'
    )


def _is_of_topic(outcome: Outcome) -> bool:
    return outcome is not None and outcome.scope is Scope.TOPIC


def _bytes(text: str | bytes | None) -> bytes:
    return text.encode() if isinstance(text, str) else text or b""


def _failure(error: KafkaError) -> Failure:
    return Failure(scope_of(error.name()), error.name(), error.str())
