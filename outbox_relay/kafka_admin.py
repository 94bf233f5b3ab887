"""What a Kafka cluster says about itself and its topics, asked once, for the doctor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AclOperation, AdminClient, ConfigResource, ResourceType

from outbox_relay.errors import ConfigurationError, KafkaUnavailable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from concurrent.futures import Future
    from typing import Any, TypeVar

    from confluent_kafka.admin import ConfigEntry, TopicDescription

    T = TypeVar("T")

_REQUEST_SECONDS = 5.0
_REFUSALS = frozenset({"_AUTHENTICATION", "SASL_AUTHENTICATION_FAILED", "_SSL"})


@dataclass(frozen=True, slots=True)
class Topic:
    """
    One topic as the brokers describe it.

    Attributes:
        error: Kafka's name of why there is no description, empty if there is one.
        replicas: Copies of the partition that has the fewest.
        is_writable: Whether this client may write to it.
        settings: Its configuration, the brokers' defaults included.
        settings_error: Kafka's name of why `settings` is empty.
    """

    name: str
    error: str = ""
    partitions: int = 0
    replicas: int = 0
    is_writable: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)
    settings_error: str = ""


@dataclass(frozen=True, slots=True)
class Cluster:
    """The brokers in service, and the topics asked about."""

    brokers: int
    topics: list[Topic]


def describe_cluster(config: Mapping[str, str | int | float | bool], *, topics: Collection[str]) -> Cluster:
    """
    Describe the cluster that the producer configuration *config* leads to, and these *topics* of it.

    Raises:
        KafkaUnavailable: No broker answered within five seconds.
        ConfigurationError: The brokers refuse the credentials, or TLS could not be agreed on.
    """
    errors: list[KafkaError] = []
    options: dict[str, Any] = {**config, "error_cb": errors.append, "log_level": 0}
    admin = AdminClient(options)
    try:
        brokers = len(admin.list_topics(timeout=_REQUEST_SECONDS).brokers)
    except KafkaException as error:
        admin.poll(0)  # hands over the errors
        raise _why_silent([*errors, error.args[0]]) from error
    try:
        return Cluster(brokers, _describe_topics(admin, sorted(topics)))
    except KafkaException as error:
        raise KafkaUnavailable(f"the brokers stopped answering: {error.args[0].str()}") from error


def find_refusal(errors: Iterable[KafkaError]) -> KafkaError | None:
    """Give the first of *errors* by which the brokers refuse the credentials, or TLS could not be agreed on."""
    return next((error for error in errors if error.name() in _REFUSALS), None)


def _why_silent(errors: list[KafkaError]) -> ConfigurationError | KafkaUnavailable:
    """Give the refusal among *errors*, else the first one: what follows it says less."""
    refusal = find_refusal(errors)
    if refusal is not None:
        return ConfigurationError(refusal.str())
    return KafkaUnavailable(f"no broker answered within {_REQUEST_SECONDS:g} s: {errors[0].str()}")


def _describe_topics(admin: AdminClient, names: list[str]) -> list[Topic]:
    if not names:
        return []
    described = admin.describe_topics(
        TopicCollection(names), include_authorized_operations=True, request_timeout=_REQUEST_SECONDS
    )
    resources = [ConfigResource(ResourceType.TOPIC, name) for name in names]
    settings = admin.describe_configs(resources, request_timeout=_REQUEST_SECONDS)
    return [_topic(name, described[name], settings[resource]) for name, resource in zip(names, resources, strict=True)]


def _topic(name: str, described: Future[TopicDescription], settings: Future[dict[str, ConfigEntry]]) -> Topic:
    description = _result(described)
    if isinstance(description, str):
        return Topic(name, error=description)
    entries = _result(settings)
    return Topic(
        name,
        partitions=len(description.partitions),
        replicas=min(len(partition.replicas) for partition in description.partitions),
        # None at all: a broker that is too old to tell
        is_writable=not description.authorized_operations or AclOperation.WRITE in description.authorized_operations,
        settings={} if isinstance(entries, str) else {key: str(entry.value) for key, entry in entries.items()},
        settings_error=entries if isinstance(entries, str) else "",
    )


def _result(answer: Future[T]) -> T | str:
    """Give the answer, or Kafka's name of the error that was the answer."""
    try:
        return answer.result()
    except KafkaException as error:
        name: str = error.args[0].name()
        if name.startswith("_"):  # the client's own, such as a time-out
            raise
        return name
