"""Which librdkafka properties a relay cannot work with, and why: judged from the settings alone, before librdkafka."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from outbox_relay.config.kafka import INTEGER, kinds, whole_number

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from outbox_relay.config.kafka import ProducerSetting

DEFAULT_MESSAGE_BYTES = 1_000_000
NO_TEXT = "holds a NUL character, or bytes that are not UTF-8: remove them"
_DEFAULT_BATCH_BYTES = 1_000_000
_LEAST_LINGER_MS = 1_000  # handing over a batch takes less
_SEPARATE_REQUESTS = (
    "makes several requests of one batch, so that a message could overtake one of its key that was refused"
)
_MOST_NUMBER = 2**31 - 1
_MOST_PORT = 65_535
_TRUE = frozenset({"true", "t", "1"})
_PROTOCOLS = frozenset({"plaintext", "ssl", "sasl_plaintext", "sasl_ssl"})
_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.%\w]+\]|[^\s:/@;\[\]?#]+)(?::([0-9]{1,5}))?")
_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]+)?(e[-+]?[0-9]+)?")
_UNSECURED = "enable.sasl.oauthbearer.unsecure.jwt"

# With these librdkafka draws a partition for some keys, the second for the empty key.
_SCATTERING = frozenset({"random", "consistent_random"})


def refusals(config: Mapping[str, ProducerSetting], *, batch_size: int) -> Iterator[tuple[str, str]]:
    """
    Yield the name of each property of *config* that breaks a promise or cannot work, with the reason and the remedy.

    *batch_size* is how many messages a lane sends at once.
    """
    yield from _unsendable_text(config)
    yield from _broken_promises(config)
    yield from _several_requests(config, batch_size=batch_size)
    yield from _misplaced(config)
    yield from _wrong_numbers(config)
    yield from _wrong_brokers(config)
    yield from _small_queues(config)
    yield from _missing_credentials(config)


def _unsendable_text(config: Mapping[str, ProducerSetting]) -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if not is_text(str(value)):
            yield name, NO_TEXT


def is_text(text: str) -> bool:
    """Tell whether *text* can be handed to a C library: in UTF-8, and without its end in the middle."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _broken_promises(config: Mapping[str, ProducerSetting]) -> Iterator[tuple[str, str]]:
    if str(config.get("acks", "all")) not in {"all", "-1"}:
        yield "acks", "only acks=all is allowed, or a message marked published could be lost with its broker: remove it"
    if not _is_true(config.get("enable.idempotence", True)):
        yield "enable.idempotence", "without it, retries reorder and duplicate messages: remove it"
    if not _is_true(config.get("enable.gapless.guarantee", True)):
        yield "enable.gapless.guarantee", "without it, a message could overtake one of its key that failed: remove it"
    if whole_number(config, "max.in.flight.requests.per.connection", default=1) > 1:
        yield (
            "max.in.flight.requests.per.connection",
            "a second request in flight may overtake one that the broker refuses: remove it",
        )
    if str(config.get("partitioner")) in _SCATTERING:
        yield (
            "partitioner",
            (
                f"{config['partitioner']} sends the messages of one key to several partitions, and they lose their "
                "order: remove it, or write murmur2_random, as Java's clients do"
            ),
        )


def _several_requests(config: Mapping[str, ProducerSetting], *, batch_size: int) -> Iterator[tuple[str, str]]:
    if whole_number(config, "batch.size", default=_DEFAULT_BATCH_BYTES) < _DEFAULT_BATCH_BYTES:
        yield "batch.size", f"{_SEPARATE_REQUESTS}: write {_DEFAULT_BATCH_BYTES} or more, or remove it"
    if whole_number(config, "batch.num.messages", default=batch_size) < batch_size:
        yield "batch.num.messages", f"{_SEPARATE_REQUESTS}: write {batch_size} (batch_size) or more, or remove it"
    if _decimal(config.get("linger.ms", _LEAST_LINGER_MS)) < _LEAST_LINGER_MS:
        yield (
            "linger.ms",
            f"{_SEPARATE_REQUESTS}: write {_LEAST_LINGER_MS} or more, or remove it; nothing waits for so long",
        )


def _misplaced(config: Mapping[str, ProducerSetting]) -> Iterator[tuple[str, str]]:
    if "default.topic.config" in config:
        yield "default.topic.config", "properties of topics stand beside the others: write them without it"
    if "delivery.report.only.error" in config:
        yield "delivery.report.only.error", "a message is marked published by its delivery report: remove it"
    if "transactional.id" in config:
        yield "transactional.id", "the relay uses no Kafka transactions, delivery is at least once: remove it"
    for name in config:
        if name.endswith((".cb", "_cb")) or name in {"logger", "on.delivery"}:
            yield name, "it takes a function, which the relay sets itself: remove it"


