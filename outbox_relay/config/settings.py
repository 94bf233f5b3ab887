"""The settings as one model: names, defaults, limits, and the rules between them."""

from __future__ import annotations

import json
from operator import le, lt
from string import Formatter
from typing import TYPE_CHECKING, Annotated, Literal

import psycopg
from psycopg.conninfo import conninfo_to_dict
from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from outbox_relay.config import kafka
from outbox_relay.config.durations import MOST_SECONDS, duration_seconds
from outbox_relay.config.kafka import ProducerSetting, whole_number
from outbox_relay.config.names import PREFIX, env_name
from outbox_relay.config.refusals import DEFAULT_MESSAGE_BYTES, NO_TEXT, is_text, needed_kbytes, refusals
from outbox_relay.relay.canary import AGGREGATE_TYPE as CANARY_TYPE
from outbox_relay.relay.failpoints import parse_failpoints
from outbox_relay.relay.message import is_topic_name
from outbox_relay.relay.shards import SHARDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pydantic.fields import FieldInfo

_DEFAULT_BATCH_MESSAGES = 10_000
_MOST_WAIT_SECONDS = 2_147_483
_MESSAGE_TIMEOUT = "kafka.message.timeout.ms"

_TIMES: tuple[tuple[str, str, Callable[[float, float], bool]], ...] = (
    ("publish_deadline", _MESSAGE_TIMEOUT, lt),  # a producer must not give up a message that the relay still waits for
    (_MESSAGE_TIMEOUT, "transaction_timeout", lt),  # the messages of a frozen process expire before its locks do
    ("publish_deadline", "drain_timeout", le),
    ("lock_timeout", "statement_timeout", lt),
    ("poll_interval", "idle_poll_interval", le),
)


def _topic(name: str) -> str:
    if not is_topic_name(name):
        raise ValueError(f"{name!r} is no topic name: use 1 to 249 of the characters a-z A-Z 0-9 . _ -")
    return name


def _topic_template(template: str) -> str:
    try:
        placeholders = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
        example = template.format(aggregate_type="a")
    except (ValueError, KeyError, IndexError, AttributeError):
        placeholders, example = [""], ""
    if set(placeholders) - {"aggregate_type"}:
        raise ValueError(f"{template!r} is no topic template: its only placeholder is {{aggregate_type}}")
    _topic(example)
    return template


def _connection_string(url: SecretStr) -> SecretStr:
    try:
        conninfo_to_dict(url.get_secret_value())
    except psycopg.ProgrammingError:
        # The driver's words quote the text, and with it perhaps a password.
        raise ValueError(
            "not a connection string: write postgresql://user@host/database or host=... dbname=...; "
            "the value is not shown because it may hold a password"
        ) from None
    return url


def _failpoints(text: str) -> str:
    parse_failpoints(text)
    return text


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _duration(value: object) -> object:
    return duration_seconds(value) if isinstance(value, str) else value


def _from_json(value: object) -> object:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None


Topic = Annotated[str, AfterValidator(_topic)]
# PostgreSQL takes milliseconds of 32 bits, and 0 of them as no limit at all.
Seconds = Annotated[float, Field(ge=0.001, le=_MOST_WAIT_SECONDS, allow_inf_nan=False)]
SecondsOrNever = Annotated[float, Field(ge=0, le=_MOST_WAIT_SECONDS, allow_inf_nan=False)]


