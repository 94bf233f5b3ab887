"""`outbox-relay run`: build the relay from the settings, and turn signals into its two levels of stopping."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import click
import structlog

from outbox_relay import __version__
from outbox_relay.cli.exits import ExitCode
from outbox_relay.cli.options import settings_options
from outbox_relay.cli.prune import prune_options
from outbox_relay.cli.reconcile import reconcile_options
from outbox_relay.cli.signals import StopSignals
from outbox_relay.config import check_producer_config
from outbox_relay.database import connect
from outbox_relay.errors import DependencyUnavailable, OutboxRelayError
from outbox_relay.observe import logs
from outbox_relay.observe.health import Certificate, HealthServer
from outbox_relay.observe.metrics import Metrics
from outbox_relay.observe.telemetry import Telemetry
from outbox_relay.operate.schema import check_schema
from outbox_relay.relay.canary import CanaryOptions, check_canary
from outbox_relay.relay.claim import ClaimOptions
from outbox_relay.relay.failpoints import Failpoints, parse_failpoints
from outbox_relay.relay.failures import Backoff
from outbox_relay.relay.loop import LaneOptions
from outbox_relay.relay.message import Addressing
from outbox_relay.relay.prune import check_pruning
from outbox_relay.relay.publish import Publisher
from outbox_relay.relay.read import Limits
from outbox_relay.relay.relay import Relay, RelayOptions
from outbox_relay.relay.survey import SurveyOptions
from outbox_relay.relay.watch import WatchOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg import Connection
    from structlog.typing import FilteringBoundLogger

    from outbox_relay.config import Configuration, ProducerSetting, Settings

_POLL_SECONDS = 0.02
_REST_SECONDS = 60.0
_SLOW_SECONDS = 30.0  # that a thread may take beyond the longest time-out of its turn
_READABLE_FACTOR = 8  # jsonb takes more room than its text, a list of small numbers several times as much


@click.command()
@click.option("--once", is_flag=True, help="Publish what is committed now, then exit.")
@settings_options()
def run(configuration: Configuration, *, once: bool) -> None:
    """
    Relay committed messages to Kafka until SIGTERM.

    The first SIGTERM or SIGINT lets the batches in hand finish, the second ends the process at once. Neither loses a
    message.
    """
    settings = configuration.settings
    redaction = logs.configure(log_format=settings.log_format, level=settings.log_level, secrets=settings.secrets())
    check_producer_config(settings.producer_config())
    if once:
        settings = settings.model_copy(update={"canary_interval": 0.0})  # nobody would be there when it arrives
    process = _Process(settings, load_again=configuration.load_again, redaction=redaction)
    raise SystemExit(process.run_once() if once else process.run())


class _Process:
    """
    One run of the daemon: its parts, and the order in which they start and stop.

    What opens a connection or a producer reads the settings again, and takes the secrets from there: those that were
    rotated meanwhile count from the next attempt on.
    """

    def __init__(
        self, settings: Settings, *, load_again: Callable[[], Configuration], redaction: logs.Redaction
    ) -> None:
        self._settings = settings
        self._load_again = load_again
        self._redaction = redaction
        self._signals = StopSignals()
        self._logger: FilteringBoundLogger = structlog.get_logger("outbox_relay")
        self._addressing = addressing_of(settings)
        metrics = Metrics()
        self._telemetry = Telemetry(
            logger=self._logger,
            metrics=metrics,
            topic_of=self._addressing.topic,
            live_max_age=_SLOW_SECONDS + max(settings.statement_timeout, settings.publish_deadline),
            ready_max_age=settings.ready_max_age if settings.survey_interval else 0.0,
        )
        self._failpoints = Failpoints(parse_failpoints(settings.failpoints), tell=self._telemetry.failpoint_reached)
        self._health = (
            HealthServer(
                host=settings.metrics_host,
                port=settings.metrics_port,
                metrics=metrics,
                telemetry=self._telemetry,
                certificate=_certificate(settings),
            )
            if settings.metrics_port
            else None
        )

    def run(self) -> int:
        """Relay until a signal; wait for the database as long as it takes."""
        relay: Relay | None = None
        received: signal.Signals | None = None
        backoff = Backoff()
        with self._listening():
            while received is None:
                pause = _REST_SECONDS
                if relay is None:
                    try:
                        relay = self._start()
                    except DependencyUnavailable as error:
                        self._telemetry.database_lost("main", error)
                        pause = backoff.next_pause(random.Random())  # noqa: S311 -- jitter, no secret
                received = self._signals.within(pause)
            return self._stop(relay, reason=received.name) or _exit_code(received)

    def run_once(self) -> int:
        """Relay what is committed now; raise if the database or Kafka is away."""
        received: signal.Signals | None = None
        with self._listening():
            relay = self._start()
            through = relay.last_no()
            try:
                while received is None and not relay.is_drained(through):
                    received = self._signals.within(_POLL_SECONDS)
            except OutboxRelayError as error:
                self._stop(relay, reason=str(error))
                raise
            code = self._stop(relay, reason=received.name if received else "drained")
            return code or (_exit_code(received) if received else 0)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        if self._health is None:
            yield
            return
        self._health.start()
        try:
            yield
        finally:
            self._health.stop()

    def _start(self) -> Relay:
        """Check the database, then start the threads."""
        settings = self._settings
        with closing(self._connect("main")) as connection:
            warning = check_schema(connection, schema=settings.schema_name)
            if settings.retention:
                check_pruning(connection, schema=settings.schema_name)
            if settings.canary_interval:
                check_canary(connection, schema=settings.schema_name)
            source = source_of(settings, connection)
        self._telemetry.database_recovered("main")
        if warning:
            self._telemetry.schema_is_newer(warning)
        publisher_class = choose_publisher()
        relay = Relay(
            options=_relay_options(settings, replace(self._addressing, source=source), failpoints=self._failpoints),
            connect=self._connect,
            make_publisher=lambda: publisher_class(
                self._producer_config, logger=librdkafka_logger(), failpoints=self._failpoints
            ),
            telemetry=self._telemetry,
        )
        _collect_garbage_rarely()
        if settings.failpoints:
            self._telemetry.failpoints_armed(settings.failpoints)
        relay.start()
        self._telemetry.relay_started(
            version=__version__,
            source=source,
            envelope=settings.envelope,
            is_traced=publisher_class is not Publisher,
            lanes=settings.lanes,
            on_poison=settings.on_poison,
            pid=os.getpid(),
        )
        return relay

    def _stop(self, relay: Relay | None, *, reason: str) -> int:
        """Drain; give 0, or the exit code of a drain that did not come to its end."""
        self._telemetry.relay_draining(reason=reason)
        deadline = time.monotonic() + self._settings.drain_timeout
        is_drained = relay is None
        if relay is not None:
            relay.drain()
            while not (is_drained := relay.join(timeout=0.0)) and time.monotonic() < deadline:
                again = self._signals.within(_POLL_SECONDS)
                if again is not None:
                    os._exit(128 + again)  # PostgreSQL frees what the lanes hold
        self._telemetry.relay_stopped(is_drained=is_drained)
        return 0 if is_drained else ExitCode.INTERNAL

    def _connect(self, thread: str) -> Connection:
        conninfo = self._read_again().database_url.get_secret_value()
        return connect(conninfo, application_name=f"outbox-relay {thread}")

    def _producer_config(self) -> dict[str, ProducerSetting]:
        return self._read_again().producer_config()

    def _read_again(self) -> Settings:
        settings = self._load_again().settings
        self._redaction.hide(settings.secrets())
        return settings


def _collect_garbage_rarely() -> None:
    """Look for cycles less often: a batch is tens of thousands of tuples without any, and costs a third more."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 10, 10)


