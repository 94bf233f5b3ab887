"""
Horizon: the highest sequence number up to which no message can still appear, so that a claim misses none.

A number is drawn before its transaction commits, so a lower number can become visible after a higher one. The steps:

1. Read the sequence's last value, N. *Then* take a snapshot of the running transactions. A writer has its transaction
   id before it draws its number, so every owner of a number up to N is among them.
2. Take away the relays: a claim leaves its xid on the shard rows that it locked.
3. When none of the others runs any more, the horizon is N. Mostly that takes one or two looks at fresh snapshots.
4. A transaction that runs for longer than the patience is looked up in pg_locks, where only those matter that hold a
   writer's lock on the outbox: an ETL job elsewhere costs a look, not a stall.
5. A writer that stays open beyond the ordering timeout is given up on. It is recorded first; then its numbers no
   longer hold up the horizon. Its messages come through outbox_pending, with the header "unordered".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from outbox_relay.database import translated_errors
from outbox_relay.errors import SchemaMismatch
from outbox_relay.sql import statement

if TYPE_CHECKING:
    from collections.abc import Collection

    from psycopg import Connection

_XID_CYCLE = 2**32
_MOST_CANDIDATES = 8  # while one waits, newer numbers gain little from candidates of their own


class Epoch(NamedTuple):
    """
    What numbers belong to: a start of a server, and the file of the sequence, which a restart of the sequence renews.

    Numbers of two epochs must not be compared: the same number may name two messages.
    """

    server_started_at: float
    sequence_file: int


class LastNumber(NamedTuple):
    """The highest number drawn so far, committed or not, and its epoch."""

    number: int
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Observation:
    """
    The last number drawn, and then the running transactions that are no relays.

    Attributes:
        last_no: Highest number drawn so far.
        running: Full transaction ids (xid8) that ran after `last_no` was read, without the relays'.
        epoch: What the number belongs to.
    """

    last_no: int
    running: frozenset[int]
    epoch: Epoch | None = None


@dataclass(slots=True)
class Candidate:
    """A number that becomes the horizon when the transactions it awaits have ended."""

    number: int
    observed_at: float
    awaited: set[int]


@dataclass(slots=True)
class Horizon:
    """
    The decisions about numbers that may still appear; it is told the time, and asks no database.

    Attributes:
        ordering_timeout: Seconds after which a writer is given up on.
        patience: Seconds after which it is worth a look who the awaited transactions are.
        through: No message with this number or a lower one can still appear, except those of `given_up` writers.
        given_up: Writers that are no longer waited for and were still running at the last observation.
        late_writers_ended: How many of them have ended: their messages are there now, below the horizon.
    """

    ordering_timeout: float
    patience: float = 0.010
    through: int = 0
    given_up: set[int] = field(default_factory=set)
    late_writers_ended: int = 0
    candidates: list[Candidate] = field(default_factory=list)
    _bystanders: set[int] = field(default_factory=set)
    _look_not_before: float = 0.0

    def observe(self, seen: Observation, *, now: float) -> None:
        """
        Take in a new observation: drop the transactions that have ended, and advance as far as possible.

        A last number below one that was seen before means a restored database or a restarted sequence: start anew.
        """
        if seen.last_no < self.newest_no:
            self.reset()
        ended = self.given_up - seen.running
        self.late_writers_ended += len(ended)
        self.given_up -= ended
        self._bystanders &= seen.running
        for candidate in self.candidates:
            candidate.awaited &= seen.running
        if seen.last_no > self.newest_no and len(self.candidates) < _MOST_CANDIDATES:
            self.candidates.append(Candidate(seen.last_no, now, set(seen.running - self.given_up)))
        self._advance()

    def wants_look(self, *, now: float) -> bool:
        """Tell whether pg_locks should be read: someone is slow, or known to be, and the last look is long ago."""
        if not self.candidates or now < self._look_not_before:
            return False
        oldest = self.candidates[0]
        return now - oldest.observed_at >= self.patience or any(
            not candidate.awaited.isdisjoint(self._bystanders) for candidate in self.candidates
        )

    def looked(self, writers: Collection[int], *, now: float, cost: float) -> None:
        """
        Await only those that hold a writer's lock; the others cannot own a number drawn so far.

        Args:
            writers: 32-bit transaction ids, as pg_locks has them.
            cost: Seconds the look took. The next one waits nine times as long, so that looking takes a tenth of the
                time at most: its price grows with all the locks that are held on the server.
        """
        self._look_not_before = now + 9 * cost
        for candidate in self.candidates:
            owners = among(candidate.awaited, writers)
            self._bystanders |= candidate.awaited - owners
            candidate.awaited = owners
        self._advance()

    def held_for(self, *, now: float) -> float:
        """Give the seconds for which the oldest candidate has been waiting, 0 if none is."""
        return now - self.candidates[0].observed_at if self.candidates else 0.0

    def blockers(self, *, now: float) -> int:
        """Give the number of transactions that any candidate has been waiting for beyond the patience."""
        waiting = [candidate.awaited for candidate in self.candidates if now - candidate.observed_at > self.patience]
        return len(set[int]().union(*waiting))

    def overdue(self, *, now: float) -> frozenset[int]:
        """Give the writers that have held up the horizon beyond the ordering timeout."""
        if self.held_for(now=now) < self.ordering_timeout:
            return frozenset()
        return frozenset(self.candidates[0].awaited)

    def give_up(self, xids: Collection[int]) -> None:
        """Wait for these writers no longer; they must have been recorded as unordered before."""
        self.given_up.update(xids)
        for candidate in self.candidates:
            candidate.awaited -= self.given_up
        self._advance()

    def reset(self) -> None:
        """Forget everything: behind a new connection may be another server with other numbers."""
        self.through = 0
        self.candidates.clear()
        self.given_up.clear()
        self._bystanders.clear()

    @property
    def is_new(self) -> bool:
        """Tell whether nothing was observed since the last reset."""
        return not self.newest_no

    @property
    def newest_no(self) -> int:
        """The highest number that was observed so far."""
        return self.candidates[-1].number if self.candidates else self.through

    def _advance(self) -> None:
        while self.candidates and not self.candidates[0].awaited:
            self.through = self.candidates.pop(0).number


def read_last_number(connection: Connection, *, schema: str) -> LastNumber:
    """
    Return the last number drawn; one cheap round trip that touches no table.

    Raises:
        DatabaseUnavailable: The connection broke.
        SchemaMismatch: There is no outbox in *schema*, or this role may not read its sequence.
    """
    with translated_errors():
        [(number, *epoch)] = connection.execute(statement("last_number", schema=schema), prepare=True).fetchall()
    return LastNumber(number, Epoch(*epoch))


def check_tables(connection: Connection, *, schema: str) -> None:
    """
    Return normally when a relay can trust the tables: nothing is hidden, and no message appears below the marks.

    Raises:
        SchemaMismatch: It cannot; the message has the SQL that mends it.
        DatabaseConflict: Somebody has locked a table, or waits to lock it.
        DatabaseUnavailable: The connection broke.
    """
    with translated_errors(), connection.transaction():
        connection.execute("SET LOCAL lock_timeout = '500ms'")
        for name in ("list_defects", "list_disagreements"):  # the second reads tables, which the first finds readable
            problems = connection.execute(statement(name, schema=schema), {"schema": schema}).fetchall()
            if problems:
                raise SchemaMismatch("; ".join(f"{problem} -- {remedy}" for problem, remedy in problems))


def observe(connection: Connection, *, schema: str) -> Observation:
    """
    Read the last number and, in a later snapshot, the running transactions, in one round trip.

    *connection* is in autocommit mode: the statement opens and ends its own transaction, because a transaction
    sees the same "next xid" from beginning to end.

    Raises:
        DatabaseUnavailable: The connection broke.
    """
    with translated_errors():
        cursor = connection.execute(statement("observe_horizon", schema=schema))
        cursor.nextset()
        [(last_no, *epoch)] = cursor.fetchall()
        cursor.nextset()
        [(snapshot, next_xid, relay_xids)] = cursor.fetchall()
    return Observation(last_no, _running(snapshot, next_xid=next_xid, relay_xids=relay_xids or ""), Epoch(*epoch))


def _running(snapshot: str, *, next_xid: int, relay_xids: str) -> frozenset[int]:
    """
    Give the running transactions of `xmin:xmax:xip,...`, and those started since its xmax, without the relays.

    A snapshot's xmax is the latest *completed* xid + 1: what has started since and not ended is not in its list.
    """
    _, xmax_text, listed = snapshot.split(":")
    xmax = int(xmax_text)
    beyond = (next_xid - xmax) % _XID_CYCLE
    running = {int(xid) for xid in listed.split(",") if xid}
    running.update(range(xmax, xmax + beyond))
    relays = {int(xid) for xid in relay_xids.split(",") if xid}
    return frozenset(xid for xid in running if xid % _XID_CYCLE not in relays)


def among(xids: Collection[int], writers: Collection[int]) -> set[int]:
    """Give those of the full transaction ids *xids* that are among *writers*, which have 32 bits as in pg_locks."""
    return {xid for xid in xids if xid % _XID_CYCLE in writers}


def list_writers(connection: Connection, *, schema: str) -> frozenset[int]:
    """Give the 32-bit transaction ids that hold a writer's lock on the outbox, prepared transactions included."""
    with translated_errors():
        rows = connection.execute(statement("list_writers", schema=schema)).fetchall()
    return frozenset(int(xid) for (xids,) in rows for xid in xids or ())


