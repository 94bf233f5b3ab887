"""What a replay finds, in which order it goes out, what it records of itself, and that it disturbs nobody."""

from __future__ import annotations

import re
from contextlib import closing
from datetime import datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, LiteralString

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
from tests.fixtures.marks import mark, set_aside
from tests.fixtures.outbox import insert
from tests.fixtures.postgres import both_layouts, login

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from psycopg import Connection, Cursor

    from outbox_relay.relay.failures import Outcome
    from outbox_relay.relay.message import Record
    from tests.fixtures.postgres import Database

pytestmark = pytest.mark.every_postgres

ADDRESSING = Addressing(source="shop.public", topics={"refund": "order.events"})
OPTIONS = ReplayOptions(rate=1e9)
NOTE = Note("ada", "a bug in billing")
ALL = Selection()
NOON, LATER = "2026-11-21 12:00Z", "2026-11-21 13:00Z"
TOO_LARGE = Failure(Scope.MESSAGE, "MSG_SIZE_TOO_LARGE", "too large")
NO_TOPIC = Failure(Scope.TOPIC, "UNKNOWN_TOPIC_OR_PART", 'topic "order.events": unknown; create it or grant access')


HOSTILE_SETTINGS = (
    "datestyle = 'German, DMY'",
    "bytea_output = 'escape'",
    "search_path = ''",
    "timezone = 'Asia/Kathmandu'",
    "standard_conforming_strings = off",
    "quote_all_identifiers = on",
    "default_transaction_isolation = 'serializable'",
    "lock_timeout = '1ms'",
)


def time(text: str) -> datetime:
    return datetime.fromisoformat(text)


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


def add(admin: Connection, count: int = 1, *, key: str = "1", type_: str = "order", created: str = NOON) -> list[int]:
    """Insert as many messages and settle all there are, an hour ago; return their numbers."""
    numbers = insert(admin, *[key] * count, aggregate_type=type_, created_at=created)
    mark(admin, age_seconds=3600)
    return numbers


def add_many(admin: Connection, count: int) -> None:
    """Insert messages of as many keys and settle all there are."""
    admin.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, event_type)"
        " SELECT 'order', number::text, 'placed' FROM generate_series(1, %s) AS number",
        [count],
    )
    mark(admin)


def plan(operator: Connection, selection: Selection = ALL, *, name: str = "again") -> Plan:
    return plan_replay(operator, options=OPTIONS, name=name, selection=selection, addressing=ADDRESSING)


def publish(
    operator: Connection,
    planned: Plan,
    broker: Broker,
    *,
    options: ReplayOptions = OPTIONS,
    addressing: Addressing = ADDRESSING,
    chunks: int = 1_000,
) -> Progress:
    """Replay, and be stopped after so many chunks."""
    pauses = iter([False] * chunks)
    return publish_again(
        operator,
        plan=planned,
        options=options,
        addressing=addressing,
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
    query = "SELECT ctid::text, xmin::text, xmax::text, outbox.* FROM outbox ORDER BY sequence_no"
    return admin.execute(query).fetchall()


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
        (Selection(since=time(LATER)), [4, 5]),
        (Selection(until=time(LATER)), [1, 2, 3, 6]),
        (Selection(since=time(NOON), until=time(LATER), keys=(("order", "2"),)), [2, 6]),
    ],
    ids=str,
)
def test_what_is_selected_and_nothing_else_is_published_again(
    admin: Connection, operator: Connection, selection: Selection, expected: list[int]
) -> None:
    add(admin, key="1")
    add(admin, key="2")
    add(admin, key="1", type_="refund")
    add(admin, key="1", created=LATER)
    add(admin, key="1", type_="basket", created="2026-11-21 14:00Z")
    add(admin, key="2")
    assert replayed(operator, selection) == expected


