"""The relay as a whole: one horizon watch, its lanes and what is beside them, started and stopped together."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from outbox_relay.database import translated_errors
from outbox_relay.errors import DatabaseUnavailable, KafkaUnavailable
from outbox_relay.relay.canary import Canary, CanaryOptions
from outbox_relay.relay.horizon import read_last_number
from outbox_relay.relay.late import LateCollector
from outbox_relay.relay.loop import Lane, LaneOptions
from outbox_relay.relay.prune import PruneOptions, Pruner
from outbox_relay.relay.reconcile import ReconcileOptions, Reconciler
from outbox_relay.relay.shards import Shards
from outbox_relay.relay.survey import SurveyOptions, Surveyor
from outbox_relay.relay.watch import HorizonWatch, WatchOptions
from outbox_relay.sql import statement

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg import Connection

    from outbox_relay.observe.telemetry import Telemetry
    from outbox_relay.relay.publish import Publisher


@dataclass(frozen=True, slots=True)
class RelayOptions:
    """What a relay process is made of; a part that is None is left out: without *prune* every message is kept."""

    lanes: int = 2
    lane: LaneOptions = LaneOptions()  # noqa: RUF009 -- frozen
    watch: WatchOptions = WatchOptions()  # noqa: RUF009 -- frozen
    reconcile: ReconcileOptions = ReconcileOptions()  # noqa: RUF009 -- frozen
    prune: PruneOptions | None = None
    survey: SurveyOptions | None = None
    canary: CanaryOptions | None = None


class Relay:
    """
    Starts the threads and tells when their work is done. *connect* opens a connection for the thread it is given.

    The first level of stopping, `drain`, takes no more; the stints in hand are recorded. The second is the end of the
    process: PostgreSQL frees what the lanes have locked, and nothing is lost.
    """

    def __init__(
        self,
        *,
        options: RelayOptions,
        connect: Callable[[str], Connection],
        make_publisher: Callable[[], Publisher],
        telemetry: Telemetry,
    ) -> None:
        self._options = options
        self._connect = connect
        self._telemetry = telemetry
        self._stop = threading.Event()
        self._reconciler = Reconciler(
            options=options.reconcile,
            connect=partial(connect, "reconcile"),
            telemetry=telemetry,
            stop=self._stop,
        )
        self._watch = HorizonWatch(
            options=options.watch,
            connect=partial(connect, "horizon"),
            telemetry=telemetry,
            renumbered=self._reconciler.begin_anew,
        )
        self._shards = Shards()
        self._lanes = [
            Lane(
                name,
                options=options.lane,
                connect=partial(connect, name),
                publisher=make_publisher(),
                watch=self._watch,
                shards=self._shards,
                telemetry=telemetry,
                stop=self._stop,
            )
            for name in (f"lane-{number}" for number in range(1, options.lanes + 1))
        ]
        self._threads = [
            threading.Thread(target=self._watch.run, name="horizon", daemon=True),
            *(threading.Thread(target=lane.run, name=lane.name, daemon=True) for lane in self._lanes),
        ]
        self._threads += [threading.Thread(target=part.run, name=name, daemon=True) for name, part in self._beside()]

    def _beside(self) -> Iterator[tuple[str, LateCollector | Reconciler | Pruner | Surveyor | Canary]]:
        """Make the parts beside the lanes."""
        options, telemetry, stop = self._options, self._telemetry, self._stop
        yield (
            "late",
            LateCollector(
                options=options.lane.claim,
                connect=partial(self._connect, "late"),
                watch=self._watch,
                found=self._look_for_waiting,
                telemetry=telemetry,
                stop=stop,
            ),
        )
        yield "reconcile", self._reconciler
        if options.prune is not None:
            connect = partial(self._connect, "prune")
            yield "prune", Pruner(options=options.prune, connect=connect, telemetry=telemetry, stop=stop)
        if options.survey is not None:
            connect = partial(self._connect, "survey")
            yield "survey", Surveyor(options=options.survey, connect=connect, telemetry=telemetry, stop=stop)
        if options.canary is not None:
            connect = partial(self._connect, "canary")
            yield "canary", Canary(options=options.canary, connect=connect, telemetry=telemetry, stop=stop)

    def _look_for_waiting(self) -> None:
        for lane in self._lanes:
            lane.look_soon()
        self._watch.wake()

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def drain(self) -> None:
        """Claim nothing more; the stints in hand are recorded."""
        self._stop.set()
        self._watch.stop()

    def join(self, *, timeout: float) -> bool:
        """Wait for the threads to end after `drain`; True if they have."""
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def last_no(self) -> int:
        """Return the number that `is_drained` is asked about: the last one drawn so far."""
        with closing(self._connect("drain")) as connection:
            return read_last_number(connection, schema=self._options.watch.schema).number

    def is_drained(self, through: int) -> bool:
        """
        Tell whether everything up to the number *through* is published or parked.

        Raises:
            KafkaUnavailable: Kafka, or a topic, has been away for longer than the publish deadline.
            DatabaseUnavailable: PostgreSQL has been away for as long.
        """
        patience = self._options.lane.publish_deadline
        held = sorted({topic for lane in self._lanes for topic in lane.held_topics})
        if held and self._telemetry.lost_for("topic") > patience:
            raise KafkaUnavailable(f"cannot write to {', '.join(held)}: create the topic, or grant access to it")
        if self._telemetry.lost_for("kafka") > patience:
            raise KafkaUnavailable(f"Kafka has been away for {patience:g} s; messages are left unpublished")
        if self._telemetry.lost_for("database") > patience:
            raise DatabaseUnavailable(f"PostgreSQL has been away for {patience:g} s")
        return not held and self._shards.drained_through >= through and not self._is_anything_left(through)

    def _is_anything_left(self, through: int) -> bool:
        """Ask the database, for a lane knows nothing of what another process holds or what still waits."""
        schema = self._options.watch.schema
        with closing(self._connect("drain")) as connection, translated_errors():
            [(is_left,)] = connection.execute(statement("find_left", schema=schema), {"through": through}).fetchall()
        return bool(is_left)