class Settings(BaseSettings):
    """
    What the daemon is told.

    Made from its arguments alone; `load` collects them from the environment and the files.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_prefix_target="all",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    database_url: Annotated[SecretStr, AfterValidator(_connection_string)] = SecretStr("")
    """Connection string of the database that holds the outbox, as URL or `key=value`. Empty: libpq decides, from `PG*`
    variables, the service file and the password file."""

    # pydantic has a method of the name `schema`
    schema_name: str = Field(default="public", alias="schema", pattern=r"^[a-z_][a-z0-9_]{0,62}$")
    """Schema of the outbox tables, a plain lower-case identifier. Another one than the migrations were applied to: the
    relay refuses to start."""

    kafka: Annotated[dict[str, ProducerSetting], Field(repr=False)] = {}
    """librdkafka properties: `OUTBOX_RELAY_KAFKA__COMPRESSION_TYPE=zstd`, or in TOML `[kafka]` with
    `"compression.type" = "zstd"`. Only `bootstrap.servers` is needed."""

    topic_template: Annotated[str, AfterValidator(_topic_template)] = "{aggregate_type}.events"
    """Topic of a message; `{aggregate_type}` is filled in. Changed on a running system: consumers must read the old and
    the new topics, and order between the two is lost."""

    topic_map: Annotated[dict[str, Topic], NoDecode, BeforeValidator(_from_json)] = {}
    """Topics of single aggregate types instead of the template; JSON in the environment: `{"order": "sales"}`."""

    allowed_topics: Annotated[frozenset[Topic], NoDecode, BeforeValidator(_from_json)] = frozenset()
    """The only topics the relay may write to; JSON in the environment. A message for any other is parked. Empty: every
    topic that the template and the map make."""

    source: str = ""
    """The `source` of every message, by which consumers tell outboxes apart. Empty: `<database>.<schema>`. After a
    restore to an earlier point in time consumers that deduplicate by sequence drop new messages, unless numbers leap
    (see docs/postgresql.md) or this is changed."""

    envelope: Literal["native", "cloudevents"] = "native"
    """How a record's headers tell what the message is: in the relay's own names, or as a CloudEvent in binary mode. The
    consumer library reads both; changed on a running system, other consumers must do so too."""

    lanes: Annotated[int, Field(ge=1, le=SHARDS)] = 2
    """Threads that publish, each with a connection and a producer; 16 shards are shared among them. More: more
    connections and memory, and little speed beyond the cores at hand."""

    batch_size: Annotated[int, Field(ge=1, le=100_000)] = 5_000
    """Messages that a lane reads at once. More: more memory. Fewer: less throughput."""

    batch_bytes: Annotated[ByteSize, Field(ge=1_024, le=2**30)] = ByteSize(8 * 1024 * 1024)
    """Bytes that a lane reads at once, such as `8MiB`; one message of each shard is always read. More: more memory.
    Fewer: less throughput."""

    poll_interval: Seconds = 0.002
    """Seconds between polls while messages arrive. More: later delivery. Less: more processor time and round trips."""

    idle_poll_interval: Seconds = 0.1
    """Seconds between polls after a time without messages. More: later delivery of the first message. Less: more work
    while idle."""

    retention: Annotated[float, BeforeValidator(_duration), Field(ge=0, le=MOST_SECONDS, allow_inf_nan=False)] = (
        604_800.0
    )
    """Seconds for which the relay keeps a published row, or a duration such as `36h` or `30d`. More: a larger table.
    Less: less to replay. 0: the relay removes nothing, and `outbox-relay prune` is left to you."""

    ordering_timeout: Seconds = 5.0
    """Seconds that a writer may keep its transaction open before the others stop waiting for it. More: one slow writer
    delays everything for longer. Less: more messages arrive late, with the header `unordered`."""

    on_poison: Literal["park", "skip"] = "park"
    """A message that Kafka can never accept is parked: `park` holds back the later ones of its key as well, `skip` lets
    them pass, out of order once it is released."""

    publish_deadline: Seconds = 15.0
    """Seconds that a batch may wait for Kafka. More: locks are held for longer while Kafka is slow. Less: more
    duplicates while it is."""

    transaction_timeout: Seconds = 30.0
    """Seconds after which PostgreSQL ends an idle transaction of the relay (`idle_in_transaction_session_timeout`).
    More: the shards of a frozen relay are free later."""

    lock_timeout: Seconds = 2.0
    """Seconds that lanes, pruning, reconciling and replays wait for a lock in PostgreSQL; `migrate`, `parked`, the
    survey and the canary have limits of their own. More: an `ALTER TABLE` delays the relay, and what queues behind it,
    for longer. Less: more claims tried again."""

    statement_timeout: Seconds = 30.0
    """Seconds that one statement may take. More: a hanging one is noticed later. Less: a large batch on a slow disk
    never gets done."""

    synchronous_commit: bool = False
    """Whether marking waits for PostgreSQL's disk. `true`: slower, and a crash of the server repeats fewer messages.
    Nothing is lost either way."""

    drain_timeout: Seconds = 20.0
    """Seconds from SIGTERM to the end. Keep it below the grace period of whatever stops the relay. Less than a batch
    takes: its rows are released and published again."""

    log_format: Literal["auto", "json", "console"] = "auto"
    """`auto` is `console` on a terminal and `json` elsewhere."""

    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = "info"
    """Least level that is logged. `debug` writes a line per batch and slows the relay down."""

    survey_interval: SecondsOrNever = 15.0
    """Seconds between looks at backlog, tables and transactions for the metrics. More: older figures. Less: more work
    for PostgreSQL. 0, or no port for metrics: none."""

    ready_max_age: SecondsOrNever = 60.0
    """Seconds after which a message that waits and does not move makes `/readyz` red. Less: a slow moment looks like a
    standstill. More: a standstill shows later. 0, or no survey: never."""

    canary_interval: SecondsOrNever = 0.0
    """Seconds between canaries, messages of the aggregate type `outbox-relay-canary` that measure the way to Kafka and
    back; the login needs the role `outbox_writer` too. More: a fault shows later. Less: more such messages. 0: none."""

    metrics_host: str = "0.0.0.0"  # noqa: S104 -- probes and Prometheus come from outside of a container
    """Address of metrics and probes. They tell topics and counts, never a payload. `127.0.0.1`: nothing outside of the
    host or the pod reaches them."""

    metrics_port: Annotated[int, Field(ge=0, le=65_535)] = 0
    """Port of metrics and probes. 0: no listener, nobody can see how the relay is."""

    metrics_certificate: str = ""
    """Path of the PEM certificate with which metrics and probes are served over TLS; a renewed file counts at once.
    Empty: plain HTTP."""

    metrics_certificate_key: str = ""
    """Path of the private key that belongs to the certificate, PEM without a password."""

    failpoints: Annotated[str, AfterValidator(_failpoints)] = ""
    """For tests of faults alone: where the relay dies, freezes, fails or dawdles, such as `after_claim=kill@3`; see
    docs/faults.md."""

    allow_failpoints: bool = False
    """Whether failpoints may be armed. `true` where somebody relies on the relay: it will fail them."""

    @classmethod
    def fields(cls) -> dict[str, FieldInfo]:
        """Return the fields by the name that people use, which is an alias where pydantic has taken the name itself."""
        return {field.alias or name: field for name, field in cls.model_fields.items()}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 -- the base class's signature
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 -- the same
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 -- the same
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 -- the same
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read nothing but the arguments; `load` remembers where each of them is from."""
        return (init_settings,)

    @field_validator("*", mode="before")
    @classmethod
    def _is_text(cls, given: object) -> object:
        text = given.get_secret_value() if isinstance(given, SecretStr) else given
        if isinstance(text, str) and not is_text(text):
            raise ValueError(NO_TEXT)
        return given

    @field_validator("kafka")
    @classmethod
    def _name_properties(cls, given: dict[str, ProducerSetting]) -> dict[str, ProducerSetting]:
        return {kafka.property_name(name): value for name, value in given.items()}

    @model_validator(mode="after")
    def _agree(self) -> Settings:
        problems = [f"{env_name(name)}: {problem}" for name, problem in self._problems()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def producer_config(self) -> dict[str, ProducerSetting]:
        """Return the librdkafka configuration: our defaults, then what was given; it holds secrets in the clear."""
        # Room for the batch in flight and the next one, or for the largest message, instead of librdkafka's 1 GiB.
        message_bytes = whole_number(self.kafka, "message.max.bytes", default=DEFAULT_MESSAGE_BYTES)
        sizes: dict[str, ProducerSetting] = {
            "queue.buffering.max.kbytes": needed_kbytes(2 * max(self.batch_bytes, message_bytes)),
            "batch.num.messages": max(self.batch_size, _DEFAULT_BATCH_MESSAGES),
        }
        return {**kafka.DEFAULTS, **sizes, **self.kafka}

    def secrets(self) -> frozenset[str]:
        """Return the values that must appear nowhere."""
        url = self.database_url.get_secret_value()
        parameters = conninfo_to_dict(url)
        values = [url, *(parameters.get(name) for name in ("password", "sslpassword"))]
        values += [str(value) for name, value in self.kafka.items() if name in kafka.SECRETS]
        return frozenset(str(value) for value in values if value)

    def _problems(self) -> Iterator[tuple[str, str]]:
        for name, reason in refusals(self.producer_config(), batch_size=self.batch_size):
            yield f"kafka.{name}", reason
        yield from self._time_problems()
        yield from self._canary_problems()
        if bool(self.metrics_certificate) != bool(self.metrics_certificate_key):
            missing = "metrics_certificate_key" if self.metrics_certificate else "metrics_certificate"
            yield missing, "not set: a certificate and its key go together"
        if self.failpoints and not self.allow_failpoints:
            yield (
                "failpoints",
                f"makes the relay fail: remove it, or set {env_name('allow_failpoints')}=true to mean it",
            )
        for topic in sorted(set(self.topic_map.values()) - self.allowed_topics if self.allowed_topics else ()):
            yield "topic_map", f"{topic} is not among the allowed topics: add it to {env_name('allowed_topics')}"

    def _canary_problems(self) -> Iterator[tuple[str, str]]:
        topic = self.topic_map.get(CANARY_TYPE) or self.topic_template.replace("{aggregate_type}", CANARY_TYPE)
        if self.canary_interval and self.allowed_topics and topic not in self.allowed_topics:
            yield "canary_interval", f"canaries go to {topic}: add it to {env_name('allowed_topics')}"

    def _time_problems(self) -> Iterator[tuple[str, str]]:
        name = _MESSAGE_TIMEOUT.removeprefix("kafka.")
        default = whole_number(kafka.DEFAULTS, name, default=0)
        seconds = self.model_dump() | {
            _MESSAGE_TIMEOUT: whole_number(self.producer_config(), name, default=default) / 1000
        }
        for shorter, longer, is_allowed in _TIMES:
            if not is_allowed(seconds[shorter], seconds[longer]):
                problem = f"{seconds[longer]:g} s is too short beside {env_name(shorter)} of {seconds[shorter]:g} s"
                yield longer, f"{problem}: raise it, or lower the other"
