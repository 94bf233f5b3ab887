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
from outbox_relay.relay.claim import Floors, claim
from outbox_relay.relay.message import Addressing, prepare
from outbox_relay.relay.publish import Publisher
from outbox_relay.relay.settle import Settlement
from outbox_relay.relay.watch import WatchOptions
from outbox_relay.sql import statement

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from outbox_relay.relay.claim import Batch
    from outbox_relay.relay.failures import Outcome
    from outbox_relay.relay.message import Message, Prepared, Record

SHARD_LOCK = b"FOR UPDATE OF outbox_shard SKIP LOCKED"
ROW_LOCK = b"FOR UPDATE OF outbox\n"
DROPPED_HEADER = "event_type"


def skips_locked_rows() -> None:
    """Claims rows instead of shards, as the textbooks have it."""

    def changed(name: str, *, schema: str | None) -> bytes:
        text = statement(name, schema=schema)
        if name == "claim":
            assert SHARD_LOCK in text
            assert ROW_LOCK in text
            text = text.replace(SHARD_LOCK, b"").replace(ROW_LOCK, b"FOR UPDATE OF outbox SKIP LOCKED\n")
        return text

    patch("outbox_relay.relay.claim.statement", changed).start()


def marks_before_the_acknowledgement() -> None:
    """Takes for published what it has handed to the producer."""
    really_publish = Publisher.publish

    def publish(self: Publisher, records: Sequence[Record], *, deadline: float) -> list[None]:
        really_publish(self, records, deadline=deadline)
        return [None] * len(records)

    patch.object(Publisher, "publish", publish).start()
    patch("outbox_relay.relay.publish._Sender._await_reports", lambda _sender, _producer, *, deadline: None).start()  # noqa: ARG005 -- the name is given


def marks_the_whole_batch() -> None:
    """Marks what failed, together with what did not."""

    def decide(messages: Sequence[Message], _outcomes: object, **_options: object) -> Settlement:
        return Settlement(published=list(messages))

    patch("outbox_relay.relay.loop.decide", decide).start()


def has_no_horizon() -> None:
    """Publishes what is committed, whatever lower numbers are still to appear; sweeps find those later."""

    def unordered(**options: Any) -> WatchOptions:  # noqa: ANN401 -- those of WatchOptions
        return WatchOptions(**{**options, "is_ordered": False})

    patch("outbox_relay.cli.run.WatchOptions", unordered).start()


def reads_by_offset() -> None:
    """Remembers the last number it has read, and never looks below."""
    has_no_horizon()

    def to_the_last_message(*arguments: Any, **named: Any) -> Batch:  # noqa: ANN401 -- those of claim
        return replace(claim(*arguments, **named), drained=[])

    patch("outbox_relay.relay.loop.claim", to_the_last_message).start()
    patch.object(Floors, "forget", lambda floors: list(floors._floors)).start()  # noqa: SLF001 -- that is what it breaks


def ignores_parked_messages() -> None:
    """Publishes what comes behind a parked message."""

    def heedless(messages: Sequence[Message], **options: Any) -> Prepared:  # noqa: ANN401 -- those of prepare
        return prepare([message._replace(is_behind_parked=False) for message in messages], **options)

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
        skips_locked_rows,
        marks_before_the_acknowledgement,
        marks_the_whole_batch,
        has_no_horizon,
        reads_by_offset,
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
