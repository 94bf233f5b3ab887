"""Lanes on a real database, with a publisher that answers what the test wants: what the loop makes of it."""

from __future__ import annotations

import random
import threading
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import xor
from typing import TYPE_CHECKING, Any, cast

import pytest
import structlog
from psycopg.conninfo import make_conninfo

from outbox_relay import database as relay_database
from outbox_relay.errors import AnswerTooLarge, KafkaUnavailable
from outbox_relay.observe.metrics import Metrics
from outbox_relay.observe.telemetry import Telemetry
from outbox_relay.relay import loop
from outbox_relay.relay.claim import ClaimOptions, claim_shards
from outbox_relay.relay.failures import NO_REPORT, WITHDRAWN, Failure, Scope
from outbox_relay.relay.late import LateCollector
from outbox_relay.relay.loop import Lane, LaneOptions
from outbox_relay.relay.message import Addressing
from outbox_relay.relay.read import Limits, read_messages
from outbox_relay.relay.shards import Shards
from outbox_relay.relay.watch import HorizonWatch, WatchOptions
from tests.fixtures.marks import mark, set_aside
from tests.fixtures.outbox import insert
from tests.fixtures.postgres import both_layouts
from tests.fixtures.proxy import TcpProxy
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from psycopg import Connection

    from outbox_relay.relay.claim import Claim
    from outbox_relay.relay.failures import Outcome
    from outbox_relay.relay.message import Record
    from outbox_relay.relay.publish import Publisher
    from outbox_relay.relay.read import Batch
    from tests.fixtures.postgres import Database

    Answer = list[Outcome] | Exception | Callable[[list[int]], list[Outcome] | None]

LONG = 3_600.0
FAILURES_UNTIL_TESTED = 3  # 5,000 messages, 312, 19; then each is tested
REFUSED = Failure(Scope.MESSAGE, "MSG_SIZE_TOO_LARGE", "shrink it")
MISSING_TOPIC = Failure(Scope.TOPIC, "UNKNOWN_TOPIC_OR_PART", "create it")

ENDLESS = LaneOptions(stint_seconds=LONG, linger_seconds=LONG)  # a stint ends when the test makes it
SELECT_STATES = "SELECT state, count(*) FROM outbox_message GROUP BY state"
TERMINATE_ONE = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND application_name IN ('lane', 'late', 'horizon')
ORDER BY random()
LIMIT 1
"""
SELECT_SESSIONS = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'lane'"


class Kafka:
    """
    Stands in for the publishers of all lanes: batches become what was asked for, all others are acknowledged.

    Attributes:
        closed: Topics that are away.
        trouble: What becomes of the batches that no answer was given for.
        batches: The numbers of each batch that was sent.
        acknowledged: Numbers in the order in which they were acknowledged.
        unordered: Those that were sent with the header `unordered`.
    """

    def __init__(self, *answers: Answer) -> None:
        self.closed: set[str] = set()
        self.batches: list[list[int]] = []
        self.acknowledged: list[int] = []
        self.unordered: set[int] = set()
        self.keys: dict[int, str] = {}
        self.producers_rebuilt = 0
        self.trouble: Callable[[list[int]], list[Outcome] | None] | None = None
        self._answers = list(answers)

    def probe(self) -> None: ...

    def changed_partitions(self) -> dict[str, int]:
        return {}

    def close(self) -> None: ...

    def unavailable(self, topics: Sequence[str]) -> dict[str, Failure]:
        return dict.fromkeys(self.closed.intersection(topics), MISSING_TOPIC)

    def publish(self, records: Sequence[Record], *, deadline: float) -> list[Outcome]:
        assert deadline > 0
        headers = [dict(record.headers) for record in records]
        numbers = [int(str(each["sequence_no"])) for each in headers]
        self.batches.append(numbers)
        self.keys |= {number: record.key for number, record in zip(numbers, records, strict=True)}
        self.unordered |= {number for number, each in zip(numbers, headers, strict=True) if "unordered" in each}
        outcomes = self._answer(numbers) or [MISSING_TOPIC if each.topic in self.closed else None for each in records]
        self.producers_rebuilt += WITHDRAWN in outcomes
        self.acknowledged += [number for number, outcome in zip(numbers, outcomes, strict=True) if outcome is None]
        return outcomes

    def _answer(self, numbers: list[int]) -> list[Outcome] | None:
        if not self._answers:
            return self.trouble(numbers) if self.trouble else None
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer(numbers) if callable(answer) else answer

    @property
    def by_key(self) -> dict[str, list[int]]:
        """The acknowledged numbers of each key in their order."""
        found: dict[str, list[int]] = defaultdict(list)
        for number in self.acknowledged:
            found[self.keys[number]].append(number)
        return dict(found)


@dataclass
class Process:
    """A relay's process without its reconciler, which would hide what the lanes do wrong."""

    dsn: str
    kafka: Kafka
    options: LaneOptions = LaneOptions()  # noqa: RUF009 -- frozen
    lanes: int = 1
    ordering_timeout: float = LONG
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        telemetry = Telemetry(logger=structlog.get_logger(), metrics=self.metrics, topic_of=Addressing().topic)
        connect = partial(relay_database.connect, self.dsn, application_name="lane")
        self._watch = HorizonWatch(
            options=WatchOptions(ordering_timeout=self.ordering_timeout),
            connect=partial(relay_database.connect, self.dsn, application_name="horizon"),
            telemetry=telemetry,
        )
        self.shards = Shards()
        lanes = [
            Lane(
                f"lane-{number}",
                options=self.options,
                connect=connect,
                publisher=cast("Publisher", self.kafka),
                watch=self._watch,
                shards=self.shards,
                telemetry=telemetry,
                stop=self._stop,
            )
            for number in range(self.lanes)
        ]
        late = LateCollector(
            options=self.options.claim,
            connect=partial(relay_database.connect, self.dsn, application_name="late"),
            watch=self._watch,
            found=lambda: self._look(lanes),
            telemetry=telemetry,
            stop=self._stop,
        )
        runs = [self._watch.run, late.run, *(lane.run for lane in lanes)]
        self._threads = [threading.Thread(target=run) for run in runs]

    def _look(self, lanes: Sequence[Lane]) -> None:
        for lane in lanes:
            lane.look_soon()
        self._watch.wake()

    @contextmanager
    def running(self) -> Iterator[Process]:
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self.stop()

    def stop(self) -> None:
        """Let it end as on SIGTERM."""
        self._stop.set()
        self._watch.stop()
        for thread in self._threads:
            thread.join()

    def count(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"outbox_relay_{name}", labels)