def _certificate(settings: Settings) -> Certificate | None:
    if not settings.metrics_certificate:
        return None
    return Certificate(settings.metrics_certificate, key_path=settings.metrics_certificate_key)


def _exit_code(received: signal.Signals) -> int:
    return ExitCode.INTERRUPTED if received is signal.SIGINT else 0


def addressing_of(settings: Settings) -> Addressing:
    """Give what the settings say about addressing, for relays and replays; an empty source is yet to be filled in."""
    return Addressing(
        template=settings.topic_template,
        topics=settings.topic_map,
        allowed=settings.allowed_topics,
        source=settings.source,
        envelope=settings.envelope,
        readable_bytes=_READABLE_FACTOR * int(settings.producer_config().get("message.max.bytes", 1_000_000)),
    )


def source_of(settings: Settings, connection: Connection) -> str:
    """Give the source of every message: as set, or the name of the database and the schema."""
    return settings.source or f"{connection.info.dbname}.{settings.schema_name}"


def _relay_options(settings: Settings, addressing: Addressing, *, failpoints: Failpoints) -> RelayOptions:
    claim = ClaimOptions(
        schema=settings.schema_name,
        lock_timeout=settings.lock_timeout,
        statement_timeout=settings.statement_timeout,
        transaction_timeout=settings.transaction_timeout,
        synchronous_commit=settings.synchronous_commit,
    )
    lane = LaneOptions(
        claim=claim,
        limits=Limits(
            messages=settings.batch_size,
            stored_bytes=settings.batch_bytes,
            readable_bytes=addressing.readable_bytes,
        ),
        addressing=addressing,
        on_poison=settings.on_poison,
        publish_deadline=settings.publish_deadline,
        failpoints=failpoints,
    )
    watch = WatchOptions(
        schema=settings.schema_name,
        ordering_timeout=settings.ordering_timeout,
        poll_interval=settings.poll_interval,
        idle_poll_interval=settings.idle_poll_interval,
    )
    prune = prune_options(settings, older_than_seconds=settings.retention) if settings.retention else None
    survey = SurveyOptions(schema=settings.schema_name, interval=settings.survey_interval)
    canary = CanaryOptions(schema=settings.schema_name, interval=settings.canary_interval)
    return RelayOptions(
        lanes=settings.lanes,
        lane=lane,
        watch=watch,
        reconcile=reconcile_options(settings),
        prune=prune,
        survey=survey if settings.survey_interval and settings.metrics_port else None,  # or nobody would see it
        canary=canary if settings.canary_interval else None,
    )


def choose_publisher() -> type[Publisher]:
    """Give the publisher that makes spans if OpenTelemetry is installed and somebody takes them."""
    try:
        from outbox_relay.relay.tracing import TracedPublisher, is_set_up  # noqa: PLC0415 -- an optional extra
    except ImportError:
        return Publisher
    return TracedPublisher if is_set_up() else Publisher


def librdkafka_logger() -> logging.Logger:
    """Give the logger for librdkafka's own words, without those that are no news."""
    logger = logging.getLogger("librdkafka")
    if not logger.filters:
        logger.addFilter(_is_news)
        logger.addFilter(logs.OncePerMinute())
    return logger


def _is_news(record: logging.LogRecord) -> bool:
    """Tell whether a line says more than that a setting which we rely on is called experimental."""
    return "enable.gapless.guarantee" not in record.getMessage()
