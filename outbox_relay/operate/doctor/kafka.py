"""The checks of Kafka: each a function of what the brokers said about one topic, with the command that mends it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from outbox_relay.operate.doctor.check import Check

if TYPE_CHECKING:
    from collections.abc import Mapping

    from outbox_relay.kafka_admin import Cluster, Topic

ProducerSetting = str | int | float | bool

_DEFAULT_MESSAGE_BYTES = 1_000_000
_COPIES = 3
_ABSENT = "UNKNOWN_TOPIC_OR_PART"


def command(tool: str, *, config: Mapping[str, ProducerSetting]) -> str:
    """Give the beginning of a call of one of Kafka's own tools for the cluster that *config* leads to."""
    beginning = f"{tool}.sh --bootstrap-server {shlex.quote(str(config.get('bootstrap.servers', '')))}"
    return f"{beginning} --command-config client.properties" if _protocol(config) != "plaintext" else beginning


def check_authentication(config: Mapping[str, ProducerSetting]) -> Check:
    """As whom did the brokers let us in?"""
    protocol = _protocol(config)
    if protocol.startswith("sasl"):
        who = f"{config.get('sasl.mechanism', 'GSSAPI')} over {protocol}"
    else:
        who = "by certificate or none" if protocol == "ssl" else "none, and no TLS"
    return Check("kafka authentication", "OK", who)


def check_topic(topic: Topic, *, cluster: Cluster, config: Mapping[str, ProducerSetting]) -> Check:
    """Is the topic there, and may the relay write to it?"""
    name = f"topic {topic.name}"
    if topic.error == _ABSENT:
        create = f"--create --topic {topic.name} --partitions 6 --replication-factor {min(_COPIES, cluster.brokers)}"
        return Check(name, "FAIL", "does not exist", f"{command('kafka-topics', config=config)} {create}")
    if topic.error or not topic.is_writable:
        finding = f"may not be {'written to' if not topic.error else f'looked at: {topic.error}'}"
        return Check(name, "FAIL", finding, _allow(topic, "Write", "Describe", config=config))
    return Check(name, "OK", f"partitions: {topic.partitions}, copies: {topic.replicas}")


def check_settings(topic: Topic, *, config: Mapping[str, ProducerSetting]) -> list[Check]:
    """Do the topic's settings fit what the relay promises, as far as they may be read?"""
    if topic.settings_error:
        finding = f"may not be read: {topic.settings_error}"
        return [
            Check(f"settings of {topic.name}", "WARN", finding, _allow(topic, "DescribeConfigs", config=config)),
        ]
    return [check(topic, config=config) for check in (check_message_size, check_copies, check_cleanup)]


def check_message_size(topic: Topic, *, config: Mapping[str, ProducerSetting]) -> Check:
    """Does the topic take what the producer lets pass?"""
    name = f"message size of {topic.name}"
    ours = int(config.get("message.max.bytes", _DEFAULT_MESSAGE_BYTES))
    theirs = int(topic.settings["max.message.bytes"])
    if theirs < ours:
        finding = f"max.message.bytes = {theirs:,}, and the producer lets {ours:,} pass: larger ones get parked"
        return Check(name, "FAIL", finding, _set(topic, f"max.message.bytes={ours}", config=config))
    return Check(name, "OK", f"{theirs:,} bytes, the producer's limit is {ours:,}")


def check_copies(topic: Topic, *, config: Mapping[str, ProducerSetting]) -> Check:
    """Does an acknowledged message survive the loss of a broker, and does writing go on without it?"""
    name = f"copies of {topic.name}"
    least = int(topic.settings["min.insync.replicas"])
    finding = f"{topic.replicas}, and min.insync.replicas = {least}"
    fewer = _set(topic, f"min.insync.replicas={max(1, topic.replicas - 1)}", config=config)
    if least > topic.replicas:
        return Check(name, "WARN", f"{finding}: brokers older than 4 refuse every message, newer ones need all", fewer)
    if topic.replicas == 1:
        remedy = f"# let kafka-reassign-partitions.sh give it {_COPIES}, on as many brokers"
        return Check(name, "WARN", f"{finding}: what its broker loses is lost", remedy)
    if least == topic.replicas:
        return Check(name, "WARN", f"{finding}: nothing can be written while one broker is away", fewer)
    if least == 1:
        remedy = _set(topic, "min.insync.replicas=2", config=config)
        return Check(name, "WARN", f"{finding}: an acknowledged message can be lost with one broker", remedy)
    return Check(name, "OK", finding)


def check_cleanup(topic: Topic, *, config: Mapping[str, ProducerSetting]) -> Check:
    """Does the topic keep every message of a key?"""
    name = f"cleanup of {topic.name}"
    policy = topic.settings["cleanup.policy"]
    if "compact" in policy:
        finding = f"{policy}: only the last message of a key stays, and one without payload removes the key"
        return Check(name, "WARN", finding, _set(topic, "cleanup.policy=delete", config=config))
    return Check(name, "OK", policy)


def _set(topic: Topic, setting: str, *, config: Mapping[str, ProducerSetting]) -> str:
    tool = command("kafka-configs", config=config)
    return f"{tool} --alter --entity-type topics --entity-name {topic.name} --add-config {setting}"


def _allow(topic: Topic, *operations: str, config: Mapping[str, ProducerSetting]) -> str:
    user = shlex.quote(f"User:{config.get('sasl.username', 'ANONYMOUS')}")
    allowed = " ".join(f"--operation {operation}" for operation in operations)
    return f"{command('kafka-acls', config=config)} --add --allow-principal {user} {allowed} --topic {topic.name}"


def _protocol(config: Mapping[str, ProducerSetting]) -> str:
    return str(config.get("security.protocol", "plaintext")).lower()