def late_writer(admin: Connection, numbers: list[int], *, to_no: int | None = None) -> None:
    """Give up on the writer of *numbers*, and collect its messages if *to_no* says up to where they go."""
    admin.execute(
        "INSERT INTO outbox_unordered (transaction_id, from_no, to_no, collected_at)"
        " SELECT transaction_id, %(from_no)s, %(to_no)s, CASE WHEN %(to_no)s::bigint IS NOT NULL THEN now() END"
        " FROM outbox WHERE sequence_no = %(number)s",
        {"from_no": numbers[0] - 1, "to_no": to_no, "number": numbers[0]},
    )


@both_layouts
def test_what_is_unpublished_or_parked_or_waits_or_was_published_since_is_left_to_the_relay(
    admin: Connection, operator: Connection
) -> None:
    [published] = insert(admin, "1")
    parked, waiting, uncollected = insert(admin, "1", "1", "1")
    set_aside(admin, parked, state="parked")
    set_aside(admin, waiting, state="waiting", is_unordered=True)
    late_writer(admin, [uncollected])
    mark(admin)
    insert(admin, "1", "2", "3")
    planned = plan(operator)
    mark(admin)
    insert(admin, "1")
    broker = Broker()
    publish(operator, planned, broker)
    assert broker.numbers == [published]


@both_layouts
def test_a_message_that_its_own_shard_has_not_reached_is_left_to_the_relay(
    admin: Connection, operator: Connection
) -> None:
    numbers = insert(admin, *map(str, range(50)))
    [(shard, through)] = admin.execute("SELECT shard, sequence_no FROM outbox WHERE sequence_no = 25").fetchall()
    mark(admin, through=through, shard=shard)
    of_shard = admin.execute("SELECT sequence_no FROM outbox WHERE shard = %s ORDER BY sequence_no", [shard])
    expected = [number for (number,) in of_shard if number <= through]
    assert len(numbers) > len(expected) > 1
    assert replayed(operator, ALL) == expected


def test_messages_of_a_late_writer_are_replayed_once_they_were_collected_and_published(
    admin: Connection, operator: Connection
) -> None:
    [number] = add(admin)
    late_writer(admin, [number])
    assert plan(operator).messages == 0
    admin.execute("UPDATE outbox_unordered SET collected_at = now(), to_no = %s", [number])
    set_aside(admin, number, state="waiting", is_unordered=True)
    assert plan(operator).messages == 0
    admin.execute("DELETE FROM outbox_pending")
    admin.execute("UPDATE outbox_unordered SET collected_at = NULL, collected_through = %s - 1", [number])
    assert plan(operator).messages == 0
    admin.execute("UPDATE outbox_unordered SET collected_through = %s", [number])
    assert replayed(operator, ALL) == [number]


@both_layouts
def test_after_the_numbers_began_anew_nothing_is_replayed_that_was_not_published(
    admin: Connection, operator: Connection
) -> None:
    add(admin, 20)
    planned = plan(operator)
    admin.execute("TRUNCATE outbox RESTART IDENTITY")
    add(admin, 3)
    insert(admin, *["1"] * 10)
    broker = Broker()
    publish(operator, planned, broker)
    assert broker.numbers == [1, 2, 3]


def test_a_plan_tells_what_goes_where(admin: Connection, operator: Connection) -> None:
    add(admin, 3)
    add(admin, 2, type_="refund", created=LATER)
    add(admin, 4, type_="basket", created="2026-11-21 11:00Z")
    planned = plan(operator)
    assert planned.topics == {"order.events": 5, "basket.events": 4}
    assert planned.first
    assert planned.last
    assert (planned.first.sequence_no, planned.first.created_at_ms) == (1, time(NOON).timestamp() * 1000)
    assert planned.last.sequence_no == 9
    assert plan(operator, Selection(to_topic="side")).topics == {"side": 9}


def test_a_record_is_that_of_the_first_time_with_one_header_more(admin: Connection, operator: Connection) -> None:
    [number] = insert(admin, "4711", aggregate_type="refund", payload_bytes=b"\x00\xff", headers={"tenant": "t1"})
    mark(admin)
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
            ("event_type", "placed"),
            ("aggregate_type", "refund"),
            ("sequence_no", str(number)),
            ("source", "shop.public"),
            ("content-type", "application/octet-stream"),
            ("replay", "again"),
            ("tenant", "t1"),
        ],
        ms,
    )