@pytest.fixture
def shop(database: Database) -> Iterator[Connection]:
    with database.connect(autocommit=True) as connection:
        yield connection


@contextmanager
def running(
    database: Database,
    kafka: Kafka,
    *,
    options: LaneOptions | None = None,
    lanes: int = 1,
    ordering_timeout: float = LONG,
) -> Iterator[Process]:
    options = options or LaneOptions()
    process = Process(database.relay_dsn, kafka, options=options, lanes=lanes, ordering_timeout=ordering_timeout)
    with process.running():
        yield process


def states(shop: Connection) -> dict[str, int]:
    return dict(shop.execute(SELECT_STATES).fetchall())


def await_states(shop: Connection, *, timeout: float = 30.0, **expected: int) -> None:
    eventually(lambda: states(shop) == expected, timeout=timeout, message=f"the states are not {expected}")


def check_marks(shop: Connection) -> None:
    """Marks count the messages that they have passed, exactly; those of writers that were given up on do not count."""
    counted: dict[int, tuple[int, int]] = {}
    for shard, messages, checksum in shop.execute(
        """
        SELECT shard, sum(messages)::int, bit_xor(checksum) FROM outbox_published GROUP BY shard
        HAVING sum(messages) > 0
        """
    ):
        counted[shard] = (messages, checksum)
    numbers: dict[int, list[int]] = defaultdict(list)
    for shard, number in shop.execute(
        """
        SELECT shard, sequence_no FROM outbox
        WHERE transaction_id NOT IN (SELECT transaction_id FROM outbox_unordered)
        """
    ):
        numbers[shard].append(number)
    assert counted == {shard: (len(passed), reduce(xor, passed)) for shard, passed in numbers.items()}


def check_order(kafka: Kafka) -> None:
    """The first acknowledgement of each message came after those of the earlier ones of its key."""
    for numbers in kafka.by_key.values():
        firsts = [number for number in dict.fromkeys(numbers) if number not in kafka.unordered]
        assert firsts == sorted(firsts)


def are_acknowledged(kafka: Kafka, count: int) -> bool:
    return len(kafka.acknowledged) == count


def marks(shop: Connection) -> list[tuple[int, int]]:
    """Number and messages of all marks."""
    return shop.execute("SELECT through, messages FROM outbox_published ORDER BY through, messages").fetchall()


