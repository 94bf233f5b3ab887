"""What a replay finds, in which order it goes out, what it records of itself, and that it disturbs nobody."""

from __future__ import annotations

import json
from contextlib import closing
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, LiteralString

import pytest
from psycopg.conninfo import make_conninfo

from outbox_relay import database as relay_database
from outbox_relay.errors import KafkaUnavailable, OperationRefused, SchemaMismatch
from outbox_relay.operate import replay as replaying
from outbox_relay.operate.parked import Note
from outbox_relay.operate.replay import Plan, Progress, ReplayOptions, Selection, plan_replay, publish_again
from outbox_relay.relay.failures import NO_REPORT, WITHDRAWN, Failure, Scope
from outbox_relay.relay.message import Addressing
from outbox_relay.sql import statement
from tests.fixtures.postgres import both_layouts, login

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from psycopg import Connection

    from outbox_relay.relay.failures import Outcome
    from outbox_relay.relay.message import Record
    from tests.fixtures.postgres import Database

pytestmark = pytest.mark.every_postgres

ADDRESSING = Addressing(source="shop.public", topics={"refund": "order.events"})
OPTIONS = ReplayOptions(rate=1e9)
NOTE = Note("ada", "a bug in billing")
ALL = Selection()
TOO_LARGE = Failure(Scope.MESSAGE, "MSG_SIZE_TOO_LARGE", "too large")
NO_TOPIC = Failure(Scope.TOPIC, "UNKNOWN_TOPIC_OR_PART", 'topic "order.events": unknown; create it or grant access')

INSERT: LiteralString = """
INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload, created_at, published_at, parked_at)
SELECT
    %(type)s,
    %(key)s,
    'placed',
    jsonb_build_object('n', number),
    %(created)s::timestamptz,
    CASE WHEN %(published)s THEN now() - interval '1 hour' END,
    CASE WHEN %(parked)s THEN now() - interval '1 hour' END
FROM generate_series(1, %(count)s) AS number
"""


class Broker:
    """Takes what a replay sends, and reports what a test tells it to."""

    def __init__(self, *reports: Callable[[Sequence[Record]], list[Outcome]], missing: Failure | None = None) -> None:
        self.records: list[Record] = []
        self._reports = list(reports)
        self._missing = missing
        self.watch: Callable[[], None] = lambda: None

    def probe(self) -> None:
        """Kafka answers."""

    def unavailable(self, topics: Sequence[str]) -> Mapping[str, Failure]:
        return dict.fromkeys(topics, self._missing) if self._missing else {}

    def publish(self, records: Sequence[Record], *, deadline: float) -> list[Outcome]:
        assert deadline > 0
        self.watch()
        report = self._reports.pop(0) if self._reports else acknowledged_but({})
        outcomes = report(records)
        self.records += [record for record, outcome in zip(records, outcomes, strict=True) if outcome is None]
        return outcomes

    @property
    def numbers(self) -> list[int]:
        return [int(str(dict(record.headers)["sequence_no"])) for record in self.records]


def acknowledged_but(failures: dict[int, Failure]) -> Callable[[Sequence[Record]], list[Outcome]]:
    return lambda records: [failures.get(index) for index in range(len(records))]


@pytest.fixture
def admin(database: Database) -> Iterator[Connection]:
    with database.connect(autocommit=True) as connection:
        yield connection


@pytest.fixture
def operator(database: Database) -> Iterator[Connection]:
    """A login with the grants of an operator and nothing else."""
    with login(database, group="outbox_operator") as name:
        dsn = make_conninfo(database.dsn, user=name)
        with closing(relay_database.connect(dsn, application_name="replay")) as connection:
            yield connection


def add(
    admin: Connection,
    count: int = 1,
    *,
    key: str = "1",
    type_: str = "order",
    created: str = "2026-11-21 12:00Z",
    published: bool = True,
    parked: bool = False,
) -> None:
    parameters = {"count": count, "key": key, "type": type_, "created": created}
    admin.execute(INSERT, parameters | {"published": published, "parked": parked})