def test_the_messages_of_a_late_writer_and_no_others_are_unordered_again(
    admin: Connection, operator: Connection
) -> None:
    with admin.transaction():
        numbers = insert(admin, *["1"] * 4)
    mark(admin)
    admin.execute(
        "INSERT INTO outbox_unordered (transaction_id, from_no, to_no, collected_at)"
        " SELECT DISTINCT transaction_id, %s::bigint, %s::bigint, now() FROM outbox",
        [numbers[0], numbers[2]],
    )
    broker = Broker()
    publish(operator, plan(operator), broker)
    assert ["unordered" in dict(record.headers) for record in broker.records] == [False, True, True, False]


def test_a_topic_that_the_settings_do_not_allow_is_refused(admin: Connection, operator: Connection) -> None:
    add(admin)
    addressing = Addressing(allowed=frozenset({"order.events"}))
    selection = Selection(to_topic="side")
    with pytest.raises(OperationRefused, match='topic "side" is not among OUTBOX_RELAY_ALLOWED_TOPICS'):
        plan_replay(operator, options=OPTIONS, name="again", selection=selection, addressing=addressing)


@both_layouts
def test_messages_of_all_shards_go_out_in_the_order_of_their_numbers(admin: Connection, operator: Connection) -> None:
    add_many(admin, 2_000)
    assert replayed(operator, ALL) == list(range(1, 2_001))


@both_layouts
@pytest.mark.parametrize(("first", "last"), [(1, 400), (1, 1), (150, 5_000_060), (5_000_195, 2**63 - 1), (201, 201)])
def test_a_range_of_numbers_is_found_whole_where_numbers_have_gaps(
    admin: Connection, operator: Connection, monkeypatch: pytest.MonkeyPatch, first: int, last: int
) -> None:
    monkeypatch.setattr(replaying, "_MOST_NUMBERS", 7)
    monkeypatch.setattr(replaying, "_MOST_CHUNK_MESSAGES", 3)
    add_many(admin, 200)
    admin.execute("SELECT setval('outbox_sequence_no_seq', 5000000)")
    add_many(admin, 200)
    admin.execute("DELETE FROM outbox WHERE sequence_no % 7 = 0 OR sequence_no < 20")
    kept = [number for (number,) in admin.execute("SELECT sequence_no FROM outbox ORDER BY 1")]
    expected = [number for number in kept if first <= number <= last]
    assert replayed(operator, Selection(first_no=first, last_no=last)) == expected