def are_shards_free(shop: Connection) -> bool:
    [(free,)] = shop.execute(
        "SELECT count(*) FROM (SELECT FROM outbox_shard FOR UPDATE SKIP LOCKED) AS free"
    ).fetchall()
    return bool(free == 16)


@both_layouts
@pytest.mark.every_postgres
def test_messages_are_published_in_order_and_marks_count_them(database: Database, shop: Connection) -> None:
    insert(shop, *[str(number % 7) for number in range(100)])
    with running(database, kafka := Kafka(), lanes=2):
        insert(shop, *[str(number % 7) for number in range(100)])
        await_states(shop, published=200)
    assert sorted(kafka.acknowledged) == list(range(1, 201))
    check_order(kafka)
    check_marks(shop)


def test_a_stint_lasts_for_many_batches_and_leaves_one_mark_for_each_shard(
    database: Database, shop: Connection
) -> None:
    with running(database, kafka := Kafka(), options=replace(ENDLESS, stint_messages=9)):
        for count in range(2, 10, 2):
            insert(shop, "1", "2")
            eventually(partial(are_acknowledged, kafka, count))
        assert (marks(shop), are_shards_free(shop)) == ([], False)
        insert(shop, "1")
        await_states(shop, published=9)
    assert len(kafka.batches) > 4
    assert marks(shop) == [(8, 4), (9, 5)]


def test_a_stint_ends_when_no_message_comes_for_a_while(database: Database, shop: Connection) -> None:
    insert(shop, "1")
    with running(database, Kafka(), options=replace(ENDLESS, linger_seconds=0.02)):
        await_states(shop, published=1)


def test_a_stint_ends_when_its_time_is_over(database: Database, shop: Connection) -> None:
    insert(shop, "1")
    with running(database, Kafka(), options=replace(ENDLESS, stint_seconds=0.1)):
        await_states(shop, published=1)


def test_a_stint_ends_with_the_bytes_of_a_batch(database: Database, shop: Connection) -> None:
    limits = Limits(stored_bytes=10_000)
    with running(database, Kafka(), options=replace(ENDLESS, limits=limits)):
        insert(shop, "1", payload_bytes=bytes(9_000))
        insert(shop, "1", payload_bytes=bytes(2_000))
        await_states(shop, published=2)


def test_a_stop_records_the_stint_in_hand(database: Database, shop: Connection) -> None:
    insert(shop, "1")
    with running(database, kafka := Kafka(), options=ENDLESS):
        eventually(lambda: kafka.acknowledged)
        assert states(shop) == {"unpublished": 1}
    assert states(shop) == {"published": 1}


def test_nothing_is_locked_while_there_is_nothing_to_do(database: Database, shop: Connection) -> None:
    insert(shop, "1")
    with running(database, Kafka(), lanes=2):
        await_states(shop, published=1)
        eventually(lambda: are_shards_free(shop))
        shop.execute("BEGIN; SELECT FROM outbox_shard FOR UPDATE; COMMIT")


def test_lanes_share_the_shards_while_there_is_much_to_do(database: Database, shop: Connection) -> None:
    """One that is busy holds four shards, so that the other one publishes although the first never comes to an end."""
    insert(shop, *map(str, range(400)))
    both = threading.Barrier(2)

    def meet(_numbers: list[int]) -> None:
        both.wait(30)

    kafka = Kafka(lambda _numbers: None, meet, meet)
    options = LaneOptions(limits=Limits(messages=32), stint_messages=10)
    with running(database, kafka, options=options, lanes=2):
        await_states(shop, published=400)
    first, second = ({int(key) for key in map(kafka.keys.get, batch) if key} for batch in kafka.batches[1:3])
    assert first.isdisjoint(second)
    assert Counter(kafka.acknowledged) == Counter(range(1, 401))
    check_marks(shop)


