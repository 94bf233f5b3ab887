"""Publish: hand records to Kafka in order and report what became of each. Nothing else here imports confluent_kafka."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from confluent_kafka import KafkaError, KafkaException, Producer

from outbox_relay.errors import KafkaUnavailable
from outbox_relay.relay.failures import NO_REPORT, WITHDRAWN, Failure, Outcome, Scope, scope_of

if TYPE_CHECKING:
    import logging
    from collections.abc import Iterable, Mapping, Sequence

    from confluent_kafka import Message as DeliveredMessage

    from outbox_relay.relay.message import Record

ProducerSetting = str | int | float | bool

_ALONE_SECONDS = 60.0
_METADATA_SECONDS = 5.0
_PURGE_SECONDS = 2.0
_GAP_REFUSED = KafkaError._GAPLESS_GUARANTEE  # noqa: SLF001 -- librdkafka's names begin with an underscore
_WITHDRAWING_CODES = frozenset({"_PURGE_QUEUE", "_PURGE_INFLIGHT", "_FATAL"})
_SINGLY: dict[str, ProducerSetting] = {"batch.num.messages": 1, "linger.ms": 0}


class Publisher:
    """
    Sends batches of records; one per lane, used by one thread.

    A broker that refuses one message refuses the whole batch it came in, and every message of the batch is reported
    with the same error. So the topic of such a batch is sent message by message for a minute, by a second producer:
    what is refused alone is guilty.
    """

    def __init__(self, config: Mapping[str, ProducerSetting], *, logger: logging.Logger | None = None) -> None:
        self._together = _Sender(config, refused_as=Scope.BATCH, logger=logger)
        self._singly = _Sender({**config, **_SINGLY}, refused_as=Scope.MESSAGE, logger=logger)
        self._alone_until: dict[str, float] = {}
        self._known_topics: set[str] = set()

    @property
    def producers_built(self) -> int:
        """Producers made so far; more than two mean that some failed for good and were replaced."""
        return self._together.producers_built + self._singly.producers_built

    def probe(self) -> None:
        """
        Ask the brokers for metadata, which also connects and warms up the producer.

        Raises:
            KafkaUnavailable: No broker answered within five seconds.
        """
        self._together.metadata_error(next(iter(self._known_topics), None))

    def unavailable(self, topics: Iterable[str]) -> dict[str, Failure]:
        """
        Tell which of *topics* cannot be written to; each is asked about once, until it fails.

        A record for a missing topic would otherwise wait in the producer, with the batch's locks, until the deadline.

        Raises:
            KafkaUnavailable: No broker answered within five seconds.
        """
        failures = {}
        for topic in set(topics) - self._known_topics:
            error = self._together.metadata_error(topic)
            if error is None:
                self._known_topics.add(topic)
            else:
                failures[topic] = Failure(
                    Scope.TOPIC, error.name(), f'topic "{topic}": {error.str()}; create it or grant access'
                )
        return failures

    def publish(self, records: Sequence[Record], *, deadline: float) -> list[Outcome]:
        """
        Send *records* in order and wait for Kafka's reports until *deadline*, a `time.monotonic()`.

        The outcomes come in the order of the records. Per key, nothing behind a record that failed for good is
        written by this call; a record without a report may have been written all the same.

        Raises:
            KafkaUnavailable: No broker tells whether a topic that is new to us exists; nothing was sent.
        """
        missing = self.unavailable({record.topic for record in records})
        outcomes: list[Outcome] = [missing.get(record.topic, WITHDRAWN) for record in records]
        now = time.monotonic()
        alone = {topic for topic, until in self._alone_until.items() if until > now}
        together: Sequence[int] = range(len(records))
        if alone or missing:
            sendable = [index for index in together if records[index].topic not in missing]
            together = [index for index in sendable if records[index].topic not in alone]
            singly = [index for index in sendable if records[index].topic in alone]
            self._singly.send(records, singly, outcomes, deadline=deadline)
        self._together.send(records, together, outcomes, deadline=deadline)
        if outcomes.count(None) < len(outcomes):
            self._learn(records, outcomes)
        return outcomes

    def _learn(self, records: Sequence[Record], outcomes: Sequence[Outcome]) -> None:
        """Send topics that refused a batch singly from now on, and ask again about topics that failed."""
        for record, outcome in zip(records, outcomes, strict=True):
            if outcome is None:
                continue
            if outcome.scope is Scope.TOPIC:
                self._known_topics.discard(record.topic)
            elif outcome.scope is Scope.BATCH and scope_of(outcome.code) is Scope.MESSAGE:
                self._alone_until[record.topic] = time.monotonic() + _ALONE_SECONDS

    def close(self) -> None:
        """Drop the producers at once; whatever they still hold is thrown away and stays unpublished."""
        self._together.drop()
        self._singly.drop()


class _Sender:
    """
    One producer at a time, replaced after it failed for good.

    With `enable.gapless.guarantee` a refused batch makes the producer fail as a whole before anything behind that
    batch is written. Without it, librdkafka goes on with a new epoch and later messages of the same key are accepted:
    a topic that took 2,000 bytes got the last 10 of 100 messages of a key and refused the 90 before.
    """

    def __init__(
        self,
        config: Mapping[str, ProducerSetting],
        *,
        refused_as: Scope,
        logger: logging.Logger | None,
    ) -> None:
        self._config: dict[str, object] = {**config, "enable.gapless.guarantee": True}
        if logger is not None:
            self._config["logger"] = logger
        self._refused_as = refused_as
        self._producer: Producer | None = None
        self.producers_built = 0

    def metadata_error(self, topic: str | None) -> KafkaError | None:
        """Give the brokers' word on *topic*, or on nothing in particular; raise KafkaUnavailable if none answers."""
        wanted = {"topic": topic} if topic else {}
        try:
            metadata = self._open().list_topics(**wanted, timeout=_METADATA_SECONDS)
        except KafkaException as error:
            raise KafkaUnavailable(
                f"no broker answered within {_METADATA_SECONDS:g} s: {error.args[0].str()}"
            ) from error
        return metadata.topics[topic].error if topic else None

    def send(
        self, records: Sequence[Record], indexes: Sequence[int], outcomes: list[Outcome], *, deadline: float
    ) -> None:
        """Send the records at *indexes* and write what became of each into *outcomes*."""
        if not indexes:
            return
        producer = self._open()
        self._hand_over(producer, records, indexes, outcomes, deadline=deadline)
        interruption = _await_reports(producer, deadline=deadline)
        if interruption is None:
            return
        if interruption is not NO_REPORT:
            self.drop()
        for index in indexes:
            outcome = outcomes[index]
            if outcome is not None and outcome.code in _WITHDRAWING_CODES:
                outcomes[index] = interruption

    def _hand_over(
        self,
        producer: Producer,
        records: Sequence[Record],
        indexes: Sequence[int],
        outcomes: list[Outcome],
        *,
        deadline: float,
    ) -> None:
        """Give the records to librdkafka's queue, in order; stop at the deadline or a full queue."""
        produce, now, report = producer.produce, time.monotonic, self._report
        stopped_keys: set[tuple[str, str]] = set()
        for index in indexes:
            topic, key, value, headers, timestamp_ms = records[index]
            if now() >= deadline:
                break
            if stopped_keys and (topic, key) in stopped_keys:
                continue
            try:
                produce(
                    topic,
                    value,
                    key,
                    on_delivery=partial(report, outcomes, index),
                    timestamp=timestamp_ms,
                    headers=headers,
                )
            except BufferError:
                break
            except KafkaException as error:
                outcomes[index] = _failure(error.args[0])
                if error.args[0].fatal():
                    break
                stopped_keys.add((topic, key))
            else:
                outcomes[index] = NO_REPORT

    def _report(
        self, outcomes: list[Outcome], index: int, error: KafkaError | None, _message: DeliveredMessage
    ) -> None:
        """Take a delivery report. It must never raise: the exception would surface from `flush()` of other messages."""
        if error is None:
            outcomes[index] = None
            return
        failure = _failure(error)
        outcomes[index] = replace(failure, scope=self._refused_as) if failure.scope is Scope.MESSAGE else failure

    def drop(self) -> None:
        """Give up the producer; what it still holds is lost to it, and unpublished."""
        if self._producer is not None:
            self._producer.purge()
            self._producer = None

    def _open(self) -> Producer:
        if self._producer is None:
            self._producer = Producer(self._config)
            self.producers_built += 1
        return self._producer


def _await_reports(producer: Producer, *, deadline: float) -> Failure | None:
    """
    Wait until every message is reported; give what cut the waiting short, if anything.

    A fatal error comes as an exception out of `flush()`, sometimes wrapped in a SystemError, and reports are still to
    be fetched after it.
    """
    interruption: Failure | None = None
    waiting = 1
    while waiting and time.monotonic() < deadline:
        try:
            waiting = producer.flush(max(0.0, deadline - time.monotonic()))
        except (KafkaException, SystemError) as error:
            interruption = _interruption(error)
            deadline = min(deadline, time.monotonic() + _PURGE_SECONDS)
    if waiting:
        producer.purge()
        with suppress(KafkaException, SystemError):
            producer.flush(_PURGE_SECONDS)
        interruption = interruption or NO_REPORT
    return interruption


def _interruption(error: BaseException) -> Failure:
    cause = error if isinstance(error, KafkaException) else error.__cause__
    if not isinstance(cause, KafkaException):
        raise error
    return WITHDRAWN if cause.args[0].code() == _GAP_REFUSED else _failure(cause.args[0])


def _failure(error: KafkaError) -> Failure:
    return Failure(scope_of(error.name()), error.name(), error.str())