def reads(operator: Connection, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many messages each statement that reads them returns, from now on."""
    found: list[int] = []
    execute = operator.execute

    def watched(query: bytes, parameters: Mapping[str, object] | None = None) -> Cursor:
        executed = execute(query, parameters)
        if query == statement("replay_read", schema="public"):
            found.append(executed.rowcount)
        return executed

    monkeypatch.setattr(operator, "execute", watched)
    return found


def test_a_gap_of_a_billion_numbers_is_walked_around(
    admin: Connection, operator: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(admin)
    admin.execute("SELECT setval('outbox_sequence_no_seq', 1000000000)")
    add(admin)
    found = reads(operator, monkeypatch)
    assert replayed(operator, ALL) == [1, 1_000_000_001]
    assert len(found) < 10


def test_one_statement_returns_no_more_than_some_megabytes_of_names_or_contents(
    admin: Connection, operator: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replaying, "_MOST_CHUNK_BYTES", 1_000_000)
    admin.execute(
        "INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload)"
        " SELECT 'order', '1', rpad('', CASE WHEN number <= 20 THEN 300000 ELSE 6 END, 'placed'),"
        " CASE WHEN number > 20 THEN to_jsonb(rpad('', 300000, 'x')) END FROM generate_series(1, 40) AS number"
    )
    mark(admin)
    found = reads(operator, monkeypatch)
    planned = plan(operator)
    assert planned.messages == 40
    assert found == [4, 4, 4, 4, 4, 20, 1]  # of a message that is only counted, its contents are not read
    found.clear()
    broker = Broker()
    publish(operator, planned, broker)
    assert broker.numbers == list(range(1, 41))
    assert found == [4] * 10 + [1]


def test_jsonb_that_grows_when_it_is_written_out_comes_one_by_one(
    admin: Connection, operator: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = insert(admin, *["1"] * 3)
    admin.execute("UPDATE outbox SET payload = '[1e100000]' WHERE sequence_no > 1")
    mark(admin)
    found = reads(operator, monkeypatch)
    planned = plan(operator)
    assert found[0] == 3
    found.clear()
    broker = Broker()
    publish(operator, planned, broker)
    assert broker.numbers == numbers
    assert [len(record.value or "") for record in broker.records] == [0, 100_003, 100_003]
    assert found == [3, 2, 1, 1]


def test_a_message_that_has_become_too_large_to_be_read_is_named(admin: Connection, operator: Connection) -> None:
    insert(admin, "1", payload_bytes=b"x" * 2_000)
    mark(admin)
    addressing = Addressing(readable_bytes=1_000)
    planned = plan(operator)
    with pytest.raises(OperationRefused, match=r"message 1 cannot be published: the message takes 2,0"):
        publish(operator, planned, Broker(), addressing=addressing)


@both_layouts
def test_nothing_in_the_outbox_is_changed_or_waited_for(
    database: Database, admin: Connection, operator: Connection
) -> None:
    add(admin, 50)
    with database.connect() as relay:
        relay.execute("SELECT FROM outbox ORDER BY sequence_no FOR UPDATE")
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


def scans(node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Each scan of a table below *node*."""
    if "Relation Name" in node:
        yield node
    for child in node.get("Plans", []):
        yield from scans(child)


def explain(operator: Connection, *options: str, plans: str, parameters: Mapping[str, object]) -> Mapping[str, Any]:
    """The plan by which messages are read in a transaction of a replay; the parameters given are those that differ."""
    given = {
        "after_no": 9_000,
        "numbers": 1_000,
        "batch_size": 1_000,
        "batch_bytes": 1_000_000,
        "readable_bytes": 1_000_000,
        "last_no": 2**63 - 1,
        **dict.fromkeys(("since", "until", "types", "key_types", "key_ids")),
        **parameters,
    }
    query = f"EXPLAIN ({', '.join([*options, 'FORMAT JSON'])}) ".encode() + statement("replay_read", schema="public")
    with operator.transaction():
        operator.execute("SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off")
        operator.execute(f"SET LOCAL plan_cache_mode = force_{plans}_plan".encode())
        [(explained,)] = operator.execute(query, given, prepare=True).fetchall()
    return explained[0]["Plan"]  # type: ignore[no-any-return]  # JSON


@both_layouts
@pytest.mark.parametrize("plans", ["custom", "generic"])
@pytest.mark.parametrize("keys", [None, ["1"]], ids=["all", "one key"])
def test_a_statement_looks_at_no_more_rows_than_numbers_whatever_the_statistics(
    admin: Connection, operator: Connection, plans: str, keys: list[str] | None
) -> None:
    admin.execute(
        "INSERT INTO outbox_unordered (transaction_id, from_no)"
        " SELECT number::text::xid8, 0 FROM generate_series(9000000, 9005000) AS number"
    )
    add_many(admin, 10)
    admin.execute("ANALYZE")
    add_many(admin, 20_000)
    set_aside(admin, *range(15_000, 20_000))
    marks = plan(operator, Selection(keys=(("order", "1"),) if keys else ())).published_through
    parameters = {"published_through": list(marks), "key_types": keys and ["order"], "key_ids": keys}
    found = list(scans(explain(operator, "ANALYZE", plans=plans, parameters=parameters)))
    assert all(scan.get("Index Name") for scan in found)
    looked_at = [
        (scan["Actual Rows"] + scan.get("Rows Removed by Filter", 0)) * scan["Actual Loops"]
        for scan in found
        if re.fullmatch(r"outbox(_p\d+)?", scan["Relation Name"])
    ]
    assert sum(looked_at) <= 1_050


@both_layouts
def test_a_plan_that_was_made_while_all_was_empty_still_finds_each_row_by_its_number(
    admin: Connection, operator: Connection
) -> None:
    admin.execute("VACUUM ANALYZE")
    found = list(scans(explain(operator, plans="generic", parameters={"published_through": [0] * 16})))
    conditions = {scan["Relation Name"]: scan["Index Cond"] for scan in found}
    assert re.search("(shard|key_hash) = .*sequence_no = ", conditions.pop("outbox_pending"))
    assert "transaction_id = " in conditions.pop("outbox_unordered")
    assert "shard = " in conditions.pop("outbox_published")
    assert conditions  # of the outbox or its partitions
    assert all(re.search("shard = .*sequence_no > ", condition) for condition in conditions.values())


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_message_in_any_script_is_replayed_whatever_the_role_sets(
    database: Database, admin: Connection, encoding: str
) -> None:
    insert(admin, "€ ключ", payload={"price": "5 €"}, created_at=NOON)
    mark(admin)
    with login(database, group="outbox_operator") as name:
        for setting in (f"client_encoding = {encoding}", *HOSTILE_SETTINGS):
            admin.execute(f'ALTER ROLE "{name}" SET {setting}'.encode())
        dsn = make_conninfo(database.dsn, user=name)
        with closing(relay_database.connect(dsn, application_name="replay")) as connection:
            broker = Broker()
            selection = Selection(keys=(("order", "€ ключ"),), since=time(NOON), until=time(LATER))
            publish(connection, plan(connection, selection), broker)
            assert [(record.key, record.value) for record in broker.records] == [("€ ключ", '{"price": "5 €"}')]
            with pytest.raises(OperationRefused, match=r"was finished at \d{4}-\d{2}-\d{2} "):
                plan(connection, selection)


def test_a_policy_that_hides_messages_from_the_operator_is_an_error(admin: Connection, operator: Connection) -> None:
    add(admin)
    admin.execute("ALTER TABLE outbox ENABLE ROW LEVEL SECURITY")
    with pytest.raises(SchemaMismatch, match='row-level security policy for table "outbox"'):
        plan(operator)


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
    add(admin, 5, key="2")
    selection = Selection(keys=(("order", "1"),), since=time(NOON), to_topic="side")
    publish(operator, plan(operator, selection), Broker())
    [(shard,)] = admin.execute("SELECT DISTINCT shard FROM outbox WHERE aggregate_id = '1'").fetchall()
    [row] = admin.execute(
        """
        SELECT
            name, session_role, operator, why, selection, messages, reached_no,
            published_through = ARRAY(SELECT CASE n WHEN %s THEN 5 ELSE 0 END::bigint FROM generate_series(0, 15) AS n),
            started_at <= finished_at
        FROM outbox_replay
        """,
        [shard],
    ).fetchall()
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
    rest = plan(operator)
    assert (rest.messages, rest.progress) == (4, Progress(6, 6))
    assert publish(operator, rest, second) == Progress(10, 10, is_finished=True)
    assert (first.numbers, second.numbers) == ([1, 2, 3, 4, 5, 6], [7, 8, 9, 10])
    with pytest.raises(OperationRefused, match=r"replay again was finished at .*: use a new --name"):
        plan(operator)


@both_layouts
def test_a_replay_that_goes_on_loses_nothing_to_marks_that_became_one_meanwhile(
    admin: Connection, operator: Connection
) -> None:
    numbers = add(admin, 10)
    publish(operator, plan(operator), Broker(), options=ReplayOptions(rate=30.0), chunks=1)
    add(admin, 1)
    admin.execute("DELETE FROM outbox_published WHERE through < 11")
    broker = Broker()
    publish(operator, plan(operator), broker)
    assert broker.numbers == numbers[3:]


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
