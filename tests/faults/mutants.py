"""
Relays that are broken on purpose, each as real ones have been: `python -m tests.faults.mutants NAME`.

One stage of the real relay is replaced, and the real command runs with it: what the judge does not find in such a relay
it would not find in ours.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from outbox_relay.__main__ import main
from outbox_relay.relay import claim as claim_stage
from outbox_relay.relay.claim import claim_shards
from outbox_relay.relay.horizon import Horizon, observe
from outbox_relay.relay.marks import Marks
from outbox_relay.relay.message import Addressing, prepare
from outbox_relay.relay.publish import Publisher
from outbox_relay.relay.read import read_messages
from outbox_relay.relay.reconcile import Reconciler
from outbox_relay.relay.settle import Settlement, record_marks, set_aside
from outbox_relay.relay.watch import HorizonWatch
from outbox_relay.sql import statement

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from psycopg import Connection

    from outbox_relay.relay.claim import Claim
    from outbox_relay.relay.failures import Outcome
    from outbox_relay.relay.horizon import Observation
    from outbox_relay.relay.message import Message, Prepared, Record
    from outbox_relay.relay.read import Batch
    from outbox_relay.relay.settle import Aside, PendingState

DROPPED_HEADER = "event_type"


def changed(module: str, name: str, *changes: tuple[bytes, bytes]) -> None:
    """Let *module* use the statement *name* with other words."""

    def statement_with_changes(wanted: str, *, schema: str | None) -> bytes:
        text = statement(wanted, schema=schema)
        for before, after in changes if wanted == name else ():
            assert text.count(before) == 1
            text = text.replace(before, after)
        return text

    patch(f"outbox_relay.relay.{module}.statement", statement_with_changes).start()


def never_reconciles() -> None:
    """Trusts its marks."""
    patch.object(Reconciler, "run", lambda _reconciler: None).start()


def skips_locked_rows() -> None:
    """Locks rows instead of shards, as the textbooks have it."""
    changed("claim", "claim_shards", (b"FOR UPDATE OF outbox_shard SKIP LOCKED", b""))
    changed("read", "read_messages", (b") AS found", b"FOR UPDATE OF outbox SKIP LOCKED) AS found"))


def marks_before_the_acknowledgement() -> None:
    """Takes for published what it has handed to the producer."""
    really_publish = Publisher.publish

    def publish(self: Publisher, records: Sequence[Record], *, deadline: float) -> list[None]:
        really_publish(self, records, deadline=deadline)
        return [None] * len(records)

    patch.object(Publisher, "publish", publish).start()
    patch("outbox_relay.relay.publish._Sender._await_reports", lambda _sender, _producer, *, deadline: None).start()  # noqa: ARG005 -- the name is given


def marks_the_whole_batch() -> None:
    """Takes for published what failed, together with what did not."""

    def decide(messages: Sequence[Message], outcomes: list[Outcome], **_options: object) -> Settlement:
        outcomes[:] = [None] * len(outcomes)
        return Settlement(published=list(messages))

    patch("outbox_relay.relay.loop.decide", decide).start()


def forgets_what_is_parked() -> None:
    """Lets its marks pass what Kafka refuses for good, and writes it down nowhere."""
    _forgets("parked")


def forgets_what_waits() -> None:
    """Lets its marks pass what Kafka does not take now, and writes it down nowhere."""
    _forgets("waiting")


def _forgets(state: PendingState) -> None:
    def write(connection: Connection, asides: Sequence[Aside], *, schema: str) -> None:
        set_aside(connection, [aside for aside in asides if aside.state != state], schema=schema)

    patch("outbox_relay.relay.loop.set_aside", write).start()


def leaves_a_hole_in_what_it_reads() -> None:
    """Misses the second of several messages, once."""
    never_reconciles()
    misses = iter([1])

    def read(connection: Connection, claim: Claim, **options: Any) -> Batch:  # noqa: ANN401 -- those of read_messages
        batch = read_messages(connection, claim, **options)
        missed = next(misses, 0) if len(batch.messages) > 2 else 0
        return replace(batch, messages=batch.messages[:missed] + batch.messages[missed + 1 :]) if missed else batch

    patch("outbox_relay.relay.loop.read_messages", read).start()


def keeps_its_marks_from_one_stint_to_the_next() -> None:
    """Believes that nobody else moves them."""
    kept: dict[int, int] = {}

    def claim(connection: Connection, **options: Any) -> Claim:  # noqa: ANN401 -- those of claim_shards
        claim = claim_shards(connection, **options)
        return replace(
            claim, marks=Marks({shard: kept.get(shard, mark) for shard, mark in claim.marks.through.items()})
        )

    def record(connection: Connection, marks: Marks, *, schema: str) -> int:
        kept.update(marks.through)
        return record_marks(connection, marks, schema=schema)

    never_reconciles()
    patch("outbox_relay.relay.loop.claim_shards", claim).start()
    patch("outbox_relay.relay.loop.record_marks", record).start()


def has_no_horizon() -> None:
    """Publishes what is committed, whatever lower numbers are still to appear, and never looks below its marks."""

    def nobody_runs(connection: Connection, *, schema: str) -> Observation:
        return replace(observe(connection, schema=schema), running=frozenset())

    never_reconciles()
    patch("outbox_relay.relay.horizon.observe", nobody_runs).start()


def ignores_the_epoch() -> None:
    """Claims by a horizon that was found for other numbers."""

    really_read_marks = claim_stage._read_marks  # noqa: SLF001 -- that is what it breaks

    def read_marks(*arguments: Any, **named: Any) -> Claim:  # noqa: ANN401 -- those of _read_marks
        return replace(really_read_marks(*arguments, **named), is_of_epoch=True)

    never_reconciles()
    patch.object(claim_stage, "_read_marks", read_marks).start()


def keeps_the_horizon_of_other_numbers() -> None:
    """Does not notice that the numbers begin anew."""
    ignores_the_epoch()
    patch.object(Horizon, "reset", lambda _horizon: None).start()
    patch.object(HorizonWatch, "reset", lambda _watch: None).start()


def counts_late_messages() -> None:
    """Reads by its marks what comes through outbox_pending, too."""
    never_reconciles()
    changed(
        "read",
        "read_messages",
        (b"outbox.transaction_id NOT IN (SELECT late.transaction_id FROM late)", b"true"),
    )


def ignores_parked_messages() -> None:
    """Publishes what comes behind a parked message."""

    def heedless(messages: Sequence[Message], **options: Any) -> Prepared:  # noqa: ANN401 -- those of prepare
        return prepare(messages, **{**options, "why_held_back": None})

    patch("outbox_relay.relay.loop.prepare", heedless).start()


def sends_everything_twice() -> None:
    """Does not trust the first acknowledgement."""
    really_publish = Publisher.publish

    def publish(self: Publisher, records: Sequence[Record], *, deadline: float) -> list[Outcome]:
        really_publish(self, records, deadline=deadline)
        return really_publish(self, records, deadline=deadline)

    patch.object(Publisher, "publish", publish).start()


def drops_a_header() -> None:
    """Forgets one of the headers."""
    really_record = Addressing.record

    def record(self: Addressing, message: Message, *, topic: str) -> Record:
        whole = really_record(self, message, topic=topic)
        return whole._replace(headers=[header for header in whole.headers if header[0] != DROPPED_HEADER])

    patch.object(Addressing, "record", record).start()


def partitions_as_librdkafka_does() -> None:
    """Chooses partitions by librdkafka's own hash and not by that of Java's producers."""
    patch.dict("outbox_relay.config.kafka.DEFAULTS", {"partitioner": "consistent"}).start()


MUTANTS: dict[str, Callable[[], None]] = {
    mutant.__name__: mutant
    for mutant in (
        never_reconciles,
        skips_locked_rows,
        marks_before_the_acknowledgement,
        marks_the_whole_batch,
        forgets_what_is_parked,
        forgets_what_waits,
        leaves_a_hole_in_what_it_reads,
        keeps_its_marks_from_one_stint_to_the_next,
        has_no_horizon,
        ignores_the_epoch,
        keeps_the_horizon_of_other_numbers,
        counts_late_messages,
        ignores_parked_messages,
        sends_everything_twice,
        drops_a_header,
        partitions_as_librdkafka_does,
    )
}

if __name__ == "__main__":
    [_, name] = sys.argv
    MUTANTS[name]()
    sys.argv[1:] = ["run"]
    main()
