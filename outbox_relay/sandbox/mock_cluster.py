"""
librdkafka's mock cluster: brokers inside this process for a machine without Java, and for errors on demand.

It speaks the protocol over loopback to any client, but checks no sequences, no fencing, no topic names and no
authorisation, creates topics by itself, and keeps everything in memory. The Python client does not expose it, so this
module calls the library inside the client's wheel; that path is private to the wheel and known only here.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Self

import confluent_kafka

from outbox_relay.errors import ConfigurationError, KafkaUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

RD_KAFKA_PRODUCER = 0
ERROR_TEXT_BYTES = 512


class ApiKey(IntEnum):
    """Requests that errors can be injected into, by their number in the Kafka protocol."""

    PRODUCE = 0
    FETCH = 1
    LIST_OFFSETS = 2
    METADATA = 3
    INIT_PRODUCER_ID = 22


class MockCluster:
    """
    A running mock cluster; its brokers are numbered from 1.

    Error codes are those of confluent_kafka.KafkaError, times are milliseconds. Close it after its clients.

    Raises:
        ConfigurationError: The installed confluent-kafka does not come with its own librdkafka.
        KafkaUnavailable: librdkafka refused.
    """

    def __init__(self, *, brokers: int = 1) -> None:
        self._library = _load_library()
        self._client = self._new_client()
        self._cluster = self._library.rd_kafka_mock_cluster_new(self._client, brokers)
        if not self._cluster:
            raise KafkaUnavailable(f"librdkafka could not start a mock cluster of {brokers} brokers")
        self._library.rd_kafka_mock_start_request_tracking(self._cluster)

    @property
    def bootstrap_servers(self) -> str:
        """Addresses of the brokers."""
        addresses: bytes = self._library.rd_kafka_mock_cluster_bootstraps(self._cluster)
        return addresses.decode()

    def create_topic(self, name: str, *, partitions: int = 1, replication: int = 1) -> None:
        """Create a topic; one that a client asks for comes into being by itself, with 4 partitions."""
        _check(self._library.rd_kafka_mock_topic_create(self._cluster, name.encode(), partitions, replication))

    def push_errors(self, api_key: ApiKey, codes: Sequence[int]) -> None:
        """Answer the next requests of this kind with *codes*, one each; code 0 lets a request through."""
        array = (ctypes.c_int * len(codes))(*codes)
        self._library.rd_kafka_mock_push_request_errors_array(self._cluster, api_key, len(codes), array)

    def clear_errors(self, api_key: ApiKey) -> None:
        """Forget the pushed errors that have not been used."""
        self._library.rd_kafka_mock_clear_request_errors(self._cluster, api_key)

    def count_requests(self, api_key: ApiKey) -> int:
        """Count the requests of this kind so far, whatever was answered."""
        count = ctypes.c_size_t()
        requests = self._library.rd_kafka_mock_get_requests(self._cluster, ctypes.byref(count))
        kinds = [self._library.rd_kafka_mock_request_api_key(requests[index]) for index in range(count.value)]
        self._library.rd_kafka_mock_request_destroy_array(requests, count)
        return kinds.count(api_key)

    def set_topic_error(self, topic: str, code: int) -> None:
        """Report *code* for the topic in metadata until it is set to 0."""
        self._library.rd_kafka_mock_topic_set_error(self._cluster, topic.encode(), code)

    def set_round_trip(self, milliseconds: int, *, broker: int = 1) -> None:
        """Delay every answer of a broker."""
        _check(self._library.rd_kafka_mock_broker_set_rtt(self._cluster, broker, milliseconds))

    def set_down(self, broker: int = 1) -> None:
        """Close a broker's connections and refuse new ones."""
        _check(self._library.rd_kafka_mock_broker_set_down(self._cluster, broker))

    def set_up(self, broker: int = 1) -> None:
        """Bring a broker back."""
        _check(self._library.rd_kafka_mock_broker_set_up(self._cluster, broker))

    def set_leader(self, topic: str, *, partition: int, broker: int) -> None:
        """Make *broker* the leader of a partition."""
        name = topic.encode()
        _check(self._library.rd_kafka_mock_partition_set_leader(self._cluster, name, partition, broker))

    def close(self) -> None:
        """End the brokers; what they hold is gone."""
        self._library.rd_kafka_mock_cluster_destroy(self._cluster)
        self._library.rd_kafka_destroy(self._client)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _new_client(self) -> int:
        """Make the client that the C interface wants as the owner of a cluster; it connects to nothing."""
        error = ctypes.create_string_buffer(ERROR_TEXT_BYTES)
        configuration = self._library.rd_kafka_conf_new()
        # Silent, or it would warn that it has no servers to connect to.
        self._library.rd_kafka_conf_set(configuration, b"log_level", b"0", error, ERROR_TEXT_BYTES)
        client: int | None = self._library.rd_kafka_new(RD_KAFKA_PRODUCER, configuration, error, ERROR_TEXT_BYTES)
        if client is None:
            raise KafkaUnavailable(f"librdkafka could not make a client: {error.value.decode()}")
        return client


