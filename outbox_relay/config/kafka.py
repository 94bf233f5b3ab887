"""What passes through to librdkafka: our defaults, what is refused and why, and the check without a broker."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from outbox_relay.config.names import did_you_mean, env_name
from outbox_relay.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ProducerSetting = str | int | float | bool

DEFAULTS: Mapping[str, ProducerSetting] = {
    "acks": "all",
    "allow.auto.create.topics": False,
    "client.id": "outbox-relay",
    "compression.type": "lz4",
    "enable.gapless.guarantee": True,
    "enable.idempotence": True,
    "linger.ms": 1_000,  # ended by flush() when a batch is queued, so that a partition gets it in one request
    "max.in.flight.requests.per.connection": 1,
    "message.timeout.ms": 25_000,
    "partitioner": "murmur2_random",
    "reconnect.backoff.max.ms": 2_000,
    "socket.keepalive.enable": True,
    "socket.nagle.disable": True,
    "socket.timeout.ms": 10_000,
}

# Two names of one property would leave it to chance which of them wins.
_ALIASES = {
    "compression.codec": "compression.type",
    "delivery.timeout.ms": "message.timeout.ms",
    "max.in.flight": "max.in.flight.requests.per.connection",
    "metadata.broker.list": "bootstrap.servers",
    "queue.buffering.max.ms": "linger.ms",
    "request.required.acks": "acks",
}

# Those that librdkafka marks as sensitive, less the user name and a path; the last is Java's, and holds a password.
SECRETS = frozenset(
    {
        "sasl.oauthbearer.assertion.private.key.passphrase",
        "sasl.oauthbearer.assertion.private.key.pem",
        "sasl.oauthbearer.client.credentials.client.secret",
        "sasl.oauthbearer.client.secret",
        "sasl.oauthbearer.config",
        "sasl.password",
        "ssl.key.password",
        "ssl.key.pem",
        "ssl.keystore.password",
        "sasl.jaas.config",
    }
)

_TRUE = frozenset({"true", "t", "1"})


def holds_secret(name: str) -> bool:
    """Tell whether the value of the property *name* must not be shown; an unknown name may be a slip of one."""
    return name in SECRETS or name not in _known()


def property_name(name: str) -> str:
    """Return the librdkafka name of *name* as the environment spells it: `linger_ms` is `linger.ms`."""
    dotted = name if name in _known() else name.replace("_", ".")
    return _ALIASES.get(dotted, dotted)


def is_property(name: str) -> bool:
    """Tell whether librdkafka is known to have a producer property *name*, in either spelling."""
    return property_name(name) in _known()


def refusals(given: Mapping[str, ProducerSetting]) -> Iterator[tuple[str, str]]:
    """Yield the name of each property that would break a promise of the relay, with the reason and the remedy."""
    if str(given.get("acks", "all")) not in {"all", "-1"}:
        yield "acks", "only acks=all is allowed, or a message marked published could be lost with its broker: remove it"
    if not _is_true(given.get("enable.idempotence", True)):
        yield "enable.idempotence", "without it, retries reorder and duplicate messages: remove it"
    if not _is_true(given.get("enable.gapless.guarantee", True)):
        yield "enable.gapless.guarantee", "without it, a message could overtake one of its key that failed: remove it"
    if not _is_at_most(given.get("max.in.flight.requests.per.connection", 1), 1):
        yield (
            "max.in.flight.requests.per.connection",
            "a second request in flight may overtake one that the broker refuses: remove it",
        )
    if "delivery.report.only.error" in given:
        yield "delivery.report.only.error", "a message is marked published by its delivery report: remove it"
    if "transactional.id" in given:
        yield "transactional.id", "the relay uses no Kafka transactions, delivery is at least once: remove it"
    for name in given:
        if name.endswith((".cb", "_cb")) or name in {"logger", "on.delivery"}:
            yield name, "it takes a function, which the relay sets itself: remove it"


def check_producer_config(config: Mapping[str, ProducerSetting]) -> None:
    """
    Have librdkafka judge *config*, the result of `Settings.producer_config`, without connecting to anything.

    Raises:
        ConfigurationError: A name is unknown, a value is refused, or `bootstrap.servers` is missing.
    """
    # Only this check needs librdkafka; reading the settings does not.
    from confluent_kafka import KafkaException, Producer  # noqa: PLC0415

    offline = {
        name: value for name, value in config.items() if name not in {"bootstrap.servers", "test.mock.num.brokers"}
    }
    try:
        Producer({**offline, "log_level": 0})
    except KafkaException as error:
        raise ConfigurationError(f"Kafka configuration: {error.args[0].str().strip()}{_suggestions(config)}") from error
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"Kafka configuration: {error}") from error
    if len(offline) == len(config):
        raise ConfigurationError(
            f"{env_name('kafka.bootstrap.servers')}: not set: name at least one broker, e.g. kafka:9092"
        )


def _suggestions(config: Mapping[str, ProducerSetting]) -> str:
    unknown = [name for name in config if name not in _known()]
    return "".join(did_you_mean(name, known=_known()) for name in unknown)


def _is_true(value: ProducerSetting) -> bool:
    return str(value).lower() in _TRUE


def _is_at_most(value: ProducerSetting, limit: int) -> bool:
    try:
        return float(value) <= limit
    except ValueError:
        return True  # librdkafka says what is wrong with it


@cache
def _known() -> frozenset[str]:
    text = resources.files("outbox_relay.config").joinpath("producer_properties.txt").read_text(encoding="ascii")
    return frozenset(text.split())