def list_given_up(connection: Connection, *, schema: str) -> frozenset[int]:
    """Give the full transaction ids of writers that were recorded as unordered and are not known to have ended."""
    with translated_errors():
        rows = connection.execute(statement("list_given_up", schema=schema)).fetchall()
    return frozenset(int(xid) for (xid,) in rows)


@dataclass(frozen=True, slots=True)
class OpenTransaction:
    """Who is behind a transaction id; of a prepared transaction there is a gid and no session (pid 0)."""

    xid: int
    pid: int
    application_name: str
    role_name: str
    state: str
    age_seconds: float
    query: str
    gid: str


def describe(connection: Connection, *, schema: str, xids: Collection[int]) -> list[OpenTransaction]:
    """Tell who is behind these transaction ids, the oldest first."""
    wanted = {"xids": [str(xid % _XID_CYCLE) for xid in xids]}
    with translated_errors():
        rows = connection.execute(statement("describe_transactions", schema=schema), wanted).fetchall()
    return [OpenTransaction(int(xid), *rest) for xid, *rest in rows]


def record_unordered(connection: Connection, *, schema: str, xids: Collection[int]) -> None:
    """
    Record, durably, that messages of these transactions will have been overtaken.

    This comes before anything overtakes them. After a crash in between, another relay would otherwise move its marks
    past messages that are not visible yet, and nobody would ever look for them.
    """
    wanted = {"xids": [str(xid) for xid in xids]}
    with translated_errors(), connection.transaction():
        connection.execute("SET LOCAL synchronous_commit = on")
        connection.execute(statement("record_unordered", schema=schema), wanted)