def _wrong_numbers(config: Mapping[str, ProducerSetting]) -> Iterator[tuple[str, str]]:
    """Librdkafka itself reads 5 in "5s", in "5e6" and in 4294967301."""
    for name, value in config.items():
        kind, text = kinds().get(name), str(value)
        if kind == "decimal" and not _DECIMAL.fullmatch(text):
            yield name, "not a number: write digits alone, without a unit"
        if kind == "integer":
            if not INTEGER.fullmatch(text):
                yield name, "not a whole number: write digits alone, without a unit"
            elif not -_MOST_NUMBER <= int(text) <= _MOST_NUMBER:
                yield name, f"{text} is more than librdkafka can count to: write {_MOST_NUMBER} or less"


def _wrong_brokers(config: Mapping[str, ProducerSetting]) -> Iterator[tuple[str, str]]:
    """Librdkafka leaves out an address that it cannot use, and fails only when none is left."""
    if "bootstrap.servers" not in config:
        return
    addresses = [text.strip() for text in str(config["bootstrap.servers"]).split(",") if text.strip()]
    if not addresses:
        yield "bootstrap.servers", "names no broker: write at least one, e.g. kafka:9092"
    for address in addresses:
        protocol, _, bare = address.rpartition("://")
        found = _ADDRESS.fullmatch(bare)
        if protocol.lower() not in {"", *_PROTOCOLS} or found is None or not 0 < int(found[1] or 9092) <= _MOST_PORT:
            shown = address.rpartition("@")[2]  # what stands before it may be a password
            yield (
                "bootstrap.servers",
                f"{shown!r} is no address of a broker: write host:port, e.g. kafka:9092, and a comma between two",
            )
        elif protocol and protocol.lower() != _protocol(config):
            yield (
                "bootstrap.servers",
                f"{address!r} is left out while security.protocol is {_protocol(config)}: write {bare}",
            )


def _small_queues(config: Mapping[str, ProducerSetting]) -> Iterator[tuple[str, str]]:
    """A message that the queue can never hold would wait for ever, and all messages behind it."""
    name = "queue.buffering.max.kbytes"
    message_bytes = whole_number(config, "message.max.bytes", default=DEFAULT_MESSAGE_BYTES)
    least = needed_kbytes(message_bytes)
    kbytes = whole_number(config, name, default=least)
    if kbytes < least:
        yield name, f"{kbytes} cannot hold a message of message.max.bytes ({message_bytes}): raise it to {least}"


def needed_kbytes(payload_bytes: int) -> int:
    """Return the least `queue.buffering.max.kbytes` that holds so many bytes."""
    return -(-payload_bytes // 1024)


def _missing_credentials(config: Mapping[str, ProducerSetting]) -> Iterator[tuple[str, str]]:
    if not _protocol(config).startswith("sasl"):
        return
    mechanism = str(config.get("sasl.mechanism", ""))
    if mechanism == "OAUTHBEARER":
        yield from _missing_tokens(config)
    elif mechanism == "PLAIN" or mechanism.startswith("SCRAM-"):
        for name in ("sasl.username", "sasl.password"):
            if not str(config.get(name, "")):
                yield name, "not set: sasl.mechanism asks for a user and a password"


def _missing_tokens(config: Mapping[str, ProducerSetting]) -> Iterator[tuple[str, str]]:
    """Librdkafka starts without a source of tokens, and waits for one for ever."""
    url = str(config.get("sasl.oauthbearer.token.endpoint.url", ""))
    if str(config.get("sasl.oauthbearer.method")).lower() == "oidc":
        if url and not url.lower().startswith(("https://", "http://")):
            yield "sasl.oauthbearer.token.endpoint.url", "not a URL: write https://host/path"
    elif not _is_true(config.get(_UNSECURED, False)):
        yield (
            "sasl.oauthbearer.method",
            (
                "nothing gives OAUTHBEARER a token: set it to oidc, and sasl.oauthbearer.token.endpoint.url, "
                "client.id and client.secret with it"
            ),
        )
    elif "principal=" not in str(config.get("sasl.oauthbearer.config", "")):
        yield "sasl.oauthbearer.config", "names no principal for the unsecured token: write principal=NAME"


def _protocol(config: Mapping[str, ProducerSetting]) -> str:
    return str(config.get("security.protocol", "plaintext")).lower()


def _decimal(value: ProducerSetting) -> float:
    return float(value) if _DECIMAL.fullmatch(str(value)) else math.inf


def _is_true(value: ProducerSetting) -> bool:
    return str(value).lower() in _TRUE