def test_a_lane_does_not_ask_again_and_again_for_shards_that_another_one_holds(
    database: Database, shop: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert(shop, *["1"] * 100)
    claims: list[str] = []
    busy = threading.Event()

    def claim(connection: Connection, **options: Any) -> Claim:  # noqa: ANN401 -- those of claim_shards
        claims.append(threading.current_thread().name)
        return claim_shards(connection, **options)

    def stay(_numbers: list[int]) -> None:
        before = len(claims)
        for _ in range(500):
            shop.execute("SELECT 1")  # time enough for as many claims
        asked.append(len(claims) - before)
        busy.set()

    asked: list[int] = []
    monkeypatch.setattr(loop, "claim_shards", claim)
    kafka = Kafka(lambda _numbers: None, stay)
    options = LaneOptions(limits=Limits(messages=32), stint_messages=2)
    with running(database, kafka, options=options, lanes=2):
        assert busy.wait(30)
    assert asked[0] < 10


def test_two_processes_publish_every_message_once_between_them(database: Database, shop: Connection) -> None:
    with running(database, kafka := Kafka(), lanes=2), running(database, kafka, lanes=2):
        for _ in range(50):
            insert(shop, *map(str, range(10)))
        await_states(shop, published=500)
    assert Counter(kafka.acknowledged) == Counter(range(1, 501))
    check_order(kafka)
    check_marks(shop)


def test_what_another_process_holds_is_published_once_it_has_ended(database: Database, shop: Connection) -> None:
    insert(shop, "1")
    with database.connect() as other:
        other.execute("SELECT FROM outbox_shard FOR UPDATE")
        with running(database, kafka := Kafka()):
            insert(shop, "1")
            other.rollback()
            await_states(shop, published=2)
    assert kafka.acknowledged == [1, 2]


def of_these(**outcomes: Outcome) -> Callable[[list[int]], list[Outcome]]:
    """Answer with these outcomes for the messages with these numbers, `_3=REFUSED`, and acknowledge all others."""
    return lambda numbers: [outcomes.get(f"_{number}") for number in numbers]


def test_a_refused_message_parks_the_later_ones_of_its_key_only(database: Database, shop: Connection) -> None:
    insert(shop, "1", "1", "2", "1")
    with running(database, kafka := Kafka(of_these(_2=REFUSED, _4=WITHDRAWN))):
        await_states(shop, published=2, parked=2)
        insert(shop, "1", "2")
        await_states(shop, published=3, parked=3)
    assert kafka.acknowledged == [1, 3, 6]
    reasons = shop.execute("SELECT reason_code FROM outbox_pending ORDER BY sequence_no").fetchall()
    assert reasons == [("MSG_SIZE_TOO_LARGE",), ("behind_parked",), ("behind_parked",)]
    check_marks(shop)


def test_later_batches_of_a_stint_stay_behind_a_message_that_it_has_parked(
    database: Database, shop: Connection
) -> None:
    insert(shop, "1")
    with running(database, kafka := Kafka([REFUSED]), options=ENDLESS):
        eventually(lambda: kafka.batches)
        insert(shop, "1", "2")
        eventually(lambda: kafka.acknowledged)
    assert (kafka.acknowledged, states(shop)) == ([3], {"published": 1, "parked": 2})


def test_under_skip_later_messages_pass_a_parked_one(database: Database, shop: Connection) -> None:
    insert(shop, "1", "1")
    with running(database, kafka := Kafka(of_these(_1=REFUSED)), options=LaneOptions(on_poison="skip")):
        await_states(shop, published=1, parked=1)
        insert(shop, "1")
        await_states(shop, published=2, parked=1)
    assert kafka.acknowledged == [2, 3]


def test_under_skip_no_message_passes_one_that_waits_behind_a_parked_one(database: Database, shop: Connection) -> None:
    parked, waits = insert(shop, "1", "1")
    mark(shop)
    set_aside(shop, parked, state="parked")
    set_aside(shop, waits, state="waiting")
    insert(shop, "1")
    with running(database, kafka := Kafka([WITHDRAWN]), options=LaneOptions(on_poison="skip")):
        await_states(shop, published=2, parked=1)
    assert kafka.acknowledged == [2, 3]


@pytest.mark.parametrize("loss", [NO_REPORT, Failure(Scope.CONNECTION, "_TRANSPORT", "away")])
def test_what_kafka_took_before_it_was_lost_is_settled_and_the_rest_waits_and_comes_in_order(
    database: Database, shop: Connection, loss: Failure
) -> None:
    keys = ["1", "2", "1", "2", "1", "7"]
    insert(shop, *keys)
    with running(database, kafka := Kafka(of_these(_3=loss, _4=loss, _5=loss))) as process:
        await_states(shop, published=6)
    assert kafka.by_key == {"1": [1, 3, 5], "2": [2, 4], "7": [6]}
    assert process.count("republished_messages_total", cause="order") == 0
    assert shop.execute("SELECT FROM outbox_pending").fetchall() == []
    check_marks(shop)


def test_messages_that_wait_keep_back_the_later_ones_of_their_keys_through_an_outage(
    database: Database, shop: Connection
) -> None:
    insert(shop, "1", "2")
    lost = threading.Event()

    class Away(Kafka):
        def probe(self) -> None:
            if self.batches and not lost.is_set():
                raise KafkaUnavailable("no broker answered")

    with running(database, kafka := Away([NO_REPORT, None])):
        await_states(shop, published=1, waiting=1)
        insert(shop, "1", "1", "2")
        assert are_shards_free(shop)
        lost.set()
        await_states(shop, published=5)
    assert kafka.by_key == {"1": [1, 3, 4], "2": [2, 5]}
    check_marks(shop)


def test_a_batch_that_no_broker_was_there_for_is_sent_again(database: Database, shop: Connection) -> None:
    insert(shop, "1", "2")
    with running(database, kafka := Kafka(KafkaUnavailable("no broker answered"))):
        await_states(shop, published=2)
    assert kafka.batches == [[1, 2], [1, 2]]


def test_kafka_that_is_lost_in_a_later_batch_leaves_the_marks_of_the_earlier_ones(
    database: Database, shop: Connection
) -> None:
    insert(shop, "1")
    kafka = Kafka([None], KafkaUnavailable("no broker answered"))
    with running(database, kafka, options=ENDLESS):
        eventually(lambda: kafka.acknowledged)
        insert(shop, "1")
        eventually(lambda: kafka.acknowledged == [1, 2])
        assert marks(shop) == [(1, 1)]


def test_messages_of_a_topic_that_is_away_wait_and_the_others_flow(database: Database, shop: Connection) -> None:
    kafka = Kafka()
    kafka.closed.add("basket.events")
    for aggregate_type in ("order", "basket"):
        insert(shop, "1", "1", aggregate_type=aggregate_type)
    with running(database, kafka):
        await_states(shop, published=2, waiting=2)
        insert(shop, "1", aggregate_type="basket")
        insert(shop, "1")
        await_states(shop, published=3, waiting=3)
        kafka.closed.clear()
        await_states(shop, published=6)
    assert kafka.acknowledged == [1, 2, 6, 3, 4, 5]
    check_marks(shop)


def test_what_kafka_has_behind_a_failure_of_its_key_is_counted_as_sent_again(
    database: Database, shop: Connection
) -> None:
    insert(shop, "1", "2", "2", "2")
    with running(database, kafka := Kafka([None, WITHDRAWN, None, None])) as process:
        await_states(shop, published=4)
    assert kafka.batches == [[1, 2, 3, 4], [2, 3, 4]]
    assert process.count("republished_messages_total", cause="order") == 2
    assert process.count("commit_to_ack_seconds_count") == 4
    check_marks(shop)


def test_what_a_batch_settled_behind_a_withdrawn_message_is_not_sent_again_by_the_same_stint(
    database: Database, shop: Connection
) -> None:
    insert(shop, "1", "a", "1", "b")
    [(shared,)] = shop.execute("SELECT count(DISTINCT shard) FROM outbox WHERE sequence_no < 4").fetchall()
    with running(database, kafka := Kafka(of_these(_1=WITHDRAWN), of_these(_1=WITHDRAWN))) as process:
        await_states(shop, published=4)
    assert shared
    assert kafka.batches == [[1, 2, 3, 4], [1, 3], [1, 3]]
    assert process.count("republished_messages_total", cause="order") == 2  # 3, twice behind 1
    check_marks(shop)


def test_a_stint_that_ends_before_a_withdrawn_message_leaves_it_waiting_and_sends_nothing_twice(
    database: Database, shop: Connection
) -> None:
    first, behind = insert(shop, "1", key_of_the_same_shard(shop, "1"))
    kafka = Kafka()
    kafka.trouble = of_these(_1=WITHDRAWN, _3=WITHDRAWN)
    with running(database, kafka, options=LaneOptions(stint_seconds=0.001)) as process:
        await_states(shop, published=1, waiting=1)
        insert(shop, "1")
        await_states(shop, published=1, waiting=2)
        kafka.trouble = None
        await_states(shop, published=3)
    assert kafka.acknowledged == [behind, first, 3]
    assert process.count("republished_messages_total", cause="order") == 0
    check_marks(shop)


def key_of_the_same_shard(shop: Connection, key: str) -> str:
    """Another key of the type "order" whose messages are in the same shard."""
    [(other,)] = shop.execute(
        """
        SELECT number::text FROM generate_series(10, 1000) AS number
        WHERE hashtextextended('order:' || number, 0) & 15 = hashtextextended('order:' || %s, 0) & 15
        LIMIT 1
        """,
        [key],
    ).fetchall()
    return str(other)


def test_producers_that_were_rebuilt_are_counted_once(database: Database, shop: Connection) -> None:
    insert(shop, "1")
    with running(database, kafka := Kafka([WITHDRAWN], [WITHDRAWN])) as process:
        await_states(shop, published=1)
        eventually(lambda: process.count("rebuilt_producers_total") == 2)
    assert kafka.batches == [[1], [1], [1]]


def test_released_messages_are_found_by_the_next_look(database: Database, shop: Connection) -> None:
    numbers = insert(shop, "1", "1")
    mark(shop)
    set_aside(shop, *numbers, state="parked")
    with running(database, kafka := Kafka()):
        insert(shop, "2")
        await_states(shop, published=1, parked=2)
        shop.execute("UPDATE outbox_pending SET state = 'waiting'")
        await_states(shop, published=3)
    assert kafka.by_key == {"1": [1, 2], "2": [3]}


def test_a_waiting_message_that_is_refused_parks_the_later_ones_of_its_key(
    database: Database, shop: Connection
) -> None:
    set_aside(shop, *insert(shop, "1", "1", "2"), state="waiting")
    mark(shop)
    insert(shop, "1")
    with running(database, kafka := Kafka(of_these(_1=REFUSED, _2=WITHDRAWN))):
        await_states(shop, published=1, parked=3)
    assert kafka.acknowledged == [3]


def test_a_pending_message_that_somebody_has_deleted_is_forgotten(database: Database, shop: Connection) -> None:
    set_aside(shop, *insert(shop, "1", "1"), state="waiting")
    mark(shop)
    shop.execute("DELETE FROM outbox WHERE sequence_no = 1")
    with running(database, kafka := Kafka()):
        eventually(lambda: not shop.execute("SELECT FROM outbox_pending").fetchall())
    assert kafka.acknowledged == [2]


@both_layouts
def test_a_late_message_is_sent_once_as_unordered_and_no_mark_counts_it(database: Database, shop: Connection) -> None:
    with database.connect() as slow, running(database, kafka := Kafka(), ordering_timeout=0.2, lanes=2) as process:
        insert(slow, "1", "2")
        insert(shop, "1", "7")
        eventually(lambda: sorted(kafka.acknowledged) == [3, 4])
        insert(slow, "1")
        insert(shop, "1")
        eventually(lambda: sorted(kafka.acknowledged) == [3, 4, 6])
        slow.commit()
        await_states(shop, published=6)
        assert process.count("late_messages_total") == 3
    assert Counter(kafka.acknowledged) == Counter(range(1, 7))
    assert kafka.unordered == {1, 2, 5}
    check_marks(shop)


def test_a_shard_in_which_only_late_messages_are_has_its_mark_at_the_horizon(
    database: Database, shop: Connection
) -> None:
    with database.connect() as slow, running(database, kafka := Kafka(), ordering_timeout=0.2):
        insert(slow, "1")
        insert(shop, "2")
        eventually(lambda: kafka.acknowledged == [2])
        slow.commit()
        await_states(shop, published=2)
        eventually(lambda: (2, 0) in marks(shop), message="no mark has passed the late message")
    assert marks(shop) == [(2, 0), (2, 1)]


@pytest.mark.parametrize(
    ("fault", "pattern"),
    [
        ("cut_before", b"BEGIN ISOLATION LEVEL READ COMMITTED;"),
        ("cut_before", b"SKIP LOCKED"),
        ("swallow_reply_to", b"SKIP LOCKED"),
        ("cut_before", b"has_pending"),
        ("swallow_reply_to", b"bytes_before"),
        ("cut_before", b"::bigint[]\n);\nCOMMIT"),
        ("swallow_reply_to", b"::bigint[]\n);\nCOMMIT"),
    ],
)
def test_a_database_that_is_lost_at_any_step_loses_repeats_and_overtakes_nothing_but_what_was_not_recorded(
    database: Database, shop: Connection, fault: str, pattern: bytes
) -> None:
    keys = [str(number % 5) for number in range(50)]
    insert(shop, *keys)
    with TcpProxy("127.0.0.1", database.server.port) as proxy:
        dsn = make_conninfo(database.relay_dsn, host="127.0.0.1", port=proxy.port)
        getattr(proxy, fault)(pattern)
        process = Process(dsn, kafka := Kafka())
        with process.running():
            await_states(shop, published=50)
        assert sum(proxy.fired.values()) == 1
    check_order(kafka)
    check_marks(shop)
    repeated = len(kafka.acknowledged) - 50
    is_commit_lost = fault == "swallow_reply_to" and b"COMMIT" in pattern
    counted = process.count("republished_messages_total", cause="connection")
    assert counted == (50 if is_commit_lost else repeated)


def test_a_transaction_that_the_server_ends_while_kafka_is_slow_leaves_no_mark(
    database: Database, shop: Connection
) -> None:
    insert(shop, "1", "2")

    def sleep_through(_numbers: list[int]) -> None:
        sessions = shop.execute(SELECT_SESSIONS).rowcount
        eventually(lambda: shop.execute(SELECT_SESSIONS).rowcount < sessions, message="the session was not ended")

    options = LaneOptions(claim=ClaimOptions(transaction_timeout=0.2))
    with running(database, kafka := Kafka(sleep_through), options=options) as process:
        await_states(shop, published=2)
    assert kafka.acknowledged == [1, 2, 1, 2]
    assert process.count("republished_messages_total", cause="connection") == 2
    check_marks(shop)


def test_a_table_that_somebody_locks_for_long_is_asked_for_again(database: Database, shop: Connection) -> None:
    options = LaneOptions(claim=ClaimOptions(lock_timeout=0.05))
    with database.connect() as admin, running(database, Kafka(), options=options) as process:
        insert(shop, "1")
        await_states(shop, published=1)
        admin.execute("LOCK TABLE outbox_published")
        insert(shop, "1")
        eventually(lambda: (process.count("claim_conflicts_total") or 0) >= 2)
        admin.rollback()
        await_states(shop, published=2)


@both_layouts
@pytest.mark.parametrize("truncate", [b"TRUNCATE outbox", b"TRUNCATE outbox RESTART IDENTITY"])
def test_messages_behind_a_truncation_are_published_like_the_first_ones(
    database: Database, shop: Connection, truncate: bytes
) -> None:
    with running(database, kafka := Kafka(), lanes=2):
        for _ in range(3):
            insert(shop, *["1", "2", "7"] * 3)
            await_states(shop, published=9)
            shop.execute(truncate)
            assert marks(shop) == []
    is_restarted = truncate.endswith(b"IDENTITY")
    assert sorted(kafka.acknowledged) == sorted([*range(1, 10)] * 3 if is_restarted else range(1, 28))


@pytest.mark.parametrize("truncate", [b"TRUNCATE outbox", b"TRUNCATE outbox RESTART IDENTITY"])
def test_a_truncation_waits_for_the_stint_and_what_comes_then_is_published(
    database: Database, shop: Connection, truncate: bytes
) -> None:
    insert(shop, "1", "2")
    with (
        database.connect(autocommit=True) as admin,
        database.connect(autocommit=True) as observer,
        ThreadPoolExecutor(1) as thread,
    ):

        def truncate_behind_the_stint(_numbers: list[int]) -> None:
            thread.submit(admin.execute, truncate)
            waits = "SELECT FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock'"
            eventually(lambda: observer.execute(waits).fetchall())

        with running(database, kafka := Kafka(truncate_behind_the_stint)):
            eventually(lambda: kafka.acknowledged and not shop.execute("SELECT FROM outbox").fetchall())
            numbers = insert(shop, "1", "2", "1")
            await_states(shop, published=3)
    assert kafka.acknowledged == [1, 2, *numbers]
    check_marks(shop)


def test_a_horizon_of_other_numbers_claims_nothing_until_it_is_found_anew(database: Database, shop: Connection) -> None:
    insert(shop, *["1"] * 5)
    with running(database, kafka := Kafka()):
        await_states(shop, published=5)
        shop.execute("BEGIN; TRUNCATE outbox RESTART IDENTITY")
        insert(shop, "2")
        shop.execute("COMMIT")
        await_states(shop, published=1)
    assert kafka.acknowledged == [1, 2, 3, 4, 5, 1]


def test_a_message_that_another_lane_has_parked_meanwhile_puts_no_blame_on_the_next_one(
    database: Database, shop: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert(shop, "a", "b", "a")
    met: list[str] = []

    def read_behind_the_other_lane(connection: Connection, claim: Claim, **options: Any) -> Batch:  # noqa: ANN401
        if len(met) < FAILURES_UNTIL_TESTED:
            met.append("the guilty one")
            raise AnswerTooLarge("as by a message that another lane parks now")
        return read_messages(connection, claim, **options)

    monkeypatch.setattr(loop, "read_messages", read_behind_the_other_lane)
    with running(database, Kafka()):
        await_states(shop, published=3)
    assert len(met) == FAILURES_UNTIL_TESTED


UNREADABLE = "[{}]".format(", ".join(["1e131071"] * 8_500))  # 100 kB as jsonb, 1.1 GB as text


@pytest.mark.slow
@pytest.mark.parametrize("waits", [False, True], ids=["new", "waiting"])
def test_a_message_that_no_server_can_write_out_is_parked_and_holds_up_no_other(
    database: Database, shop: Connection, *, waits: bool
) -> None:
    [guilty] = insert(shop, *["1"] * 400, *map(str, range(20)), "guilty", *map(str, range(20)))[420:421]
    shop.execute("UPDATE outbox SET payload = %s WHERE sequence_no = %s", [UNREADABLE, guilty])
    if waits:
        set_aside(shop, *range(1, 442), state="waiting")
        mark(shop)
    with running(database, kafka := Kafka()):
        await_states(shop, published=440, parked=1, timeout=200)
    [(code, reason)] = shop.execute("SELECT reason_code, reason FROM outbox_pending").fetchall()
    assert code == "MSG_SIZE_TOO_LARGE"
    assert "once its numbers are written out" in reason
    assert Counter(kafka.acknowledged) == Counter({*range(1, 442)} - {guilty})
    check_order(kafka)
    check_marks(shop)


class Trouble:
    """Answers of a Kafka with troubles: some keys fail from some message of the batch on, as a producer reports it."""

    def __init__(self, kafka: Kafka, chance: random.Random) -> None:
        self._kafka = kafka
        self._chance = chance

    def __call__(self, numbers: list[int]) -> list[Outcome] | None:
        if self._chance.random() < 0.6:
            return None
        if self._chance.random() < 0.1:
            raise KafkaUnavailable("no broker answered")
        failure = self._chance.choice([NO_REPORT, WITHDRAWN, WITHDRAWN, MISSING_TOPIC])
        failed_keys = {key for key in map(self._kafka.keys.get, numbers) if self._chance.random() < 0.3}
        stopped: set[str | None] = set()
        outcomes: list[Outcome] = []
        for key in map(self._kafka.keys.get, numbers):
            if key in failed_keys and self._chance.random() < 0.5:
                stopped.add(key)
            outcomes.append(failure if key in stopped else None)
        return outcomes


@both_layouts
@pytest.mark.slow
def test_troubles_of_all_kinds_lose_nothing_overtake_nothing_and_leave_true_marks(
    database: Database, shop: Connection, seed: int
) -> None:
    chance = random.Random(seed)  # noqa: S311 -- no secret
    kafka = Kafka()
    kafka.trouble = Trouble(kafka, random.Random(seed))  # noqa: S311 -- no secret
    options = LaneOptions(limits=Limits(messages=40), stint_messages=50)
    with ExitStack() as stack:
        processes = [
            stack.enter_context(running(database, kafka, options=options, lanes=2, ordering_timeout=0.1))
            for _ in range(2)
        ]
        slow = [stack.enter_context(database.connect()) for _ in range(2)]
        operator = stack.enter_context(database.connect())
        for _ in range(150):
            insert(shop, *(str(chance.randrange(30)) for _ in range(chance.randrange(1, 12))))
            writer = chance.choice(slow)
            insert(writer, str(chance.randrange(30)))
            match chance.randrange(8):
                case 0:
                    writer.commit()
                case 1:
                    writer.rollback()
                case 2:
                    shop.execute(TERMINATE_ONE)
                case 3:
                    operator.rollback()
                    operator.execute("SELECT FROM outbox_shard WHERE shard = %s FOR UPDATE", [chance.randrange(16)])
        operator.rollback()
        for writer in slow:
            writer.commit()
        kafka.trouble = None
        [(total,)] = shop.execute("SELECT count(*) FROM outbox").fetchall()
        await_states(shop, published=total, timeout=60)
        eventually(lambda: not shop.execute("SELECT FROM outbox_unordered WHERE collected_at IS NULL").rowcount)
        await_states(shop, published=total, timeout=60)
    assert processes
    numbers = {number for (number,) in shop.execute("SELECT sequence_no FROM outbox")}
    assert set(kafka.acknowledged) == numbers
    check_order(kafka)
    check_marks(shop)
