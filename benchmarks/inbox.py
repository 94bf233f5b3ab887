"""What it costs a consumer to have each effect once, and what it keeps for that."""

from __future__ import annotations

import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import psycopg

from benchmarks.bench import AGGREGATE_TYPE, KEYS, Bench, say
from benchmarks.report import Table, share, spread
from benchmarks.rounds import in_rounds
from outbox_relay.consumer import Inbox, Message, SequenceInbox
from outbox_relay.operate import migrate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BATCH = 500
NONE = "none"
CREATED_AT = datetime(2026, 1, 1, tzinfo=UTC)
INBOXES: dict[str, Inbox | SequenceInbox] = {
    "`Inbox`": Inbox("benchmark"),
    "`SequenceInbox`": SequenceInbox("benchmark"),
}
TABLES = {"`Inbox`": "inbox_message", "`SequenceInbox`": "inbox_sequence"}


@dataclass(frozen=True, slots=True)
class Case:
    """Which of the inboxes, and how many messages in one transaction."""

    inbox: str
    batch: int


def measure(bench: Bench) -> list[Table]:
    """Consume with and without an inbox, in turns, then fill each and look at its size."""
    cases = [Case(inbox, batch) for batch in (BATCH, 1) for inbox in (NONE, *INBOXES)]
    costs = in_rounds(cases, lambda case: _consume(bench, case), repeat=bench.plan.repeat)
    plan = bench.plan
    speed = Table(
        "Consuming each message once",
        f"One consumer; its handler is one `UPDATE` of a balance per message, over {KEYS:,} keys. "
        f"{plan.inbox_messages:,} messages in transactions of {BATCH}, {plan.inbox_messages_singly:,} in transactions "
        "of one. Making the messages is not timed.",
        ("inbox, messages per transaction", "messages/s", "us/message", "time of the bare handler's"),
        [
            (
                f"{case.inbox}, {case.batch}",
                spread([1e6 / cost for cost in samples]),
                spread(samples, digits=1),
                share(samples, of=costs[Case(NONE, case.batch)]),
            )
            for case, samples in costs.items()
        ],
    )
    return [speed, _kept(bench)]


def _kept(bench: Bench) -> Table:
    count = bench.plan.inbox_messages_kept
    rows = []
    for name, table in TABLES.items():
        say(f"inbox: size of {name}")
        with _database(bench) as connection:
            _accept(connection, name, messages=count)
            [(kept, kept_bytes)] = connection.execute(
                f"SELECT count(*), pg_total_relation_size('{table}') FROM {table}"
            ).fetchall()
        rows.append((name, f"{kept:,}", f"{kept_bytes / 1e6:,.1f}", f"{kept_bytes / count:,.1f}"))
    return Table(
        "What an inbox keeps",
        f"After {count:,} messages over {KEYS:,} keys in batches of {BATCH}, with the indexes and what autovacuum has "
        "left. Rows of the first grow with the messages, of the second with the keys.",
        ("inbox", "rows", "MB", "bytes/message"),
        rows,
    )


def _consume(bench: Bench, case: Case) -> float:
    """Return the microseconds that each message took."""
    say(f"inbox: {case.inbox}, {case.batch}")
    count = bench.plan.inbox_messages if case.batch > 1 else bench.plan.inbox_messages_singly
    seconds = 0.0
    with _database(bench) as connection:
        for messages in _batches(count, size=case.batch):
            started = time.monotonic()
            _consume_batch(connection, case.inbox, messages)
            seconds += time.monotonic() - started
        [(effects,)] = connection.execute("SELECT sum(balance) FROM account").fetchall()
    if effects != count:
        raise RuntimeError(f"{count} messages had {effects} effects")
    return seconds * 1e6 / count


def _consume_batch(connection: psycopg.Connection, name: str, messages: Sequence[Message]) -> None:
    with connection.transaction():
        fresh = messages if name == NONE else INBOXES[name].accept_many(connection, messages).fresh
        for message in fresh:
            connection.execute("UPDATE account SET balance = balance + 1 WHERE id = %s", [message.key])


def _accept(connection: psycopg.Connection, name: str, *, messages: int) -> None:
    for batch in _batches(messages, size=BATCH):
        with connection.transaction():
            INBOXES[name].accept_many(connection, batch)


@contextmanager
def _database(bench: Bench) -> Iterator[psycopg.Connection]:
    with bench.database() as dsn, psycopg.connect(dsn, autocommit=True) as connection:
        migrate.apply(connection, schema="public", line="inbox")
        connection.execute("CREATE TABLE account (id text PRIMARY KEY, balance bigint NOT NULL) WITH (fillfactor = 50)")
        connection.execute("INSERT INTO account SELECT key::text, 0 FROM generate_series(0, %s) AS key", [KEYS - 1])
        connection.execute("VACUUM (ANALYZE) account")
        yield connection


def _batches(count: int, *, size: int) -> Iterator[list[Message]]:
    for start in range(1, count + 1, size):
        yield [_message(number) for number in range(start, min(start + size, count + 1))]


def _message(number: int) -> Message:
    return Message(
        message_id=uuid.uuid4(),
        source="shop.public",
        sequence_no=number,
        aggregate_type=AGGREGATE_TYPE,
        event_type="order_placed",
        key=str(number % KEYS),
        payload=b"{}",
        headers={},
        created_at=CREATED_AT,
        topic=f"{AGGREGATE_TYPE}.events",
        partition=0,
        offset=number,
    )