def _load_library() -> ctypes.CDLL:
    """Load the librdkafka that the client in this process already uses, with the signatures of what is called here."""
    wheel_libraries = Path(confluent_kafka.__file__).parents[1] / "confluent_kafka.libs"
    path = next(wheel_libraries.glob("librdkafka-*.so*"), None)
    if path is None:
        raise ConfigurationError(
            f"no librdkafka in {wheel_libraries}: the mock cluster needs confluent-kafka installed from its Linux wheel"
        )
    library = ctypes.CDLL(str(path))
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    numbers, pointers = ctypes.POINTER(ctypes.c_int), ctypes.POINTER(pointer)
    for name, result, arguments in (
        ("rd_kafka_conf_new", pointer, ()),
        ("rd_kafka_conf_set", number, (pointer, text, text, text, ctypes.c_size_t)),
        ("rd_kafka_new", pointer, (number, pointer, text, ctypes.c_size_t)),
        ("rd_kafka_destroy", None, (pointer,)),
        ("rd_kafka_mock_cluster_new", pointer, (pointer, number)),
        ("rd_kafka_mock_cluster_destroy", None, (pointer,)),
        ("rd_kafka_mock_cluster_bootstraps", text, (pointer,)),
        ("rd_kafka_mock_topic_create", number, (pointer, text, number, number)),
        ("rd_kafka_mock_topic_set_error", None, (pointer, text, number)),
        ("rd_kafka_mock_push_request_errors_array", None, (pointer, ctypes.c_int16, ctypes.c_size_t, numbers)),
        ("rd_kafka_mock_clear_request_errors", None, (pointer, ctypes.c_int16)),
        ("rd_kafka_mock_start_request_tracking", None, (pointer,)),
        ("rd_kafka_mock_get_requests", pointers, (pointer, ctypes.POINTER(ctypes.c_size_t))),
        ("rd_kafka_mock_request_api_key", ctypes.c_int16, (pointer,)),
        ("rd_kafka_mock_request_destroy_array", None, (pointers, ctypes.c_size_t)),
        ("rd_kafka_mock_broker_set_rtt", number, (pointer, ctypes.c_int32, number)),
        ("rd_kafka_mock_broker_set_down", number, (pointer, ctypes.c_int32)),
        ("rd_kafka_mock_broker_set_up", number, (pointer, ctypes.c_int32)),
        ("rd_kafka_mock_partition_set_leader", number, (pointer, text, ctypes.c_int32, ctypes.c_int32)),
    ):
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library


def _check(code: int) -> None:
    if code:
        raise KafkaUnavailable(f"the mock cluster refused: {confluent_kafka.KafkaError(code).str()}")
