"""
Reconcile: compare the marks with the rows, so that no message is skipped for ever, and keep the marks few.

A mark says how many messages it has passed, and their checksum. An interval is what lies between two neighbouring marks
of a shard, and must hold just these. Rows may be missing, for somebody may delete published messages. Rows too many
were skipped: they go to outbox_pending, from where a relay publishes them after all.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

from psycopg import ClientCursor

from outbox_relay.database import roll_back, translated_errors
from outbox_relay.errors import DatabaseConflict, OutboxRelayError
from outbox_relay.relay.session import repeat_until_stopped
from outbox_relay.relay.shards import SHARDS
from outbox_relay.sql import numbers, statement

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from psycopg import Connection

    from outbox_relay.observe.telemetry import Telemetry

FROM_THE_BEGINNING: Mapping[int, int] = dict.fromkeys(range(SHARDS), 0)
THROUGH_ALL = 2**63 - 1

_ROUND_SECONDS = 5.0
_RETRY_SECONDS = 30.0
_RESTART_SECONDS = 60.0  # between complete comparisons while marks are above the last number drawn

Damage = Literal["none", "some", "all"]


@dataclass(frozen=True, slots=True)
class ReconcileOptions:
    """
    How much is done at once, and the server's time-outs for each transaction, in seconds.

    Attributes:
        schema: Where the outbox is.
        messages: Of each shard, after how many messages a look ends, at the next mark. More: a look holds back vacuum
            for longer. Fewer: more round trips, and more marks are left of a busy time.
        marks: Of each shard, the most marks that a look takes. More: the horizon, to which thinning looks like a
            writer, is held for longer.
        repaired_messages: Most messages that one transaction puts to outbox_pending. More: their shard stands still for
            longer.
        lock_timeout: Wait for somebody else's lock.
        transaction_timeout: PostgreSQL ends a transaction that is idle for longer.
    """

    schema: str = "public"
    messages: int = 10_000
    marks: int = 250
    repaired_messages: int = 5_000
    lock_timeout: float = 2.0
    statement_timeout: float = 30.0
    transaction_timeout: float = 30.0


@dataclass(frozen=True, slots=True)
class Stage:
    """
    Which marks are due for what.

    Attributes:
        older_than_seconds: Marks that are younger are left for later.
        slot_seconds: The age is taken of whole slots of this length, into which thinning joins marks.
        thins: Whether the marks are joined then; the newest one of each shard is left out, for lanes go on from it.
    """

    older_than_seconds: float
    slot_seconds: float = 1.0
    thins: bool = False


CHECK = Stage(older_than_seconds=5.0)
THIN = Stage(older_than_seconds=60.0, slot_seconds=10.0, thins=True)
ALL = Stage(older_than_seconds=0.0, slot_seconds=0.001)


class Positions(NamedTuple):
    """
    How far each shard is reconciled.

    Attributes:
        is_alone: Whether the transaction that asked may move the positions on.
        are_marks_ahead: Some mark is above the last number drawn: new messages appear below the marks.
    """

    is_alone: bool
    are_marks_ahead: bool
    checked: dict[int, int]
    thinned: dict[int, int]


class Stretch(NamedTuple):
    """Neighbouring intervals of a shard, compared as one; the columns of `reconcile_look.sql`."""

    shard: int
    from_no: int
    through: int
    found_messages: int
    is_equal: bool
    has_more: bool


class Interval(NamedTuple):
    """
    An interval whose mark counted other messages than there are; the columns of `reconcile_differences.sql`.

    Attributes:
        found_messages: What is there now, without messages of writers that were given up on.
        uncounted_messages: Those among them that the mark surely did not count: they were committed after it.
    """

    shard: int
    from_no: int
    through: int
    messages: int
    checksum: int
    before_xid: str
    found_messages: int
    found_checksum: int
    uncounted_messages: int
    uncounted_checksum: int

    @property
    def damage(self) -> Damage:
        """
        Tell which messages have to be published again.

        Without those that are surely uncounted, as many as the mark counted, or fewer, may be there: the others were
        deleted. More of them, or others, and nobody can tell the skipped ones from those that are in Kafka.
        """
        rest = self.found_messages - self.uncounted_messages
        checksum = self.found_checksum ^ self.uncounted_checksum
        if rest > self.messages or (rest == self.messages and checksum != self.checksum):
            return "all"
        return "some" if self.uncounted_messages else "none"

    @property
    def affected_messages(self) -> int:
        """How many messages have to be published again, pending ones included."""
        return {"none": 0, "some": self.uncounted_messages, "all": self.found_messages}[self.damage]


class _Part(NamedTuple):
    """
    What became of the lower part of an interval, or of all of it; the columns of `reconcile_repair.sql`.

    Attributes:
        messages: What the mark above says now, as its checksum does.
    """

    through: int
    skipped_messages: int
    messages: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Repair:
    """
    Messages of one interval, or of the lower part of a long one, that are waiting to be published now.

    Attributes:
        messages: How many; fewer than were skipped if some were pending already.
        is_whole: Among them are all messages of the interval, because nobody can tell which of them were skipped.
    """

    shard: int
    from_no: int
    through: int
    messages: int
    is_whole: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """
    What one look has found.

    Attributes:
        messages: How many were compared with their marks.
        damaged: Intervals in which messages were skipped, to be repaired.
        positions: Up to where each shard is compared, damage included.
        is_last: Nothing more is due.
        are_marks_ahead: Some mark is above the last number drawn: new messages appear below the marks.
    """

    messages: int
    damaged: list[Interval]
    positions: dict[int, int]
    is_last: bool
    are_marks_ahead: bool = False


def compare_batch(
    connection: Connection,
    *,
    options: ReconcileOptions,
    after: Mapping[int, int],
    through: int = THROUGH_ALL,
    is_thorough: bool = False,
) -> Batch:
    """
    Compare the next marks above the positions *after*, one for each shard, with the rows; change nothing.

    *connection* is in autocommit mode; the batch is a transaction of its own, which waits for nobody. Marks whose
    interval begins at *through* or higher are left out.

    Args:
        is_thorough: Read every row. Otherwise a row is not noticed that has the number and the shard of a deleted one,
            which comes about only where the sequence went back.

    Raises:
        DatabaseUnavailable: The connection broke.
        DatabaseConflict: A lock or a time-out rolled the batch back.
        SchemaMismatch: There is no outbox, or this role may not read its messages and marks.
    """
    with translated_errors():
        connection.execute(begin_statement(options))
        stretches = _look(connection, options=options, stage=ALL, after=after, through=through)
        damaged = _damaged(connection, stretches, is_thorough=is_thorough, schema=options.schema)
        connection.commit()
    return _batch(stretches, damaged=damaged)


def advance_batch(
    connection: Connection, *, options: ReconcileOptions, stage: Stage, is_thorough: bool = False
) -> Batch | None:
    """
    Compare what is due next, as `compare_batch` does, and move the positions on; None while somebody else does that.

    A shard with damage stays where it is: it is looked at again once it is repaired.
    """
    with translated_errors():
        connection.execute(begin_statement(options))
        positions = _positions(connection, schema=options.schema)
        if not positions.is_alone:
            connection.rollback()
            return None
        after = positions.thinned if stage.thins else positions.checked
        stretches = _look(connection, options=options, stage=stage, after=after, through=THROUGH_ALL)
        damaged = _damaged(connection, stretches, is_thorough=is_thorough, schema=options.schema)
        broken = {interval.shard for interval in damaged}
        _advance(connection, [each for each in stretches if each.shard not in broken], options=options, stage=stage)
    return replace(_batch(stretches, damaged=damaged), are_marks_ahead=positions.are_marks_ahead)


def repair(connection: Connection, interval: Interval, *, options: ReconcileOptions) -> Iterator[Repair]:
    """
    Let the skipped messages of *interval* be published, in a transaction for each part of it.

    What somebody else has repaired or removed meanwhile is left alone. Messages that are pending already stay as they
    are. Whoever stops in between leaves the rest to be found again.

    Raises:
        DatabaseConflict: A relay held the shard for too long, or a time-out rolled the part back.
    """
    is_whole = interval.damage == "all"
    while True:
        part = _repair_part(connection, interval, is_whole=is_whole, options=options)
        if part is None:
            return
        if part.skipped_messages:
            yield Repair(interval.shard, interval.from_no, part.through, part.skipped_messages, is_whole)
        if part.through == interval.through:
            return
        interval = interval._replace(from_no=part.through, messages=part.messages, checksum=part.checksum)


def restart(connection: Connection, *, options: ReconcileOptions) -> None:
    """Have all marks that are kept compared once more, by whichever process reconciles next."""
    with translated_errors():
        connection.execute(begin_statement(options))
        ClientCursor(connection).execute(statement("reconcile_restart", schema=options.schema))


def reconcile_through(
    connection: Connection, *, options: ReconcileOptions, after: Mapping[int, int], through: Mapping[int, int]
) -> Iterator[Repair]:
    """
    Compare and repair, for each shard that *through* names, the intervals that hold messages above *after* up to there.

    For whoever is about to remove these messages: afterwards none of them is skipped, except one that appeared while
    this was at work.
    """
    for shard, number in through.items():
        position, is_last = after.get(shard, 0), False
        while not is_last:
            batch = compare_batch(connection, options=options, after={shard: position}, through=number)
            for interval in batch.damaged:
                yield from repair(connection, interval, options=options)
            position = batch.positions.get(shard, position)
            is_last = batch.is_last


class Reconciler:
    """
    One per process, in a thread of its own; of all relays one reconciles at a time.

    At the start, all marks that are kept are compared once more. So they are, and thoroughly, after marks were found
    above the last number drawn: then messages have appeared below marks that were compared already. A failure makes no
    relay unready: it is told and tried again.
    """

    def __init__(
        self,
        *,
        options: ReconcileOptions,
        connect: Callable[[], Connection],
        telemetry: Telemetry,
        stop: threading.Event,
    ) -> None:
        self._options = options
        self._connect = connect
        self._telemetry = telemetry
        self._stop = stop
        self._has_to_restart = True
        self._is_thorough = False
        self._restart_at = 0.0

    def begin_anew(self) -> None:
        """Compare all marks that are kept once more, from one of the next rounds on."""
        self._has_to_restart = True

    def run(self) -> None:
        """Reconcile until stopped."""
        repeat_until_stopped(
            "reconcile",
            connect=self._connect,
            work=self._reconcile_until_stopped,
            fail=self._telemetry.reconciling_failed,
            pause=_RETRY_SECONDS,
            telemetry=self._telemetry,
            stop=self._stop,
        )

    def _reconcile_until_stopped(self, connection: Connection) -> None:
        while not self._stop.is_set():
            if self._has_to_restart and time.monotonic() >= self._restart_at:
                self._restart(connection)
            self._advance(connection, stage=THIN)
            if self._advance(connection, stage=CHECK) and not self._has_to_restart:
                self._is_thorough = False
            self._stop.wait(_ROUND_SECONDS)

    def _restart(self, connection: Connection) -> None:
        self._has_to_restart = False  # before it is done: meanwhile the watch may ask for another one
        try:
            restart(connection, options=self._options)
        except OutboxRelayError:
            self._has_to_restart = True
            raise
        self._restart_at = time.monotonic() + _RESTART_SECONDS

    def _advance(self, connection: Connection, *, stage: Stage) -> bool:
        """
        Take batch after batch, with as much time between two as they take; True if the last one was reached.

        Otherwise somebody else reconciles, or the relay stops.
        """
        is_last = False
        while not is_last and not self._stop.is_set():
            started = time.monotonic()
            batch = advance_batch(connection, options=self._options, stage=stage, is_thorough=self._is_thorough)
            if batch is None:
                return False
            if batch.are_marks_ahead:
                self._has_to_restart = self._is_thorough = True
            self._repair(connection, batch.damaged)
            seconds = time.monotonic() - started
            self._telemetry.batch_reconciled(batch.messages, seconds=seconds)
            is_last = batch.is_last
            self._stop.wait(seconds)
        return is_last

    def _repair(self, connection: Connection, damaged: Iterable[Interval]) -> None:
        """Repair each interval; one whose shard somebody holds does not keep the others from it."""
        conflict: DatabaseConflict | None = None
        for interval in damaged:
            try:
                for each in repair(connection, interval, options=self._options):
                    self._telemetry.skipped_messages_found(each)
            except DatabaseConflict as error:
                roll_back(connection)
                conflict = error
        if conflict is not None:
            raise conflict


@lru_cache
def begin_statement(options: ReconcileOptions) -> bytes:
    """Return the statements that begin a transaction of reconciling and set what it needs."""
    return statement("reconcile_begin", schema=options.schema) % {
        b"lock_timeout_ms": round(options.lock_timeout * 1000),
        b"statement_timeout_ms": round(options.statement_timeout * 1000),
        b"transaction_timeout_ms": round(options.transaction_timeout * 1000),
    }


def _positions(connection: Connection, *, schema: str) -> Positions:
    rows = connection.execute(statement("reconcile_positions", schema=schema)).fetchall()
    return Positions(
        is_alone=all(row[0] for row in rows),
        are_marks_ahead=any(row[4] for row in rows),
        checked={row[1]: row[2] for row in rows},
        thinned={row[1]: row[3] for row in rows},
    )


def _look(
    connection: Connection, *, options: ReconcileOptions, stage: Stage, after: Mapping[int, int], through: int
) -> list[Stretch]:
    parameters = {
        "shards": numbers(after),
        "positions": numbers(after.values()),
        "older_than_seconds": stage.older_than_seconds,
        "slot_seconds": stage.slot_seconds,
        "leaves_newest": stage.thins,
        "limit": through,
        "marks": options.marks,
        "messages": options.messages,
    }
    look = statement("reconcile_look", schema=options.schema)
    return [Stretch(*row) for row in connection.execute(look, parameters, prepare=True).fetchall()]


def _damaged(connection: Connection, stretches: Iterable[Stretch], *, is_thorough: bool, schema: str) -> list[Interval]:
    """Look at each interval of the stretches that differ, or of all; return those in which messages were skipped."""
    damaged = []
    for each in stretches:
        if is_thorough or not each.is_equal:
            parameters = {
                "shard": each.shard,
                "from_no": each.from_no,
                "through": each.through,
                "is_thorough": is_thorough,
            }
            rows = connection.execute(statement("reconcile_differences", schema=schema), parameters).fetchall()
            damaged += [interval for interval in map(Interval._make, rows) if interval.damage != "none"]
    return damaged


def _advance(connection: Connection, stretches: Sequence[Stretch], *, options: ReconcileOptions, stage: Stage) -> None:
    """Thin the marks of the stretches if it is time, move the positions behind them, and commit."""
    if not stretches:
        connection.commit()
        return
    parameters = {
        "shards": numbers(each.shard for each in stretches),
        "from_nos": numbers(each.from_no for each in stretches),
        "throughs": numbers(each.through for each in stretches),
        "slot_seconds": stage.slot_seconds,
    }
    name = "reconcile_thin" if stage.thins else "reconcile_advance"
    ClientCursor(connection).execute(statement(name, schema=options.schema), parameters)


def _batch(stretches: Iterable[Stretch], *, damaged: list[Interval]) -> Batch:
    stretches = list(stretches)
    return Batch(
        messages=sum(each.found_messages for each in stretches),
        damaged=damaged,
        positions={each.shard: each.through for each in stretches},
        is_last=not any(each.has_more for each in stretches),
    )


def _repair_part(
    connection: Connection, interval: Interval, *, is_whole: bool, options: ReconcileOptions
) -> _Part | None:
    """Repair the next part of *interval*, up to the most messages; None if the interval is not as it was."""
    parameters = {
        "shard": interval.shard,
        "from_no": interval.from_no,
        "through": interval.through,
        "messages": interval.messages,
        "checksum": interval.checksum,
        "before_xid": interval.before_xid,
        "is_whole": is_whole,
        "most": options.repaired_messages,
    }
    with translated_errors():
        connection.execute(begin_statement(options))
        cursor = ClientCursor(connection).execute(statement("reconcile_repair", schema=options.schema), parameters)
        cursor.nextset()  # the first one is the lock's
        rows = cursor.fetchall()
    return _Part._make(rows[0]) if rows else None