def add_numbered(admin: Connection, position: int, number: int) -> None:
    """Insert a published message with this id and this sequence number."""
    admin.execute(
        """
        INSERT INTO outbox (id, sequence_no, aggregate_type, aggregate_id, event_type, published_at)
        OVERRIDING SYSTEM VALUE VALUES (%s, %s, 'order', '1', 'placed', now() - interval '1 hour')
        """,
        [position, number],
    )


def plan(operator: Connection, selection: Selection = ALL, *, name: str = "again") -> Plan:
    return plan_replay(operator, options=OPTIONS, name=name, selection=selection, addressing=ADDRESSING)


def publish(
    operator: Connection, planned: Plan, broker: Broker, *, options: ReplayOptions = OPTIONS, chunks: int = 1_000
) -> Progress:
    """Replay, and be stopped after so many chunks."""
    pauses = iter([False] * chunks)
    return publish_again(
        operator,
        plan=planned,
        options=options,
        addressing=ADDRESSING,
        publisher=broker,  # type: ignore[arg-type]  # has what is needed of a Publisher
        note=NOTE,
        pause=lambda _seconds: next(pauses, True),
        on_progress=lambda _progress: None,
    )


def replayed(operator: Connection, selection: Selection, *, name: str = "again") -> list[int]:
    broker = Broker()
    planned = plan(operator, selection, name=name)
    assert publish(operator, planned, broker) == Progress(planned.messages, max(broker.numbers, default=0), True)  # noqa: FBT003 -- its third field
    return broker.numbers


def in_table(admin: Connection) -> list[tuple[object, ...]]:
    return admin.execute("SELECT ctid::text, xmin::text, xmax::text, outbox.* FROM outbox ORDER BY id").fetchall()


NOON, LATER = (datetime(2026, 11, 21, hour, tzinfo=UTC) for hour in (12, 13))


@both_layouts
@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (ALL, [1, 2, 3, 4, 5, 6]),
        (Selection(keys=(("order", "1"),)), [1, 4]),
        (Selection(keys=(("order", "1"), ("refund", "1"))), [1, 3, 4]),
        (Selection(keys=(("order", "3"),)), []),
        (Selection(aggregate_types=("refund", "basket")), [3, 5]),
        (Selection(topics=("order.events",)), [1, 2, 3, 4, 6]),
        (Selection(topics=("basket.events", "nothing")), [5]),
        (Selection(topics=("order.events",), aggregate_types=("refund",)), [3]),
        (Selection(first_no=4), [4, 5, 6]),
        (Selection(first_no=2, last_no=3), [2, 3]),
        (Selection(last_no=1), [1]),
        (Selection(first_no=7), []),
        (Selection(since=LATER), [4, 5]),
        (Selection(until=LATER), [1, 2, 3, 6]),
        (Selection(since=NOON, until=LATER, keys=(("order", "2"),)), [2, 6]),
    ],
    ids=str,
)
def test_what_is_selected_and_nothing_else_is_published_again(
    admin: Connection, operator: Connection, selection: Selection, expected: list[int]
) -> None:
    add(admin, key="1")
    add(admin, key="2")
    add(admin, key="1", type_="refund")
    add(admin, key="1", created="2026-11-21 13:00Z")
    add(admin, key="1", type_="basket", created="2026-11-21 14:00Z")
    add(admin, key="2")
    assert replayed(operator, selection) == expected


def test_what_is_unpublished_or_parked_or_was_published_since_is_left_to_the_relay(
    admin: Connection, operator: Connection
) -> None:
    add(admin)
    add(admin, published=False)
    add(admin, published=False, parked=True)
    add(admin, parked=True)
    add(admin, published=False)
    planned = plan(operator)
    admin.execute("UPDATE outbox SET published_at = clock_timestamp() WHERE sequence_no = 5")
    broker = Broker()
    publish(operator, planned, broker)
    assert broker.numbers == [1]


def test_a_plan_tells_what_goes_where(admin: Connection, operator: Connection) -> None:
    add(admin, 3)
    add(admin, 2, type_="refund", created="2026-11-21 13:00Z")
    add(admin, 4, type_="basket", created="2026-11-21 11:00Z")
    planned = plan(operator)
    assert planned.topics == {"order.events": 5, "basket.events": 4}
    assert planned.first
    assert planned.last
    assert (planned.first.sequence_no, planned.first.created_at) == (1, NOON)
    assert planned.last.sequence_no == 9
    assert plan(operator, Selection(to_topic="side")).topics == {"side": 9}


