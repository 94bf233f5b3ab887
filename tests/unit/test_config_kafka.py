"""What may be said to librdkafka, and what may not."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from confluent_kafka import KafkaError, KafkaException, Message, Producer
from pydantic import ValidationError

from outbox_relay.config import ProducerSetting, Settings, check_producer_config
from outbox_relay.config.explain import explain
from outbox_relay.config.kafka import DEFAULTS, SECRETS, kinds, property_name
from outbox_relay.errors import ConfigurationError

if TYPE_CHECKING:
    from outbox_relay.sandbox.mock_cluster import MockCluster

PARTITIONERS = [
    "random",
    *("consistent", "consistent_random", "murmur2", "murmur2_random", "fnv1a", "fnv1a_random"),
]
GENERAL_KINDS = {"integer": "number", "decimal": "number", "file": "text"}
BROKER: dict[str, ProducerSetting] = {"bootstrap.servers": "127.0.0.1:1"}


def with_kafka(properties: dict[str, ProducerSetting]) -> Settings:
    return Settings.model_validate({"kafka": properties})


@pytest.mark.parametrize(
    ("properties", "problem"),
    [
        (
            {"acks": 1},
            "ACKS: only acks=all is allowed, or a message marked published could be lost with its broker: remove it",
        ),
        (
            {"request.required.acks": "0"},
            "ACKS: only acks=all is allowed, or a message marked published could be lost with its broker: remove it",
        ),
        (
            {"enable.idempotence": False},
            "ENABLE_IDEMPOTENCE: without it, retries reorder and duplicate messages: remove it",
        ),
        (
            {"enable.gapless.guarantee": "false"},
            "ENABLE_GAPLESS_GUARANTEE: without it, a message could overtake one of its key that failed: remove it",
        ),
        (
            {"max.in.flight": 2},
            (
                "MAX_IN_FLIGHT_REQUESTS_PER_CONNECTION: a second request in flight may overtake one that the broker "
                "refuses: remove it"
            ),
        ),
        (
            {"delivery.report.only.error": True},
            "DELIVERY_REPORT_ONLY_ERROR: a message is marked published by its delivery report: remove it",
        ),
        (
            {"transactional.id": "t"},
            "TRANSACTIONAL_ID: the relay uses no Kafka transactions, delivery is at least once: remove it",
        ),
        (
            {"batch.size": 16_384},
            (
                "BATCH_SIZE: makes several requests of one batch, so that a message could overtake one of its key that "
                "was refused: write 1000000 or more, or remove it"
            ),
        ),
        (
            {"batch.num.messages": "4999"},
            (
                "BATCH_NUM_MESSAGES: makes several requests of one batch, so that a message could overtake one of its "
                "key that was refused: write 5000 (batch_size) or more, or remove it"
            ),
        ),
        (
            {"linger.ms": "0"},
            (
                "LINGER_MS: makes several requests of one batch, so that a message could overtake one of its key that "
                "was refused: write 1000 or more, or remove it; nothing waits for so long"
            ),
        ),
        ({"error_cb": "f"}, "ERROR_CB: it takes a function, which the relay sets itself: remove it"),
        ({"logger": "f"}, "LOGGER: it takes a function, which the relay sets itself: remove it"),
    ],
    ids=str,
)
def test_a_property_that_would_break_a_promise_is_refused(properties: dict[str, ProducerSetting], problem: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        with_kafka(properties)

    assert explain(refusal.value) == f"OUTBOX_RELAY_KAFKA__{problem}"


@pytest.mark.parametrize(
    "properties",
    [
        {"acks": -1},
        {"acks": "all"},
        {"enable.idempotence": "True"},
        {"max.in.flight.requests.per.connection": "1"},
        {"enable.gapless.guarantee": 1},
        {"linger.ms": 1000.5, "batch.size": 2_000_000, "batch.num.messages": 5_000},
    ],
    ids=str,
)
def test_a_property_that_keeps_the_promises_is_allowed(properties: dict[str, ProducerSetting]) -> None:
    settings = with_kafka(BROKER | properties)

    check_producer_config(settings.producer_config())
    assert settings.producer_config().items() >= properties.items()


def test_given_properties_replace_our_defaults_under_each_of_their_names() -> None:
    settings = Settings.model_validate({"batch_bytes": "2MiB", "kafka": {"queue.buffering.max.ms": 9_000}})

    sizes = {"queue.buffering.max.kbytes": 4_096, "batch.num.messages": 10_000}
    assert settings.producer_config() == {**DEFAULTS, **sizes, "linger.ms": 9_000}


def test_two_names_of_one_property_are_one_property() -> None:
    names = [*kinds(), "linger.mss"]
    alike: dict[str, set[str]] = {}
    for name in names:
        alike.setdefault(librdkafkas_name(name), set()).add(property_name(name))

    assert {name: ours for name, ours in alike.items() if len(ours) > 1} == {}


def librdkafkas_name(name: str) -> str:
    """How it is called in what librdkafka says of a value that cannot be; of text that is the name itself."""
    try:
        Producer({name: "?", "no.such.property": 1})
    except KafkaException as error:
        words = re.search(r'configuration property "(.+)"|bool value for "(.+)"', error.args[0].str())
        if words and "no.such.property" not in words[0]:
            return words[1] or words[2]
    return name


def test_a_batch_is_one_request_however_many_messages_it_has() -> None:
    assert Settings(batch_size=100_000).producer_config()["batch.num.messages"] == 100_000


@pytest.mark.parametrize(("batch_bytes", "message_bytes"), [(1_024, 1_000), (2**20, 5_000_000), (2**23, 5_000_000)])
def test_the_queue_takes_one_message_that_the_settings_allow(batch_bytes: int, message_bytes: int) -> None:
    settings = Settings.model_validate({"batch_bytes": batch_bytes, "kafka": {"message.max.bytes": message_bytes}})

    producer = Producer({**settings.producer_config(), "log_level": 0})

    producer.produce("t", bytes(message_bytes - 100))
    producer.purge()


@pytest.mark.parametrize("partitioner", PARTITIONERS)
def test_a_partitioner_is_allowed_if_it_sends_each_key_to_one_partition(
    mock_cluster: MockCluster, partitioner: str
) -> None:
    mock_cluster.create_topic("orders", partitions=7)
    scattering = {"bootstrap.servers": mock_cluster.bootstrap_servers, "sticky.partitioning.linger.ms": 0}
    producer = Producer({**scattering, "partitioner": partitioner, "log_level": 0})
    chosen: dict[bytes, set[int]] = {b"": set(), b"a": set(), b"order-1": set()}

    def note(_error: KafkaError | None, message: Message) -> None:
        chosen[message.key() or b""].add(message.partition() or 0)

    for key in [*chosen] * 50:
        producer.produce("orders", "v", key, on_delivery=note)
    producer.flush()

    assert is_allowed({"partitioner": partitioner}) == all(len(partitions) == 1 for partitions in chosen.values())


def is_allowed(properties: dict[str, ProducerSetting]) -> bool:
    try:
        with_kafka(properties)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize(
    ("properties", "problem"),
    [
        ({"linger.ms": "5s"}, "LINGER_MS: not a number: write digits alone, without a unit"),
        ({"socket.timeout.ms": "1e4"}, "SOCKET_TIMEOUT_MS: not a whole number: write digits alone, without a unit"),
        ({"socket.timeout.ms": True}, "SOCKET_TIMEOUT_MS: not a whole number: write digits alone, without a unit"),
        ({"message.max.bytes": "0x10"}, "MESSAGE_MAX_BYTES: not a whole number: write digits alone, without a unit"),
        (
            {"socket.timeout.ms": 2**32 + 10_000},
            "SOCKET_TIMEOUT_MS: 4294977296 is more than librdkafka can count to: write 2147483647 or less",
        ),
        ({"client.id": "a\0b"}, "CLIENT_ID: holds a NUL character, or bytes that are not UTF-8: remove them"),
        ({"client.id": "a\udcff"}, "CLIENT_ID: holds a NUL character, or bytes that are not UTF-8: remove them"),
        (
            {"queue.buffering.max.kbytes": 4_882, "message.max.bytes": 5_000_000},
            "QUEUE_BUFFERING_MAX_KBYTES: 4882 cannot hold a message of message.max.bytes (5000000): raise it to 4883",
        ),
        (
            {"default.topic.config": "acks"},
            "DEFAULT_TOPIC_CONFIG: properties of topics stand beside the others: write them without it",
        ),
    ],
    ids=str,
)
def test_a_value_that_librdkafka_would_read_differently_or_cannot_use_is_refused(
    properties: dict[str, ProducerSetting], problem: str
) -> None:
    with pytest.raises(ValidationError) as refusal:
        with_kafka(properties)

    assert explain(refusal.value).splitlines()[0] == f"OUTBOX_RELAY_KAFKA__{problem}"


@pytest.mark.parametrize(
    "servers",
    ["kafka", "kafka:9092", " a:1 , b:65535,", "[::1]:9092", "10.0.0.1:9092", "PLAINTEXT://kafka:9092", "a_b.local:1"],
)
def test_an_address_of_a_broker_is_a_host_and_perhaps_a_port(servers: str) -> None:
    assert is_allowed({"bootstrap.servers": servers})


@pytest.mark.parametrize(
    ("servers", "shown"),
    [
        ("kafka://host:9092", "'kafka://host:9092'"),
        ("http://host:9092", "'http://host:9092'"),
        ("sasl://user:hunter2@host:9092", "'host:9092'"),
        ("a:9092 b:9092", "'a:9092 b:9092'"),
        ("a:9092;b:9092", "'a:9092;b:9092'"),
        ("a:9092,b:9092x", "'b:9092x'"),
        ("a:65536", "'a:65536'"),
        ("a:0", "'a:0'"),
        ("a/b", "'a/b'"),
        ("::1", "'::1'"),
        (":9092", "':9092'"),
    ],
)
def test_what_is_no_address_of_a_broker_is_refused_without_a_password(servers: str, shown: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        with_kafka({"bootstrap.servers": servers})

    assert explain(refusal.value) == (
        f"OUTBOX_RELAY_KAFKA__BOOTSTRAP_SERVERS: {shown} is no address of a broker: write host:port, e.g. kafka:9092, "
        "and a comma between two"
    )


def test_an_address_for_another_protocol_is_refused_and_a_list_without_any() -> None:
    with pytest.raises(ValidationError) as refusal:
        with_kafka({"bootstrap.servers": "SSL://kafka:9092"})
    assert explain(refusal.value) == (
        "OUTBOX_RELAY_KAFKA__BOOTSTRAP_SERVERS: 'SSL://kafka:9092' is left out while security.protocol is plaintext: "
        "write kafka:9092"
    )
    assert is_allowed({"bootstrap.servers": "SSL://kafka:9092", "security.protocol": "ssl"})
    assert not is_allowed({"bootstrap.servers": ", "})


OAUTH: dict[str, ProducerSetting] = {"security.protocol": "SASL_SSL", "sasl.mechanism": "OAUTHBEARER"}
OIDC: dict[str, ProducerSetting] = {**OAUTH, "sasl.oauthbearer.method": "oidc"}
UNSECURED: dict[str, ProducerSetting] = {**OAUTH, "enable.sasl.oauthbearer.unsecure.jwt": "true"}
AWS: dict[str, ProducerSetting] = {
    "sasl.oauthbearer.metadata.authentication.type": "aws_iam",
    "sasl.oauthbearer.config": "region=eu-central-1,audience=https://kafka",
}


@pytest.mark.parametrize(
    ("properties", "problem"),
    [
        (
            {"security.protocol": "sasl_plaintext"},
            (
                "SASL_MECHANISM: No provider for SASL mechanism GSSAPI: recompile librdkafka with libsasl2 or openssl "
                "support. Current build options: PLAIN SASL_SCRAM OAUTHBEARER"
            ),
        ),
        (
            {"security.protocol": "sasl_plaintext", "sasl.mechanisms": "PLANE"},
            "SASL_MECHANISM: Unsupported SASL mechanism: PLANE",
        ),
        (
            {"security.protocol": "SASL_SSL", "sasl.mechanism": "SCRAM-SHA-512", "sasl.username": "relay"},
            "SASL_PASSWORD: not set: sasl.mechanism asks for a user and a password",
        ),
        (
            {"security.protocol": "SASL_SSL", "sasl.mechanism": "PLAIN", "sasl.username": "", "sasl.password": "x"},
            "SASL_USERNAME: not set: sasl.mechanism asks for a user and a password",
        ),
        (
            OAUTH,
            (
                "SASL_OAUTHBEARER_METHOD: nothing gives OAUTHBEARER a token: set it to oidc, and "
                "sasl.oauthbearer.token.endpoint.url, client.id and client.secret with it"
            ),
        ),
        (
            OIDC,
            (
                "SASL_OAUTHBEARER_TOKEN_ENDPOINT_URL: `sasl.oauthbearer.token.endpoint.url` is mandatory when "
                "`sasl.oauthbearer.method=oidc` is set"
            ),
        ),
        (
            {**OIDC, "sasl.oauthbearer.token.endpoint.url": "auth.example"},
            "SASL_OAUTHBEARER_TOKEN_ENDPOINT_URL: not a URL: write https://host/path",
        ),
        (
            {**OIDC, **AWS},
            (
                "SASL_OAUTHBEARER_METADATA_AUTHENTICATION_TYPE: Config "
                "'sasl.oauthbearer.metadata.authentication.type=aws_iam' requires the optional 'oauthbearer-aws' "
                "extra. "
                "Install with: pip install 'confluent-kafka[oauthbearer-aws]'"
            ),
        ),
        (
            UNSECURED,
            "SASL_OAUTHBEARER_CONFIG: names no principal for the unsecured token: write principal=NAME",
        ),
        (
            {"ssl.ca.location": "/nowhere/ca.pem"},
            (
                "SSL_CA_LOCATION: '/nowhere/ca.pem' cannot be read: No such file or directory: correct the path, or "
                "let "
                "this user read the file"
            ),
        ),
        (
            {"security.protocol": "ssl", "ssl.key.location": "/etc"},
            "SSL_KEY_LOCATION: '/etc' cannot be read: Is a directory: correct the path, or let this user read the file",
        ),
        (
            {"ssl.key.location": "-----BEGIN PRIVATE KEY-----\nhunter2"},
            (
                "SSL_KEY_LOCATION: holds PEM text, and takes the path of a file: write the path, or use the property "
                "that "
                "ends in .pem"
            ),
        ),
        (
            {"security.protocol": "ssl", "ssl.ca.location": "/etc/hostname"},
            (
                "SSL_CA_LOCATION: ssl.ca.location failed: error:05800088:x509 certificate routines::no certificate "
                "or crl "
                "found"
            ),
        ),
        (
            {"compression.codec": "brotli"},
            'COMPRESSION_TYPE: Invalid value "brotli" for configuration property "compression.codec"',
        ),
        (
            {"queuing.strategy": "lifo"},
            "QUEUING_STRATEGY: `queuing.strategy` must be set to `fifo` when `enable.idempotence` is true",
        ),
        ({"message.send.max.retries": 0}, "RETRIES: `retries` must be set >= 1 when `enable.idempotence` is true"),
        ({"debug": "everything"}, 'DEBUG: Invalid value "everything" for configuration property "debug"'),
        (
            {"log_level": 9},
            'LOG_LEVEL: Configuration property "log_level" value 9 is outside allowed range 0..7',
        ),
        ({"opaque": "x"}, 'OPAQUE: Property "opaque" must be set through dedicated .._set_..() function'),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_in_one_line_that_names_the_variable(
    properties: dict[str, ProducerSetting], problem: str
) -> None:
    assert problem_of(BROKER | properties) == f"OUTBOX_RELAY_KAFKA__{problem}"


def problem_of(properties: dict[str, ProducerSetting]) -> str:
    try:
        check_producer_config(with_kafka(properties).producer_config())
    except ValidationError as error:
        return explain(error)
    except ConfigurationError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "properties",
    [
        {**UNSECURED, "sasl.oauthbearer.config": "principal=relay"},
        {"security.protocol": "ssl", "ssl.ca.location": "/etc"},
        {"security.protocol": "ssl", "ssl.ca.location": "probe"},
    ],
    ids=str,
)
def test_what_may_work_is_not_refused(properties: dict[str, ProducerSetting]) -> None:
    assert problem_of(BROKER | properties) == ""


@pytest.mark.parametrize(
    ("properties", "problem"),
    [
        ({"linger.mss": 5}, 'LINGER_MSS: No such configuration property: "linger.mss"; did you mean linger.ms?'),
        (
            {"linger.ms": 900_001},
            (
                'LINGER_MS: Configuration property "queue.buffering.max.ms" value 900001 is outside allowed range '
                "0..900000"
            ),
        ),
    ],
    ids=str,
)
def test_librdkafka_refuses_without_a_broker(properties: dict[str, ProducerSetting], problem: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        check_producer_config(with_kafka(BROKER | properties).producer_config())

    assert str(refusal.value) == f"OUTBOX_RELAY_KAFKA__{problem}"


def test_a_configuration_without_a_broker_is_refused() -> None:
    with pytest.raises(ConfigurationError) as refusal:
        check_producer_config(Settings().producer_config())

    assert (
        str(refusal.value)
        == "OUTBOX_RELAY_KAFKA__BOOTSTRAP_SERVERS: not set: name at least one broker, e.g. kafka:9092"
    )


def test_every_property_suggested_is_known_to_librdkafka() -> None:
    unknown = [name for name in {*kinds(), *SECRETS} - {"sasl.jaas.config"} if is_unknown_to_librdkafka(name)]

    assert unknown == []


def is_unknown_to_librdkafka(name: str) -> bool:
    try:
        Producer({"log_level": 0, name: "?"})
    except KafkaException as error:
        return re.search("No such configuration property", error.args[0].str()) is not None
    return False


def test_the_kind_of_each_property_is_what_librdkafka_takes() -> None:
    kinds_of_librdkafka = {name: librdkafkas_kind(name) for name in kinds()}

    assert kinds_of_librdkafka == {name: GENERAL_KINDS.get(kind, kind) for name, kind in kinds().items()}


def librdkafkas_kind(name: str) -> str:
    """Told from what it says of a question mark; it has one word for both numbers, and anything may be text."""
    with pytest.raises(KafkaException) as refusal:
        Producer({name: "?", "no.such.property": 1})
    words = refusal.value.args[0].str()
    if words.startswith("Expected bool"):
        return "boolean"
    is_number = words.startswith("Invalid value for") and not words.endswith("?") and property_name(name) != "acks"
    return "number" if is_number else "choice" if words.startswith("Invalid value") else "text"
