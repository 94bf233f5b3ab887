"""What is around relays in the simulation: PostgreSQL, Kafka, writers, operators and the time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import cycle
from math import ceil
from typing import TYPE_CHECKING

from outbox_relay.errors import DatabaseUnavailable
from outbox_relay.relay.claim import Claim, ShardWork
from outbox_relay.relay.failures import NO_REPORT, WITHDRAWN, Failure, Outcome, Scope
from outbox_relay.relay.horizon import Epoch
from outbox_relay.relay.marks import Marks
from outbox_relay.relay.read import Batch, Limits
from outbox_relay.relay.shards import SHARDS
from tests.faults.simulation.tables import Mark, Pending, Row, Tables, Unordered, mark_of
from tests.fixtures.outbox import PLAIN

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from outbox_relay.relay.message import Key, Message, OnPoison, Record
    from outbox_relay.relay.settle import Aside
    from outbox_relay.relay.watch import Reached

PUBLISHING_SECONDS = 0.02
UNPUBLISHABLE_TYPE = "no topic"  # there is none of such a name
REFUSED = Failure(Scope.MESSAGE, "MSG_SIZE_TOO_LARGE", "too large")
CLOSED = Failure(Scope.TOPIC, "TOPIC_AUTHORIZATION_FAILED", "not allowed")
WRITTEN_WITHOUT_REPORT = replace(NO_REPORT, reason="the message was written, its report was lost")
LOST = DatabaseUnavailable("the connection broke")


@dataclass(eq=False)
class Writer:
    """An open transaction; one without numbers has written elsewhere."""

    xid: int
    numbers: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Connection:
    """
    A session. It sees its own changes of outbox_pending, and others see them when it commits.

    Attributes:
        is_lost: Broken; the next statement says so.
        has_failures: Kafka has refused something since its transaction began.
    """

    world: World
    is_lost: bool = False
    has_failures: bool = False
    changes: dict[int, Pending | None] = field(default_factory=dict)

    @property
    def pending(self) -> dict[int, Pending]:
        """The rows of outbox_pending that it sees."""
        seen = {**self.world.tables.pending, **self.changes}
        return {number: row for number, row in seen.items() if row is not None}

    def rollback(self) -> None:
        self.world.free(self)
        if self.is_lost:
            raise LOST

    def close(self) -> None:
        self.world.free(self)


@dataclass(eq=False)
class World:
    """
    The tables, who has locked what, what Kafka has, and the time. It checks each step.

    Attributes:
        flushed: The tables to which a crash goes back. The commits of lanes wait for no disk; all others do.
        replicated: Those to which a failover goes back.
        in_kafka: Message ids.
        repeatable: Those of them that may be published once more, for no mark had passed them when a stint ended.
        rolled_back: Those for which that was so because the stint was not recorded.
        poison: Those that Kafka refuses each time.
    """

    on_poison: OnPoison
    tables: Tables = field(default_factory=Tables)
    flushed: Tables = field(default_factory=Tables)
    replicated: Tables = field(default_factory=Tables)
    open_writers: list[Writer] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)
    owners: dict[int, Connection] = field(default_factory=dict)
    epoch: Epoch = Epoch(1.0, 1)  # noqa: RUF009 -- a tuple
    in_kafka: set[str] = field(default_factory=set)
    repeatable: set[str] = field(default_factory=set)
    rolled_back: set[str] = field(default_factory=set)
    ever_committed: set[str] = field(default_factory=set)
    poison: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    closed_topics: set[str] = field(default_factory=set)
    written: int = 0
    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    @property
    def unsettled(self) -> list[Row]:
        return [row for row in self.tables.rows.values() if row.is_there and not self.tables.is_settled(row)]

    # What writers and operators do

    def insert(self, *places: tuple[Key, int]) -> Writer:
        """Draw numbers for messages of these keys, each with its shard, in a transaction that stays open."""
        writer = Writer(self.tables.next_xid)
        self.tables.next_xid += 1
        self.open_writers.append(writer)
        self.insert_more(writer, *places)
        return writer

    def insert_more(self, writer: Writer, *places: tuple[Key, int]) -> None:
        for (aggregate_type, aggregate_id), shard in places:
            self.tables.last_no += 1
            self.written += 1
            message = PLAIN._replace(
                sequence_no=self.tables.last_no,
                message_id=f"message {self.written}",
                shard=shard,
                aggregate_type=aggregate_type,
                aggregate_id=aggregate_id,
            )
            self.tables.rows[self.tables.last_no] = Row(message, writer.xid)
            writer.numbers.append(self.tables.last_no)

    def end(self, writer: Writer, *, commits: bool) -> None:
        self.open_writers.remove(writer)
        for number in writer.numbers:
            row = self.tables.rows[number]
            row.is_committed, row.is_gone = commits, not commits
            if commits:
                self.ever_committed.add(row.message.message_id)
                is_above = number > self.tables.newest_mark(row.message.shard)
                assert is_above or self.tables.is_late(row), "a message appeared below a mark"
        if commits:
            self.flush()

    def release_parked(self, key: Key) -> None:
        """What an operator does: all parked messages of a key are waiting again."""
        for number in self.tables.parked(key):
            is_unordered = self.tables.pending[number].is_unordered or self.on_poison == "skip"
            self.tables.pending[number] = Pending("waiting", is_unordered=is_unordered)
        self.flush()

    def delete_pending(self, number: int, *, with_its_row: bool) -> None:
        """Delete a pending message: an operator skips it, or somebody deletes nothing but the message."""
        if with_its_row:
            del self.tables.pending[number]
        self.tables.rows[number].is_gone = True
        self.flush()

    def truncate(self, *, restarts: bool) -> None:
        """What PostgreSQL does when nobody else has a transaction open that has touched the table."""
        last_no = 0 if restarts else self.tables.last_no
        self.tables = Tables(last_no=last_no, next_xid=self.tables.next_xid)
        self.epoch = self.epoch._replace(sequence_file=self.epoch.sequence_file + restarts)
        self.replicate()

    # What befalls the server

    def flush(self) -> None:
        self.flushed = self.tables.copy()

    def replicate(self) -> None:
        self.flush()
        self.replicated = self.tables.copy()

    def come_back(self, tables: Tables, *, leap: int) -> None:
        """Go on with what was flushed or replicated, *leap* numbers further; others are given away once more."""
        for connection in self.connections:
            connection.is_lost = True
        self.owners.clear()
        self.open_writers.clear()
        self.tables = tables.copy()
        for row in self.tables.rows.values():
            row.is_gone |= not row.is_committed
        self.tables.last_no += leap
        self.tables.next_xid += 100
        self.epoch = self.epoch._replace(server_started_at=self.epoch.server_started_at + 1)
        self.replicate()
        self.excuse(range(SHARDS))

    def lose(self, connection: Connection) -> None:
        """What PostgreSQL does to a session that has been idle for too long, or whose client is gone."""
        self.free(connection)
        connection.is_lost = True

    def free(self, connection: Connection) -> None:
        """End the transaction of *connection* without its effects: its shards are anybody's."""
        connection.changes.clear()
        self.rolled_back |= self.let_go(connection)

    def let_go(self, connection: Connection) -> set[str]:
        """Unlock what *connection* holds; give the messages in it that will be published once more."""
        held = [shard for shard, owner in self.owners.items() if owner is connection]
        for shard in held:
            del self.owners[shard]
        connection.has_failures = False
        return self.excuse(held)

    def excuse(self, held: Collection[int]) -> set[str]:
        more = {
            row.message.message_id
            for row in self.tables.rows.values()
            if row.message.shard in held and row.message.message_id in self.in_kafka and not self.tables.is_settled(row)
        }
        more -= self.repeatable
        self.repeatable |= more
        return more

    # The statements of relays

    def probe(
        self, candidates: Collection[int], *, reached: Reached, looks_for_waiting: bool, held_types: Collection[str]
    ) -> list[ShardWork]:
        rows = self.tables.waiting(self.tables.pending) if looks_for_waiting else ()
        waiting = {row.message.shard for row in rows if row.message.aggregate_type not in held_types}
        return [
            ShardWork(
                shard,
                next((row.number for row in self.unpublished(shard, reached.through)), None),
                has_waiting=shard in waiting,
                is_held=False,
            )
            for shard in candidates
        ]

    def unpublished(self, shard: int, through: int) -> Iterator[Row]:
        after = self.tables.newest_mark(shard)
        return (row for row in self.tables.between(shard, after=after, through=through) if row.is_there)

    def lock(
        self, connection: Connection, probes: Sequence[ShardWork], *, reached: Reached, most: int, takes_all: bool
    ) -> Claim:
        works = [each for each in probes if each.first_no is not None or each.has_waiting]
        wanted = sorted(
            probes if takes_all and works else works, key=lambda each: (not each.has_waiting, each.first_no or 2**63)
        )
        held = [each._replace(is_held=True) for each in wanted if each.shard not in self.owners][:most]
        is_of_epoch = reached.epoch == self.epoch and reached.through <= self.tables.last_no
        if is_of_epoch:
            self.owners |= {each.shard: connection for each in held}
        taken = {each.shard for each in held}
        pending = {self.tables.rows[number].message.shard for number in self.tables.pending}
        return Claim(
            held=held,
            missed=[each for each in works if each.shard not in taken],
            marks=Marks({shard: self.tables.newest_mark(shard) for shard in taken}),
            have_pending=frozenset(pending & taken),
            began_at=0.0,
            is_of_epoch=is_of_epoch or not held,
        )

    def read_messages(self, connection: Connection, claim: Claim, *, through: int, limits: Limits) -> Batch:
        marks = claim.marks.through
        most = ceil(limits.messages / len(marks))
        found: list[Message] = []
        for shard, mark in marks.items():
            assert self.owners.get(shard) is connection, "a shard was read by a lane that does not hold it"
            rows = self.tables.between(shard, after=mark, through=through)
            taken = [row for row in rows if row.is_there and not self.tables.is_late(row)][:most]
            seen = [self.seen(connection, row) for row in taken]
            found += seen if shard in claim.have_pending else map(_behind_nothing, seen)
        return Batch(sorted(found), [], frozenset(each.shard for each in found))

    def read_waiting(
        self, connection: Connection, claim: Claim, *, held_types: Collection[str], limits: Limits
    ) -> Batch:
        chosen = [
            row
            for row in self.tables.waiting(connection.pending)
            if row.message.shard in claim.marks.through and row.message.aggregate_type not in held_types
        ][: limits.messages]
        there = [self.seen(connection, row)._replace(is_behind_waiting=False) for row in chosen if not row.is_gone]
        gone = [row.message for row in chosen if row.is_gone]
        return Batch(there, gone, frozenset(row.message.shard for row in chosen))

    def seen(self, connection: Connection, row: Row) -> Message:
        """Give its message with what *connection* sees of the earlier ones of its key."""
        pending = connection.pending
        is_unordered = row.number in pending and pending[row.number].is_unordered
        before = [pending[each.number] for each in self.tables.earlier(row) if each.number in pending]
        states = set() if is_unordered else {each.state for each in before if not each.is_unordered}
        return row.message._replace(
            is_unordered=is_unordered, is_behind_parked="parked" in states, is_behind_waiting="waiting" in states
        )

    def forget_waiting(self, connection: Connection, messages: Iterable[Message]) -> None:
        connection.changes |= dict.fromkeys((message.sequence_no for message in messages), None)

    def set_aside(self, connection: Connection, asides: Iterable[Aside]) -> None:
        pending = connection.pending
        for message, state, failure in asides:
            if state == "parked":
                is_guilty = message.message_id in self.refused or message.aggregate_type == UNPUBLISHABLE_TYPE
                assert is_guilty or failure.code == "behind_parked", "a message was parked that Kafka may still take"
            if not self.tables.rows[message.sequence_no].is_gone:
                earlier = pending.get(message.sequence_no)
                is_unordered = message.is_unordered if earlier is None else earlier.is_unordered
                connection.changes[message.sequence_no] = Pending(state, is_unordered=is_unordered)

    def record(self, connection: Connection, marks: Marks) -> int:
        pending = connection.pending
        moved = marks.moved()
        for shard, *given in moved:
            mark = Mark(*given)
            assert self.owners.get(shard) is connection, "a mark was moved by a lane that does not hold its shard"
            self.check_mark(shard, mark, pending=pending)
            self.tables.marks.setdefault(shard, []).append(mark)
        self.tables.pending = pending
        connection.changes.clear()
        has_failures = connection.has_failures
        repeated = self.let_go(connection)
        assert has_failures or not repeated, "a stint without failures left something to be repeated"
        return len(moved)

    def check_mark(self, shard: int, mark: Mark, *, pending: Collection[int]) -> None:
        before = self.tables.newest_mark(shard)
        assert before < mark.through <= self.tables.last_no, "a mark goes back, or beyond the last number"
        rows = self.tables.between(shard, after=before, through=mark.through)
        passed = [row for row in rows if not self.tables.is_late(row)]
        for row in passed:
            assert row.is_committed or row.is_gone, "a mark has passed a message that may still appear"
            is_accounted_for = row.message.message_id in self.in_kafka or row.number in pending
            assert row.is_gone or is_accounted_for, "a mark has passed a message that Kafka does not have"
        there = [row for row in passed if row.is_there]
        assert mark == mark_of(there, through=mark.through), "a mark has counted other messages than there are"

    def record_unordered(self, xids: Collection[int]) -> None:
        for xid in xids:
            self.tables.unordered.setdefault(xid, Unordered(self.tables.highest_mark))
        for writer in self.open_writers:
            if writer.xid in xids:
                from_no = self.tables.unordered[writer.xid].from_no
                assert min(writer.numbers) > from_no, "a message of a writer that was given up on is below a mark"
        self.flush()

    def collect_late(self) -> int | None:
        """Collect all messages of one writer at once."""
        running = {writer.xid for writer in self.open_writers}
        for xid, record in sorted(self.tables.unordered.items()):
            if record.to_no is None and xid not in running:
                rows = [row for row in self.tables.rows.values() if row.xid == xid and row.is_there]
                collected = [row.number for row in rows if row.number > record.from_no]
                for number in collected:
                    self.tables.pending.setdefault(number, Pending("waiting", is_unordered=True))
                record.to_no = self.tables.last_no
                return len(collected)
        return None

    # What Kafka does

    def publish(self, connection: Connection, records: Sequence[Record], fates: Iterable[Outcome]) -> list[Outcome]:
        """
        Give each record one of *fates*, in turn, unless its topic is closed or it is poison.

        Per key nothing is written behind one that failed for good.
        """
        self.now += PUBLISHING_SECONDS
        outcomes: list[Outcome] = []
        stopped: set[str] = set()
        for record, fate in zip(records, cycle(fates), strict=False):
            outcome = WITHDRAWN if record.key in stopped else self.fate_of(record, fate)
            if outcome is None or outcome is WRITTEN_WITHOUT_REPORT:
                self.take(record, has_report=outcome is None)
            else:
                stopped.add(record.key)
                if outcome.scope is Scope.MESSAGE:
                    self.refused.add(id_of(record))
            outcomes.append(outcome)
        connection.has_failures |= any(outcomes)
        return outcomes

    def fate_of(self, record: Record, fate: Outcome) -> Outcome:
        if record.topic in self.closed_topics:
            return CLOSED
        return REFUSED if id_of(record) in self.poison else fate

    def take(self, record: Record, *, has_report: bool) -> None:
        """Write a record, and check what is promised of each."""
        message_id = id_of(record)
        assert message_id in self.ever_committed, "a phantom was published"
        if message_id in self.in_kafka:
            assert message_id in self.repeatable, "a message was published twice for no reason"
            self.repeatable.discard(message_id)
        else:
            self.check_first(message_id, is_unordered="unordered" in dict(record.headers))
            self.in_kafka.add(message_id)
        if not has_report:
            self.repeatable.add(message_id)

    def check_first(self, message_id: str, *, is_unordered: bool) -> None:
        """Check that no earlier message of the key is still to come, unless the record says so itself."""
        row = next(row for row in self.tables.rows.values() if row.message.message_id == message_id)
        pending = self.tables.pending.get(row.number)
        assert is_unordered == (pending is not None and pending.is_unordered), "a message says wrongly that it is late"
        if not is_unordered:
            to_come = [each for each in self.tables.earlier(row) if each.message.message_id not in self.in_kafka]
            assert all(map(self.may_be_passed, to_come)), "a later message of the key came first"

    def may_be_passed(self, row: Row) -> bool:
        """Whether later messages of its key may come first: it is late, or was parked under "skip"."""
        was_parked = row.message.message_id in self.refused or row.message.aggregate_type == UNPUBLISHABLE_TYPE
        return row.is_gone or self.tables.is_late(row) or (self.on_poison == "skip" and was_parked)

    # In the end

    def check_marks(self) -> None:
        """Compare all marks with the rows, as reconciling does; somebody may have deleted pending messages."""
        for shard, marks in self.tables.marks.items():
            before = 0
            for mark in marks:
                rows = self.tables.between(shard, after=before, through=mark.through)
                passed = [row for row in rows if row.is_committed and not self.tables.is_late(row)]
                assert mark == mark_of(passed, through=mark.through), "rows and marks do not agree"
                before = mark.through


def id_of(record: Record) -> str:
    """The id of the message that *record* was made of."""
    return str(dict(record.headers)["id"])


def _behind_nothing(message: Message) -> Message:
    return message._replace(is_behind_parked=False, is_behind_waiting=False)
