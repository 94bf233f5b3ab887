"""What passes through to librdkafka: our defaults, what is refused and why, and the check without a broker."""

from __future__ import annotations

import logging
import re
from functools import cache
from importlib import resources
from pathlib import Path
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
    "message.send.max.retries": "retries",
    "metadata.broker.list": "bootstrap.servers",
    "queue.buffering.max.ms": "linger.ms",
    "request.required.acks": "acks",
    "sasl.mechanisms": "sasl.mechanism",
    "sasl.oauthbearer.client.credentials.client.id": "sasl.oauthbearer.client.id",
    "sasl.oauthbearer.client.credentials.client.secret": "sasl.oauthbearer.client.secret",
}

# What librdkafka's words are about where they name no property.
_ABOUT = {
    "SASL mechanism": "sasl.mechanism",
    "OpenSSL provider": "ssl.providers",
    "OpenSSL engine": "ssl.engine.location",
    "dlopen": "plugin.library.paths",
    "parse pattern": "topic.blacklist",
}

_CERTIFICATES = frozenset({"https.ca.location", "ssl.ca.location"})  # which may also be a directory, or looked for
INTEGER = re.compile("-?[0-9]{1,18}")

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


def kinds() -> Mapping[str, str]:
    """Return the kind of each producer property: integer, decimal, boolean, choice, file or text."""
    return _known()


def whole_number(config: Mapping[str, ProducerSetting], name: str, *, default: int) -> int:
    """Return the property *name* as a number: *default* if it is not given, or is none, which the settings refuse."""
    text = str(config.get(name, default))
    return int(text) if INTEGER.fullmatch(text) else default


def check_producer_config(config: Mapping[str, ProducerSetting]) -> None:
    """
    Have librdkafka judge *config*, the result of `Settings.producer_config`, without connecting to anything.

    Raises:
        ConfigurationError: A name is unknown, a value is refused, or `bootstrap.servers` is missing.
    """
    # Only this check needs librdkafka; reading the settings does not.
    from confluent_kafka import Producer  # noqa: PLC0415

    unreadable = [f"{env_name(f'kafka.{name}')}: {reason}" for name, reason in _unreadable_files(config)]
    if unreadable:
        raise ConfigurationError("\n".join(unreadable))
    offline = {
        name: value for name, value in config.items() if name not in {"bootstrap.servers", "test.mock.num.brokers"}
    }
    try:
        Producer({**offline, "logger": _unheard()})
    except Exception as error:  # whatever librdkafka, its wrapper and what they import may raise
        raise ConfigurationError(_why_refused(error, config)) from error
    if len(offline) == len(config):
        raise ConfigurationError(
            f"{env_name('kafka.bootstrap.servers')}: not set: name at least one broker, e.g. kafka:9092"
        )


def _unheard() -> logging.Logger:
    logger = logging.getLogger("unheard")
    logger.addHandler(logging.NullHandler())
    return logger


def _unreadable_files(config: Mapping[str, ProducerSetting]) -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        path = str(value)
        if _known().get(name) != "file" or (name in _CERTIFICATES and path == "probe"):
            continue
        if path.lstrip().startswith("-----BEGIN"):  # a key, perhaps: it is not shown
            yield (
                name,
                "holds PEM text, and takes the path of a file: write the path, or use the property that ends in .pem",
            )
            continue
        try:
            if not (name in _CERTIFICATES and Path(path).is_dir()):
                Path(path).open("rb").close()
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            yield name, f"{path!r} cannot be read: {why}: correct the path, or let this user read the file"


def _why_refused(error: Exception, config: Mapping[str, ProducerSetting]) -> str:
    """Return the words of *error* in one line, behind the variable of the property that they are about."""
    text = str(error.args[0].str() if type(error).__name__ == "KafkaException" else error)
    words = " ".join(text.removeprefix("Failed to create producer: ").split())
    unknown = [name for name in config if name not in _known() and name in words]
    suggestions = "".join(did_you_mean(name, known=_known()) for name in unknown)
    return f"{env_name(f'kafka.{_culprit(words, config)}').removesuffix('__')}: {words}{suggestions}"


def _culprit(words: str, config: Mapping[str, ProducerSetting]) -> str:
    """Return the property that librdkafka's *words* name first, or are known to be about, or nothing."""
    names = sorted({*_known(), *config} - {"debug", "retries"}, key=len, reverse=True)
    pattern = "|".join(rf"(?<![\w.]){re.escape(name)}(?![\w.])" for name in [*names, '"debug"', "`retries`"] if name)
    named = re.search(pattern, words)
    if named:
        return property_name(named[0].strip('`"'))
    return next((name for hint, name in _ABOUT.items() if hint in words), "")


@cache
def _known() -> Mapping[str, str]:
    text = resources.files("outbox_relay.config").joinpath("producer_properties.txt").read_text(encoding="ascii")
    return dict(line.split() for line in text.splitlines())