def test_a_record_is_that_of_the_first_time_with_one_header_more(admin: Connection, operator: Connection) -> None:
    admin.execute("""
        INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload_bytes, headers, published_at)
        VALUES ('refund', '4711', 'paid', '\\x00ff', '{"tenant": "t1"}', now() - interval '1 hour')
    """)
    admin.execute("INSERT INTO outbox_unordered (transaction_id) SELECT transaction_id FROM outbox")
    [(message_id, ms)] = admin.execute(
        "SELECT message_id::text, (extract(epoch FROM created_at) * 1000)::bigint FROM outbox"
    ).fetchall()
    broker = Broker()
    publish(operator, plan(operator), broker)
    [record] = broker.records
    assert record == (
        "order.events",
        "4711",
        b"\x00\xff",
        [
            ("id", message_id),
            ("event_type", "paid"),
            ("aggregate_type", "refund"),
            ("sequence_no", "1"),
            ("source", "shop.public"),
            ("content-type", "application/octet-stream"),
            ("unordered", "1"),
            ("replay", "again"),
            ("tenant", "t1"),
        ],
        ms,
    )


def test_a_topic_that_the_settings_do_not_allow_is_refused(admin: Connection, operator: Connection) -> None:
    add(admin)
    addressing = Addressing(allowed=frozenset({"order.events"}))
    selection = Selection(to_topic="side")
    with pytest.raises(OperationRefused, match='topic "side" is not among OUTBOX_RELAY_ALLOWED_TOPICS'):
        plan_replay(operator, options=OPTIONS, name="again", selection=selection, addressing=addressing)


@both_layouts
def test_messages_go_out_in_sequence_order_where_ids_are_in_another(
    admin: Connection, operator: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replaying, "_ROWS_LOOKED_AT", 3)
    numbers = [2, 1, 3, 6, 4, 5, 8, 7, 10, 9]
    for position, number in enumerate(numbers, 1):
        add_numbered(admin, position, number)
    assert replayed(operator, ALL) == sorted(numbers)


@both_layouts
@pytest.mark.parametrize(("first", "last"), [(1, 400), (1, 1), (150, 260), (395, 10_000), (201, 201)])
def test_a_range_of_numbers_is_found_whole_where_ids_have_gaps(
    admin: Connection, operator: Connection, monkeypatch: pytest.MonkeyPatch, first: int, last: int
) -> None:
    monkeypatch.setattr(replaying, "_MARGIN_MESSAGES", 0)
    add(admin, 200)
    admin.execute("SELECT setval('outbox_id_seq', 5000000)")
    add(admin, 200)
    admin.execute("DELETE FROM outbox WHERE id % 7 = 0 OR id < 20")
    kept = [number for (number,) in admin.execute("SELECT sequence_no FROM outbox ORDER BY 1")]
    expected = [number for number in kept if first <= number <= last]
    assert replayed(operator, Selection(first_no=first, last_no=last)) == expected


@pytest.mark.parametrize(("margin", "expected"), [(20, [18, 19, 20]), (0, [18, 19])], ids=["margin", "none"])
def test_a_number_that_a_writer_drew_long_after_its_id_is_found_in_its_range(
    admin: Connection, operator: Connection, monkeypatch: pytest.MonkeyPatch, margin: int, expected: list[int]
) -> None:
    monkeypatch.setattr(replaying, "_MARGIN_MESSAGES", margin)
    for position, number in enumerate([1, 2, 3, 4, 20, *range(5, 20)], 1):
        add_numbered(admin, position, number)
    assert replayed(operator, Selection(first_no=18)) == expected


def test_a_range_of_numbers_reads_no_more_of_a_long_table_than_it_must(
    admin: Connection, operator: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replaying, "_MARGIN_MESSAGES", 100)
    add(admin, 20_000)
    finds: list[Mapping[str, object]] = []
    execute = operator.execute

    def watched(query: bytes, parameters: Mapping[str, object] | None = None) -> object:
        if query == statement("replay_find", schema="public"):
            assert parameters
            finds.append(parameters)
        return execute(query, parameters)

    monkeypatch.setattr(operator, "execute", watched)
    assert plan(operator, Selection(first_no=10_000, last_no=10_009)).messages == 10
    assert [(find["after"], find["last"]) for find in finds] == [(9_899, 10_110), (10_110, 10_110)]


@both_layouts
def test_nothing_in_the_outbox_is_changed_or_waited_for(
    database: Database, admin: Connection, operator: Connection
) -> None:
    add(admin, 50)
    with database.connect() as relay:
        relay.execute("SELECT FROM outbox ORDER BY id FOR UPDATE")
        relay.execute("SELECT FROM outbox_shard ORDER BY shard FOR UPDATE")
        before = in_table(admin)
        assert len(replayed(operator, ALL)) == 50
    assert in_table(admin) == before


def test_no_transaction_is_open_while_kafka_answers(admin: Connection, operator: Connection) -> None:
    add(admin, 5)
    states: list[tuple[object, ...]] = []
    query = "SELECT state, backend_xid, backend_xmin FROM pg_stat_activity WHERE pid = %s"
    broker = Broker()
    broker.watch = lambda: states.extend(admin.execute(query, [operator.info.backend_pid]).fetchall())
    publish(operator, plan(operator), broker, options=ReplayOptions(rate=20.0))
    assert states == [("idle", None, None)] * 3


def test_messages_go_out_at_the_rate_that_was_asked_for(
    admin: Connection, operator: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(admin, 10)
    now = 100.0
    sent: list[tuple[float, int]] = []
    broker = Broker()
    broker.watch = lambda: sent.append((now, len(broker.records)))
    monkeypatch.setattr(replaying, "time", SimpleNamespace(monotonic=lambda: now))

    def pause(seconds: float) -> bool:
        nonlocal now
        now += seconds
        return False

    publish_again(
        operator,
        plan=plan(operator),
        options=ReplayOptions(rate=32.0),
        addressing=ADDRESSING,
        publisher=broker,  # type: ignore[arg-type]  # has what is needed of a Publisher
        note=NOTE,
        pause=pause,
        on_progress=lambda _progress: None,
    )
    assert sent == [(100.0, 0), (100.09375, 3), (100.1875, 6), (100.28125, 9)]


def test_messages_are_found_by_the_primary_key_and_nothing_else(admin: Connection, operator: Connection) -> None:
    add(admin, 20_000)
    admin.execute("ANALYZE outbox")
    planned = plan(operator, Selection(keys=(("order", "1"),)))
    parameters = {
        "after": 0,
        "last": 20_000,
        "rows": 5_000,
        "published_before": planned.published_before,
        "first_no": 1,
        "last_no": 20_000,
        "since": None,
        "until": None,
        "aggregate_types": None,
        "key_types": ["order"],
        "key_ids": ["1"],
    }
    with operator.transaction():
        operator.execute("SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off")
        query = b"EXPLAIN (FORMAT JSON) " + statement("replay_find", schema="public")
        [(explained,)] = operator.execute(query, parameters).fetchall()
    text = json.dumps(explained)
    assert text.count('"Index Name": "outbox_pkey"') == 2
    assert text.count('"Relation Name": "outbox"') == 2
    assert "Seq Scan" not in text


def test_a_message_that_was_pruned_since_is_left_out(admin: Connection, operator: Connection) -> None:
    add(admin, 5)
    planned = plan(operator)
    broker = Broker()

    def prune() -> None:
        admin.execute("DELETE FROM outbox WHERE sequence_no = 4")

    broker.watch = prune
    assert publish(operator, planned, broker, options=ReplayOptions(rate=20.0)).messages == 4
    assert broker.numbers == [1, 2, 3, 5]


def test_a_replay_records_who_why_what_and_how_far(admin: Connection, operator: Connection) -> None:
    add(admin, 5)
    selection = Selection(keys=(("order", "1"),), since=NOON, to_topic="side")
    publish(operator, plan(operator, selection), Broker())
    [row] = admin.execute("""
        SELECT
            name, session_role, operator, why, selection, messages, reached_no,
            started_at <= finished_at AND published_before <= started_at
        FROM outbox_replay
    """).fetchall()
    assert row == (
        "again",
        operator.info.user,
        "ada",
        "a bug in billing",
        {
            "keys": [["order", "1"]],
            "aggregate_types": [],
            "topics": [],
            "first_no": 1,
            "last_no": 2**63 - 1,
            "since": "2026-11-21 12:00:00+00:00",
            "until": None,
            "to_topic": "side",
        },
        5,
        5,
        True,
    )


def test_a_replay_that_was_stopped_goes_on_behind_what_was_acknowledged(
    admin: Connection, operator: Connection
) -> None:
    add(admin, 10)
    slow = ReplayOptions(rate=30.0)
    first, second = Broker(), Broker()
    assert publish(operator, plan(operator), first, options=slow, chunks=2) == Progress(6, 6)
    assert admin.execute("SELECT messages, reached_no, finished_at FROM outbox_replay").fetchall() == [(6, 6, None)]
    add(admin, 5)  # published after the replay began
    admin.execute("UPDATE outbox SET published_at = now() WHERE sequence_no > 10")
    rest = plan(operator)
    assert (rest.messages, rest.progress) == (4, Progress(6, 6))
    assert publish(operator, rest, second) == Progress(10, 10, is_finished=True)
    assert (first.numbers, second.numbers) == ([1, 2, 3, 4, 5, 6], [7, 8, 9, 10])
    with pytest.raises(OperationRefused, match=r"replay again was finished at .*: use a new --name"):
        plan(operator)


def test_a_name_stands_for_one_selection(admin: Connection, operator: Connection) -> None:
    add(admin, 10)
    same, other = plan(operator), plan(operator)
    publish(operator, same, Broker(), chunks=0)
    with pytest.raises(OperationRefused, match="replay again has another selection"):
        plan(operator, Selection(first_no=2))
    with pytest.raises(OperationRefused, match="has just been begun by somebody else"):
        publish(operator, other, Broker())
    assert plan(operator).progress == Progress()


def test_what_a_refused_batch_has_withdrawn_is_sent_again_in_the_order_of_its_key(
    admin: Connection, operator: Connection
) -> None:
    add(admin, 3, key="a")
    add(admin, 3, key="b")
    broker = Broker(acknowledged_but({1: WITHDRAWN, 3: WITHDRAWN}), acknowledged_but({0: WITHDRAWN}))
    assert publish(operator, plan(operator), broker).messages == 6
    assert broker.numbers == [1, 3, 5, 6, 3, 4, 5, 6, 2, 3]


@pytest.mark.parametrize(
    ("failure", "error", "words"),
    [
        (TOO_LARGE, OperationRefused, "message 4 was not acknowledged: MSG_SIZE_TOO_LARGE: too large"),
        (NO_TOPIC, OperationRefused, "message 4 was not acknowledged: UNKNOWN_TOPIC_OR_PART"),
        (NO_REPORT, KafkaUnavailable, "message 4 was not acknowledged: no_report"),
    ],
    ids=["message", "topic", "kafka"],
)
def test_a_failure_ends_the_replay_before_the_chunk_that_it_is_in(
    admin: Connection, operator: Connection, failure: Failure, error: type[Exception], words: str
) -> None:
    add(admin, 10)
    broker = Broker(acknowledged_but({}), acknowledged_but({1: failure}))
    with pytest.raises(error, match=words):
        publish(operator, plan(operator), broker, options=ReplayOptions(rate=20.0))
    assert plan(operator).progress == Progress(2, 2)


def test_a_topic_that_is_missing_is_told_before_anything_is_recorded(admin: Connection, operator: Connection) -> None:
    add(admin, 10)
    with pytest.raises(OperationRefused, match=r'topic "order\.events": unknown; create it or grant access'):
        publish(operator, plan(operator), Broker(missing=NO_TOPIC))
    assert admin.execute("SELECT FROM outbox_replay").fetchall() == []


@pytest.mark.parametrize("role", ["outbox_writer", "outbox_relay", "outbox_pruner"])
def test_a_login_that_is_no_operator_is_told_to_become_one(database: Database, role: LiteralString) -> None:
    with login(database, group=role) as name:
        dsn = make_conninfo(database.dsn, user=name)
        with (
            closing(relay_database.connect(dsn, application_name="replay")) as connection,
            pytest.raises(SchemaMismatch, match="permission denied for table outbox_replay"),
        ):
            plan(connection)
